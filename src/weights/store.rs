//! What a checkpoint's tensors are read from, whatever the format of its files.

use std::fmt::Debug;
use std::path::Path;

use safetensors::Dtype;

use crate::{Error, Result};

/// Named tensors in one file or several. A format that is read through this trait is read in every dialect.
pub(crate) trait Store: Debug + Send + Sync {
    /// The number of tensors.
    fn count(&self) -> usize;

    /// Tensor `index`, without its numbers.
    fn tensor(&self, index: usize) -> Stored<'_>;

    /// Reads the numbers of tensor `index`, row-major, into `values`, which is overwritten.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] for a type that is not a floating-point number, or too little memory.
    fn read_f32(&mut self, index: usize, values: &mut Vec<f32>) -> Result<()>;
}

/// What a store says of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub dtype: Dtype,
    /// The file it lies in.
    pub file: &'a Path,
}

impl Stored<'_> {
    /// Checks that [`Store::read_f32`] converts the tensor's type.
    pub fn check_float(&self) -> Result<()> {
        if matches!(self.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
            return Ok(());
        }
        Err(self.wrong_type("F32, F16, BF16 and F64"))
    }

    pub fn wrong_type(&self, expected: &str) -> Error {
        let Self { name, dtype, .. } = self;
        Error::checkpoint(self.file, format!("tensor {name} has the type {dtype}; {expected} can be read here"))
    }
}
