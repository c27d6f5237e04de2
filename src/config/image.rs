//! Images and their patches.

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
}

/// Visible patches of `patches`: `int(patches * (1 - ratio))`, computed in f64 and truncated as Python does (100 at 0.9 keep 9).
///
/// With few patches that can be none: the encoder then sees the class token alone, as in transformers.
///
/// # Errors
/// [`Error::Value`] unless `0 <= ratio < 1`.
pub fn visible_patches(patches: usize, ratio: f64) -> Result<usize> {
    if !(0.0..1.0).contains(&ratio) {
        return Err(Error::value("mask ratio", format!("{ratio} is not in [0, 1)")));
    }
    Ok((patches as f64 * (1.0 - ratio)) as usize)
}
