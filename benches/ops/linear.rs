use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{Activation, Linear, LinearShape, Write};

use crate::{BATCH, PATCHES, VISIBLE, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let (encoder, decoder) = (BATCH * (1 + VISIBLE), BATCH * (1 + PATCHES));
    for (name, rows, inputs, outputs) in [
        ("vit_b_encoder_qkv", encoder, 768, 2304),
        ("vit_b_encoder_projection", encoder, 768, 768),
        ("vit_b_encoder_mlp_in", encoder, 768, 3072),
        ("vit_b_encoder_mlp_out", encoder, 3072, 768),
        ("vit_b_decoder_qkv", decoder, 512, 1536),
        ("vit_b_decoder_projection", decoder, 512, 512),
        ("vit_b_decoder_mlp_in", decoder, 512, 2048),
        ("vit_b_decoder_mlp_out", decoder, 2048, 512),
    ] {
        products(criterion, name, LinearShape { rows, inputs, outputs });
    }
    activations(criterion, encoder * 3072);
}

/// The three products of a layer, and what goes with them in an MLP.
fn products(criterion: &mut Criterion, name: &str, shape: LinearShape) {
    let cpu = Cpu::<f32>::new();
    let LinearShape { rows, inputs, outputs } = shape;
    let cost = shape.cost(4);
    let (x, weight, bias) = (random(rows * inputs), random(outputs * inputs), random(outputs));
    let (mut y, mut pre) = (random(rows * outputs), random(rows * outputs));
    measure(criterion, "linear", "forward", name, cost, || cpu.linear_forward(shape, &mut y, &x, &weight, Some(&bias)));
    if name.ends_with("mlp_in") {
        measure(criterion, "linear", "activation_forward", name, cost, || {
            let activation = Activation::Gelu;
            cpu.linear_activation_forward(shape, activation, &mut y, &mut pre, &x, &weight, Some(&bias))
        });
    }
    let (mut dx, mut dweight, mut dbias) = (random(rows * inputs), random(outputs * inputs), random(outputs));
    measure(criterion, "linear", "backward_input", name, cost, || {
        cpu.linear_backward_input(shape, Write::Assign, &mut dx, &y, &weight)
    });
    if name.ends_with("mlp_out") {
        measure(criterion, "linear", "activation_backward_input", name, cost, || {
            cpu.linear_activation_backward_input(shape, Activation::Gelu, &mut dx, &y, &weight, &x)
        });
    }
    measure(criterion, "linear", "backward_weight", name, cost, || {
        dweight.fill(0.0);
        cpu.linear_backward_weight(shape, &mut dweight, Some(&mut dbias), &y, &x)
    });
}

fn activations(criterion: &mut Criterion, length: usize) {
    let cpu = Cpu::<f32>::new();
    let (mut y, x) = (random(length), random(length));
    let cost = vitmae::ops::Cost { bytes: 8 * length as u64, flops: length as u64 };
    for (name, activation) in
        [("gelu", Activation::Gelu), ("gelu_tanh", Activation::GeluTanh), ("silu", Activation::Silu)]
    {
        measure(criterion, "linear", &format!("{name}_forward"), "vit_b_encoder_mlp", cost, || {
            cpu.activation_forward(length, activation, &mut y, &x)
        });
    }
}
