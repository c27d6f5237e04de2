//! Opening checkpoints, and reading exactly the weights that a model has.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::config::MaeConfig;
use crate::weights::{ParameterKind, ParameterSpec, TensorFile, listed, names};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest index that is read: one entry per tensor.
const MAX_INDEX: u64 = 100 << 20;

/// A checkpoint that is open for reading: a configuration, and weights in one file or several.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Option<MaeConfig>,
    files: Vec<TensorFile>,
    /// By published name: the file, and the entry in it.
    tensors: BTreeMap<String, (usize, usize)>,
}

/// `model.safetensors.index.json`: which shard has which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors` or `model.safetensors.index.json` with its shards; or one
    /// `.safetensors` or `.index.json` file, with the `config.json` beside it if there is one.
    ///
    /// Headers are checked here; weights are read by [`Checkpoint::read_into`].
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for what is missing, damaged, or of another format, and then says what was found and what to do;
    /// [`Error::Config`] for a `config.json` that does not work; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let invalid = |problem: String| Error::checkpoint(path, problem);
        if !path.exists() {
            let mut problem = "there is no such file or folder".to_owned();
            if is_hub_id(path) {
                problem += &format!(
                    "; if it is a model of the Hugging Face hub, fetch it first (hf download {} --local-dir FOLDER) and give the \
                     folder",
                    path.display()
                );
            }
            return Err(invalid(problem));
        }
        let folder = path.is_dir();
        let (config, weights) = if folder {
            (path.join(CONFIG), Self::weights_of(path)?)
        } else {
            (path.with_file_name(CONFIG), path.to_path_buf())
        };
        if folder && !config.exists() {
            return Err(invalid(format!(
                "the folder has no {CONFIG}; a checkpoint has {CONFIG} and {WEIGHTS} in one folder"
            )));
        }
        let config = if config.exists() { Some(MaeConfig::from_file(&config)?) } else { None };
        let files = if weights.to_string_lossy().ends_with(".index.json") {
            open_shards(&weights)?
        } else {
            vec![TensorFile::open(&weights)?]
        };
        let tensors = by_published_name(path, &files)?;
        Ok(Self { path: path.to_path_buf(), config, files, tensors })
    }

    /// The file with the weights, or with their index, of a folder.
    fn weights_of(folder: &Path) -> Result<PathBuf> {
        for name in [WEIGHTS, INDEX] {
            if folder.join(name).exists() {
                return Ok(folder.join(name));
            }
        }
        let pickle =
            ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().find(|name| folder.join(name).exists());
        Err(Error::checkpoint(
            folder,
            match pickle {
                Some(name) => format!(
                    "the folder has {name}, a PyTorch pickle, and no {WEIGHTS}; save the model from Python with \
                     safe_serialization=True"
                ),
                None => format!("the folder has neither {WEIGHTS} nor {INDEX}"),
            },
        ))
    }

    /// Where the checkpoint lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration; only a single file may lack one.
    #[must_use]
    pub fn config(&self) -> Option<&MaeConfig> {
        self.config.as_ref()
    }

    /// The configuration.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when there is none.
    pub fn require_config(&self) -> Result<&MaeConfig> {
        self.config().ok_or_else(|| {
            Error::checkpoint(&self.path, format!("there is no {CONFIG} beside the file; put the model's there"))
        })
    }

    /// The published names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of the tensor with this published name.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|&(file, entry)| self.files[file].entries()[entry].shape.as_slice())
    }

    /// Whether there is a decoder; without one, this is an encoder for features and classification.
    #[must_use]
    pub fn has_decoder(&self) -> bool {
        self.names().any(names::is_decoder)
    }

    /// Reads the parameters `specs`, and calls `put` with the place and the numbers of each, in their order.
    ///
    /// The checkpoint must have exactly these tensors in these shapes. When only an encoder is asked for, it may also have a
    /// decoder, a `classifier` and a `pooler`. Everything is checked before the first call; one tensor is held at a time.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names missing, unexpected and mis-shaped tensors, tensors whose type is not a
    /// floating-point number and the first that has a number that is not finite; [`Error::Io`]; what `put` returns.
    pub fn read_into(
        &mut self,
        specs: &[ParameterSpec],
        mut put: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check(specs)?;
        for spec in specs {
            let (file, entry) = self.find(&spec.name)?;
            self.files[file].check_float(entry)?;
        }
        let mut values = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let (file, entry) = self.find(&spec.name)?;
            let file = &mut self.files[file];
            file.read_f32(entry, &mut values)?;
            if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                return Err(Error::checkpoint(
                    file.path(),
                    format!(
                        "tensor {} has {} as element {place}; the model is damaged, or did not survive its training",
                        file.entries()[entry].name,
                        values[place]
                    ),
                ));
            }
            if spec.kind == ParameterKind::Position && values.iter().all(|&value| value == 0.0) {
                tracing::warn!(
                    "checkpoint {}: the position table {} is zero everywhere, as some versions of transformers leave it in \
                     models built from a configuration; such a model cannot tell patches apart",
                    self.path.display(),
                    spec.name
                );
            }
            put(index, &values)?;
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(usize, usize)> {
        self.tensors
            .get(name)
            .copied()
            .ok_or_else(|| Error::checkpoint(&self.path, format!("the tensor {name} is missing")))
    }

    /// Holds names and shapes against what a model has, as [`Checkpoint::read_into`] does before it reads.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names missing, unexpected and mis-shaped tensors.
    pub fn check(&self, specs: &[ParameterSpec]) -> Result<()> {
        let wanted: HashSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let with_decoder = wanted.iter().any(|name| names::is_decoder(name));
        let missing: Vec<&str> =
            specs.iter().map(|spec| spec.name.as_str()).filter(|&name| !self.tensors.contains_key(name)).collect();
        if with_decoder && !self.has_decoder() && missing.iter().all(|name| names::is_decoder(name)) {
            return Err(Error::checkpoint(
                &self.path,
                "this is an encoder without the decoder: it can embed pictures and be probed or fine-tuned, but reconstruction \
                 and pre-training need a checkpoint of the whole autoencoder (ViTMAEForPreTraining)",
            ));
        }
        let unexpected: Vec<&str> = self
            .names()
            .filter(|name| !wanted.contains(name))
            .filter(|name| with_decoder || !(names::is_decoder(name) || names::is_head(name)))
            .collect();
        let shapes = specs.iter().filter_map(|spec| {
            let found = self.shape(&spec.name).filter(|&found| found != spec.shape)?;
            Some((spec, format!("{} (expected {:?}, found {found:?})", spec.name, spec.shape)))
        });
        let (shaped, shapes): (Vec<&ParameterSpec>, Vec<String>) = shapes.unzip();
        if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
            return Ok(());
        }
        let mut problem = String::from("its tensors are not those of the model");
        let shapes: Vec<&str> = shapes.iter().map(String::as_str).collect();
        for (what, mut list) in [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)] {
            if !list.is_empty() {
                // As data flows: embeddings, encoder, decoder.
                list.sort_unstable_by_key(|name| (names::is_decoder(name), *name));
                problem += &format!("; {what}: {}", listed(&list));
            }
        }
        if shaped.iter().any(|spec| spec.kind == ParameterKind::Position) {
            problem += "; the position tables differ because image_size or patch_size are not those of the model";
        }
        if self.names().any(names::is_original) {
            problem += "; these are the names of the original implementation or of timm, which are not read yet: convert \
                        the file with transformers";
        }
        Err(Error::checkpoint(&self.path, problem))
    }
}

/// Every tensor of every file under its published name.
fn by_published_name(path: &Path, files: &[TensorFile]) -> Result<BTreeMap<String, (usize, usize)>> {
    let mut tensors: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (place, file) in files.iter().enumerate() {
        for (index, entry) in file.entries().iter().enumerate() {
            let name = names::published(&entry.name);
            if let Some(&(other, before)) = tensors.get(&name) {
                return Err(Error::checkpoint(
                    path,
                    format!(
                        "{} in {} and {} in {} are the same parameter",
                        files[other].entries()[before].name,
                        files[other].path().display(),
                        entry.name,
                        file.path().display()
                    ),
                ));
            }
            tensors.insert(name, (place, index));
        }
    }
    Ok(tensors)
}

/// Opens the shards that an index names, which must lie beside it and have the tensors that it says.
fn open_shards(index: &Path) -> Result<Vec<TensorFile>> {
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

/// Whether a path that is not there could be the name of a model on the Hugging Face hub, `owner/name`.
fn is_hub_id(path: &Path) -> bool {
    let mut components = path.components();
    let (owner, name, more) = (components.next(), components.next(), components.next());
    matches!((owner, name, more), (Some(Component::Normal(_)), Some(Component::Normal(_)), None))
        && path.extension().is_none()
}

/// Whether `name` is a file's name and nothing else, on any system.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
}
