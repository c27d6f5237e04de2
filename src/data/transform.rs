//! Crops, flips and resizing: pictures of any size to bytes of one size.

use crate::data::ImageProcessor;
use crate::data::image::{CropBox, Image, Part, Region, Resample};
use crate::data::resample::{Pixels, Resampler, divide_alpha, multiply_alpha};
use crate::random::{AUGMENTATION_STREAM, RandomStream, below, unit};
use crate::{Error, Result};

/// Crops to whole pixels and resizes, keeping its buffers from one picture to the next.
///
/// The result is Pillow's `crop(..).resize(..)`, byte for byte.
#[derive(Clone, Debug, Default)]
pub struct Resizer {
    resampler: Resampler,
    /// What the box shows, premultiplied with alpha.
    premultiplied: Vec<u8>,
}

impl Resizer {
    /// Without buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Resizes what `crop` shows of `image` to `out` `[height, width, channels]`.
    ///
    /// With 4 channels the colour is weighted with alpha, as Pillow does for RGBA.
    ///
    /// # Errors
    /// [`Error::Shape`] for a box outside the picture, an empty box, or an output of another length.
    pub fn resize(
        &mut self,
        out: &mut [u8],
        size: (usize, usize),
        image: &Image,
        crop: CropBox,
        resample: Resample,
    ) -> Result<()> {
        self.resize_mirrored(out, size, image, crop, resample, false)
    }

    /// As [`Resizer::resize`], mirrored if asked for.
    pub(crate) fn resize_mirrored(
        &mut self,
        out: &mut [u8],
        (height, width): (usize, usize),
        image: &Image,
        crop: CropBox,
        resample: Resample,
        mirrored: bool,
    ) -> Result<()> {
        let shape = |what: &str, expected: String, found: String| Error::shape("resize", what, expected, found);
        let inside = crop.width > 0
            && crop.height > 0
            && crop.left.checked_add(crop.width).is_some_and(|right| right <= image.width)
            && crop.top.checked_add(crop.height).is_some_and(|bottom| bottom <= image.height);
        if !inside || image.pixels.len() != image.height * image.width * image.channels {
            let expected = format!("a box inside {}x{} pixels (width x height)", image.width, image.height);
            return Err(shape("crop", expected, format!("{crop:?} and {} bytes", image.pixels.len())));
        }
        let length = [height, width, image.channels].iter().try_fold(1_usize, |n, m| n.checked_mul(*m));
        if height == 0 || width == 0 || length != Some(out.len()) {
            let expected = format!("{height}x{width}x{} bytes, at least one", image.channels);
            return Err(shape("out", expected, format!("{} bytes", out.len())));
        }
        let Self { resampler, premultiplied } = self;
        let source = Pixels::new(&image.pixels, image.width, image.channels, crop);
        let size = (height, width);
        match image.channels {
            1 => resampler.resize::<1>(out, size, source, resample, mirrored),
            2 => resampler.resize::<2>(out, size, source, resample, mirrored),
            3 => resampler.resize::<3>(out, size, source, resample, mirrored),
            4 if resample == Resample::Nearest || (crop.height, crop.width) == size => {
                resampler.resize::<4>(out, size, source, resample, mirrored);
            }
            4 => {
                premultiplied.resize(crop.width * crop.height * 4, 0);
                source.copy_to(premultiplied, 4);
                multiply_alpha(premultiplied);
                let whole = CropBox { top: 0, left: 0, ..crop };
                let source = Pixels::new(premultiplied, crop.width, 4, whole);
                resampler.resize::<4>(out, size, source, resample, mirrored);
                divide_alpha(out);
            }
            channels => return Err(shape("image", "1 to 4 channels".to_owned(), format!("{channels} channels"))),
        }
        Ok(())
    }
}

/// The augmentation of training: a random crop, resized, and a horizontal flip (torchvision's `RandomResizedCrop` and
/// `RandomHorizontalFlip`, the recipe of MAE pre-training).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Training {
    /// Rows of the result.
    pub height: usize,
    /// Columns of the result.
    pub width: usize,
    /// The share of the picture's area that a crop covers, least and most.
    pub scale: (f64, f64),
    /// Width over height of a crop, least and most.
    pub ratio: (f64, f64),
    /// How pixels are interpolated.
    pub resample: Resample,
    /// The probability of a horizontal flip.
    pub flip: f64,
}

impl Training {
    /// Crops of 20 to 100 % of the area at 3:4 to 4:3, bicubic, half of them flipped.
    #[must_use]
    pub fn new(height: usize, width: usize) -> Self {
        Self { height, width, scale: (0.2, 1.0), ratio: (3.0 / 4.0, 4.0 / 3.0), resample: Resample::Bicubic, flip: 0.5 }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Config`] for empty sizes or ranges that are not increasing and positive.
    pub fn check(&self) -> Result<()> {
        let positive = |(low, high): (f64, f64)| low > 0.0 && low <= high && high.is_finite();
        if self.height == 0 || self.width == 0 {
            return Err(Error::Config(format!("crops of {}x{} pixels are empty", self.height, self.width)));
        }
        if !positive(self.scale) || self.scale.1 > 1.0 || !positive(self.ratio) {
            return Err(Error::Config(format!(
                "random crops need 0 < least <= most for scale (at most 1) and ratio, found {:?} and {:?}",
                self.scale, self.ratio
            )));
        }
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(Error::Config(format!("the probability of a flip is in [0, 1], found {}", self.flip)));
        }
        Ok(())
    }

    /// The crop of a picture of `height x width` pixels and whether it is flipped: a function of seed, epoch and sample.
    ///
    /// Try `t` of ten uses block `t` of the sample's Philox stream: its words are area, ratio, row and column. A crop that
    /// does not fit ten times over is replaced by the largest centred one whose ratio is allowed. Block 10 decides the
    /// flip.
    #[must_use]
    pub fn draw(&self, height: usize, width: usize, seed: u64, epoch: u32, sample: u64) -> (CropBox, bool) {
        let words = RandomStream::new(seed, epoch, sample, AUGMENTATION_STREAM);
        let flip = unit(words.block(TRIES)[0]) < self.flip;
        let area = height as f64 * width as f64;
        let (low, high) = (self.ratio.0.ln(), self.ratio.1.ln());
        for attempt in 0..TRIES {
            let [a, r, y, x] = words.block(attempt);
            let target = area * (self.scale.0 + (self.scale.1 - self.scale.0) * unit(a));
            let ratio = (low + (high - low) * unit(r)).exp();
            let w = (target * ratio).sqrt().round_ties_even() as usize;
            let h = (target / ratio).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let pick = |word, room: usize| below(word, u32::try_from(room + 1).unwrap_or(u32::MAX)) as usize;
                return (CropBox { top: pick(y, height - h), left: pick(x, width - w), height: h, width: w }, flip);
            }
        }
        let (mut w, mut h) = (width, height);
        let ratio = width as f64 / height as f64;
        if ratio < self.ratio.0 {
            h = ((width as f64 / self.ratio.0).round_ties_even() as usize).clamp(1, height.max(1));
        } else if ratio > self.ratio.1 {
            w = ((height as f64 * self.ratio.1).round_ties_even() as usize).clamp(1, width.max(1));
        }
        (CropBox { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }, flip)
    }
}

const TRIES: u32 = 10;

/// What happens to a picture between decoding and the batch.
#[derive(Clone, Debug)]
pub enum Transform {
    /// Random crops and flips.
    Training(Training),
    /// The deterministic preparation of a checkpoint.
    Inference(ImageProcessor),
}

impl Transform {
    /// Rows and columns of the result.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        match self {
            Self::Training(training) => (training.height, training.width),
            Self::Inference(processor) => processor.output_size(),
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Config`], see [`Training::check`] and [`ImageProcessor::check`].
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Training(training) => training.check(),
            Self::Inference(processor) => processor.check_fixed_size(),
        }
    }

    /// What is seen of a picture of `height x width` pixels.
    pub(crate) fn region(&self, height: usize, width: usize, keys: (u64, u32, u64)) -> Region {
        match self {
            Self::Training(training) => {
                let (crop, mirrored) = training.draw(height, width, keys.0, keys.1, keys.2);
                Region { crop, mirrored }
            }
            Self::Inference(_) => Region::whole(height, width),
        }
    }

    /// Writes the picture to `out` `[height, width, channels]`; `keys` are seed, epoch and sample.
    ///
    /// # Errors
    /// [`Error::Shape`] when `out` has another length.
    pub fn apply(&self, out: &mut [u8], image: &Image, keys: (u64, u32, u64), resizer: &mut Resizer) -> Result<()> {
        self.show(out, image, self.region(image.height, image.width, keys), resizer)
    }

    /// The same for a picture of which no more was read than its region.
    pub(crate) fn apply_part(&self, out: &mut [u8], part: &Part, resizer: &mut Resizer) -> Result<()> {
        self.show(out, &part.image, part.region, resizer)
    }

    fn show(&self, out: &mut [u8], image: &Image, region: Region, resizer: &mut Resizer) -> Result<()> {
        match self {
            Self::Training(training) => {
                let size = (training.height, training.width);
                resizer.resize_mirrored(out, size, image, region.crop, training.resample, region.mirrored)
            }
            Self::Inference(processor) => processor.apply(out, image, resizer),
        }
    }
}
