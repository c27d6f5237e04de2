//! LayerNorm over the features of each token (Ba et al., arXiv 1607.06450).

use crate::Result;
use crate::ops::{Cost, Memory, Write};

/// Sizes of a LayerNorm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNormShape {
    /// Tokens.
    pub rows: usize,
    /// Features `D`.
    pub width: usize,
    /// Added to the (biased) variance.
    pub epsilon: f64,
}

impl LayerNormShape {
    /// One read, one write.
    #[must_use]
    pub fn forward_cost(&self, element_bytes: usize) -> Cost {
        let numbers = (self.rows * self.width) as u64;
        Cost { bytes: 2 * numbers * element_bytes as u64, flops: 8 * numbers }
    }

    /// Reads x, dy and the residual's gradient, writes dx.
    #[must_use]
    pub fn backward_cost(&self, element_bytes: usize) -> Cost {
        let numbers = (self.rows * self.width) as u64;
        Cost { bytes: 4 * numbers * element_bytes as u64, flops: 14 * numbers }
    }
}

/// LayerNorm: x, y `[rows, D]`; gamma, beta `[D]`; mean and reciprocal standard deviation `[rows]`.
pub trait LayerNorm: Memory {
    /// `y = (x - mean) * rstd * gamma + beta`; mean and rstd are saved for backward.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    #[expect(clippy::too_many_arguments, reason = "three outputs and three inputs")]
    fn layernorm_forward(
        &self,
        shape: LayerNormShape,
        y: &mut Self::Buffer<Self::Element>,
        mean: &mut Self::Buffer<Self::Master>,
        rstd: &mut Self::Buffer<Self::Master>,
        x: &Self::Buffer<Self::Element>,
        gamma: &Self::Buffer<Self::Master>,
        beta: &Self::Buffer<Self::Master>,
    ) -> Result<()>;

    /// `dx` as `write` says (accumulating onto the gradient of the residual that passes the norm by), `dgamma` and `dbeta`
    /// accumulated.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    #[expect(clippy::too_many_arguments, reason = "three outputs and five inputs")]
    fn layernorm_backward(
        &self,
        shape: LayerNormShape,
        write: Write,
        dx: &mut Self::Buffer<Self::Element>,
        dgamma: &mut Self::Buffer<Self::Master>,
        dbeta: &mut Self::Buffer<Self::Master>,
        dy: &Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        mean: &Self::Buffer<Self::Master>,
        rstd: &Self::Buffer<Self::Master>,
        gamma: &Self::Buffer<Self::Master>,
    ) -> Result<()>;
}
