use criterion::Criterion;
use vitmae::ops::{Backend, LayerNormShape, Write};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.models {
        for (name, tokens, width) in model.parts() {
            let rows = place.batch * tokens;
            let shape = LayerNormShape { rows, width, epsilon: 1e-6 };
            let bytes = place.element_bytes();
            place.measure(
                criterion,
                ["layernorm", "forward", &name],
                shape.forward_cost(bytes),
                |place| {
                    let numbers = (place.elements(rows * width)?, place.elements(rows * width)?);
                    let statistics = (place.masters(rows)?, place.masters(rows)?);
                    Ok((numbers, statistics, place.masters(width)?, place.masters(width)?))
                },
                |backend, ((y, x), (mean, rstd), gamma, beta)| {
                    backend.layernorm_forward(shape, y, mean, rstd, x, gamma, beta)
                },
            );
            place.measure(
                criterion,
                ["layernorm", "backward", &name],
                shape.backward_cost(bytes),
                |place| {
                    let numbers =
                        (place.elements(rows * width)?, place.elements(rows * width)?, place.elements(rows * width)?);
                    let statistics = (place.masters(rows)?, place.positive(rows)?);
                    let gradients = (place.masters(width)?, place.masters(width)?);
                    Ok((numbers, statistics, gradients, place.masters(width)?))
                },
                |backend, ((dx, dy, x), (mean, rstd), (dgamma, dbeta), gamma)| {
                    backend.layernorm_backward(shape, Write::Accumulate, dx, dgamma, dbeta, dy, x, mean, rstd, gamma)
                },
            );
        }
    }
}
