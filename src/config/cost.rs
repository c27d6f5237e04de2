//! What a configuration costs: parameters and floating-point operations.

use std::convert::Infallible;
use std::fmt::Arguments;

use crate::config::declare::{self, Builder, Init};
use crate::config::{MaeConfig, visible_patches};
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

/// Counts what is trained.
impl Builder for Count {
    type Matrix = ();
    type Vector = ();
    type Table = ();
    type Error = Infallible;

    fn matrix(&mut self, names: &[Arguments<'_>], shape: &[usize]) -> std::result::Result<(), Infallible> {
        (0..names.len()).for_each(|_| self.add(shape));
        Ok(())
    }

    fn vector(&mut self, names: &[Arguments<'_>], shape: &[usize], _: Init) -> std::result::Result<(), Infallible> {
        self.matrix(names, shape)
    }

    fn table(&mut self, _: &str, _: &[usize]) -> std::result::Result<(), Infallible> {
        Ok(())
    }

    /// Counts one part, as all are equal: there may be very many.
    fn repeat<T>(
        &mut self,
        times: usize,
        mut part: impl FnMut(&mut Self, usize) -> std::result::Result<T, Infallible>,
    ) -> std::result::Result<Vec<T>, Infallible> {
        let mut one = Self(Some(0));
        let Ok(_) = part(&mut one, 0);
        let parts = one.0.zip(u64::try_from(times).ok()).and_then(|(one, times)| one.checked_mul(times));
        self.0 = self.0.zip(parts).and_then(|(sum, parts)| sum.checked_add(parts));
        Ok(Vec::new())
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
        let Ok(_) = declare::autoencoder(&mut count, self);
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
        let keep = visible_patches(patches, mask_ratio)?;
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
