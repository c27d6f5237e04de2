//! The preparation of pictures that a checkpoint was trained with: `preprocessor_config.json` of transformers.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::data::image::{CropBox, Image, Resample, zeros};
use crate::data::transform::Resizer;
use crate::files::{read_text, write_atomically};
use crate::{Error, Result};

/// The name of the file beside a checkpoint's weights.
const FILE_NAME: &str = "preprocessor_config.json";

/// How large a picture is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// Both sides as said, whatever the picture's proportions.
    Exact { height: usize, width: usize },
    /// The shorter side as said, the longer in proportion (rounded down).
    ShortestEdge(usize),
}

/// Resizes, optionally centre-crops, and says how to normalise; reads and writes transformers' files.
///
/// The default is that of `facebook/vit-mae-base`: 224x224, bilinear, ImageNet's mean and standard deviation. A file
/// that leaves something out gets what transformers' `ViTImageProcessor` would use: resize to 224x224 bilinear, rescale
/// by 1/255, normalise with 0.5 and 0.5.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    resize: Option<Size>,
    resample: Resample,
    crop: Option<(usize, usize)>,
    rescale: Option<f64>,
    normalize: bool,
    mean: Vec<f32>,
    std: Vec<f32>,
}

/// Mean of ImageNet's channels, full range 1.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation of ImageNet's channels.
const IMAGENET_DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

impl Default for ImageProcessor {
    fn default() -> Self {
        Self::new(224, 224, 3)
    }
}

impl ImageProcessor {
    /// Bilinear to `height x width`. Three channels are normalised with ImageNet's mean and std, any other number
    /// with 0.5 and 0.5 for each channel (so that values lie in `[-1, 1]`): there are no statistics to go by.
    #[must_use]
    pub fn new(height: usize, width: usize, channels: usize) -> Self {
        let (mean, std) = if channels == 3 {
            (IMAGENET_MEAN.to_vec(), IMAGENET_DEVIATION.to_vec())
        } else {
            (vec![0.5; channels], vec![0.5; channels])
        };
        Self {
            resize: Some(Size::Exact { height, width }),
            resample: Resample::Bilinear,
            crop: None,
            rescale: Some(1.0 / 255.0),
            normalize: true,
            mean,
            std,
        }
    }

    /// The same with other interpolation.
    #[must_use]
    pub fn resample(mut self, resample: Resample) -> Self {
        self.resample = resample;
        self
    }

    /// The same with another mean and standard deviation, in units of the full range.
    #[must_use]
    pub fn normalized_with(mut self, mean: &[f32], std: &[f32]) -> Self {
        self.normalize = true;
        self.mean = mean.to_vec();
        self.std = std.to_vec();
        self
    }

    /// Resizes the shorter side to `edge` and cuts `height x width` from the centre (the usual way to evaluate
    /// classifiers: 256 and 224x224, bicubic).
    #[must_use]
    pub fn shortest_edge_and_crop(mut self, edge: usize, height: usize, width: usize) -> Self {
        self.resize = Some(Size::ShortestEdge(edge));
        self.crop = Some((height, width));
        self
    }

    /// The same for other sizes, as when positions are interpolated: the resize and the crop end at `height x width`.
    #[must_use]
    pub fn with_size(mut self, height: usize, width: usize) -> Self {
        match (self.resize, self.crop) {
            (Some(Size::ShortestEdge(edge)), Some((crop_height, crop_width))) => {
                // The margin keeps its proportion.
                let least = crop_height.min(crop_width).max(1);
                self.resize = Some(Size::ShortestEdge((edge * height.min(width)).div_ceil(least)));
                self.crop = Some((height, width));
            }
            (_, Some(_)) => self.crop = Some((height, width)),
            _ => self.resize = Some(Size::Exact { height, width }),
        }
        self
    }

    /// Reads `preprocessor_config.json`, or the one in a checkpoint's folder.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Config`] when it does not make sense.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() { path.join(FILE_NAME) } else { path.to_path_buf() };
        let text = read_text(&path, 1 << 20)?;
        Self::from_json(&text).map_err(|error| match error {
            Error::Config(problem) => Error::Config(format!("{}: {problem}", path.display())),
            other => other,
        })
    }

    /// Reads the `preprocessor_config.json` of a checkpoint: in its folder, or beside it if it is a file. `None` if there is
    /// none.
    ///
    /// # Errors
    /// As [`ImageProcessor::open`].
    pub fn of_checkpoint(checkpoint: &Path) -> Result<Option<Self>> {
        let file = match checkpoint.is_dir() {
            true => checkpoint.join(FILE_NAME),
            false => checkpoint.with_file_name(FILE_NAME),
        };
        file.exists().then(|| Self::open(file)).transpose()
    }

    /// Reads the content of a `preprocessor_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for what is not JSON or does not make sense.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|error| Error::Config(format!("not JSON: {error}")))?;
        let object = value.as_object().ok_or_else(|| Error::Config("expected a JSON object".to_owned()))?;
        let flag = |name, default| field(object, name, "true or false", Some).map(|flag| flag.unwrap_or(default));
        let numbers = |name| {
            field(object, name, "a list of numbers", |numbers| match numbers {
                Numbers::One(number) => Some(vec![number]),
                Numbers::Many(numbers) => Some(numbers),
            })
        };
        let size =
            |name| field(object, name, "a number, {\"height\", \"width\"} or {\"shortest_edge\"}", Written::size);
        let mean = numbers("image_mean")?.unwrap_or_else(|| vec![0.5; 3]);
        let std = numbers("image_std")?.unwrap_or_else(|| vec![0.5; mean.len()]);
        let filters = "a Pillow filter from 0 to 5 (2 bilinear, 3 bicubic)";
        let resample = field(object, "resample", filters, Resample::from_pillow)?.unwrap_or_default();
        let resize = match flag("do_resize", true)? {
            true => Some(size("size")?.unwrap_or(Size::Exact { height: 224, width: 224 })),
            false => None,
        };
        let crop = match flag("do_center_crop", false)? {
            true => match size("crop_size")?.or(resize) {
                Some(Size::Exact { height, width }) => Some((height, width)),
                Some(Size::ShortestEdge(edge)) => Some((edge, edge)),
                None => return Err(Error::Config("do_center_crop needs crop_size".to_owned())),
            },
            false => None,
        };
        let positive = |factor: f64| Some(factor).filter(|factor| *factor > 0.0 && factor.is_finite());
        let rescale = match flag("do_rescale", true)? {
            true => field(object, "rescale_factor", "a positive number", positive)?.or(Some(1.0 / 255.0)),
            false => None,
        };
        let normalize = flag("do_normalize", true)?;
        let processor = Self { resize, resample, crop, rescale, normalize, mean, std };
        processor.check()?;
        Ok(processor)
    }

    /// Checks that sizes and statistics make sense.
    ///
    /// # Errors
    /// [`Error::Config`] when not.
    pub fn check(&self) -> Result<()> {
        if self.mean.len() != self.std.len() || self.mean.is_empty() {
            return Err(Error::Config(format!(
                "image_mean and image_std must have one number per channel, found {} and {}",
                self.mean.len(),
                self.std.len()
            )));
        }
        if self.std.iter().any(|d| !d.is_finite() || *d <= 0.0) || self.mean.iter().any(|m| !m.is_finite()) {
            return Err(Error::Config(format!(
                "image_std must be positive and image_mean finite, found {:?} and {:?}",
                self.std, self.mean
            )));
        }
        let empty = matches!(self.resize, Some(Size::Exact { height: 0, .. } | Size::Exact { width: 0, .. }))
            || self.resize == Some(Size::ShortestEdge(0))
            || matches!(self.crop, Some((0, _) | (_, 0)));
        if empty {
            return Err(Error::Config("size and crop_size must be at least 1".to_owned()));
        }
        Ok(())
    }

    /// Checks, too, that every picture comes out at the same size.
    pub(crate) fn check_fixed_size(&self) -> Result<()> {
        self.check()?;
        if self.output_size() == (0, 0) {
            return Err(Error::Config(
                "the image processor leaves pictures at sizes of their own; batches need do_resize with a height and \
                 a width, or do_center_crop"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Rows and columns of the result; `(0, 0)` when that depends on the picture.
    #[must_use]
    pub fn output_size(&self) -> (usize, usize) {
        match (self.crop, self.resize) {
            (Some(size), _) => size,
            (None, Some(Size::Exact { height, width })) => (height, width),
            (None, _) => (0, 0),
        }
    }

    /// Channels that the statistics are for.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Mean and standard deviation `[C]` in units of the full range, so that the model's input is
    /// `(byte / 255 - mean) / std`; other rescaling factors, and none, are expressed in them.
    #[must_use]
    pub fn normalization(&self) -> (Vec<f32>, Vec<f32>) {
        // byte * factor = (byte / 255) * full
        let full = self.rescale.unwrap_or(1.0) * 255.0;
        let scale = |v: &f32| (f64::from(*v) / full) as f32;
        if self.normalize {
            // Exactly the numbers of the file in the usual case.
            if (full - 1.0).abs() < 1e-6 {
                return (self.mean.clone(), self.std.clone());
            }
            (self.mean.iter().map(scale).collect(), self.std.iter().map(scale).collect())
        } else {
            (vec![0.0; self.mean.len()], vec![scale(&1.0); self.mean.len()])
        }
    }

    /// Resizes and crops one picture.
    ///
    /// # Errors
    /// [`Error::Config`] when the result would be larger than memory allows.
    pub fn process(&self, image: &Image) -> Result<Image> {
        let (height, width) = match self.output_size() {
            (0, 0) => self.resized(image),
            size => size,
        };
        let length = height.checked_mul(width).and_then(|n| n.checked_mul(image.channels)).filter(|n| *n < 1 << 40);
        let length = length.ok_or_else(|| Error::Config(format!("a picture of {height}x{width} is too large")))?;
        let mut pixels = Vec::new();
        zeros(&mut pixels, length)?;
        self.apply(&mut pixels, image, &mut Resizer::new())?;
        Image::new(width, height, image.channels, pixels)
    }

    /// Rows and columns after the resize and before the crop.
    fn resized(&self, image: &Image) -> (usize, usize) {
        match self.resize {
            None => (image.height, image.width),
            Some(Size::Exact { height, width }) => (height, width),
            Some(Size::ShortestEdge(edge)) => {
                let (short, long) = (image.height.min(image.width).max(1), image.height.max(image.width));
                // transformers: int(size * long / short)
                let long = ((edge as f64 * long as f64 / short as f64) as usize).max(1);
                if image.height <= image.width { (edge, long) } else { (long, edge) }
            }
        }
    }

    /// Writes the result to `out` `[height, width, channels]`.
    pub(crate) fn apply(&self, out: &mut [u8], image: &Image, resizer: &mut Resizer) -> Result<()> {
        let (height, width) = self.resized(image);
        let Some((crop_height, crop_width)) = self.crop else {
            return resizer.resize(out, (height, width), image, CropBox::whole(image), self.resample);
        };
        let mut resized = Image { height, width, channels: image.channels, pixels: Vec::new() };
        resized.pixels.resize(height * width * image.channels, 0);
        resizer.resize(&mut resized.pixels, (height, width), image, CropBox::whole(image), self.resample)?;
        if out.len() != crop_height * crop_width * image.channels {
            return Err(Error::shape(
                "centre crop",
                "out",
                format!("{crop_height}x{crop_width}x{} bytes", image.channels),
                format!("{} bytes", out.len()),
            ));
        }
        center_crop(out, (crop_height, crop_width), &resized);
        Ok(())
    }

    /// Writes `preprocessor_config.json` as transformers' `ViTImageProcessor` reads it, into a folder.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let path = folder.as_ref().join(FILE_NAME);
        write_atomically(&path, |file| file.bytes(format!("{:#}\n", self.to_json()).as_bytes()))
    }

    /// The content of `preprocessor_config.json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        // Through the shortest decimal, so that 0.485 stays 0.485.
        let decimals = |numbers: &[f32]| -> Vec<f64> {
            numbers.iter().map(|n| n.to_string().parse().unwrap_or(f64::from(*n))).collect()
        };
        let mut object = json!({
            "image_processor_type": "ViTImageProcessor",
            "do_resize": self.resize.is_some(),
            "resample": self.resample.pillow(),
            "do_rescale": self.rescale.is_some(),
            "rescale_factor": self.rescale.unwrap_or(1.0 / 255.0),
            "do_normalize": self.normalize,
            "image_mean": decimals(&self.mean),
            "image_std": decimals(&self.std),
        });
        if let Some(size) = self.resize {
            object["size"] = match size {
                Size::Exact { height, width } => json!({ "height": height, "width": width }),
                Size::ShortestEdge(edge) => json!({ "shortest_edge": edge }),
            };
        }
        if let Some((height, width)) = self.crop {
            object["do_center_crop"] = json!(true);
            object["crop_size"] = json!({ "height": height, "width": width });
            // transformers' ViTImageProcessor does not crop; this one does.
            object["image_processor_type"] = json!("BitImageProcessor");
        }
        object
    }
}

/// Cuts from the centre as transformers' `center_crop` does; what lies outside the picture is black.
fn center_crop(out: &mut [u8], (height, width): (usize, usize), image: &Image) {
    // Python's floor division on signed offsets. A crop that is larger on a side pads there.
    let offset = |size: usize, crop: usize| -> isize {
        if size >= crop { ((size - crop) / 2) as isize } else { -((crop - size).div_ceil(2) as isize) }
    };
    let (top, left) = (offset(image.height, height), offset(image.width, width));
    out.fill(0);
    let columns = left.max(0) as usize..((left + width as isize).min(image.width as isize)).max(0) as usize;
    for y in 0..height {
        let source = top + y as isize;
        if source < 0 || source >= image.height as isize || columns.is_empty() {
            continue;
        }
        let c = image.channels;
        let from = (source as usize * image.width + columns.start) * c;
        let to = (y * width + (columns.start as isize - left) as usize) * c;
        let length = columns.len() * c;
        out[to..to + length].copy_from_slice(&image.pixels[from..from + length]);
    }
}

/// A field of the file, as `convert` sees it; `None` where it is left out or null.
fn field<T: DeserializeOwned, U>(
    object: &Map<String, Value>,
    name: &str,
    expected: &str,
    convert: impl Fn(T) -> Option<U>,
) -> Result<Option<U>> {
    let Some(value) = object.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
    let field = T::deserialize(value).ok().and_then(convert);
    field.map(Some).ok_or_else(|| Error::Config(format!("{name} must be {expected}, found {value}")))
}

/// One number per channel; a single number is one channel.
#[derive(Deserialize)]
#[serde(untagged)]
enum Numbers {
    One(f32),
    Many(Vec<f32>),
}

/// A size in the file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Side(usize),
    Sides(usize, usize),
    Exact { height: usize, width: usize },
    Shortest { shortest_edge: usize, longest_edge: Option<Value> },
}

impl Written {
    fn size(self) -> Option<Size> {
        let (size, most) = match self {
            Self::Side(side) => (Size::Exact { height: side, width: side }, side),
            Self::Sides(height, width) | Self::Exact { height, width } => {
                (Size::Exact { height, width }, height.max(width))
            }
            Self::Shortest { shortest_edge: edge, longest_edge: None } => (Size::ShortestEdge(edge), edge),
            Self::Shortest { .. } => return None,
        };
        (most <= 1 << 20).then_some(size)
    }
}
