//! Types and checks of flags that several commands share.

use std::path::PathBuf;

use vitmae::config::Size;

/// A whole number from 1.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number of at least 1".into()),
    }
}

/// A whole number from 1, however large.
pub(crate) fn at_least_one_u64(text: &str) -> Result<u64, String> {
    at_least_one(text).map(|number| number as u64)
}

/// Threads, at most.
const MOST_THREADS: usize = 1024;

/// A number of threads.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    match at_least_one(text)? {
        number if number > MOST_THREADS => Err(format!("expected at most {MOST_THREADS}")),
        number => Ok(number),
    }
}

/// A number of threads beside those that are there anyway; none is taken for one, the least there is.
pub(crate) fn helpers(text: &str) -> Result<usize, String> {
    if text.parse() == Ok(0_usize) { Ok(1) } else { threads(text) }
}

/// A file that is written as PNG.
pub(crate) fn png(path: PathBuf) -> Result<PathBuf, String> {
    match path.extension() {
        Some(end) if end.eq_ignore_ascii_case("png") => Ok(path),
        _ => Err("the picture is a PNG: give it a name that ends with .png".into()),
    }
}

/// A file for features.
pub(crate) fn feature_file(path: PathBuf) -> Result<PathBuf, String> {
    match path.extension().and_then(|end| end.to_str()) {
        Some("npy" | "safetensors") => Ok(path),
        _ => {
            Err("features are written as NumPy's or safetensors: give a name that ends with .npy or .safetensors"
                .into())
        }
    }
}

/// A mask ratio in [0, 1).
pub(crate) fn mask_ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..1.0).contains(&ratio) => Ok(ratio),
        _ => Err("expected a number from 0 to below 1".into()),
    }
}

/// Bounds a norm: zero would keep every weight where it is.
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("expected a number above 0".into()),
    }
}

/// How pictures are prepared for a checkpoint: by its `preprocessor_config.json` where it has one, else resized to its image
/// size and normalised as transformers does by default.
pub(crate) fn processor_for(
    checkpoint: &std::path::Path,
    config: &vitmae::config::MaeConfig,
    size: Option<Size>,
) -> anyhow::Result<vitmae::data::ImageProcessor> {
    let image = config.image();
    let processor = vitmae::data::ImageProcessor::of_checkpoint(checkpoint)?
        .unwrap_or_else(|| vitmae::data::ImageProcessor::new(image.height, image.width, image.channels));
    let processor = match size {
        Some(size) => processor.with_size(size.height, size.width),
        None => processor,
    };
    if processor.output_size() == (0, 0) {
        anyhow::bail!(
            "the checkpoint's preprocessor_config.json leaves pictures at sizes of their own, and a batch needs one size; give it \
             with --image-size, to which they are then resized"
        );
    }
    Ok(processor)
}
