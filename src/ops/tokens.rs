//! Sequences of tokens: the class token, positions, and the mask tokens that the decoder fills the gaps with.

use crate::Result;
use crate::ops::{Cost, Memory};

/// Sizes of a sequence. Token 0 is the class token; patch `i` is token `1 + i` of the whole sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokensShape {
    /// Sequences `B`.
    pub batch: usize,
    /// Patches `L` of an image.
    pub patches: usize,
    /// Patches `n` that the op selects of each image: the visible ones, or those to predict.
    pub selected: usize,
    /// Features `D`.
    pub width: usize,
}

impl TokensShape {
    /// One pass over the whole sequence and one over the selected tokens.
    #[must_use]
    pub fn unshuffle_cost(&self, element_bytes: usize) -> Cost {
        let numbers = (self.batch * (2 + self.patches + self.selected) * self.width) as u64;
        Cost { bytes: numbers * element_bytes as u64, flops: numbers }
    }

    /// One read and one write of the selected tokens.
    #[must_use]
    pub fn assemble_cost(&self, element_bytes: usize) -> Cost {
        let numbers = (self.batch * (1 + self.selected) * self.width) as u64;
        Cost { bytes: 2 * numbers * element_bytes as u64, flops: numbers }
    }
}

/// Assembling, unshuffling and selecting tokens.
///
/// The ids of a sample are distinct. An id that is no patch is an error on the CPU; a GPU, which cannot tell in time, writes a
/// row of NaN, or leaves the row out in [`Tokens::tokens_gather_backward`].
pub trait Tokens: Memory {
    /// The encoder's input `x` `[B, 1 + n, D]`: `x[b, 0] = class_token + positions[0]`,
    /// `x[b, 1 + j] = patches[b, j] + positions[1 + ids_keep[b, j]]`, with `patches` `[B, n, D]`, `positions` `[1 + L, D]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers; the same holds for every op here.
    fn tokens_assemble_forward(
        &self,
        shape: TokensShape,
        x: &mut Self::Buffer<Self::Element>,
        patches: &Self::Buffer<Self::Element>,
        class_token: &Self::Buffer<Self::Master>,
        positions: &Self::Buffer<Self::Master>,
        ids_keep: &Self::Buffer<u32>,
    ) -> Result<()>;

    /// `dpatches` (assigned) and `dclass_token` (accumulated) from `dx`. Positions are fixed.
    ///
    /// # Errors
    /// As [`Tokens::tokens_assemble_forward`].
    fn tokens_assemble_backward(
        &self,
        shape: TokensShape,
        dpatches: &mut Self::Buffer<Self::Element>,
        dclass_token: &mut Self::Buffer<Self::Master>,
        dx: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// The decoder's input `y` `[B, 1 + L, D]`: each patch's own token where it was visible, else the mask token, each plus its
    /// position. `x` `[B, 1 + n, D]`, `positions` `[1 + L, D]`; patch `i` was visible when `ids_restore[b, i] < n`.
    ///
    /// # Errors
    /// As [`Tokens::tokens_assemble_forward`].
    fn tokens_unshuffle_forward(
        &self,
        shape: TokensShape,
        y: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        mask_token: &Self::Buffer<Self::Master>,
        positions: &Self::Buffer<Self::Master>,
        ids_restore: &Self::Buffer<u32>,
    ) -> Result<()>;

    /// `dx` (assigned) and `dmask_token` (accumulated, in fixed order) from `dy`.
    ///
    /// # Errors
    /// As [`Tokens::tokens_assemble_forward`].
    fn tokens_unshuffle_backward(
        &self,
        shape: TokensShape,
        dx: &mut Self::Buffer<Self::Element>,
        dmask_token: &mut Self::Buffer<Self::Master>,
        dy: &Self::Buffer<Self::Element>,
        ids_restore: &Self::Buffer<u32>,
    ) -> Result<()>;

    /// `y[b, j] = x[b, 1 + ids[b, j]]`: the tokens of some patches, without the class token. `y` `[B, n, D]`,
    /// `x` `[B, 1 + L, D]`, `ids` `[B, n]`.
    ///
    /// # Errors
    /// As [`Tokens::tokens_assemble_forward`].
    fn tokens_gather_forward(
        &self,
        shape: TokensShape,
        y: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        ids: &Self::Buffer<u32>,
    ) -> Result<()>;

    /// `dx` `[B, 1 + L, D]` (assigned): `dy` at the selected tokens, zero elsewhere.
    ///
    /// # Errors
    /// As [`Tokens::tokens_assemble_forward`].
    fn tokens_gather_backward(
        &self,
        shape: TokensShape,
        dx: &mut Self::Buffer<Self::Element>,
        dy: &Self::Buffer<Self::Element>,
        ids: &Self::Buffer<u32>,
    ) -> Result<()>;
}
