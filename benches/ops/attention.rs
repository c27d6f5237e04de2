use criterion::Criterion;
use vitmae::ops::{AttentionShape, Backend, Cost};

use crate::place::{Model, Place};

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    let mut shapes = Vec::new();
    for model in place.models {
        let (name, decoder) = (model.name, Model::DECODER_WIDTH / Model::DECODER_HEADS);
        let head_dim = model.width / model.heads;
        shapes.push((format!("{name}_encoder"), 1 + model.visible(), model.heads, head_dim));
        if !model.repeats {
            shapes.push((format!("{name}_decoder"), 1 + model.patches(), Model::DECODER_HEADS, decoder));
        }
        shapes.push((format!("{name}_unmasked"), 1 + model.patches(), model.heads, head_dim));
    }
    for (name, tokens, heads, head_dim) in shapes {
        let shape = AttentionShape { batch: place.batch, tokens, heads, head_dim };
        let numbers = place.batch * tokens * shape.width();
        let statistics = place.batch * heads * tokens;
        let bytes = place.element_bytes();
        place.measure(
            criterion,
            ["attention", "forward", &name],
            shape.forward_cost(bytes),
            |place| Ok((place.elements(numbers)?, place.masters(statistics)?, place.elements(3 * numbers)?)),
            |backend, (out, log_sum_exp, qkv)| backend.attention_forward(shape, out, log_sum_exp, qkv),
        );
        place.measure(
            criterion,
            ["attention", "backward", &name],
            shape.backward_cost(bytes),
            |place| {
                let qkv = place.elements(3 * numbers)?;
                let (mut out, mut log_sum_exp) = (place.elements(numbers)?, place.masters(statistics)?);
                place.backend.attention_forward(shape, &mut out, &mut log_sum_exp, &qkv)?;
                Ok((place.elements(3 * numbers)?, place.elements(numbers)?, qkv, log_sum_exp))
            },
            |backend, (dqkv, dout, qkv, log_sum_exp)| backend.attention_backward(shape, dqkv, dout, qkv, log_sum_exp),
        );
        // Queries and keys in, a map per head out, and one of forward's two products.
        let map = place.batch * heads * tokens * tokens;
        let cost =
            Cost { bytes: ((2 * numbers + map) * bytes + 4 * statistics) as u64, flops: (2 * map * head_dim) as u64 };
        place.measure(
            criterion,
            ["attention", "probabilities", &name],
            cost,
            |place| Ok((place.elements(map)?, place.elements(3 * numbers)?, place.masters(statistics)?)),
            |backend, (map, qkv, log_sum_exp)| backend.attention_probabilities(shape, map, qkv, log_sum_exp),
        );
    }
}
