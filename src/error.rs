//! The library's error type: every message says what was expected, what was found and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong in the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model or training setting that cannot work.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// Tensors or buffers whose shapes do not fit together.
    #[error("{op}: {what}: expected {expected}, found {found}")]
    Shape {
        /// The operation that checked.
        op: &'static str,
        /// Which tensor or dimension.
        what: String,
        /// The shape that would have been accepted.
        expected: String,
        /// The shape that was given.
        found: String,
    },
    /// Values that are not allowed: NaN in pixels or noise, a mask ratio out of range.
    #[error("{what}: {problem}")]
    Value {
        /// Which input.
        what: String,
        /// What is wrong with it, and what is accepted.
        problem: String,
    },
    /// A checkpoint that cannot be read, or that does not fit the model.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A picture that cannot be decoded.
    #[error("picture {}: {problem}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A source of pictures that cannot be used.
    #[error("data {source_name}: {problem}")]
    Data {
        /// The folder, file or `synthetic` specification.
        source_name: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// The operating system refused to read or write.
    #[error("{action} {}: {cause}", path.display())]
    Io {
        /// What was being done: `reading`, `writing`, `creating`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer. It is part of the message, so it is not a `source` that would say it again.
        cause: std::io::Error,
    },
    /// A device that is not there or cannot do what was asked.
    #[error("device: {0}")]
    Device(String),
    /// The CUDA driver, NVRTC or a kernel launcher refused.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// The processes that train together do not find each other, or one of them is gone.
    #[error("several processes: {0}")]
    Distributed(String),
    /// Another process of the run has failed, and says why itself.
    #[error("process {rank} of {size} has failed; its own message says why")]
    Peer {
        /// The first that failed, from 0.
        rank: usize,
        /// All processes.
        size: usize,
    },
    /// Training went wrong in a way that repeating the step does not mend.
    #[error("training: {0}")]
    Training(String),
}

/// The library's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, cause: std::io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_path_buf(), cause }
    }

    /// An [`Error::Shape`].
    pub(crate) fn shape(
        op: &'static str,
        what: impl Into<String>,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Shape { op, what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// An [`Error::Checkpoint`] for `path`.
    pub(crate) fn checkpoint(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    /// An [`Error::Value`].
    pub(crate) fn value(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Value { what: what.into(), problem: problem.into() }
    }
}
