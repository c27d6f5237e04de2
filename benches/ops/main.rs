//! Every op family on the CPU, at the sizes of ViT-B/16 with 8 images of 224 pixels.
//!
//! `cargo bench --bench ops -- linear/` runs one family. Throughput is given as the ops' own cost: bytes that must be moved, and
//! floating-point operations as elements.

mod adamw;
mod attention;
mod cross_entropy;
mod layernorm;
mod linear;
mod loss;
mod masking;
mod patchify;
mod tokens;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vitmae::cpu::{Cpu, CpuBuffer};
use vitmae::ops::philox::RandomStream;
use vitmae::ops::{Cost, ImageShape, Memory};

/// Images of a batch.
const BATCH: usize = 8;
/// Patches of an image.
const PATCHES: usize = 196;
/// Visible patches of an image.
const VISIBLE: usize = 49;
/// The images.
const IMAGE: ImageShape = ImageShape { channels: 3, height: 224, width: 224, patch_height: 16, patch_width: 16 };

/// Measures `call` as `family/op/shape/cpu/f32`.
fn measure(
    criterion: &mut Criterion,
    family: &str,
    op: &str,
    shape: &str,
    cost: Cost,
    mut call: impl FnMut() -> vitmae::Result<()>,
) {
    let mut group = criterion.benchmark_group(family);
    group.throughput(Throughput::ElementsAndBytes { elements: cost.flops, bytes: cost.bytes });
    group.bench_function(format!("{op}/{shape}/cpu/f32"), |bencher| {
        bencher.iter(|| call().expect("the buffers have the shape's sizes"));
    });
}

/// Numbers in [-1, 1).
fn random(length: usize) -> CpuBuffer<f32> {
    let mut buffer = Cpu::<f32>::new().buffer(length).expect("there is enough memory");
    let mut stream = RandomStream::new(1, 0, length as u64, 200);
    buffer.fill_with(|| 2.0 * stream.next_f32() - 1.0);
    buffer
}

/// For each image, `selected` patches, spread over it.
fn ids(selected: usize) -> CpuBuffer<u32> {
    let mut ids = Cpu::<f32>::new().buffer(BATCH * selected).expect("there is enough memory");
    for (index, id) in ids.iter_mut().enumerate() {
        *id = (index % selected * 37 % PATCHES) as u32;
    }
    ids
}

criterion_group!(
    benches,
    masking::benches,
    patchify::benches,
    linear::benches,
    tokens::benches,
    layernorm::benches,
    attention::benches,
    loss::benches,
    cross_entropy::benches,
    adamw::benches
);
criterion_main!(benches);
