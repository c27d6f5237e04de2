use criterion::Criterion;
use vitmae::ops::{Backend, LossShape, Pixels};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.different() {
        let (image, batch) = (model.image(), place.batch);
        let predicted = model.patches() - model.visible();
        let shape = LossShape { image, batch, predicted, norm_pix_loss: true, scale: 1e-3 };
        let rows = batch * predicted;
        place.measure(
            criterion,
            ["loss", "forward_backward_u8", model.name],
            shape.cost(1, place.element_bytes()),
            |place| {
                let losses = (place.masters(1)?, place.masters(rows)?);
                let numbers =
                    (place.elements(rows * image.patch_length())?, place.elements(rows * image.patch_length())?);
                let pixels = (place.pictures(model)?, place.masters(3)?, place.positive(3)?);
                let ids = place.ids(model.patches(), predicted)?;
                Ok((losses, numbers, pixels, ids, place.constant(batch * model.patches(), 1.0)?))
            },
            |backend, ((loss, patch_loss), (gradient, prediction), (values, mean, std), ids, mask)| {
                let pixels = Pixels::Bytes { values, mean, std };
                backend.loss_forward_backward(shape, loss, patch_loss, gradient, prediction, pixels, ids, mask)
            },
        );
    }
}
