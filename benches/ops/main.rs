//! Every op family: on the CPU at the sizes of ViT-B/16 with 8 images of 224 pixels, and on a GPU, where there is one, at those
//! of training ViT-B, L and H.
//!
//! `cargo bench --bench ops -- linear/` runs one family, `-- cuda/bf16` one device and element type. Throughput is given as the
//! ops' own cost: bytes that must be moved, and floating-point operations as elements. Times on a GPU come from CUDA events
//! around a row of calls, each on other memory than the call before, so that nothing is left in the cache.

mod adamw;
mod attention;
mod cross_entropy;
mod layernorm;
mod linear;
mod loss;
mod masking;
mod patchify;
mod place;
mod tokens;

use criterion::{Criterion, criterion_group, criterion_main};
#[cfg(feature = "cuda")]
use half::bf16;
use place::Place;
use vitmae::cpu::Cpu;
#[cfg(feature = "cuda")]
use vitmae::cuda::Cuda;
use vitmae::ops::Backend;

/// Every family on one device.
fn families<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    masking::benches(criterion, place);
    patchify::benches(criterion, place);
    linear::benches(criterion, place);
    tokens::benches(criterion, place);
    layernorm::benches(criterion, place);
    attention::benches(criterion, place);
    loss::benches(criterion, place);
    cross_entropy::benches(criterion, place);
    adamw::benches(criterion, place);
}

fn ops(criterion: &mut Criterion) {
    families(criterion, &Place::cpu(Cpu::<f32>::new()));
    #[cfg(feature = "cuda")]
    on_a_gpu(criterion);
}

#[cfg(feature = "cuda")]
fn on_a_gpu(criterion: &mut Criterion) {
    let gpu = match vitmae::cuda::Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("skipped on a GPU: {error}");
            return;
        }
    };
    families(criterion, &Place::<Cuda<bf16>>::cuda(&gpu, "bf16").expect("a stream"));
    families(criterion, &Place::<Cuda<f32>>::cuda(&gpu, "f32").expect("a stream"));
}

criterion_group!(benches, ops);
criterion_main!(benches);
