//! Picture files to bytes `[H, W, C]`.
//!
//! The content decides the format, never the name. Differences from Pillow's `Image.open(..).convert(..)`:
//! 16-bit samples are rounded to 8 bits (Pillow cuts colour, which may be one level less, and clips 16-bit grey at 255,
//! which turns it white); the EXIF orientation is applied (`ImageOps.exif_transpose`); and JPEG files
//! differ by a few levels in builds without the feature `turbojpeg`, with which they give the same bytes.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::data::image::{Image, Part, Region};
use crate::data::jpeg;
use crate::files::open;
use crate::{Error, Result};

/// The number of pixels above which Pillow, too, takes a picture for a decompression bomb.
pub const MAX_PIXELS: u64 = 178_956_970;

/// Decodes JPEG, PNG, WebP, BMP and TIFF to one number of channels.
///
/// Grey-scale, palette, CMYK, 16-bit and alpha pictures are all accepted. With 3 channels alpha is dropped as Pillow's
/// `convert("RGB")` does (the colour under transparent pixels shows); 1 channel is the luma of its `convert("L")`; with 4
/// channels opaque pictures get alpha 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoder {
    channels: usize,
    max_pixels: u64,
}

impl Decoder {
    /// A decoder to `channels` (1, 3 or 4) that refuses pictures of more than [`MAX_PIXELS`].
    ///
    /// # Errors
    /// [`Error::Config`] for other numbers of channels: picture files hold luma, RGB or RGBA.
    pub fn new(channels: usize) -> Result<Self> {
        if !matches!(channels, 1 | 3 | 4) {
            return Err(Error::Config(format!(
                "picture files are read as 1 (grey), 3 (RGB) or 4 (RGBA) channels, found num_channels = {channels}; \
                 other data can be given to the library as tensors"
            )));
        }
        Ok(Self { channels, max_pixels: MAX_PIXELS })
    }

    /// Refuses pictures of more pixels than this; a guard against decompression bombs.
    #[must_use]
    pub fn max_pixels(mut self, pixels: u64) -> Self {
        self.max_pixels = pixels;
        self
    }

    /// Channels of the pictures.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Reads and decodes a file.
    ///
    /// # Errors
    /// [`Error::Picture`] when it cannot be read or decoded.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Image> {
        let mut bytes = Vec::new();
        self.read_file(path.as_ref(), &mut bytes)?;
        self.decode(&bytes, path)
    }

    /// Reads a file into `bytes`; files larger than any picture are refused.
    pub(crate) fn read_file(&self, path: &Path, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        let (file, length) = self.open_file(path)?;
        bytes.reserve(length as usize);
        file.take(self.max_bytes())
            .read_to_end(bytes)
            .map_err(|error| picture(path, format!("cannot be read: {error}")))?;
        Ok(())
    }

    /// Bytes of a file that [`Decoder::read_file`] can open.
    pub(crate) fn file_size(&self, path: &Path) -> Result<u64> {
        Ok(self.open_file(path)?.1)
    }

    fn open_file(&self, path: &Path) -> Result<(File, u64)> {
        let unreadable = |problem: &dyn std::fmt::Display| picture(path, format!("cannot be read: {problem}"));
        let (file, length) = open(path).map_err(|error| match error {
            Error::Io { cause, .. } => unreadable(&cause),
            other => other,
        })?;
        if length > self.max_bytes() {
            return Err(unreadable(&format!(
                "{length} bytes are more than a picture of {} pixels takes",
                self.max_pixels
            )));
        }
        Ok((file, length))
    }

    /// Eight bytes hold a 16-bit RGBA pixel; files and decoders keep a little beside the picture.
    fn max_bytes(&self) -> u64 {
        self.max_pixels.saturating_mul(8).saturating_add(64 << 20)
    }

    /// Decodes the bytes of a file; `name` is for the error.
    ///
    /// # Errors
    /// [`Error::Picture`] for empty, truncated, damaged, unsupported or too large pictures.
    pub fn decode(&self, bytes: &[u8], name: impl AsRef<Path>) -> Result<Image> {
        let mut part = Part::default();
        self.decode_part(bytes, || name.as_ref().to_path_buf(), Region::whole, &mut part)?;
        Ok(part.image)
    }

    /// Decodes a region of a picture, and perhaps more of it, into `part`. `choose` gets the numbers of rows and columns and says
    /// which region; `part` keeps it.
    ///
    /// # Errors
    /// As [`Decoder::decode`]; damage outside the box may go unnoticed.
    pub(crate) fn decode_part(
        &self,
        bytes: &[u8],
        name: impl FnOnce() -> PathBuf,
        choose: impl Fn(usize, usize) -> Region,
        part: &mut Part,
    ) -> Result<()> {
        let decode = || {
            if !self.decode_jpeg(bytes, &choose, part) {
                part.hold(self.decode_any(bytes)?, &choose);
            }
            Ok(())
        };
        guarded(decode).map_err(|problem| picture(&name(), problem))
    }

    /// The usual kinds of JPEG, of which only what is needed is decoded; whether this was one.
    fn decode_jpeg(&self, bytes: &[u8], choose: impl Fn(usize, usize) -> Region, part: &mut Part) -> bool {
        let Some(header) = jpeg::header(bytes) else { return false };
        let (height, width) = (header.height, header.width);
        if height as u64 * width as u64 > self.max_pixels || !jpeg_is_complete(bytes) {
            return false;
        }
        let upright = header.orientation == Orientation::NoTransforms;
        let region = if upright { choose(height, width) } else { Region::whole(height, width) };
        if !jpeg::decode(bytes, &header, region.crop, part) {
            return false;
        }
        part.region = Region { crop: part.inside(region.crop), ..region };
        if !upright {
            let Image { channels, pixels, .. } = &mut part.image;
            let (pixels, width, height) = (std::mem::take(pixels), width as u32, height as u32);
            let turned = if *channels == 1 {
                image::GrayImage::from_raw(width, height, pixels).map(DynamicImage::ImageLuma8)
            } else {
                image::RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
            };
            let Some(mut turned) = turned else { return false };
            turned.apply_orientation(header.orientation);
            let (width, height) = (turned.width() as usize, turned.height() as usize);
            let turned = Image { width, height, channels: *channels, pixels: turned.into_bytes() };
            part.hold(turned, choose);
        }
        let Image { channels, pixels, .. } = &mut part.image;
        if *channels != self.channels {
            *pixels = with_channels(std::mem::take(pixels), *channels, self.channels);
            *channels = self.channels;
        }
        true
    }

    fn decode_any(&self, bytes: &[u8]) -> std::result::Result<Image, String> {
        if bytes.is_empty() {
            return Err("the file is empty".to_owned());
        }
        let format = image::guess_format(bytes).map_err(|_| {
            let start: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            format!("not a JPEG, PNG, WebP, BMP or TIFF picture (it starts with the bytes {})", start.join(" "))
        })?;
        if !format.reading_enabled() {
            return Err(format!("{format:?} is not supported; convert it to JPEG, PNG, WebP, BMP or TIFF"));
        }
        if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
            return Err("the JPEG is truncated: it ends before its end-of-image marker".to_owned());
        }
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(self.max_bytes());
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(|error| describe(&error, format))?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(format!("a picture of {width}x{height} has no pixels"));
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(format!(
                "{width}x{height} pixels are more than the limit of {} (a decompression bomb?)",
                self.max_pixels
            ));
        }
        // A damaged EXIF block does not make a picture unreadable.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut decoded = DynamicImage::from_decoder(decoder).map_err(|error| describe(&error, format))?;
        decoded.apply_orientation(orientation);
        let (width, height) = (decoded.width() as usize, decoded.height() as usize);
        let pixels = convert(decoded, self.channels);
        if pixels.len() != width * height * self.channels {
            return Err("the decoder returned fewer pixels than the header announces".to_owned());
        }
        Ok(Image { width, height, channels: self.channels, pixels })
    }
}

/// The decoders are other people's code over bytes from anywhere, with `unwrap`s and slices in it. Millions of damaged files
/// did not make them panic; should one do so all the same, it must not end a run of days.
pub(crate) fn guarded<T>(decode: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err("the decoder failed on it; the file is most likely damaged".to_owned()))
}

fn picture(path: &Path, problem: String) -> Error {
    Error::Picture { path: path.to_path_buf(), problem }
}

fn describe(error: &image::ImageError, format: ImageFormat) -> String {
    match error {
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            format!("the {format:?} is truncated: {error}")
        }
        image::ImageError::Limits(error) => format!("the {format:?} needs too much memory to decode: {error}"),
        error => format!("cannot be decoded as {format:?}: {error}"),
    }
}

/// Whether the marker segments of a JPEG reach its end-of-image marker. The decoder fills what is missing with grey and
/// reports success; Pillow, whose judgement users know, calls such a file truncated.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    // Almost all files end so. One that is cut right after a thumbnail's marker has no pixels, which the decoder reports.
    if bytes.starts_with(&[0xff, 0xd8]) && bytes.ends_with(&[0xff, 0xd9]) {
        return true;
    }
    let mut at = 2;
    while at + 1 < bytes.len() {
        if bytes[at] != 0xff {
            at += 1;
            continue;
        }
        match bytes[at + 1] {
            0xd9 => return true,
            // Fill bytes, stuffed zeros in entropy-coded data, restart markers and other markers without a length.
            0xff => at += 1,
            0x00 | 0x01 | 0xd0..=0xd8 => at += 2,
            _ => {
                let Some(&[high, low]) = bytes.get(at + 2..at + 4).and_then(|b| b.first_chunk::<2>()) else {
                    return false;
                };
                at += 2 + usize::from(u16::from_be_bytes([high, low])).max(2);
            }
        }
    }
    false
}

/// To 8 bits and `channels` channels.
fn convert(decoded: DynamicImage, channels: usize) -> Vec<u8> {
    let found = usize::from(decoded.color().channel_count());
    let samples = match (decoded.as_flat_samples_u8(), decoded.as_flat_samples_u16()) {
        (Some(_), _) => decoded.into_bytes(),
        (None, Some(flat)) => rounded(flat.samples),
        // Floating point, in [0, 1].
        _ if found == 4 => decoded.into_rgba8().into_raw(),
        _ => return convert(DynamicImage::ImageRgb8(decoded.into_rgb8()), channels),
    };
    with_channels(samples, found, channels)
}

/// From one number of channels to another. The luma of a grey pixel is its level.
fn with_channels(samples: Vec<u8>, found: usize, channels: usize) -> Vec<u8> {
    if found == channels {
        return samples;
    }
    let mut out = Vec::with_capacity(samples.len() / found * channels);
    for pixel in samples.chunks_exact(found) {
        let rgba = match *pixel {
            [l] => [l, l, l, 255],
            [l, a] => [l, l, l, a],
            [r, g, b] => [r, g, b, 255],
            [r, g, b, a] => [r, g, b, a],
            // No other layouts exist; the caller notices the wrong length.
            _ => return Vec::new(),
        };
        match channels {
            1 => out.push(luma(rgba[0], rgba[1], rgba[2])),
            channels => out.extend_from_slice(&rgba[..channels]),
        }
    }
    out
}

/// Pillow's fixed-point ITU-R 601 luma.
pub(crate) fn luma(red: u8, green: u8, blue: u8) -> u8 {
    ((u32::from(red) * 19_595 + u32::from(green) * 38_470 + u32::from(blue) * 7_471 + 0x8000) >> 16) as u8
}

fn rounded(samples: &[u16]) -> Vec<u8> {
    samples.iter().map(|sample| ((u32::from(*sample) + 128) / 257) as u8).collect()
}

/// What unpacks JPEG files in this build; pixels may differ by a few levels from one to the other.
#[must_use]
pub fn jpeg_decoder() -> &'static str {
    if cfg!(feature = "turbojpeg") { "libjpeg-turbo" } else { "zune-jpeg" }
}
