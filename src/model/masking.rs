//! What decides which patches are hidden.

use crate::config::MaeConfig;
use crate::model::images::Images;
use crate::ops::{ImageShape, MaskingShape, RandomMask};
use crate::{Error, Result};

/// Which patches of a batch are hidden.
#[derive(Clone, Copy, Debug)]
pub enum Masking<'a> {
    /// None, in the order of the image: what features want.
    None,
    /// The share `ratio` of the patches of each image, those with the greatest noise.
    Noise {
        /// In `[0, 1)`.
        ratio: f64,
        /// `[B, L]`, finite; ties keep the order of the patches.
        noise: &'a [f32],
    },
    /// The same with Philox noise, keyed by seed, epoch and global sample index.
    Random {
        /// In `[0, 1)`.
        ratio: f64,
        /// Seed and epoch.
        random: RandomMask,
        /// The global index of each image, `[B]`; or those from `first` on.
        samples: Option<&'a [u64]>,
        /// The first image's global index where `samples` does not say.
        first: u64,
    },
}

impl Masking<'static> {
    /// Random masks for a batch of images numbered from 0.
    #[must_use]
    pub fn random(ratio: f64, seed: u64) -> Self {
        Self::Random { ratio, random: RandomMask { seed, epoch: 0 }, samples: None, first: 0 }
    }
}

impl Masking<'_> {
    /// Sizes for a batch of images of `patches` patches, after checking ratio and noise.
    fn check(&self, batch: usize, patches: usize) -> Result<MaskingShape> {
        match *self {
            Self::None => Ok(MaskingShape { batch, patches, keep: patches }),
            Self::Noise { ratio, noise } => {
                if noise.len() != batch * patches {
                    return Err(Error::shape(
                        "noise",
                        "[images, patches]",
                        format!("[{batch}, {patches}]"),
                        noise.len(),
                    ));
                }
                if let Some(place) = noise.iter().position(|value| !value.is_finite()) {
                    let problem = format!("number {place} is {}; all must be finite", noise[place]);
                    return Err(Error::value("noise", problem));
                }
                MaskingShape::new(batch, patches, ratio)
            }
            Self::Random { ratio, samples, .. } => {
                if samples.is_some_and(|samples| samples.len() != batch) {
                    let found = samples.map_or(0, <[u64]>::len);
                    return Err(Error::shape("masking", "one sample index per image", batch, found));
                }
                MaskingShape::new(batch, patches, ratio)
            }
        }
    }

    /// The masks of images `range` of the batch.
    #[must_use]
    pub(crate) fn part(&self, range: std::ops::Range<usize>, patches: usize) -> Self {
        match *self {
            Self::None => Self::None,
            Self::Noise { ratio, noise } => {
                Self::Noise { ratio, noise: &noise[range.start * patches..range.end * patches] }
            }
            Self::Random { ratio, random, samples, first } => Self::Random {
                ratio,
                random,
                samples: samples.map(|samples| &samples[range.clone()]),
                first: first + range.start as u64,
            },
        }
    }
}

/// Images and which of their patches are hidden, checked.
#[derive(Clone, Copy, Debug)]
pub struct MaskedImages<'a> {
    pub(crate) images: Images<'a>,
    pub(crate) masking: Masking<'a>,
    pub(crate) image: ImageShape,
    pub(crate) mask: MaskingShape,
}

impl<'a> MaskedImages<'a> {
    /// Checks that images and masking fit each other and the model.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Shape`] and [`Error::Value`] for sizes that do not fit, an empty batch and numbers that
    /// are not finite.
    pub fn new(config: &MaeConfig, images: &Images<'a>, masking: &Masking<'a>) -> Result<Self> {
        let image = images.check(config)?;
        let mask = masking.check(images.batch, image.patches())?;
        Ok(Self { images: *images, masking: *masking, image, mask })
    }
}
