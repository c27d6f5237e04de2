//! Opening checkpoints, and reading exactly the weights that a model has.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::path::{Component, Path, PathBuf};

use crate::config::MaeConfig;
use crate::weights::dialects::{Dialect, View, is_decoder, is_head};
use crate::weights::shards::Shards;
use crate::weights::store::{Store, Stored};
use crate::weights::{Group, ParameterSpec, listed};
use crate::{Error, Result};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint that is open for reading: a configuration, and weights in one file or several.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Option<MaeConfig>,
    store: Box<dyn Store>,
    dialect: &'static Dialect,
    /// By published name.
    parameters: BTreeMap<String, Place>,
}

/// Where a parameter lies.
#[derive(Debug)]
struct Place {
    /// The tensor in the store.
    tensor: usize,
    view: View,
    /// The parameter's, or the stored tensor's if that cannot be seen so.
    shape: Vec<usize>,
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
        let store = Box::new(Shards::open(&weights)?);
        let dialect = Dialect::of(&*store);
        let parameters = by_published_name(path, &*store, dialect)?;
        Ok(Self { path: path.to_path_buf(), config, store, dialect, parameters })
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

    /// The published names of the parameters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.keys().map(String::as_str)
    }

    /// The shape of the parameter with this published name.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.parameters.get(name).map(|place| place.shape.as_slice())
    }

    /// Whether there is a decoder; without one, this is an encoder for features and classification.
    #[must_use]
    pub fn has_decoder(&self) -> bool {
        self.names().any(is_decoder)
    }

    /// Reads the parameters `specs`, and calls `put` with the place and the numbers of each, in their order.
    ///
    /// The checkpoint must have exactly these parameters in these shapes. When only an encoder is asked for, it may also have a
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
            self.store.tensor(self.find(&spec.name)?.0).check_float()?;
        }
        let (mut numbers, mut held, mut scratch) = (Vec::new(), None, Vec::new());
        for (index, spec) in specs.iter().enumerate() {
            let (tensor, view) = self.find(&spec.name)?;
            // Parameters that share a tensor follow each other.
            if held != Some(tensor) {
                self.store.read_f32(tensor, &mut numbers)?;
                held = Some(tensor);
            }
            let Stored { name, shape, file, .. } = self.store.tensor(tensor);
            if let Some(place) = numbers.iter().position(|number| !number.is_finite()) {
                return Err(Error::checkpoint(
                    file,
                    format!(
                        "tensor {name} has {} as element {place}; the model is damaged, or did not survive its training",
                        numbers[place]
                    ),
                ));
            }
            let values = view.of(shape, &numbers, &mut scratch);
            if spec.group == Group::Table && values.iter().all(|&value| value == 0.0) {
                tracing::warn!(
                    "checkpoint {}: the position table {} is zero everywhere, as some versions of transformers leave it in \
                     models built from a configuration; such a model cannot tell patches apart",
                    self.path.display(),
                    spec.name
                );
            }
            put(index, values)?;
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(usize, View)> {
        let place = self.parameters.get(name);
        place
            .map(|place| (place.tensor, place.view))
            .ok_or_else(|| Error::checkpoint(&self.path, format!("the tensor {name} is missing")))
    }

    /// Holds names and shapes against what a model has, as [`Checkpoint::read_into`] does before it reads.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names missing, unexpected and mis-shaped tensors.
    pub fn check(&self, specs: &[ParameterSpec]) -> Result<()> {
        let wanted: HashSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let with_decoder = wanted.iter().any(|name| is_decoder(name));
        let missing: Vec<&str> =
            specs.iter().map(|spec| spec.name.as_str()).filter(|&name| !self.parameters.contains_key(name)).collect();
        if with_decoder && !self.has_decoder() && missing.iter().all(|name| is_decoder(name)) {
            return Err(Error::checkpoint(
                &self.path,
                "this is an encoder without the decoder: it can embed pictures and be probed or fine-tuned, but reconstruction \
                 and pre-training need a checkpoint of the whole autoencoder (ViTMAEForPreTraining)",
            ));
        }
        // Published names, with the file's own in parentheses where it has others.
        let both = |name: &str, stored: &str| {
            if name == stored { name.to_owned() } else { format!("{name} ({stored})") }
        };
        let missing: Vec<String> = missing.into_iter().map(|name| both(name, &self.dialect.stored(name))).collect();
        let unexpected = self.parameters.iter().filter(|(name, _)| !wanted.contains(name.as_str()));
        let unexpected: Vec<String> = unexpected
            .filter(|(name, _)| with_decoder || !(is_decoder(name) || is_head(name)))
            .map(|(name, place)| both(name, self.store.tensor(place.tensor).name))
            .collect();
        let shapes = specs.iter().filter_map(|spec| {
            let place = self.parameters.get(&spec.name).filter(|place| place.shape != spec.shape)?;
            let Stored { name, shape, .. } = self.store.tensor(place.tensor);
            let stored = if place.view == View::Whole { String::new() } else { format!(", stored as {shape:?}") };
            let name = both(&spec.name, name);
            Some((spec, format!("{name} (expected {:?}, found {:?}{stored})", spec.shape, place.shape)))
        });
        let (shaped, shapes): (Vec<&ParameterSpec>, Vec<String>) = shapes.unzip();
        if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
            return Ok(());
        }
        let mut problem = String::from("its tensors are not those of the model");
        for (what, mut list) in [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)] {
            if !list.is_empty() {
                // As data flows: embeddings, encoder, decoder.
                list.sort_unstable_by(|a, b| (is_decoder(a), a).cmp(&(is_decoder(b), b)));
                problem += &format!("; {what}: {}", listed(&list));
            }
        }
        if shaped.iter().any(|spec| spec.group == Group::Table) {
            problem += "; the position tables differ because image_size or patch_size are not those of the model";
        }
        if !self.dialect.is_published() {
            problem += &format!("; in parentheses are the file's own names, which are those of {}", self.dialect.name);
        }
        Err(Error::checkpoint(&self.path, problem))
    }
}

/// Every parameter of a store under its published name.
fn by_published_name(path: &Path, store: &dyn Store, dialect: &Dialect) -> Result<BTreeMap<String, Place>> {
    let mut parameters = BTreeMap::new();
    for tensor in 0..store.count() {
        let stored = store.tensor(tensor);
        for (name, view) in dialect.published(stored.name) {
            let shape = view.shape(stored.shape).unwrap_or_else(|| stored.shape.to_vec());
            match parameters.entry(name) {
                Entry::Vacant(entry) => {
                    entry.insert(Place { tensor, view, shape });
                }
                Entry::Occupied(entry) => {
                    let before = store.tensor(entry.get().tensor);
                    let which = |stored: Stored<'_>| format!("{} in {}", stored.name, stored.file.display());
                    let problem = format!("{} and {} are the same parameter", which(before), which(stored));
                    return Err(Error::checkpoint(path, problem));
                }
            }
        }
    }
    Ok(parameters)
}

/// Whether a path that is not there could be the name of a model on the Hugging Face hub, `owner/name`.
fn is_hub_id(path: &Path) -> bool {
    let mut components = path.components();
    let (owner, name, more) = (components.next(), components.next(), components.next());
    matches!((owner, name, more), (Some(Component::Normal(_)), Some(Component::Normal(_)), None))
        && path.extension().is_none()
}
