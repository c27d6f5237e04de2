//! Pictures in, batches out: sources, decoding, augmentation, and the loader that keeps a training step fed.
//!
//! ```
//! use vitmae::data::{Loader, LoaderOptions, Source, SourceOptions, Training, Transform};
//!
//! let source = Source::parse("synthetic:100", &SourceOptions::new(3, 32, 32)?)?;
//! let transform = Transform::Training(Training::new(32, 32));
//! let mut loader = Loader::new(source, transform, &LoaderOptions { batch_size: 8, seed: 1, ..Default::default() })?;
//! let batch = loader.next_batch()?.expect("training never ends");
//! assert_eq!(batch.pixels.len(), 8 * 32 * 32 * 3);
//! # Ok::<(), vitmae::Error>(())
//! ```

mod decode;
mod fingerprint;
mod folder;
mod health;
mod jpeg;
mod loader;
mod order;
mod parquet;
mod processor;
mod random;
mod resample;
mod shards;
mod source;
mod synthetic;
mod transform;

use crate::{Error, Result};

/// Makes `pixels` as long as `length`, or says that there is not so much memory.
pub(crate) fn zeros(pixels: &mut Vec<u8>, length: usize) -> Result<()> {
    pixels.clear();
    pixels.try_reserve_exact(length).map_err(|_| {
        Error::Device(format!("there is no memory for {length} bytes of pixels; ask for fewer or smaller pictures"))
    })?;
    pixels.resize(length, 0);
    Ok(())
}

pub(crate) use health::too_many;

pub use decode::{Decoder, Image, MAX_PIXELS, jpeg_decoder};
pub use loader::{Batch, Loader, LoaderOptions, Position, Shard};
pub use processor::ImageProcessor;
pub use source::{PICTURE_EXTENSIONS, Pictures, Source, SourceOptions};
pub use synthetic::{SYNTHETIC_CLASSES, SYNTHETIC_COUNT, Synthetic};
pub use transform::{CropBox, Resample, Resizer, Training, Transform};
