//! Masked autoencoders (He et al., arXiv 2111.06377; `ViTMAE` in Hugging Face transformers).
#![deny(missing_docs)]

pub mod cpu;
pub mod data;
mod error;
pub mod ops;
pub mod picture;

pub use error::{Error, Result};
