//! What a configuration costs: parameters and floating-point operations.

use crate::config::MaeConfig;
use crate::ops::MaskingShape;
use crate::{Error, Result};

/// Floating-point operations per image; a multiply-add counts as two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flops {
    /// Of a forward pass.
    pub forward: u64,
    /// Of a training step: forward and backward.
    pub step: u64,
}

/// A sum of products that remembers an overflow.
#[derive(Clone, Copy)]
struct Count(Option<u64>);

impl Count {
    fn add(&mut self, factors: &[usize]) {
        let product =
            factors.iter().try_fold(1_u64, |product, &factor| product.checked_mul(u64::try_from(factor).ok()?));
        self.0 = self.0.zip(product).and_then(|(sum, product)| sum.checked_add(product));
    }
}

/// The sizes of a stack of blocks.
struct Stack {
    width: usize,
    layers: usize,
    mlp_width: usize,
}

impl MaeConfig {
    fn stacks(&self) -> [Stack; 2] {
        [
            Stack { width: self.hidden_size, layers: self.num_hidden_layers, mlp_width: self.intermediate_size },
            Stack {
                width: self.decoder_hidden_size,
                layers: self.decoder_num_hidden_layers,
                mlp_width: self.decoder_intermediate_size,
            },
        ]
    }

    /// Trained parameters of encoder and decoder; the fixed position tables are not counted.
    ///
    /// `u64::MAX` for sizes that [`MaeConfig::validate`] refuses because they overflow.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        self.checked_parameter_count().unwrap_or(u64::MAX)
    }

    pub(super) fn checked_parameter_count(&self) -> Option<u64> {
        let mut count = Count(Some(0));
        for Stack { width, layers, mlp_width } in self.stacks() {
            // Query, key, value and projection; the two layers of the MLP.
            count.add(&[layers, 4, width, width]);
            count.add(&[layers, 2, width, mlp_width]);
            // Biases of projection and MLP; the block's two LayerNorms.
            count.add(&[layers, 2, width]);
            count.add(&[layers, mlp_width]);
            count.add(&[layers, 4, width]);
            if self.qkv_bias {
                count.add(&[layers, 3, width]);
            }
            // Class or mask token, final LayerNorm.
            count.add(&[3, width]);
        }
        let (encoder, decoder) = (self.hidden_size, self.decoder_hidden_size);
        let patch = [self.num_channels, self.patch_size.height, self.patch_size.width];
        count.add(&[patch[0], patch[1], patch[2], encoder]);
        count.add(&[encoder]);
        count.add(&[encoder, decoder]);
        count.add(&[decoder]);
        count.add(&[patch[0], patch[1], patch[2], decoder]);
        count.add(&patch);
        count.0
    }

    /// Operations of the *reference* implementation per image, whatever is skipped here: it embeds every patch, runs the
    /// encoder on the class token and the visible patches and the decoder on all tokens, and predicts for each of them.
    /// Counted are the products of linear layers and of attention; a backward pass is twice its forward pass, but for the
    /// patch embedding, which has no input gradient.
    ///
    /// # Errors
    /// [`Error::Value`] for a ratio that is not in `[0, 1)`; [`Error::Config`] when the number overflows.
    pub fn flops(&self, mask_ratio: f64) -> Result<Flops> {
        let patches = self.patches();
        let keep = MaskingShape::new(1, patches, mask_ratio)?.keep;
        let patch = [self.num_channels, self.patch_size.height, self.patch_size.width];
        let (visible, all) = (keep.saturating_add(1), patches.saturating_add(1));
        let (mut linears, mut patch_embedding) = (Count(Some(0)), Count(Some(0)));
        for (Stack { width, layers, mlp_width }, tokens) in self.stacks().into_iter().zip([visible, all]) {
            linears.add(&[2, 4, layers, tokens, width, width]);
            linears.add(&[2, 2, layers, tokens, width, mlp_width]);
            linears.add(&[4, layers, tokens, tokens, width]);
        }
        linears.add(&[2, visible, self.hidden_size, self.decoder_hidden_size]);
        linears.add(&[2, all, self.decoder_hidden_size, patch[0], patch[1], patch[2]]);
        patch_embedding.add(&[2, patches, self.hidden_size, patch[0], patch[1], patch[2]]);
        let flops = linears.0.zip(patch_embedding.0).and_then(|(linears, embedding)| {
            Some(Flops {
                forward: linears.checked_add(embedding)?,
                step: linears.checked_mul(3)?.checked_add(embedding.checked_mul(2)?)?,
            })
        });
        flops.ok_or_else(|| Error::Config("the model is so large that its operations do not fit into 64 bits".into()))
    }
}
