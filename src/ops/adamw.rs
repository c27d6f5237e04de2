//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a flat arena.
//!
//! Everything that an update depends on lies on the device: the norm of the gradients, the loss, the learning rate, and the
//! counters that the bias corrections follow from. So a step is launched without reading anything back, and a step that is
//! not finite is skipped where it happens.

use bytemuck::{Pod, Zeroable};

use crate::Result;
use crate::ops::{Cost, Memory};

/// What is the same for all updates of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of the first `decayed` parameters.
    pub weight_decay: f64,
    /// The greatest gradient norm; larger gradients are scaled down to it.
    pub clip_norm: Option<f64>,
    /// Parameters in the arena.
    pub length: usize,
    /// Parameters at its start that decay and have a working copy: the matrices. Biases, norms and tokens follow.
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

/// What the optimiser keeps on the device besides the moments: zeroed before the first update.
///
/// The kernels have the same layout (kernels/adamw.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct AdamWState {
    /// Updates so far, which the bias corrections follow from.
    pub updates: u64,
    /// Steps that were skipped because gradients or loss were not finite.
    pub skipped: u64,
    /// Steps skipped since the last update.
    pub skipped_in_a_row: u64,
    /// The norm of the last step's gradients, before clipping.
    pub gradient_norm: f64,
    /// The last step's loss; 0 where none was given.
    pub loss: f64,
}

/// `base` to the power of `exponent`, by squaring: the same bits on every device.
#[must_use]
pub(crate) fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut square, mut product) = (base, 1.0);
    while exponent > 0 {
        if exponent & 1 == 1 {
            product *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    product
}

/// The optimiser's ops.
pub trait AdamW: Memory {
    /// Writes to `norm` `[1]` the Euclidean norm of the first `length` gradients, summed in a fixed order; NaN or infinite when
    /// any of them is, and infinite where the norm is too large for its type.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    fn gradient_norm(
        &self,
        length: usize,
        norm: &mut Self::Buffer<Self::Master>,
        gradient: &Self::Buffer<Self::Master>,
    ) -> Result<()>;

    /// One update of `master` and the moments, and of the working copy of the matrices (nothing to do where it is an alias),
    /// with the gradients times `min(1, clip_norm / norm)`.
    ///
    /// As PyTorch's `AdamW`: decay first, then `master -= lr * m_hat / (sqrt(v_hat) + epsilon)`. `norm` `[1]` and `loss` `[1]`
    /// are those of the step, `learning_rate` `[1]` is what the update is made with. Where norm or loss are not finite, nothing
    /// is updated and `state` `[1]` counts a skipped step, else it counts an update; it takes down norm and loss either way.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    #[expect(clippy::too_many_arguments, reason = "five outputs and four inputs")]
    fn adamw_step(
        &self,
        settings: AdamWSettings,
        state: &mut Self::Buffer<AdamWState>,
        master: &mut Self::Buffer<Self::Master>,
        working: &mut Self::Buffer<Self::Element>,
        first_moment: &mut Self::Buffer<Self::Master>,
        second_moment: &mut Self::Buffer<Self::Master>,
        gradient: &Self::Buffer<Self::Master>,
        norm: &Self::Buffer<Self::Master>,
        loss: Option<&Self::Buffer<Self::Master>>,
        learning_rate: &Self::Buffer<f64>,
    ) -> Result<()>;

    /// Moves the first `length` numbers of `average` towards those of `master`: `average += (1 - decay) * (master - average)`,
    /// an exponential moving average of weights (Polyak and Juditsky, 1992).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    fn weights_average(
        &self,
        length: usize,
        decay: f64,
        average: &mut Self::Buffer<Self::Master>,
        master: &Self::Buffer<Self::Master>,
    ) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::power;

    #[test]
    fn power_is_a_product() {
        for base in [0.9, 0.95, 0.999, 0.0, 1.0] {
            let mut product = 1.0_f64;
            for exponent in 0..1000 {
                assert!((power(base, exponent) - product).abs() <= 1e-12 * product, "{base}^{exponent}");
                product *= base;
            }
        }
        assert_eq!(power(0.95, u64::MAX), 0.0);
    }
}
