use criterion::Criterion;
use vitmae::ops::{Activation, Backend, Cost, LinearShape, Write};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.models {
        for (part, tokens, width) in model.parts() {
            let rows = place.batch * tokens;
            for (layer, inputs, outputs) in [
                ("qkv", width, 3 * width),
                ("projection", width, width),
                ("mlp_in", width, 4 * width),
                ("mlp_out", 4 * width, width),
            ] {
                let name = format!("{part}_{layer}");
                products(criterion, place, &name, LinearShape { rows, inputs, outputs });
            }
            activations(criterion, place, &format!("{part}_mlp"), rows * 4 * width);
        }
    }
}

/// The three products of a layer, and what goes with them in an MLP.
fn products<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>, name: &str, shape: LinearShape) {
    let LinearShape { rows, inputs, outputs } = shape;
    let cost = shape.cost(place.element_bytes());
    let forward = |place: &Place<B>| {
        let numbers = (place.elements(rows * inputs)?, place.elements(rows * outputs)?);
        Ok((numbers, place.elements(outputs * inputs)?, place.masters(outputs)?))
    };
    place.measure(criterion, ["linear", "forward", name], cost, forward, |backend, ((x, y), weight, bias)| {
        backend.linear_forward(shape, y, x, weight, Some(bias))
    });
    if name.ends_with("mlp_in") {
        place.measure(
            criterion,
            ["linear", "activation_forward", name],
            cost,
            |place| Ok((forward(place)?, place.elements(rows * outputs)?)),
            |backend, (((x, y), weight, bias), pre)| {
                backend.linear_activation_forward(shape, Activation::Gelu, y, pre, x, weight, Some(bias))
            },
        );
    }
    let projects = name.ends_with("mlp_out") || name.ends_with("projection");
    if projects {
        place.measure(
            criterion,
            ["linear", "residual_forward", name],
            cost,
            |place| Ok((forward(place)?, place.elements(rows * outputs)?)),
            |backend, (((x, y), weight, bias), residual)| {
                backend.linear_residual_forward(shape, y, residual, x, weight, Some(bias))
            },
        );
    }
    place.measure(criterion, ["linear", "backward_input", name], cost, forward, |backend, ((dx, dy), weight, _)| {
        backend.linear_backward_input(shape, Write::Assign, dx, dy, weight)
    });
    if name.ends_with("mlp_out") {
        place.measure(
            criterion,
            ["linear", "activation_backward_input", name],
            cost,
            |place| Ok((forward(place)?, place.elements(rows * inputs)?)),
            |backend, (((dpre, dy), weight, _), pre)| {
                backend.linear_activation_backward_input(shape, Activation::Gelu, dpre, dy, weight, pre)
            },
        );
        // Besides the product, `pre` in, the activation out again, and the sums of a bias.
        let more = Cost {
            bytes: (2 * rows * inputs * place.element_bytes() + 4 * inputs) as u64,
            flops: (rows * inputs) as u64,
        };
        place.measure(
            criterion,
            ["linear", "activation_backward", name],
            cost.plus(more),
            |place| {
                let pre = (place.elements(rows * inputs)?, place.elements(rows * inputs)?);
                Ok((forward(place)?, pre, place.masters(inputs)?))
            },
            |backend, (((dpre, dy), weight, _), (pre, y), dbias)| {
                backend.linear_activation_backward(shape, Activation::Gelu, dpre, y, Some(dbias), dy, weight, pre)
            },
        );
    }
    place.measure(
        criterion,
        ["linear", "backward_weight", name],
        cost,
        |place| {
            let numbers = (place.elements(rows * inputs)?, place.elements(rows * outputs)?);
            Ok((numbers, place.masters(outputs * inputs)?, place.masters(outputs)?))
        },
        |backend, ((x, dy), dweight, dbias)| backend.linear_backward_weight(shape, dweight, Some(dbias), dy, x),
    );
}

fn activations<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>, name: &str, length: usize) {
    let cost = Cost { bytes: (2 * place.element_bytes() * length) as u64, flops: length as u64 };
    for (op, activation) in [
        ("gelu_forward", Activation::Gelu),
        ("gelu_tanh_forward", Activation::GeluTanh),
        ("silu_forward", Activation::Silu),
    ] {
        place.measure(
            criterion,
            ["linear", op, name],
            cost,
            |place| Ok((place.elements(length)?, place.elements(length)?)),
            |backend, (y, x)| backend.activation_forward(length, activation, y, x),
        );
    }
}
