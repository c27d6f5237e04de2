//! From predictions back to pictures.

use crate::model::images::{ImageValues, Images};
use crate::ops::ImageShape;

impl Images<'_> {
    /// The numbers as the model sees them, `[B, C, H, W]`.
    #[must_use]
    pub fn normalized(&self) -> Vec<f32> {
        match self.values {
            ImageValues::Normalized(values) => values.to_vec(),
            ImageValues::Bytes { values, mean, std } => {
                let (channels, plane) = (self.channels, self.height * self.width);
                let mut output = vec![0.0; values.len()];
                for (image, bytes) in
                    output.chunks_exact_mut(channels * plane).zip(values.chunks_exact(channels * plane))
                {
                    for (place, &byte) in bytes.iter().enumerate() {
                        let (pixel, channel) = (place / channels, place % channels);
                        image[channel * plane + pixel] = (f32::from(byte) / 255.0 - mean[channel]) / std[channel];
                    }
                }
                output
            }
        }
    }
}

/// Predicted patches `[B, L, P * Q * C]` as images `[B, C, H, W]` in the model's normalised units.
///
/// Where the model predicts normalised patches (`norm_pix_loss`), each is scaled back with the mean and standard deviation of the true
/// patch in `truth` `[B, C, H, W]`: that shows what the model knows of the structure but leaks each patch's brightness and
/// contrast, so say so beside the picture.
#[must_use]
pub fn predicted_images(shape: ImageShape, logits: &[f32], truth: &[f32], norm_pix_loss: bool) -> Vec<f32> {
    let mut output = vec![0.0; truth.len()];
    let length = shape.patch_length();
    let patches = shape.patches();
    for (index, patch) in logits.chunks_exact(length).enumerate() {
        let image = index / patches * shape.length();
        let place = |number: usize| image + pixel_place(shape, index % patches, number);
        let (mean, std) = if norm_pix_loss {
            let values = || (0..length).map(|number| f64::from(truth[place(number)]));
            let mean = values().sum::<f64>() / length as f64;
            let squares: f64 = values().map(|value| (value - mean).powi(2)).sum();
            (mean, (squares / (length.max(2) - 1) as f64 + 1e-6).sqrt())
        } else {
            (0.0, 1.0)
        };
        for (number, &value) in patch.iter().enumerate() {
            output[place(number)] = (f64::from(value) * std + mean) as f32;
        }
    }
    output
}

/// Where number `number` (in the order p, q, c) of patch `patch` lies in an image `[C, H, W]`.
fn pixel_place(shape: ImageShape, patch: usize, number: usize) -> usize {
    let ImageShape { channels, height, width, patch_height, patch_width } = shape;
    let columns = width / patch_width;
    let (channel, pixel) = (number % channels, number / channels);
    let row = patch / columns * patch_height + pixel / patch_width;
    let column = patch % columns * patch_width + pixel % patch_width;
    (channel * height + row) * width + column
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_lands_in_its_place_with_channels_fastest() {
        let shape = ImageShape { channels: 2, height: 2, width: 4, patch_height: 2, patch_width: 2 };
        let logits: Vec<f32> = (0..16).map(|value| value as f32).collect();
        let images = predicted_images(shape, &logits, &[0.0; 16], false);
        // Channel 0, first row: patch 0 pixels 0 and 1, patch 1 pixels 0 and 1.
        assert_eq!(images[..4], [0.0, 2.0, 8.0, 10.0]);
        assert_eq!(images[4..8], [4.0, 6.0, 12.0, 14.0]);
        assert_eq!(images[8..12], [1.0, 3.0, 9.0, 11.0]);
    }

    #[test]
    fn normalised_predictions_get_the_true_patch_statistics() {
        let shape = ImageShape { channels: 1, height: 2, width: 2, patch_height: 2, patch_width: 2 };
        let truth = [1.0, 3.0, 5.0, 7.0];
        let std = (20.0f64 / 3.0 + 1e-6).sqrt();
        let images = predicted_images(shape, &[1.0, 0.0, 0.0, -1.0], &truth, true);
        assert!((f64::from(images[0]) - 4.0 - std).abs() < 1e-5);
        assert_eq!(images[1], 4.0);
    }
}
