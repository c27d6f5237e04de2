//! Softmax cross-entropy of a classifier: hard labels, label smoothing (Szegedy et al., arXiv 1512.00567, section 7).

use crate::Result;
use crate::ops::{Cost, Memory};

/// Sizes and settings of a cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropyShape {
    /// Samples.
    pub rows: usize,
    /// Classes `K`.
    pub classes: usize,
    /// The share of the target that is spread evenly over all classes, 0 to 1.
    pub smoothing: f64,
    /// What the sum over samples is multiplied by: 1 / (samples of the whole step, all micro-batches together).
    pub scale: f64,
}

impl CrossEntropyShape {
    /// Reads the logits, writes the gradient.
    #[must_use]
    pub fn cost(&self, element_bytes: usize) -> Cost {
        let numbers = (self.rows * self.classes) as u64;
        Cost { bytes: 2 * numbers * element_bytes as u64, flops: 10 * numbers }
    }
}

/// The loss of classification.
pub trait CrossEntropy: Memory {
    /// Adds to `loss` `[1]` and writes `row_loss` `[rows]` and `dlogits` `[rows, K]`, from `logits` `[rows, K]` and `labels`
    /// `[rows]`, each below `K`.
    ///
    /// With `p = softmax(logits)` and the target `t = (1 - smoothing) * one_hot(label) + smoothing / K`, `row_loss` is
    /// `-sum(t * ln(p))`, `dlogits` is `scale * (p - t)`, and `loss` grows by `scale` times the sum of the rows' losses, in a
    /// fixed order.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers; where the device can tell, for labels that are no class. Where
    /// it cannot, such a row, and so the loss, is NaN.
    fn cross_entropy_forward_backward(
        &self,
        shape: CrossEntropyShape,
        loss: &mut Self::Buffer<Self::Master>,
        row_loss: &mut Self::Buffer<Self::Master>,
        dlogits: &mut Self::Buffer<Self::Element>,
        logits: &Self::Buffer<Self::Element>,
        labels: &Self::Buffer<u32>,
    ) -> Result<()>;
}
