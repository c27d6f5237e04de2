//! Parquet files with pictures in a column, as Hugging Face's data sets have them (feature `parquet`).

use std::path::PathBuf;

use crate::Error;

#[cfg(feature = "parquet")]
mod columns;
#[cfg(not(feature = "parquet"))]
mod disabled;
#[cfg(feature = "parquet")]
mod enabled;
#[cfg(feature = "parquet")]
mod file;
#[cfg(feature = "parquet")]
mod pages;

#[cfg(not(feature = "parquet"))]
pub(crate) use disabled::open;
#[cfg(feature = "parquet")]
pub(crate) use enabled::open;

/// What to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// What the user asked for.
    pub(crate) description: String,
    pub(crate) files: Vec<PathBuf>,
    /// The column with the pictures, if not the one that looks like it.
    pub(crate) picture: Option<String>,
    /// The column with the classes, if not the one that looks like it.
    pub(crate) label: Option<String>,
}

impl Request {
    fn refuse(&self, problem: impl Into<String>) -> Error {
        Error::Data { source_name: self.description.clone(), problem: problem.into() }
    }
}
