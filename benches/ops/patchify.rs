use criterion::Criterion;
use vitmae::ops::{Backend, Pixels};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.different() {
        let (image, batch, visible) = (model.image(), place.batch, model.visible());
        let numbers = batch * visible * image.patch_length();
        let bytes = place.element_bytes();
        place.measure(
            criterion,
            ["patchify", "visible_forward_f32", model.name],
            image.patchify_cost(batch, visible, 4, bytes),
            |place| {
                let pixels = place.masters(batch * image.length())?;
                Ok((place.elements(numbers)?, pixels, place.ids(model.patches(), visible)?))
            },
            |backend, (rows, pixels, ids)| {
                backend.patchify_visible_forward(image, batch, visible, rows, Pixels::Normalized(pixels), ids)
            },
        );
        place.measure(
            criterion,
            ["patchify", "visible_forward_u8", model.name],
            image.patchify_cost(batch, visible, 1, bytes),
            |place| {
                let pixels = (place.pictures(model)?, place.masters(3)?, place.positive(3)?);
                Ok((place.elements(numbers)?, pixels, place.ids(model.patches(), visible)?))
            },
            |backend, (rows, (values, mean, std), ids)| {
                let pixels = Pixels::Bytes { values, mean, std };
                backend.patchify_visible_forward(image, batch, visible, rows, pixels, ids)
            },
        );
    }
}
