//! The CPU backend: f32 for use, f64 for gradient checks.

mod float;
mod memory;

pub use float::Float;
pub use memory::CpuBuffer;

use std::marker::PhantomData;

/// The CPU as a device; its threads are those of the rayon pool that the caller runs in.
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
