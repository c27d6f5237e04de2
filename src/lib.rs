//! Masked autoencoders.

#[cfg(feature = "cuda")]
pub mod cuda;
