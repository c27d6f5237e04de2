//! What decides what a run does, and `recipe.json`, which keeps it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::MaeConfig;
use crate::data::jpeg_decoder;
use crate::train::run::checkpoint::Fingerprints;
use crate::train::{OptimizerSettings, Schedule, Sharding};
use crate::{Error, Result};

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
#[derive(Clone, Debug)]
pub struct PretrainSettings {
    /// A folder of pictures, shards, or `synthetic[:COUNT]`.
    pub data: OsString,
    /// Pictures whose reconstruction loss is taken at every checkpoint, in the same forms.
    pub validation: Option<OsString>,
    /// Where the files go.
    pub out: PathBuf,
    /// Where TensorBoard's events go, if not to `out`.
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
    pub optimizer: OptimizerSettings,
    /// The decay of a moving average of the weights, which checkpoints then have as well.
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
    pub resume: bool,
    /// Images in the model at a time, at most.
    pub micro_batch: usize,
    /// Whether backward computes activations again instead of keeping them.
    pub recompute: bool,
    /// What each of several processes keeps a share of.
    pub sharding: Sharding,
    /// Threads that decode pictures.
    pub workers: usize,
    /// What the run is on, for the record.
    pub device: String,
    /// Operations per second of a process' device in matrix products, of which the model FLOPs utilisation is a share.
    pub peak_flops: Option<f64>,
    /// The fingerprint that the pictures must have, where a recipe says so.
    pub data_fingerprint: Option<String>,
    /// The same of the validation pictures.
    pub validation_fingerprint: Option<String>,
}

/// `recipe.json`: the settings of a run as they were resolved, and what else its result depends on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recipe {
    vitmae_version: String,
    device: String,
    data: String,
    /// [`Source::fingerprint`](crate::data::Source::fingerprint): names, classes and sizes, of many pictures those of a sample.
    data_fingerprint: String,
    pictures: usize,
    #[serde(default)]
    validation: Option<String>,
    #[serde(default)]
    validation_fingerprint: Option<String>,
    from: Option<PathBuf>,
    length: RunLength,
    /// The step that the run went on from, where these settings are those of its second part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resumed_at: Option<u64>,
    total_steps: u64,
    steps_per_epoch: f64,
    batch_size: usize,
    accumulate: usize,
    base_learning_rate: f64,
    #[serde(default)]
    learning_rate: Option<f64>,
    minimum_learning_rate: f64,
    warmup_epochs: Option<f64>,
    schedule: Schedule,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    clip_norm: Option<f64>,
    #[serde(default)]
    ema: Option<f64>,
    checkpoint_every: Option<u64>,
    keep_checkpoints: Option<usize>,
    picture_every: Option<u64>,
    seed: u64,
    micro_batch: usize,
    recompute: bool,
    #[serde(default)]
    shard_optimizer: bool,
    /// What unpacked JPEG files.
    #[serde(default)]
    jpeg_decoder: Option<String>,
    #[serde(default)]
    processes: Option<usize>,
    config: serde_json::Value,
}

/// What a run found out about itself.
pub(super) struct Resolved {
    pub fingerprints: Fingerprints,
    pub pictures: usize,
    pub total_steps: u64,
    pub steps_per_epoch: f64,
    pub schedule: Schedule,
    pub processes: usize,
}

impl Recipe {
    /// Of a run that has done `done` steps before.
    pub fn new(settings: &PretrainSettings, resolved: Resolved, done: u64) -> Self {
        let Resolved { fingerprints, pictures, total_steps, steps_per_epoch, schedule, processes } = resolved;
        let OptimizerSettings { betas, epsilon, weight_decay, clip_norm } = settings.optimizer;
        let text = |text: &OsString| text.to_string_lossy().into_owned();
        Self {
            vitmae_version: env!("CARGO_PKG_VERSION").to_owned(),
            device: settings.device.clone(),
            data: text(&settings.data),
            data_fingerprint: fingerprints.data,
            pictures,
            validation: settings.validation.as_ref().map(text),
            validation_fingerprint: fingerprints.validation,
            from: settings.from.clone(),
            length: settings.length,
            resumed_at: (done > 0).then_some(done),
            total_steps,
            steps_per_epoch,
            batch_size: settings.batch_size,
            accumulate: settings.accumulate,
            base_learning_rate: settings.base_learning_rate,
            learning_rate: settings.learning_rate,
            minimum_learning_rate: settings.minimum_learning_rate,
            warmup_epochs: settings.warmup_epochs,
            schedule,
            betas,
            epsilon,
            weight_decay,
            clip_norm,
            ema: settings.average_decay,
            checkpoint_every: settings.checkpoint_every,
            keep_checkpoints: settings.keep_checkpoints,
            picture_every: settings.picture_every,
            seed: settings.seed,
            micro_batch: settings.micro_batch,
            recompute: settings.recompute,
            shard_optimizer: settings.sharding == Sharding::Optimizer,
            jpeg_decoder: Some(jpeg_decoder().to_owned()),
            processes: Some(processes),
            config: serde_json::from_str(&settings.config.to_json()).unwrap_or_default(),
        }
    }
}

/// The largest recipe that is read.
const MAX_RECIPE: u64 = 1 << 20;

impl PretrainSettings {
    /// The settings of the run whose `recipe.json` this is, for a run in the folder `out`. On the same device, with the same
    /// version and the same pictures, it gives the same run bit for bit; of another version the log says so.
    ///
    /// # Errors
    /// [`Error::Config`] for a file that is no recipe; [`Error::Io`].
    pub fn from_recipe(path: impl AsRef<Path>, out: impl Into<PathBuf>) -> Result<Self> {
        let path = path.as_ref();
        let invalid = |problem: String| Error::Config(format!("{} is no recipe of a run: {problem}", path.display()));
        let text = crate::files::read_text(path, MAX_RECIPE)?;
        let recipe: Recipe = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
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
                "the run of the recipe went on from step {step}: if it was given another length then, a run in one piece differs"
            );
        }
        let config = MaeConfig::from_json(&recipe.config.to_string()).map_err(|error| invalid(error.to_string()))?;
        let Recipe { betas, epsilon, weight_decay, clip_norm, .. } = recipe;
        Ok(Self {
            data: recipe.data.into(),
            validation: recipe.validation.map(Into::into),
            out: out.into(),
            events: None,
            config,
            from: recipe.from,
            length: recipe.length,
            batch_size: recipe.batch_size,
            accumulate: recipe.accumulate,
            base_learning_rate: recipe.base_learning_rate,
            learning_rate: recipe.learning_rate,
            minimum_learning_rate: recipe.minimum_learning_rate,
            warmup_epochs: recipe.warmup_epochs,
            optimizer: OptimizerSettings { betas, epsilon, weight_decay, clip_norm },
            average_decay: recipe.ema,
            checkpoint_every: recipe.checkpoint_every,
            keep_checkpoints: recipe.keep_checkpoints,
            picture_every: recipe.picture_every,
            seed: recipe.seed,
            resume: false,
            micro_batch: recipe.micro_batch,
            recompute: recipe.recompute,
            sharding: if recipe.shard_optimizer { Sharding::Optimizer } else { Sharding::Nothing },
            workers: 0,
            device: recipe.device,
            peak_flops: None,
            data_fingerprint: Some(recipe.data_fingerprint),
            validation_fingerprint: recipe.validation_fingerprint,
        })
    }

    /// Refuses numbers that no run works with.
    ///
    /// # Errors
    /// [`Error::Config`] that names the first one.
    pub(super) fn check(&self) -> Result<()> {
        let OptimizerSettings { betas, epsilon, weight_decay, clip_norm } = self.optimizer;
        let not_negative = |number: f64| number.is_finite() && number >= 0.0;
        let positive = |number: Option<f64>| number.is_none_or(|number| number.is_finite() && number > 0.0);
        let share = |number: f64| (0.0..1.0).contains(&number);
        let steps = match self.length {
            RunLength::Epochs(length) | RunLength::Steps(length) => length,
        };
        let rhythms = [self.checkpoint_every, self.picture_every, self.keep_checkpoints.map(|keep| keep as u64)];
        let numbers = [
            ("the base learning rate must be at least 0", not_negative(self.base_learning_rate)),
            ("the learning rate must be above 0", positive(self.learning_rate)),
            ("the minimum of the learning rate must be at least 0", not_negative(self.minimum_learning_rate)),
            ("the warm-up must be at least 0 epochs", self.warmup_epochs.is_none_or(not_negative)),
            ("betas must be from 0 to below 1", share(betas.0) && share(betas.1)),
            ("epsilon must be at least 0", not_negative(epsilon)),
            ("the weight decay must be at least 0", not_negative(weight_decay)),
            ("the greatest gradient norm must be above 0", positive(clip_norm)),
            ("the decay of the average must be from 0 to below 1", self.average_decay.is_none_or(share)),
            ("a run needs at least one step", steps > 0),
            (
                "steps between checkpoints and pictures, and kept checkpoints, must be at least 1",
                !rhythms.contains(&Some(0)),
            ),
        ];
        match numbers.into_iter().find(|(_, holds)| !holds) {
            Some((problem, _)) => Err(Error::Config(problem.to_owned())),
            None => Ok(()),
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
