//! Which patches the encoder sees.
//!
//! Noise in `[0, 1)` is drawn per patch and sorted, stably and ascending: the `keep` patches with the smallest noise are
//! visible. (He et al. 2021, section 3; `random_masking` in transformers' `modeling_vit_mae.py`.)

use crate::Result;
use crate::config::visible_patches;
use crate::ops::{Cost, Memory};

/// Sizes of a masking op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskingShape {
    /// Images `B`.
    pub batch: usize,
    /// Patches `L` of an image.
    pub patches: usize,
    /// Visible patches of an image.
    pub keep: usize,
}

impl MaskingShape {
    /// Sizes at a mask ratio, with the [`visible_patches`] of that ratio.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless `0 <= ratio < 1`.
    pub fn new(batch: usize, patches: usize, ratio: f64) -> Result<Self> {
        Ok(Self { batch, patches, keep: visible_patches(patches, ratio)? })
    }

    /// Hidden patches of an image.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.patches - self.keep
    }

    /// Noise in; `ids_keep`, `ids_hidden`, `ids_restore` and mask out.
    #[must_use]
    pub fn cost(&self) -> Cost {
        let patches = (self.batch * self.patches) as u64;
        Cost { bytes: patches * 16, flops: 0 }
    }
}

/// What the noise of [`PatchMasking::masking_random`] depends on: neither on the device nor on batch or worker counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomMask {
    /// The run's seed.
    pub seed: u64,
    /// The epoch, so that a sample gets another mask each time.
    pub epoch: u32,
}

/// Shuffles patches and says which of them are hidden.
///
/// Outputs, all of them always written:
/// - `ids_keep` `[B, keep]`: visible patches in the order of their noise;
/// - `ids_hidden` `[B, L - keep]`: the others, likewise;
/// - `ids_restore` `[B, L]`: the rank of each patch in the shuffle (its argsort);
/// - `mask` `[B, L]`: 0 = visible, 1 = hidden.
pub trait PatchMasking: Memory {
    /// From the caller's noise `[B, L]`; ties keep the order of the patches.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    fn masking_from_noise(
        &self,
        shape: MaskingShape,
        ids_keep: &mut Self::Buffer<u32>,
        ids_hidden: &mut Self::Buffer<u32>,
        ids_restore: &mut Self::Buffer<u32>,
        mask: &mut Self::Buffer<f32>,
        noise: &Self::Buffer<f32>,
    ) -> Result<()>;

    /// From Philox4x32-10, keyed by (seed, epoch, global sample index `samples` `[B]`).
    ///
    /// Key: the seed's low and high words. Counter: (patch / 4, epoch, the sample's low word, its high word with stream 1 in
    /// the top byte); patch `i` gets word `i % 4`, of which the 24 high bits are the noise.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    #[expect(clippy::too_many_arguments, reason = "four outputs and two inputs")]
    fn masking_random(
        &self,
        shape: MaskingShape,
        ids_keep: &mut Self::Buffer<u32>,
        ids_hidden: &mut Self::Buffer<u32>,
        ids_restore: &mut Self::Buffer<u32>,
        mask: &mut Self::Buffer<f32>,
        random: RandomMask,
        samples: &Self::Buffer<u64>,
    ) -> Result<()>;
}
