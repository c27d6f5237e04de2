//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a flat arena.

use crate::Result;
use crate::ops::{Cost, Memory};

/// One update's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of the first `decayed` parameters.
    pub weight_decay: f64,
    /// How many updates there will have been after this one, from 1: for the bias correction.
    pub step: u64,
    /// What gradients are multiplied by first (clipping); 1 leaves them.
    pub gradient_scale: f64,
    /// Parameters in the arena.
    pub length: usize,
    /// Parameters at its start that decay: the matrices. Biases, norms and tokens follow.
    pub decayed: usize,
}

impl AdamWSettings {
    /// Reads gradient, master and both moments; writes master and moments (28 bytes a parameter in f32).
    #[must_use]
    pub fn cost(&self, master_bytes: usize) -> Cost {
        let numbers = self.length as u64;
        Cost { bytes: 7 * numbers * master_bytes as u64, flops: 15 * numbers }
    }
}

/// The optimiser's ops.
pub trait AdamW: Memory {
    /// The Euclidean norm of the first `length` gradients, summed in a fixed order; NaN or infinite when any of them is.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    fn gradient_norm(&self, length: usize, gradient: &Self::Buffer<Self::Master>) -> Result<f64>;

    /// One update of `master` and the moments, and of the working copy of the matrices (nothing to do where it is an alias).
    ///
    /// As PyTorch's `AdamW`: decay first, then `master -= lr * m_hat / (sqrt(v_hat) + epsilon)`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    fn adamw_step(
        &self,
        settings: AdamWSettings,
        master: &mut Self::Buffer<Self::Master>,
        working: &mut Self::Buffer<Self::Element>,
        first_moment: &mut Self::Buffer<Self::Master>,
        second_moment: &mut Self::Buffer<Self::Master>,
        gradient: &Self::Buffer<Self::Master>,
    ) -> Result<()>;
}
