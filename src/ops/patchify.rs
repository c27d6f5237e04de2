//! Pictures to rows of patches.

use crate::Result;
use crate::ops::{Cost, ImageShape, Memory};

impl ImageShape {
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
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
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
