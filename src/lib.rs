//! Masked autoencoders.
