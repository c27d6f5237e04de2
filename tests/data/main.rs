//! The data pipeline and the pictures it makes for people.

mod common;
mod decode;
mod loader;
#[cfg(feature = "parquet")]
mod parquet;
mod picture;
mod shards;
mod source;
mod transform;
