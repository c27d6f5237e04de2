//! Files of named tensors (safetensors): reading one tensor at a time, and writing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::files::{AtomicWriter, open, write_atomically};
use crate::weights::header;
use crate::weights::store::Stored;
use crate::{Error, Result};

/// How many bytes of a tensor are read before they are converted.
const CHUNK: usize = 1 << 20;

/// The numbers of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// 32-bit floating point; half precision is read as this.
    F32(Vec<f32>),
    /// 64-bit floating point.
    F64(Vec<f64>),
    /// 64-bit integers.
    I64(Vec<i64>),
    /// Bytes.
    U8(Vec<u8>),
}

impl Values {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::U8(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F64(_) => Dtype::F64,
            Self::I64(_) => Dtype::I64,
            Self::U8(_) => Dtype::U8,
        }
    }

    fn write(&self, writer: &mut AtomicWriter<'_>) -> Result<()> {
        match self {
            Self::F32(values) => write_f32(writer, values),
            Self::F64(values) => write_numbers(writer, values, |value| value.to_le_bytes()),
            Self::I64(values) => write_numbers(writer, values, |value| value.to_le_bytes()),
            Self::U8(values) => writer.bytes(values),
        }
    }
}

/// A tensor: dense, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its sizes; empty for a single number.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub values: Values,
}

impl Tensor {
    /// A tensor of `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the product of the shape is not their number.
    pub fn new(shape: impl Into<Vec<usize>>, values: Values) -> Result<Self> {
        let shape = shape.into();
        let length = shape.iter().try_fold(1_usize, |length, &size| length.checked_mul(size));
        if length != Some(values.len()) {
            return Err(Error::shape("tensor", "values", format!("as many as {shape:?} has"), values.len()));
        }
        Ok(Self { shape, values })
    }
}

/// A safetensors file that is open for reading; its header has been checked, its tensors are read when they are asked for.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entries: Vec<(String, TensorInfo)>,
    /// Where the bytes start that the entries' offsets count from.
    start: u64,
    by_name: BTreeMap<String, usize>,
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] for a file that is truncated, damaged or of another format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let (mut file, length) = open(&path)?;
        let (entries, start) = header::read(&path, &mut file, length)?;
        let by_name = entries.iter().enumerate().map(|(index, (name, _))| (name.clone(), index)).collect();
        Ok(Self { path, file, entries, start, by_name })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The shape of the tensor called `name`.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.by_name.get(name).map(|&index| self.entries[index].1.shape.as_slice())
    }

    /// The tensor called `name`, as it is stored; half precision as f32.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is no such tensor, or it has another type; [`Error::Io`].
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let index = self.find(name)?;
        let TensorInfo { dtype, shape, .. } = self.entries[index].1.clone();
        let values = match dtype {
            Dtype::F64 => Values::F64(self.numbers(index, f64::from_le_bytes)?),
            Dtype::I64 => Values::I64(self.numbers(index, i64::from_le_bytes)?),
            Dtype::U8 => Values::U8(self.numbers(index, |[byte]: [u8; 1]| byte)?),
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => {
                let mut values = Vec::new();
                self.read_f32(index, &mut values)?;
                Values::F32(values)
            }
            _ => return Err(self.stored(index).wrong_type("F32, F16, BF16, F64, I64 and U8")),
        };
        Ok(Tensor { shape, values })
    }

    /// The tensor called `name` as f32, from any floating-point type.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_as_f32(&mut self, name: &str) -> Result<Vec<f32>> {
        let index = self.find(name)?;
        let mut values = Vec::new();
        self.read_f32(index, &mut values)?;
        Ok(values)
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            Error::checkpoint(&self.path, format!("there is no tensor {name}; there are {}", super::listed(&names)))
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.entries.len()
    }

    /// Entry `index`, without its numbers.
    pub(crate) fn stored(&self, index: usize) -> Stored<'_> {
        let (name, TensorInfo { dtype, shape, .. }) = &self.entries[index];
        Stored { name, shape, dtype: *dtype, file: &self.path }
    }

    /// Reads entry `index` into `values`, which is overwritten.
    pub(crate) fn read_f32(&mut self, index: usize, values: &mut Vec<f32>) -> Result<()> {
        match self.entries[index].1.dtype {
            Dtype::F32 => self.numbers_into(index, values, f32::from_le_bytes),
            Dtype::F16 => self.numbers_into(index, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => self.numbers_into(index, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F64 => self.numbers_into(index, values, |bytes| f64::from_le_bytes(bytes) as f32),
            _ => self.stored(index).check_float(),
        }
    }

    fn numbers<T, const N: usize>(&mut self, index: usize, number: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let mut values = Vec::new();
        self.numbers_into(index, &mut values, number)?;
        Ok(values)
    }

    /// Reads entry `index`, whose numbers take `N` bytes each.
    fn numbers_into<T, const N: usize>(
        &mut self,
        index: usize,
        values: &mut Vec<T>,
        number: impl Fn([u8; N]) -> T,
    ) -> Result<()> {
        let failed = |source| Error::io("reading", &self.path, source);
        let (name, TensorInfo { data_offsets: (from, to), .. }) = &self.entries[index];
        let (mut left, length) = (to - from, (to - from) / N);
        values.clear();
        values.try_reserve_exact(length).map_err(|_| {
            Error::checkpoint(&self.path, format!("tensor {name} of {length} numbers does not fit into memory"))
        })?;
        self.file.seek(SeekFrom::Start(self.start + *from as u64)).map_err(failed)?;
        let mut bytes = vec![0; left.min(CHUNK)];
        while left > 0 {
            let part = &mut bytes[..left.min(CHUNK)];
            self.file.read_exact(part).map_err(failed)?;
            values.extend(part.as_chunks::<N>().0.iter().map(|&bytes| number(bytes)));
            left -= part.len();
        }
        Ok(())
    }
}

/// Writes tensors into a safetensors file, which is replaced whole or not at all.
///
/// # Errors
/// [`Error::Io`]; [`Error::Checkpoint`] when a name is there twice.
pub fn write_tensors(path: impl AsRef<Path>, tensors: &[(&str, &Tensor)]) -> Result<()> {
    // Wide types first, so that every tensor is aligned for its type.
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.values.dtype().bitsize()));
    let entries: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| ((*name).to_owned(), tensor.values.dtype(), tensor.shape.clone()))
        .collect();
    write_stream(path.as_ref(), entries, |index, writer| tensors[index].1.values.write(writer))
}

/// Writes a safetensors file whose tensors `write` passes on one after the other, in the order of `entries`.
pub(crate) fn write_stream(
    path: &Path,
    entries: Vec<(String, Dtype, Vec<usize>)>,
    mut write: impl FnMut(usize, &mut AtomicWriter<'_>) -> Result<()>,
) -> Result<()> {
    let invalid = |problem: String| Error::checkpoint(path, problem);
    let count = entries.len();
    let mut names = std::collections::HashSet::new();
    let mut end = 0_usize;
    let mut infos = Vec::with_capacity(count);
    for (name, dtype, shape) in entries {
        if !names.insert(name.clone()) || name == "__metadata__" {
            return Err(invalid(format!("the name {name} cannot be given to a tensor: it is reserved or there twice")));
        }
        let start = end;
        let bytes = shape.iter().try_fold(dtype.bitsize() / 8, |bytes, &size| bytes.checked_mul(size));
        end = bytes
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| invalid(format!("tensor {name} of shape {shape:?} is too large")))?;
        infos.push((name, TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    let format = [("format".to_owned(), "pt".to_owned())];
    let header = Metadata::new(Some(format.into()), infos)
        .map_err(|error| error.to_string())
        .and_then(|metadata| serde_json::to_string(&metadata).map_err(|error| error.to_string()))
        .map_err(|error| invalid(format!("the header cannot be written: {error}")))?;
    // Tensors start at a multiple of eight bytes.
    let length = header.len().next_multiple_of(8);
    write_atomically(path, |writer| {
        writer.bytes(&(length as u64).to_le_bytes())?;
        writer.bytes(header.as_bytes())?;
        writer.bytes(&[b' '; 8][..length - header.len()])?;
        (0..count).try_for_each(|index| write(index, writer))
    })
}

/// Little-endian f32.
pub(crate) fn write_f32(writer: &mut AtomicWriter<'_>, values: &[f32]) -> Result<()> {
    write_numbers(writer, values, |value| value.to_le_bytes())
}

fn write_numbers<T: Copy + bytemuck::Pod, const N: usize>(
    writer: &mut AtomicWriter<'_>,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> Result<()> {
    if cfg!(target_endian = "little") {
        return writer.bytes(bytemuck::cast_slice(values));
    }
    values.iter().try_for_each(|&value| writer.bytes(&bytes(value)))
}
