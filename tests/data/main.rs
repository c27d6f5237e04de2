//! The data pipeline and the pictures it makes for people.

mod common;
mod decode;
mod loader;
mod picture;
mod shards;
mod source;
mod transform;
