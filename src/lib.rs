//! Masked autoencoders (He et al., arXiv 2111.06377; `ViTMAE` in Hugging Face transformers).
#![deny(missing_docs)]

pub mod config;
pub mod cpu;
mod error;
pub mod files;
pub mod ops;
pub mod weights;

pub use error::{Error, Result};
