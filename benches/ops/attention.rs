use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{Attention, AttentionShape};

use crate::{BATCH, PATCHES, VISIBLE, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    for (name, tokens, heads, head_dim) in [
        ("vit_b_encoder", 1 + VISIBLE, 12, 64),
        ("vit_b_decoder", 1 + PATCHES, 16, 32),
        ("vit_b_unmasked", 1 + PATCHES, 12, 64),
    ] {
        let shape = AttentionShape { batch: BATCH, tokens, heads, head_dim };
        let numbers = BATCH * tokens * shape.width();
        let (mut out, mut log_sum_exp) = (random(numbers), random(BATCH * heads * tokens));
        let (qkv, mut dqkv) = (random(3 * numbers), random(3 * numbers));
        measure(criterion, "attention", "forward", name, shape.forward_cost(4), || {
            cpu.attention_forward(shape, &mut out, &mut log_sum_exp, &qkv)
        });
        measure(criterion, "attention", "backward", name, shape.backward_cost(4), || {
            cpu.attention_backward(shape, &mut dqkv, &out, &qkv, &log_sum_exp)
        });
    }
}
