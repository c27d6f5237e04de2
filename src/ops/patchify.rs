//! Pictures to rows of patches.

use crate::ops::{Cost, Memory};
use crate::{Error, Result};

/// The size of an image and of its patches, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// Channels `C`.
    pub channels: usize,
    /// Rows of pixels `H`.
    pub height: usize,
    /// Columns of pixels `W`.
    pub width: usize,
    /// Rows of a patch `P`.
    pub patch_height: usize,
    /// Columns of a patch `Q`.
    pub patch_width: usize,
}

impl ImageShape {
    /// Checks that patches divide the image.
    ///
    /// # Errors
    /// [`Error::Config`] for zero sizes, an image smaller than a patch, or one that patches do not divide.
    pub fn check(&self) -> Result<()> {
        let Self { channels, height, width, patch_height, patch_width } = *self;
        if channels == 0 || patch_height == 0 || patch_width == 0 {
            return Err(Error::Config(format!(
                "channels and patch size must be at least 1, found {channels} channels and patches of \
                 {patch_height}x{patch_width}"
            )));
        }
        if height < patch_height || width < patch_width {
            return Err(Error::Config(format!(
                "an image of {height}x{width} pixels is smaller than a patch of {patch_height}x{patch_width}"
            )));
        }
        if height % patch_height != 0 || width % patch_width != 0 {
            return Err(Error::Config(format!(
                "patches of {patch_height}x{patch_width} do not divide an image of {height}x{width} pixels; \
                 choose a size that is a multiple, such as {}x{}",
                height.div_ceil(patch_height).saturating_mul(patch_height),
                width.div_ceil(patch_width).saturating_mul(patch_width)
            )));
        }
        Ok(())
    }

    /// Rows and columns of the grid of patches.
    #[must_use]
    pub fn grid(&self) -> (usize, usize) {
        (self.height / self.patch_height, self.width / self.patch_width)
    }

    /// Patches `L` of an image.
    #[must_use]
    pub fn patches(&self) -> usize {
        let (rows, columns) = self.grid();
        rows * columns
    }

    /// Numbers in a patch, `C * P * Q`.
    #[must_use]
    pub fn patch_length(&self) -> usize {
        self.channels * self.patch_height * self.patch_width
    }

    /// Numbers in an image, `C * H * W`.
    #[must_use]
    pub fn length(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// One read of the visible pixels and one write of the rows of `visible` patches per image.
    #[must_use]
    pub fn patchify_cost(&self, batch: usize, visible: usize, pixel_bytes: usize, element_bytes: usize) -> Cost {
        let numbers = (batch * visible * self.patch_length()) as u64;
        Cost { bytes: numbers * (pixel_bytes + element_bytes) as u64, flops: 2 * numbers }
    }
}

/// A batch of pictures on the device.
#[derive(Debug)]
pub enum Pixels<'a, M: Memory> {
    /// Normalised numbers `[B, C, H, W]`, used as they are.
    Normalized(&'a M::Buffer<f32>),
    /// Bytes `[B, H, W, C]`; the model sees `(value / 255 - mean[c]) / std[c]`.
    Bytes {
        /// The bytes.
        values: &'a M::Buffer<u8>,
        /// Mean `[C]` in units of the full range.
        mean: &'a M::Buffer<f32>,
        /// Standard deviation `[C]` in units of the full range.
        std: &'a M::Buffer<f32>,
    },
}

// Not derived: that would ask for buffers that can be copied.
impl<M: Memory> Clone for Pixels<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for Pixels<'_, M> {}

/// Cuts images into patches.
pub trait Patchify: Memory {
    /// `rows` `[B * n, C * P * Q]`, in the order (c, p, q) of the patch embedding's weight, of the patches `ids` `[B, n]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for short buffers.
    fn patchify_visible_forward(
        &self,
        image: ImageShape,
        batch: usize,
        visible: usize,
        rows: &mut Self::Buffer<Self::Element>,
        pixels: Pixels<'_, Self>,
        ids: &Self::Buffer<u32>,
    ) -> Result<()>;
}
