//! The data pipeline and the pictures it makes for people.

mod common;
mod loader;
