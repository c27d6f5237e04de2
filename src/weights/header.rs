//! The head of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.
//!
//! All of it is checked against the file before anything of a size that it claims is allocated. The safetensors crate's own
//! reader wants the whole file in memory, lets the second of two equal names win, and does not name the tensor that is wrong.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::{Error, Result};

/// The format's own bound on the length of a header.
const MAX_HEADER: u64 = 100_000_000;
/// More dimensions than any tensor has.
const MAX_RANK: usize = 32;

/// Reads and checks the header of the safetensors file `path` of `length` bytes. Returns the tensors in the order of the file, and
/// where the bytes start that their offsets count from.
pub(crate) fn read(path: &Path, file: &mut File, length: u64) -> Result<(Vec<(String, TensorInfo)>, u64)> {
    let invalid = |problem: String| Error::checkpoint(path, problem);
    let mut start = Vec::new();
    file.take(8 + 64).read_to_end(&mut start).map_err(|source| Error::io("reading", path, source))?;
    if let Some(problem) = other_format(&start) {
        return Err(invalid(problem.into()));
    }
    let Some((count, _)) = start.split_first_chunk::<8>() else {
        return Err(invalid(format!(
            "the file has only {length} bytes: it is empty or truncated; fetch or write it again"
        )));
    };
    let count = u64::from_le_bytes(*count);
    let room = length.saturating_sub(8);
    if count > MAX_HEADER {
        return Err(invalid(format!(
            "its header claims {count} bytes, and {MAX_HEADER} are allowed: this is not a safetensors file"
        )));
    }
    if count > room {
        return Err(invalid(format!(
            "its header claims {count} bytes, and {room} follow: the file is truncated, or not a safetensors file"
        )));
    }
    let mut header = start.split_off(8);
    header.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    let rest = count - header.len() as u64;
    file.take(rest).read_to_end(&mut header).map_err(|source| Error::io("reading", path, source))?;
    let text = std::str::from_utf8(&header).map_err(|error| invalid(format!("its header is not UTF-8: {error}")))?;
    let Header(mut tensors) =
        serde_json::from_str(text).map_err(|error| invalid(format!("its header cannot be read: {error}")))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);

    for (name, info) in &tensors {
        if info.shape.len() > MAX_RANK {
            let problem = format!("tensor {name} has {} sizes; at most {MAX_RANK} sizes are read", info.shape.len());
            return Err(invalid(problem));
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
        let (from, to) = info.data_offsets;
        let found = to.checked_sub(from);
        if bits.is_none() || bits.map(|bits| bits / 8) != found {
            return Err(invalid(format!(
                "tensor {name} ({} {:?}) does not fit its bytes {from}..{to}: the file is damaged",
                info.dtype, info.shape
            )));
        }
    }
    let metadata = Metadata::new(None, tensors.clone())
        .map_err(|error| invalid(format!("its tensors overlap or leave holes ({error}): the file is damaged")))?;
    let (expected, found) = (metadata.data_len() as u64, room - count);
    if expected != found {
        let what =
            if found < expected { "the file is truncated; fetch or write it again" } else { "the file is damaged" };
        return Err(invalid(format!("its tensors take {expected} bytes, and {found} follow the header: {what}")));
    }
    Ok((tensors, 8 + count))
}

/// What a file is that is not safetensors, from its first bytes.
fn other_format(start: &[u8]) -> Option<&'static str> {
    // The lengths of some headers start with these bytes too, but then JSON follows.
    let is = |magic: &[u8]| start.starts_with(magic) && start.get(8) != Some(&b'{');
    if is(b"version https://git-lfs") {
        Some(
            "this is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or fetch the file again",
        )
    } else if is(b"PK\x03\x04") || (is(b"\x80") && matches!(start.get(1), Some(2..=5))) {
        Some(
            "this is a PyTorch pickle (.bin, .pth), not safetensors; save the model from Python with \
             safe_serialization=True",
        )
    } else if is(b"\x89HDF\r\n\x1a\n") {
        Some("this is an HDF5 file (Keras), not safetensors; save the model in PyTorch's format from Python")
    } else if is(b"<!DOCTYPE") || is(b"<html") {
        Some(
            "this is a web page, not safetensors: the download went to a page that describes the file; fetch the file itself",
        )
    } else {
        None
    }
}

/// The tensors of a header in the order of the file. A plain map would let the second of two equal names win.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object with an entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut tensors = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()
                            .map_err(|error| de::Error::custom(format!("__metadata__: {error}")))?;
                    } else {
                        let info = map
                            .next_value()
                            .map_err(|error: A::Error| de::Error::custom(format!("tensor {name}: {error}")))?;
                        tensors.push((name.clone(), info));
                    }
                    if let Some(name) = seen.replace(name) {
                        return Err(de::Error::custom(format!("{name} is there twice")));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}
