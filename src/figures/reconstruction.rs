//! What a model sees and what it makes of it: original, masked, reconstruction, reconstruction + visible.

use crate::config::MaeConfig;
use crate::figures::{Grid, PictureRef};
use crate::model::{Images, Reconstruction, predicted_images};
use crate::ops::ImageShape;
use crate::{Error, Result};

/// Draws a batch and its reconstruction, one row of four pictures per image.
///
/// `mean` and `std` `[C]` are those that the images were normalised with; `labels` `[B]` stand beside the rows.
///
/// # Errors
/// [`Error::Shape`] when the parts do not belong together.
pub fn reconstruction_grid(
    config: &MaeConfig,
    shape: ImageShape,
    images: &Images<'_>,
    result: &Reconstruction,
    (mean, std): (&[f32], &[f32]),
    labels: &[String],
) -> Result<Grid> {
    if labels.len() != images.batch || result.batch != images.batch {
        let found = format!("{} and {}", labels.len(), result.batch);
        return Err(Error::shape("reconstruction_grid", "labels and results", images.batch, found));
    }
    let truth = images.normalized();
    let predicted = predicted_images(shape, &result.logits, &truth, config.norm_pix_loss);
    let original = denormalize(shape, &truth, mean, std);
    let predicted = denormalize(shape, &predicted, mean, std);

    let mut grid = Grid::new(&["original", "masked", "reconstruction", "reconstruction + visible"]);
    let ImageShape { channels, height, width, patch_height, patch_width } = shape;
    let pictures = original.chunks_exact(shape.length()).zip(predicted.chunks_exact(shape.length()));
    for (((original, predicted), mask), label) in pictures.zip(result.mask.chunks_exact(shape.patches())).zip(labels) {
        let original = PictureRef::planes(original, height, width, channels);
        let predicted = PictureRef::planes(predicted, height, width, channels);
        let cells = [
            original,
            original.masked(mask, patch_height, patch_width),
            predicted,
            predicted.pasted_on(original, mask, patch_height, patch_width),
        ];
        grid.row(label, &cells)?;
    }
    let hidden = result.patches - result.keep;
    grid.footer(&format!("{hidden} of {} patches hidden. {}", result.patches, note(config)));
    Ok(grid)
}

/// How the colours of the predictions were found.
fn note(config: &MaeConfig) -> &'static str {
    if config.norm_pix_loss {
        "Predictions are of normalised patches, scaled back with the mean and standard deviation of the true patches: \
         brightness and contrast of hidden patches are given, not predicted."
    } else {
        "Predictions are raw pixels. Visible patches are not trained to be predicted: the last column pastes the true ones."
    }
}

/// `[B, C, H, W]` from the model's units to 0..1.
fn denormalize(shape: ImageShape, values: &[f32], mean: &[f32], std: &[f32]) -> Vec<f32> {
    let plane = shape.height * shape.width;
    let channel = |index: usize| index / plane % shape.channels;
    values.iter().enumerate().map(|(index, value)| value * std[channel(index)] + mean[channel(index)]).collect()
}
