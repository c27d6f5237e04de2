use criterion::Criterion;
use vitmae::ops::{Backend, MaskingShape, RandomMask};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.different() {
        let (batch, patches) = (place.batch, model.patches());
        let shape = MaskingShape { batch, patches, keep: model.visible() };
        let make = |place: &Place<B>| {
            let ids =
                (place.ids(patches, shape.keep)?, place.ids(patches, shape.hidden())?, place.ids(patches, patches)?);
            let masks = (place.masters(batch * patches)?, place.masters(batch * patches)?);
            Ok((ids, masks, place.backend.buffer::<u64>(batch)?))
        };
        place.measure(
            criterion,
            ["masking", "from_noise", model.name],
            shape.cost(),
            make,
            |backend, ((keep, hidden, restore), (mask, noise), _)| {
                backend.masking_from_noise(shape, keep, hidden, restore, mask, noise)
            },
        );
        let random = RandomMask { seed: 1, epoch: 0 };
        place.measure(
            criterion,
            ["masking", "random", model.name],
            shape.cost(),
            make,
            |backend, ((keep, hidden, restore), (mask, _), samples)| {
                backend.masking_random(shape, keep, hidden, restore, mask, random, samples)
            },
        );
    }
}
