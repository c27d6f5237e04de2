//! Masked autoencoders (He et al., arXiv 2111.06377; `ViTMAE` in Hugging Face transformers).
#![deny(missing_docs)]

pub mod config;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod device;
pub mod distributed;
mod error;
pub mod figures;
pub mod files;
mod isa;
pub mod model;
mod nvtx;
pub mod ops;
pub mod random;
pub mod train;
pub mod weights;

pub use error::{Error, Result};

/// The README's examples, for the documentation's tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
