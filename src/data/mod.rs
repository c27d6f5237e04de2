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
mod image;
mod jpeg;
mod loader;
mod order;
mod parquet;
mod pictures;
mod processor;
mod resample;
mod shards;
mod source;
mod synthetic;
mod transform;

pub(crate) use health::{BAD_SHARE, too_many};

pub use decode::{Decoder, MAX_PIXELS, jpeg_decoder};
pub use image::{CropBox, Image, Resample};
pub use loader::{Batch, Loader, LoaderOptions, Position, Shard};
pub use pictures::{PICTURE_EXTENSIONS, Pictures, SourceOptions};
pub use processor::ImageProcessor;
pub use source::Source;
pub use synthetic::{SYNTHETIC_CLASSES, SYNTHETIC_COUNT, Synthetic};
pub use transform::{Resizer, Training, Transform};
