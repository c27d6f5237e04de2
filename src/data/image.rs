//! Pictures as bytes, boxes of them, and how they are interpolated.

use crate::{Error, Result};

/// A picture: bytes, rows from the top, `[height, width, channels]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Columns of pixels.
    pub width: usize,
    /// Rows of pixels.
    pub height: usize,
    /// 1 (luma), 3 (RGB) or 4 (RGBA) for pictures that were decoded here.
    pub channels: usize,
    /// `height * width * channels` bytes, interleaved.
    pub pixels: Vec<u8>,
}

impl Image {
    /// Wraps bytes `[height, width, channels]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths disagree, [`Error::Value`] for a picture without pixels.
    pub fn new(width: usize, height: usize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        if width == 0 || height == 0 || channels == 0 {
            return Err(Error::value(
                "picture",
                format!("{width}x{height} with {channels} channels has no pixels; every size must be at least 1"),
            ));
        }
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(channels));
        if expected != Some(pixels.len()) {
            return Err(Error::shape(
                "Image::new",
                "pixels",
                format!("{height}x{width}x{channels} bytes"),
                format!("{} bytes", pixels.len()),
            ));
        }
        Ok(Self { width, height, channels, pixels })
    }
}

/// How pixels are interpolated; the names and numbers are Pillow's. All but `Nearest` average over the covered area when
/// they shrink a picture (antialiasing), as Pillow does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resample {
    /// The nearest pixel, 0.
    Nearest,
    /// Lanczos with three lobes, 1.
    Lanczos,
    /// Bilinear, 2.
    #[default]
    Bilinear,
    /// Bicubic with a = -0.5, 3.
    Bicubic,
    /// The mean of the covered pixels, 4.
    Box,
    /// Hamming, 5.
    Hamming,
}

impl Resample {
    /// From Pillow's number, as in `preprocessor_config.json`.
    #[must_use]
    pub fn from_pillow(number: u64) -> Option<Self> {
        [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic, Self::Box, Self::Hamming]
            .into_iter()
            .find(|resample| resample.pillow() == number)
    }

    /// Pillow's number.
    #[must_use]
    pub fn pillow(self) -> u64 {
        self as u64
    }
}

/// A box of whole pixels in a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CropBox {
    /// The first row.
    pub top: usize,
    /// The first column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl CropBox {
    /// All of a picture.
    #[must_use]
    pub fn whole(image: &Image) -> Self {
        Self { top: 0, left: 0, height: image.height, width: image.width }
    }
}

/// What is seen of a picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) crop: CropBox,
    /// Whether left and right change places.
    pub(crate) mirrored: bool,
}

impl Region {
    /// All of a picture of `height x width` pixels.
    pub(crate) fn whole(height: usize, width: usize) -> Self {
        Self { crop: CropBox { top: 0, left: 0, height, width }, mirrored: false }
    }
}

/// A picture, or the part of one that was decoded, with what is to be seen of it. Its memory is used again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// The pixels.
    pub(crate) image: Image,
    /// What is seen of `image`.
    pub(crate) region: Region,
    /// The row of the whole picture that `image` begins with.
    pub(crate) top: usize,
    /// The column of the whole picture that `image` begins with.
    pub(crate) left: usize,
    /// A file that ends where the part does.
    pub(crate) shorter: Vec<u8>,
}

impl Part {
    /// Holds a whole picture, of which `choose` says, from its rows and columns, what is seen.
    pub(crate) fn hold(&mut self, image: Image, choose: impl Fn(usize, usize) -> Region) {
        (self.top, self.left) = (0, 0);
        self.region = choose(image.height, image.width);
        self.image = image;
    }

    /// A box of the whole picture, which must be in this part, as one of the part.
    pub(crate) fn inside(&self, crop: CropBox) -> CropBox {
        CropBox { top: crop.top.saturating_sub(self.top), left: crop.left.saturating_sub(self.left), ..crop }
    }
}

/// Makes `pixels` as long as `length`, or says that there is not so much memory.
pub(crate) fn zeros(pixels: &mut Vec<u8>, length: usize) -> Result<()> {
    pixels.clear();
    pixels.try_reserve_exact(length).map_err(|_| {
        Error::Device(format!("there is no memory for {length} bytes of pixels; ask for fewer or smaller pictures"))
    })?;
    pixels.resize(length, 0);
    Ok(())
}
