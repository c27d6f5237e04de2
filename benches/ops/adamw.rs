use criterion::Criterion;
use vitmae::ops::{AdamWSettings, AdamWState, Backend, Cost};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    // As many as ViT-B/16 with its decoder has.
    let length = place.parameters;
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.05,
        clip_norm: None,
        length,
        decayed: length,
    };
    place.measure(
        criterion,
        ["adamw", "step", "vit_b"],
        settings.cost(4),
        |place| {
            let working = place.elements(length)?;
            let moments = (place.masters(length)?, place.positive(length)?);
            let numbers =
                (place.constant(1, AdamWState::default())?, place.constant(1, 1.0f32)?, place.constant(1, 1.5e-4)?);
            Ok((place.masters(length)?, working, moments, place.masters(length)?, numbers))
        },
        |backend, (master, working, (first, second), gradient, (state, norm, rate))| {
            backend.adamw_step(settings, state, master, working, first, second, gradient, norm, None, rate)
        },
    );
    let cost = Cost { bytes: 4 * length as u64, flops: 2 * length as u64 };
    place.measure(
        criterion,
        ["adamw", "gradient_norm", "vit_b"],
        cost,
        |place| Ok((place.masters(1)?, place.masters(length)?)),
        |backend, (norm, gradient)| backend.gradient_norm(length, norm, gradient),
    );
    place.measure(
        criterion,
        ["adamw", "weights_average", "vit_b"],
        Cost { bytes: 12 * length as u64, flops: 3 * length as u64 },
        |place| Ok((place.masters(length)?, place.masters(length)?)),
        |backend, (average, master)| backend.weights_average(length, 0.9999, average, master),
    );
}
