//! Masked autoencoders (He et al., arXiv 2111.06377; `ViTMAE` in Hugging Face transformers).
#![deny(missing_docs)]

pub mod cpu;
mod error;
pub mod model;
pub mod ops;
pub mod train;

pub use error::{Error, Result};
