//! The types of activations and weight matrices on a GPU.

use half::bf16;

use super::gemm::{GemmElement, GemmType};
use crate::ops::Real;

/// The type of activations and weight matrices on a GPU: [`bf16`] to train, `f32` to compare.
pub trait CudaElement: Real + GemmElement {
    /// Whether the working copy of masters is the masters themselves.
    #[must_use]
    fn is_master() -> bool {
        Self::TYPE == GemmType::F32
    }
}

impl CudaElement for f32 {}
impl CudaElement for bf16 {}
