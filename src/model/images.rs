//! Pictures as callers hand them over.

use crate::config::MaeConfig;
use crate::ops::ImageShape;
use crate::{Error, Result};

/// A batch of equally large pictures in main memory.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// Pictures `B`.
    pub batch: usize,
    /// Channels `C`.
    pub channels: usize,
    /// Rows of pixels `H`.
    pub height: usize,
    /// Columns of pixels `W`.
    pub width: usize,
    /// The numbers.
    pub values: ImageValues<'a>,
}

/// The numbers of [`Images`].
#[derive(Clone, Copy, Debug)]
pub enum ImageValues<'a> {
    /// Normalised `pixel_values` `[B, C, H, W]`; all finite.
    Normalized(&'a [f32]),
    /// Bytes `[B, H, W, C]`; the model sees `(value / 255 - mean[c]) / std[c]`.
    Bytes {
        /// The bytes.
        values: &'a [u8],
        /// Mean `[C]`, in units of the full range.
        mean: &'a [f32],
        /// Standard deviation `[C]`, in units of the full range; not zero.
        std: &'a [f32],
    },
}

impl Images<'_> {
    /// The shape of one image under the model's patch size, after checking everything that a caller can get wrong.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Shape`] for sizes that do not fit the model or the values; [`Error::Value`] for an empty
    /// batch, pixels that are not finite or a standard deviation that is not positive.
    pub(crate) fn check(&self, config: &MaeConfig) -> Result<ImageShape> {
        let model = config.image();
        let image = ImageShape { channels: self.channels, height: self.height, width: self.width, ..model };
        if self.batch == 0 {
            return Err(Error::value("batch", "there is no image in it"));
        }
        if self.channels != model.channels {
            return Err(Error::shape("images", "channels", model.channels, self.channels));
        }
        image.check()?;
        let expected = self.batch.saturating_mul(image.length());
        let found = match self.values {
            ImageValues::Normalized(values) => {
                if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                    let problem = format!("number {place} is {}; all must be finite", values[place]);
                    return Err(Error::value("pixel_values", problem));
                }
                values.len()
            }
            ImageValues::Bytes { values, mean, std } => {
                if mean.len() != self.channels || std.len() != self.channels {
                    let found = format!("{} and {}", mean.len(), std.len());
                    return Err(Error::shape(
                        "images",
                        "mean and standard deviation per channel",
                        self.channels,
                        found,
                    ));
                }
                if !std.iter().all(|&value| value > 0.0 && value.is_finite())
                    || !mean.iter().all(|value| value.is_finite())
                {
                    let problem = format!("must be finite, deviations positive; found {mean:?} and {std:?}");
                    return Err(Error::value("mean and standard deviation", problem));
                }
                values.len()
            }
        };
        if found != expected {
            return Err(Error::shape("images", "number of values", expected, found));
        }
        Ok(image)
    }

    /// Pictures `range` of the batch.
    #[must_use]
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let length = self.channels * self.height * self.width;
        let numbers = range.start * length..range.end * length;
        let values = match self.values {
            ImageValues::Normalized(values) => ImageValues::Normalized(&values[numbers]),
            ImageValues::Bytes { values, mean, std } => ImageValues::Bytes { values: &values[numbers], mean, std },
        };
        Self { batch: range.len(), values, ..*self }
    }
}
