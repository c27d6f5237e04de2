//! What the tests share.

use std::path::{Path, PathBuf};

use vitmae::data::{Batch, Image, Loader, Source, SourceOptions, Training, Transform};

/// The folder of real pictures that `VITMAE_DATA` names, if it is there.
pub fn real_data() -> Option<PathBuf> {
    std::env::var_os("VITMAE_DATA").map(PathBuf::from).filter(|folder| folder.is_dir())
}

pub fn options(size: usize) -> SourceOptions {
    SourceOptions::new(3, size, size).unwrap()
}

pub fn synthetic(count: usize, size: usize) -> Source {
    Source::parse(format!("synthetic:{count}"), &options(size)).unwrap()
}

pub fn training(size: usize) -> Transform {
    Transform::Training(Training::new(size, size))
}

/// What decides what the model sees.
pub fn content(batch: &Batch) -> (Vec<u8>, Vec<u64>, Option<Vec<u32>>, u32, usize) {
    (batch.pixels.clone(), batch.samples.clone(), batch.labels.clone(), batch.epoch, batch.index)
}

/// Pixels, samples, labels, epoch and number of a batch.
pub type Taken = (Vec<u8>, Vec<u64>, Option<Vec<u32>>, u32, usize);

pub fn take(loader: &mut Loader, count: usize) -> Vec<Taken> {
    (0..count).map(|_| content(&loader.next_batch().unwrap().unwrap())).collect()
}

/// A picture that is different everywhere.
pub fn gradient(width: usize, height: usize) -> Image {
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            pixels.extend([(x * 255 / width) as u8, (y * 255 / height) as u8, ((x + y) % 256) as u8]);
        }
    }
    Image::new(width, height, 3, pixels).unwrap()
}

pub fn save_png(image: &Image, path: &Path) {
    let color = match image.channels {
        1 => image::ExtendedColorType::L8,
        3 => image::ExtendedColorType::Rgb8,
        _ => image::ExtendedColorType::Rgba8,
    };
    let (width, height) = (image.width as u32, image.height as u32);
    image::save_buffer_with_format(path, &image.pixels, width, height, color, image::ImageFormat::Png).unwrap();
}

/// The committed golden values (`tests/golden/README.md`).
pub fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases").join(folder)
}

pub fn manifest(folder: &str) -> Vec<serde_json::Value> {
    serde_json::from_str(&std::fs::read_to_string(golden(folder).join("manifest.json")).unwrap()).unwrap()
}

/// The largest difference of two bytes.
pub fn difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
}

pub fn text<'a>(entry: &'a serde_json::Value, field: &str) -> Option<&'a str> {
    entry.get(field)?.as_str()
}
