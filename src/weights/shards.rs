//! Safetensors files as a store: one file, or the shards that an index names.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};

use serde::Deserialize;

use crate::weights::store::{Store, Stored};
use crate::weights::{TensorFile, listed};
use crate::{Error, Result};

/// The largest index that is read: one entry per tensor.
const MAX_INDEX: u64 = 100 << 20;

/// The tensors of several files, one file after the other.
#[derive(Debug)]
pub(crate) struct Shards {
    files: Vec<TensorFile>,
    /// Of each tensor: its file, and its entry there.
    places: Vec<(usize, usize)>,
}

/// `model.safetensors.index.json`: which shard has which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Shards {
    /// Opens a `.safetensors` file, or the shards that an `.index.json` names: they must lie beside it and have the tensors
    /// that it says.
    pub fn open(path: &Path) -> Result<Self> {
        let files = if path.to_string_lossy().ends_with(".index.json") {
            open_index(path)?
        } else {
            vec![TensorFile::open(path)?]
        };
        let places = files.iter().enumerate().flat_map(|(at, file)| (0..file.count()).map(move |entry| (at, entry)));
        Ok(Self { places: places.collect(), files })
    }
}

impl Store for Shards {
    fn count(&self) -> usize {
        self.places.len()
    }

    fn tensor(&self, index: usize) -> Stored<'_> {
        let (file, entry) = self.places[index];
        self.files[file].stored(entry)
    }

    fn read_f32(&mut self, index: usize, values: &mut Vec<f32>) -> Result<()> {
        let (file, entry) = self.places[index];
        self.files[file].read_f32(entry, values)
    }
}

fn open_index(index: &Path) -> Result<Vec<TensorFile>> {
    let invalid = |problem: String| Error::checkpoint(index, problem);
    let text = crate::files::read_text(index, MAX_INDEX)?;
    let Index { weight_map } =
        serde_json::from_str(&text).map_err(|error| invalid(format!("the index cannot be read: {error}")))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    if shards.is_empty() {
        return Err(invalid("the index names no tensors".into()));
    }
    let mut files = Vec::with_capacity(shards.len());
    for (shard, tensors) in shards {
        if !is_file_name(shard) {
            return Err(invalid(format!("the shard {shard:?} is not the name of a file beside the index")));
        }
        let path = index.with_file_name(shard);
        if !path.exists() {
            return Err(invalid(format!("the shard {shard} is missing; fetch it into the same folder")));
        }
        let file = TensorFile::open(path)?;
        let absent: Vec<&str> = tensors.into_iter().filter(|name| file.shape(name).is_none()).collect();
        if !absent.is_empty() {
            let absent = listed(&absent);
            return Err(invalid(format!("the shard {shard} lacks tensors that the index says it has: {absent}")));
        }
        files.push(file);
    }
    Ok(files)
}

/// Whether `name` is a file's name and nothing else, on any system.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
}
