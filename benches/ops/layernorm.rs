use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{LayerNorm, LayerNormShape, Write};

use crate::{BATCH, PATCHES, VISIBLE, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    for (name, rows, width) in
        [("vit_b_encoder", BATCH * (1 + VISIBLE), 768), ("vit_b_decoder", BATCH * (1 + PATCHES), 512)]
    {
        let shape = LayerNormShape { rows, width, epsilon: 1e-6 };
        let (mut y, x) = (random(rows * width), random(rows * width));
        let (mut mean, mut rstd, gamma, beta) = (random(rows), random(rows), random(width), random(width));
        measure(criterion, "layernorm", "forward", name, shape.forward_cost(4), || {
            cpu.layernorm_forward(shape, &mut y, &mut mean, &mut rstd, &x, &gamma, &beta)
        });
        let (mut dx, mut dgamma, mut dbeta) = (random(rows * width), random(width), random(width));
        measure(criterion, "layernorm", "backward", name, shape.backward_cost(4), || {
            cpu.layernorm_backward(
                shape,
                Write::Accumulate,
                &mut dx,
                &mut dgamma,
                &mut dbeta,
                &y,
                &x,
                &mean,
                &rstd,
                &gamma,
            )
        });
    }
}
