//! The settings of a run: one struct, and one table that says of each field how it is given, what it may be, how it is shown
//! and where it must be the same. Flags, `recipe.json`, the state of a checkpoint and messages follow from the two.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::MaeConfig;
use crate::data::{ImageProcessor, jpeg_decoder};
use crate::ops::Backend;
use crate::train::{OptimizerSettings, Schedule, Sharding};
use crate::{Error, Result};

/// What a setting may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number of at least 1.
    Count,
    /// A whole number.
    Whole,
    /// A number of at least 0.
    NotNegative,
    /// A number above 0.
    Positive,
    /// A number from 0 to below 1.
    Share,
    /// Two of these.
    Shares,
    /// A flag without a value.
    Switch,
    /// A file or folder; its flag is the command's own.
    Path,
}

impl Kind {
    /// The value of a flag's text.
    ///
    /// # Errors
    /// What was expected.
    pub fn parse(self, text: &str) -> std::result::Result<Value, String> {
        let value = match self {
            Self::Count | Self::Whole => text.parse::<u64>().map(Value::from).unwrap_or_default(),
            _ => text.parse::<f64>().map(Value::from).unwrap_or_default(),
        };
        if self.holds(&value) { Ok(value) } else { Err(format!("expected {}", self.expected())) }
    }

    fn holds(self, value: &Value) -> bool {
        let number = value.as_f64();
        let share = |value: &Value| value.as_f64().is_some_and(|number| (0.0..1.0).contains(&number));
        match self {
            Self::Count => value.as_u64().is_some_and(|count| count > 0),
            Self::Whole => value.is_u64(),
            Self::NotNegative => number.is_some_and(|number| number >= 0.0),
            Self::Positive => number.is_some_and(|number| number > 0.0),
            Self::Share => share(value),
            Self::Shares => value.as_array().is_some_and(|values| values.iter().all(share)),
            Self::Switch => value.is_boolean(),
            Self::Path => value.is_string(),
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Count => "a whole number of at least 1",
            Self::Whole => "a whole number",
            Self::NotNegative => "a number of at least 0",
            Self::Positive => "a number above 0",
            Self::Share => "a number from 0 to below 1",
            Self::Shares => "numbers from 0 to below 1",
            Self::Switch => "true or false",
            Self::Path => "a path",
        }
    }
}

/// Where a setting must be what it is elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MustMatch {
    /// Nowhere.
    Nothing,
    /// On all processes of a run.
    Processes,
    /// Where a run is resumed.
    Resume,
    /// On all processes, and where a run is resumed.
    Everywhere,
}

/// One field of [`PretrainSettings`].
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// In `recipe.json` and in the state of a checkpoint.
    pub name: &'static str,
    /// On the command line, without dashes; empty where there is none.
    pub flag: &'static str,
    /// The original's spellings of the flag.
    pub aliases: &'static [&'static str],
    /// What stands for the value in the help.
    pub value_name: &'static str,
    /// The help. A default that follows from other things stands in it.
    pub help: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// Where it must be the same.
    pub must_match: MustMatch,
}

impl Field {
    const fn new(name: &'static str, kind: Kind, must_match: MustMatch) -> Self {
        Self { name, flag: "", aliases: &[], value_name: "", help: "", kind, must_match }
    }

    const fn flag(self, flag: &'static str, value_name: &'static str, help: &'static str) -> Self {
        Self { flag, value_name, help, ..self }
    }

    const fn aliases(self, aliases: &'static [&'static str]) -> Self {
        Self { aliases, ..self }
    }

    /// Its name in messages: the flag, else the field.
    fn label(&self) -> &'static str {
        if self.flag.is_empty() { self.name } else { self.flag }
    }
}

/// Every setting that has a value of its own, in the order of the help.
pub const FIELDS: &[Field] = &[
    Field::new("batch_size", Kind::Count, MustMatch::Everywhere)
        .flag("batch-size", "N", "Pictures in a batch, of all processes together: their number must divide it")
        .aliases(&["batch_size"]),
    Field::new("accumulate", Kind::Count, MustMatch::Everywhere)
        .flag("accumulate", "N", "Batches in an optimiser step; gives what one large batch gives")
        .aliases(&["accum_iter", "accum-iter"]),
    Field::new("base_learning_rate", Kind::NotNegative, MustMatch::Resume).flag(
        "blr",
        "F",
        "Base learning rate: that of 256 pictures in a step",
    ),
    Field::new("learning_rate", Kind::Positive, MustMatch::Resume).flag(
        "lr",
        "F",
        "The highest learning rate itself; --blr has no effect then",
    ),
    Field::new("minimum_learning_rate", Kind::NotNegative, MustMatch::Everywhere)
        .flag("min-lr", "F", "The learning rate at the end of the cosine")
        .aliases(&["min_lr"]),
    Field::new("warmup_epochs", Kind::NotNegative, MustMatch::Resume)
        .flag("warmup-epochs", "F", "Epochs of linear warm-up [default: a twentieth of the run, at most 40]")
        .aliases(&["warmup_epochs"]),
    Field::new("weight_decay", Kind::NotNegative, MustMatch::Everywhere)
        .flag("weight-decay", "F", "Weight decay of matrices; biases, norms and tokens do not decay")
        .aliases(&["weight_decay"]),
    Field::new("clip_norm", Kind::Positive, MustMatch::Everywhere).flag(
        "clip-grad",
        "F",
        "Scale gradients down to this norm where they are larger",
    ),
    Field::new("betas", Kind::Shares, MustMatch::Everywhere),
    Field::new("epsilon", Kind::NotNegative, MustMatch::Everywhere),
    Field::new("ema", Kind::Share, MustMatch::Everywhere).flag(
        "ema",
        "DECAY",
        "Keep a moving average of the weights with this decay, such as 0.9999; checkpoints then hold it in ema/",
    ),
    Field::new("checkpoint_every", Kind::Count, MustMatch::Processes).flag(
        "checkpoint-every",
        "STEPS",
        "Steps between checkpoints [default: a tenth of the run]",
    ),
    Field::new("keep_checkpoints", Kind::Count, MustMatch::Nothing).flag(
        "keep",
        "N",
        "The newest checkpoints that are kept [default: all with --checkpoint-every, else one]",
    ),
    Field::new("picture_every", Kind::Count, MustMatch::Nothing).flag(
        "picture-every",
        "STEPS",
        "Steps between reconstruction pictures [default: a tenth of the run]",
    ),
    Field::new("seed", Kind::Whole, MustMatch::Everywhere).flag(
        "seed",
        "N",
        "Decides weights, order, crops and masks",
    ),
    Field::new("micro_batch", Kind::Count, MustMatch::Nothing).flag(
        "micro-batch",
        "N",
        "Images in the model at a time: more is faster up to a point and needs more memory; the result is the same \
         [default: 16 on the CPU, the batch on a GPU]",
    ),
    Field::new("recompute", Kind::Switch, MustMatch::Nothing).flag(
        "recompute",
        "",
        "Compute activations again in backward instead of keeping them: less memory, a third more time, the same result",
    ),
    Field::new("shard_optimizer", Kind::Switch, MustMatch::Processes).flag(
        "shard-optimizer",
        "",
        "Share the optimiser's state out among the processes (as ZeRO-1): 8 bytes per parameter less on each of many, the \
         same result, more to exchange",
    ),
    Field::new("from", Kind::Path, MustMatch::Resume).flag("from", "CKPT", "Start from these weights"),
];

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunLength {
    /// Passes over the pictures.
    Epochs(u64),
    /// Optimiser steps.
    Steps(u64),
}

/// Everything that decides what a run does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PretrainSettings {
    /// A folder of pictures, shards, or `synthetic[:COUNT]`.
    #[serde(with = "text")]
    pub data: OsString,
    /// Pictures whose reconstruction loss is taken at every checkpoint, in the same forms.
    #[serde(default, with = "optional_text")]
    pub validation: Option<OsString>,
    /// Where the files go.
    #[serde(skip)]
    pub out: PathBuf,
    /// Where TensorBoard's events go, if not to `out`.
    #[serde(skip)]
    pub events: Option<PathBuf>,
    /// The model to train.
    pub config: MaeConfig,
    /// Weights to start from, instead of fresh ones.
    pub from: Option<PathBuf>,
    /// How long.
    pub length: RunLength,
    /// Pictures that are loaded and put through the model before the gradients of the next ones are added; of all processes
    /// together.
    pub batch_size: usize,
    /// Batches per optimiser step.
    pub accumulate: usize,
    /// Learning rate per 256 images of a step.
    pub base_learning_rate: f64,
    /// The highest learning rate, instead of the one that follows from `base_learning_rate`.
    pub learning_rate: Option<f64>,
    /// What the cosine ends at.
    pub minimum_learning_rate: f64,
    /// Epochs of warm-up; a twentieth of the run (at most 40 epochs) where it is `None`.
    pub warmup_epochs: Option<f64>,
    /// The optimiser's settings.
    #[serde(flatten)]
    pub optimizer: OptimizerSettings,
    /// The decay of a moving average of the weights, which checkpoints then have as well.
    #[serde(rename = "ema")]
    pub average_decay: Option<f64>,
    /// Steps between checkpoints; a tenth of the run where it is `None`.
    pub checkpoint_every: Option<u64>,
    /// How many of the newest checkpoints are kept, besides the one with the lowest validation loss. Where it is `None`, all
    /// with a given `checkpoint_every`, else one.
    pub keep_checkpoints: Option<usize>,
    /// Steps between reconstruction pictures; ten in a run where it is `None`.
    pub picture_every: Option<u64>,
    /// Decides weights, order, crops and masks.
    pub seed: u64,
    /// Whether to resume from the last checkpoint in `out`.
    #[serde(skip)]
    pub resume: bool,
    /// Images in the model at a time, at most.
    pub micro_batch: usize,
    /// Whether backward computes activations again instead of keeping them.
    pub recompute: bool,
    /// What each of several processes keeps a share of.
    #[serde(default, rename = "shard_optimizer")]
    pub sharding: Sharding,
    /// Threads that decode pictures.
    #[serde(skip)]
    pub workers: usize,
    /// What the run is on, for the record.
    pub device: String,
    /// Operations per second of a process' device in matrix products, of which the model FLOPs utilisation is a share.
    #[serde(skip)]
    pub peak_flops: Option<f64>,
    /// The fingerprint that the pictures must have, where a recipe says so.
    #[serde(skip)]
    pub data_fingerprint: Option<String>,
    /// The same of the validation pictures.
    #[serde(skip)]
    pub validation_fingerprint: Option<String>,
}

/// Paths and names of sets as text.
mod text {
    use super::*;

    pub fn serialize<S: serde::Serializer>(text: &OsString, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&text.to_string_lossy())
    }

    pub fn deserialize<'d, D: serde::Deserializer<'d>>(deserializer: D) -> std::result::Result<OsString, D::Error> {
        String::deserialize(deserializer).map(OsString::from)
    }
}

/// The same, where there may be none.
mod optional_text {
    use super::*;

    pub fn serialize<S: serde::Serializer>(
        text: &Option<OsString>,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        text.as_ref().map(|text| text.to_string_lossy()).serialize(serializer)
    }

    pub fn deserialize<'d, D: serde::Deserializer<'d>>(
        deserializer: D,
    ) -> std::result::Result<Option<OsString>, D::Error> {
        Option::<String>::deserialize(deserializer).map(|text| text.map(OsString::from))
    }
}

impl Default for PretrainSettings {
    /// The paper's recipe for ViT-B, with batches for one small machine; `data` and `out` are to be given.
    fn default() -> Self {
        Self {
            data: OsString::new(),
            validation: None,
            out: PathBuf::new(),
            events: None,
            config: MaeConfig::base(),
            from: None,
            length: RunLength::Epochs(400),
            batch_size: 64,
            accumulate: 1,
            base_learning_rate: 1.5e-4,
            learning_rate: None,
            minimum_learning_rate: 0.0,
            warmup_epochs: None,
            optimizer: OptimizerSettings::default(),
            average_decay: None,
            checkpoint_every: None,
            keep_checkpoints: None,
            picture_every: None,
            seed: 0,
            resume: false,
            micro_batch: 16,
            recompute: false,
            sharding: Sharding::Nothing,
            workers: 0,
            device: String::new(),
            peak_flops: None,
            data_fingerprint: None,
            validation_fingerprint: None,
        }
    }
}

/// What tells whether a run sees the sets that it saw before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprints {
    pub data: String,
    pub validation: Option<String>,
}

/// `recipe.json`: the settings of a run as they were resolved, and what else its result depends on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Recipe {
    pub vitmae_version: String,
    /// [`Source::fingerprint`](crate::data::Source::fingerprint): names, classes and sizes, of many pictures those of a sample.
    pub data_fingerprint: String,
    pub validation_fingerprint: Option<String>,
    pub pictures: usize,
    /// The step that the run was resumed at, where these settings are those of its second part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed_at: Option<u64>,
    pub total_steps: u64,
    pub steps_per_epoch: f64,
    pub schedule: Schedule,
    /// What unpacked JPEG files.
    pub jpeg_decoder: Option<String>,
    pub processes: Option<usize>,
    #[serde(flatten)]
    pub settings: PretrainSettings,
}

/// The largest recipe that is read.
const MAX_RECIPE: u64 = 1 << 20;

/// The fields of what serde makes an object of.
fn object(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

/// A value in a message.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(false) => "not given".to_owned(),
        Value::Bool(true) => "given".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(shown).collect::<Vec<_>>().join(", "),
        // 2 and not 2.0, and no exponents.
        Value::Number(number) if number.is_f64() => number.as_f64().unwrap_or_default().to_string(),
        other => other.to_string(),
    }
}

impl PretrainSettings {
    /// The settings of the run whose `recipe.json` this is, for a run in the folder `out`. On the same device, with the same
    /// version and the same pictures, it gives the same run bit for bit; of another version the log says so.
    ///
    /// # Errors
    /// [`Error::Config`] for a file that is not a recipe; [`Error::Io`].
    pub fn from_recipe(path: impl AsRef<Path>, out: impl Into<PathBuf>) -> Result<Self> {
        let path = path.as_ref();
        let invalid =
            |problem: String| Error::Config(format!("{} is not a recipe of a run: {problem}", path.display()));
        let text = crate::files::read_text(path, MAX_RECIPE)?;
        let given: Map<String, Value> = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        let recipe: Recipe = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        let known = object(&recipe);
        if let Some(name) = given.keys().find(|name| !known.contains_key(*name) && *name != "resumed_at") {
            return Err(invalid(format!("unknown field `{name}`")));
        }
        if recipe.vitmae_version != env!("CARGO_PKG_VERSION") {
            tracing::warn!(
                "the recipe is of version {}, and this is {}: the run may differ",
                recipe.vitmae_version,
                env!("CARGO_PKG_VERSION")
            );
        }
        if let Some(decoder) = recipe.jpeg_decoder.as_ref().filter(|decoder| *decoder != jpeg_decoder()) {
            tracing::warn!(
                "JPEG files of the recipe's run were unpacked by {decoder}, and are by {} in this build: pixels may differ by a few \
                 levels, and the run with them",
                jpeg_decoder()
            );
        }
        if let Some(processes) = recipe.processes.filter(|&processes| processes > 1) {
            tracing::info!("the recipe's run had {processes} processes: with another number sums have another order");
        }
        if let Some(step) = recipe.resumed_at {
            tracing::warn!(
                "the run of the recipe was resumed at step {step}: if it was given another length then, a run in one piece differs"
            );
        }
        let config = MaeConfig::from_json(&given.get("config").cloned().unwrap_or_default().to_string())
            .map_err(|error| invalid(error.to_string()))?;
        Ok(Self {
            out: out.into(),
            config,
            data_fingerprint: Some(recipe.data_fingerprint),
            validation_fingerprint: recipe.validation_fingerprint,
            ..recipe.settings
        })
    }

    /// These settings with some fields, by their [names](Field::name), as `values` has them.
    ///
    /// # Errors
    /// [`Error::Config`] for a value of another type.
    pub fn with(self, values: Map<String, Value>) -> Result<Self> {
        let mut fields = object(&self);
        fields.extend(values);
        let changed: Self = serde_json::from_value(fields.into()).map_err(|error| Error::Config(error.to_string()))?;
        // What is not written, or not exactly.
        let Self { data, validation, out, events, config, from, resume, workers, peak_flops, .. } = self;
        let Self { data_fingerprint, validation_fingerprint, .. } = self;
        Ok(Self {
            data,
            validation,
            out,
            events,
            config,
            from,
            resume,
            workers,
            peak_flops,
            data_fingerprint,
            validation_fingerprint,
            ..changed
        })
    }

    /// The value of a setting that no flag names, for the help.
    #[must_use]
    pub fn default_of(field: &Field) -> Option<String> {
        let own = object(&Self::default()).remove(field.name)?;
        let shows = !matches!(own, Value::Null | Value::Bool(_)) && !field.help.contains("[default:");
        shows.then(|| shown(&own))
    }

    /// The fields that must be the same where the run is resumed, by name.
    pub(super) fn resumed_fields(&self) -> Map<String, Value> {
        let mut own = object(self);
        let fields =
            FIELDS.iter().filter(|field| matches!(field.must_match, MustMatch::Resume | MustMatch::Everywhere));
        fields.map(|field| (field.name.to_owned(), own.remove(field.name).unwrap_or_default())).collect()
    }

    /// The fields that must be as `then` has them, as [`PretrainSettings::resumed_fields`] of a checkpoint: label, value then,
    /// value now. Older checkpoints lack fields, which are not compared.
    pub(super) fn compared<'a>(
        &'a self,
        then: &'a Map<String, Value>,
    ) -> impl Iterator<Item = (&'static str, String, String)> + 'a {
        let now = self.resumed_fields();
        FIELDS
            .iter()
            .filter_map(move |field| Some((field.label(), shown(then.get(field.name)?), shown(now.get(field.name)?))))
    }

    /// What several processes must have in common before they train together, in words for the message about what differs.
    pub(super) fn shared<B: Backend>(
        &self,
        processor: &ImageProcessor,
        fingerprints: &Fingerprints,
        schedule: &Schedule,
    ) -> Vec<(String, String)> {
        let set = |fingerprint: &String| format!("a set with the fingerprint {fingerprint}");
        let validation = fingerprints.validation.as_ref().map_or("not given".to_owned(), set);
        let derived = [
            ("the program's version", env!("CARGO_PKG_VERSION").to_owned()),
            ("the kind of device", kind_of_device(std::any::type_name::<B>())),
            ("the model", self.config.to_json()),
            ("--data", set(&fingerprints.data)),
            ("--val", validation),
            ("preprocessing", processor.to_json().to_string()),
            ("the number of steps (--steps, --epochs)", schedule.total_steps.to_string()),
            ("the highest learning rate (--lr, --blr)", schedule.peak.to_string()),
            ("the number of warm-up steps (--warmup-epochs)", schedule.warmup_steps.to_string()),
        ];
        let mut own = object(self);
        let same = |field: &&Field| matches!(field.must_match, MustMatch::Processes | MustMatch::Everywhere);
        let label = |field: &Field| match field.flag {
            "" => format!("the optimiser's {}", field.name),
            flag => format!("--{flag}"),
        };
        let fields = FIELDS.iter().filter(same);
        let fields = fields.map(|field| (label(field), shown(&own.remove(field.name).unwrap_or_default())));
        derived.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(fields).collect()
    }

    /// Refuses values that no run works with.
    ///
    /// # Errors
    /// [`Error::Config`] that names the first one.
    pub(super) fn check(&self) -> Result<()> {
        let optional = [self.learning_rate, self.warmup_epochs, self.optimizer.clip_norm, self.average_decay];
        // JSON has no such numbers: they would look like those that were not given.
        if optional.into_iter().flatten().any(|number| !number.is_finite()) {
            return Err(Error::Config("a learning rate, warm-up, gradient norm or average decay is not finite".into()));
        }
        let (own, usual) = (object(self), object(&Self::default()));
        for field in FIELDS {
            let value = own.get(field.name).unwrap_or(&Value::Null);
            let absent = value.is_null() && usual.get(field.name).is_none_or(Value::is_null);
            if !absent && !field.kind.holds(value) {
                let flag = if field.flag.is_empty() { String::new() } else { format!(" (--{})", field.flag) };
                return Err(Error::Config(format!(
                    "{}{flag} must be {}, and is {}",
                    field.name.replace('_', " "),
                    field.kind.expected(),
                    shown(value)
                )));
            }
        }
        match self.length {
            RunLength::Epochs(0) | RunLength::Steps(0) => Err(Error::Config("a run needs at least one step".into())),
            _ => Ok(()),
        }
    }

    /// Refuses pictures that are not those of the recipe.
    pub(super) fn check_fingerprints(&self, found: &Fingerprints) -> Result<()> {
        let validation = self.validation.as_ref().zip(found.validation.as_ref());
        let sets = [
            Some((self.data.to_string_lossy().into_owned(), &found.data, &self.data_fingerprint)),
            validation.map(|(spec, found)| {
                (format!("{} (--val)", spec.to_string_lossy()), found, &self.validation_fingerprint)
            }),
        ];
        for (source_name, found, expected) in sets.into_iter().flatten() {
            if let Some(expected) = expected
                && expected != found
            {
                let problem = format!(
                    "these are not the pictures of the recipe (fingerprint {found}, expected {expected}): their number, \
                     names, sizes or classes differ"
                );
                return Err(Error::Data { source_name, problem });
            }
        }
        Ok(())
    }
}

/// A backend by its type: `Cpu with f32`.
fn kind_of_device(backend: &str) -> String {
    let names = backend.split(['<', '>', ',']).map(str::trim).filter(|part| !part.is_empty());
    names.map(|part| part.rsplit("::").next().unwrap_or(part)).collect::<Vec<_>>().join(" with ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_named_without_its_modules() {
        assert_eq!(kind_of_device("vitmae::cpu::backend::Cpu<f32>"), "Cpu with f32");
        assert_eq!(kind_of_device("a::Cuda<b::Driver, half::bf16>"), "Cuda with Driver with bf16");
        assert_eq!(kind_of_device("Cpu"), "Cpu");
    }

    #[test]
    fn every_field_is_one_of_the_settings() {
        let own = object(&PretrainSettings::default());
        for field in FIELDS {
            assert!(own.contains_key(field.name), "{}", field.name);
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        for odd in [f64::NAN, f64::INFINITY] {
            let settings = PretrainSettings { learning_rate: Some(odd), ..PretrainSettings::default() };
            assert!(settings.check().is_err());
            let settings = PretrainSettings { base_learning_rate: odd, ..PretrainSettings::default() };
            assert!(settings.check().is_err());
        }
        PretrainSettings::default().check().unwrap();
    }
}
