use criterion::Criterion;
use vitmae::cpu::{Cpu, CpuBuffer};
use vitmae::ops::philox::RandomStream;
use vitmae::ops::{Memory, Patchify, Pixels};

use crate::{BATCH, IMAGE, VISIBLE, ids, measure, random};

/// Random bytes for a batch of pictures.
pub fn bytes() -> CpuBuffer<u8> {
    let mut bytes = Cpu::<f32>::new().buffer(BATCH * IMAGE.length()).expect("there is enough memory");
    let mut words = RandomStream::new(2, 0, 0, 200);
    bytes.fill_with(|| words.next_u32() as u8);
    bytes
}

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    let mut rows = random(BATCH * VISIBLE * IMAGE.patch_length());
    let (ids, numbers, bytes) = (ids(VISIBLE), random(BATCH * IMAGE.length()), bytes());
    let (mean, deviation) = (random(3), random(3));
    let cost = IMAGE.patchify_cost(BATCH, VISIBLE, 4, 4);
    measure(criterion, "patchify", "visible_forward_f32", "vit_b", cost, || {
        cpu.patchify_visible_forward(IMAGE, BATCH, VISIBLE, &mut rows, Pixels::Normalized(&numbers), &ids)
    });
    let cost = IMAGE.patchify_cost(BATCH, VISIBLE, 1, 4);
    let pixels = Pixels::Bytes { values: &bytes, mean: &mean, deviation: &deviation };
    measure(criterion, "patchify", "visible_forward_u8", "vit_b", cost, || {
        cpu.patchify_visible_forward(IMAGE, BATCH, VISIBLE, &mut rows, pixels, &ids)
    });
}
