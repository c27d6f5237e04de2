use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{Tokens, TokensShape};

use crate::{BATCH, PATCHES, VISIBLE, ids, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    let shape = TokensShape { batch: BATCH, patches: PATCHES, selected: VISIBLE, width: 768 };
    let (keep, all) = (ids(VISIBLE), ids(PATCHES));
    let mut x = random(BATCH * (1 + VISIBLE) * 768);
    let (mut patches, mut token) = (random(BATCH * VISIBLE * 768), random(768));
    let positions = random((1 + PATCHES) * 768);
    measure(criterion, "tokens", "assemble_forward", "vit_b_encoder", shape.assemble_cost(4), || {
        cpu.tokens_assemble_forward(shape, &mut x, &patches, &token, &positions, &keep)
    });
    measure(criterion, "tokens", "assemble_backward", "vit_b_encoder", shape.assemble_cost(4), || {
        token.fill(0.0);
        cpu.tokens_assemble_backward(shape, &mut patches, &mut token, &x)
    });
    let shape = TokensShape { width: 512, ..shape };
    let (mut x, mut y) = (random(BATCH * (1 + VISIBLE) * 512), random(BATCH * (1 + PATCHES) * 512));
    measure(criterion, "tokens", "unshuffle_forward", "vit_b_decoder", shape.unshuffle_cost(4), || {
        cpu.tokens_unshuffle_forward(shape, &mut y, &x, &token, &positions, &all)
    });
    measure(criterion, "tokens", "unshuffle_backward", "vit_b_decoder", shape.unshuffle_cost(4), || {
        token.fill(0.0);
        cpu.tokens_unshuffle_backward(shape, &mut x, &mut token, &y, &all)
    });
    let hidden = PATCHES - VISIBLE;
    let shape = TokensShape { selected: hidden, ..shape };
    let (mut some, ids) = (random(BATCH * hidden * 512), ids(hidden));
    measure(criterion, "tokens", "gather_forward", "vit_b_decoder", shape.assemble_cost(4), || {
        cpu.tokens_gather_forward(shape, &mut some, &y, &ids)
    });
    measure(criterion, "tokens", "gather_backward", "vit_b_decoder", shape.unshuffle_cost(4), || {
        cpu.tokens_gather_backward(shape, &mut y, &some, &ids)
    });
}
