//! Multi-head self-attention (Vaswani et al., arXiv 1706.03762), without masks.

use crate::Result;
use crate::ops::{Cost, Memory};

/// Sizes of an attention op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences `B`.
    pub batch: usize,
    /// Tokens `N` of a sequence.
    pub tokens: usize,
    /// Heads `H`.
    pub heads: usize,
    /// Features `D` of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// `H * D`.
    #[must_use]
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// What the scores are multiplied by, `1 / sqrt(D)`.
    #[must_use]
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Reads qkv, writes the output; two products.
    #[must_use]
    pub fn forward_cost(&self, element_bytes: usize) -> Cost {
        Cost { bytes: self.numbers() * 4 * element_bytes as u64, flops: 4 * self.numbers() * self.tokens as u64 }
    }

    /// Reads qkv and the output's gradient, writes that of qkv; five products.
    #[must_use]
    pub fn backward_cost(&self, element_bytes: usize) -> Cost {
        Cost { bytes: self.numbers() * 7 * element_bytes as u64, flops: 10 * self.numbers() * self.tokens as u64 }
    }

    fn numbers(&self) -> u64 {
        (self.batch * self.tokens * self.width()) as u64
    }
}

/// Attention over the packed output of the QKV product: qkv `[B, N, 3, H, D]`, out `[B, N, H * D]`.
///
/// The `N x N` scores exist for a tile of one head at a time only.
pub trait Attention: Memory {
    /// `out = softmax(q kᵀ / sqrt(D)) v` per head; saves the natural log-sum-exp of the scaled scores, `[B, H, N]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers; the same holds for every op here.
    fn attention_forward(
        &self,
        shape: AttentionShape,
        out: &mut Self::Buffer<Self::Element>,
        log_sum_exp: &mut Self::Buffer<Self::Master>,
        qkv: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// `dqkv` (assigned) from `dout`; the probabilities are rebuilt from qkv and the log-sum-exp.
    ///
    /// # Errors
    /// As [`Attention::attention_forward`].
    fn attention_backward(
        &self,
        shape: AttentionShape,
        dqkv: &mut Self::Buffer<Self::Element>,
        dout: &Self::Buffer<Self::Element>,
        qkv: &Self::Buffer<Self::Element>,
        log_sum_exp: &Self::Buffer<Self::Master>,
    ) -> Result<()>;

    /// The probabilities themselves, `[B, H, N, N]`, for looking at.
    ///
    /// # Errors
    /// As [`Attention::attention_forward`].
    fn attention_probabilities(
        &self,
        shape: AttentionShape,
        probabilities: &mut Self::Buffer<Self::Element>,
        qkv: &Self::Buffer<Self::Element>,
        log_sum_exp: &Self::Buffer<Self::Master>,
    ) -> Result<()>;
}
