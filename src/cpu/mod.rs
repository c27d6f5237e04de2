//! The CPU backend: f32 for use, f64 for gradient checks.

mod activation;
mod adamw;
mod attention;
mod check;
mod cross_entropy;
mod float;
mod gemm;
mod kernel;
mod layernorm;
mod linear;
mod loss;
mod masking;
mod math;
mod memory;
mod parallel;
mod patchify;
mod scratch;
mod simd;
mod tokens;

pub use crate::isa::Isa;
pub use float::Float;
pub use memory::CpuBuffer;
#[cfg(test)]
pub(crate) use memory::allocated_bytes;

use std::marker::PhantomData;

/// The CPU as a device; its threads are those of the rayon pool that the caller runs in.
///
/// Results do not depend on how many threads there are. Inside a pool (`ThreadPool::install`) a call that has been made once
/// allocates no memory; from outside one, rayon queues the work in the global pool and allocates a little for the queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu<F = f32> {
    float: PhantomData<F>,
}

impl<F: Float> Cpu<F> {
    /// The CPU.
    #[must_use]
    pub fn new() -> Self {
        Self { float: PhantomData }
    }
}
