//! The reconstruction loss: mean squared error over the pixels of hidden patches.

use crate::Result;
use crate::ops::{Cost, ImageShape, Memory, Pixels};

/// Sizes and settings of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossShape {
    /// The images and their patches.
    pub image: ImageShape,
    /// Images `B`.
    pub batch: usize,
    /// Predicted patches `n` of an image.
    pub predicted: usize,
    /// Whether the target is each patch normalised by its own mean and (unbiased) variance + 1e-6.
    pub norm_pix_loss: bool,
    /// What the sum over hidden patches of their mean squared errors is multiplied by: 1 / (hidden patches of the whole
    /// batch, all micro-batches of a step together), or 0 where nothing is hidden.
    pub scale: f64,
}

impl LossShape {
    /// Reads prediction and pixels, writes the gradient.
    #[must_use]
    pub fn cost(&self, pixel_bytes: usize, element_bytes: usize) -> Cost {
        let numbers = (self.batch * self.predicted * self.image.patch_length()) as u64;
        Cost { bytes: numbers * (2 * element_bytes + pixel_bytes) as u64, flops: 9 * numbers }
    }
}

/// The masked loss.
pub trait Loss: Memory {
    /// Adds to `loss` `[1]` and writes `dprediction` `[B * n, P * Q * C]` (zero for visible patches), from
    /// `prediction` `[B * n, P * Q * C]` (order p, q, c) of the patches `ids` `[B, n]` and `mask` `[B, L]` (1 = hidden).
    /// `patch_loss` `[B * n]` receives each patch's mean squared error (0 where visible).
    ///
    /// The target is rebuilt from `pixels`; sums run in a fixed order.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers.
    #[expect(clippy::too_many_arguments, reason = "three outputs and four inputs")]
    fn loss_forward_backward(
        &self,
        shape: LossShape,
        loss: &mut Self::Buffer<Self::Master>,
        patch_loss: &mut Self::Buffer<Self::Master>,
        dprediction: &mut Self::Buffer<Self::Element>,
        prediction: &Self::Buffer<Self::Element>,
        pixels: Pixels<'_, Self>,
        ids: &Self::Buffer<u32>,
        mask: &Self::Buffer<f32>,
    ) -> Result<()>;
}
