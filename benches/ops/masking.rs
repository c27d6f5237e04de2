use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{Masking, MaskingShape, Memory, RandomMask};

use crate::{BATCH, PATCHES, VISIBLE, ids, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    let shape = MaskingShape { batch: BATCH, patches: PATCHES, keep: VISIBLE };
    let (mut keep, mut hidden, mut restore) = (ids(VISIBLE), ids(PATCHES - VISIBLE), ids(PATCHES));
    let (mut mask, noise) = (random(BATCH * PATCHES), random(BATCH * PATCHES));
    let samples = cpu.buffer(BATCH).expect("there is enough memory");
    measure(criterion, "masking", "from_noise", "vit_b", shape.cost(), || {
        cpu.masking_from_noise(shape, &mut keep, &mut hidden, &mut restore, &mut mask, &noise)
    });
    let random = RandomMask { seed: 1, epoch: 0 };
    measure(criterion, "masking", "random", "vit_b", shape.cost(), || {
        cpu.masking_random(shape, &mut keep, &mut hidden, &mut restore, &mut mask, random, &samples)
    });
}
