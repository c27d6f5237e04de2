//! `checkpoint-STEP/` folders: the model as transformers saves it, and beside it what a run needs to go on.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::ImageProcessor;
use crate::ops::Backend;
use crate::train::Trainer;
use crate::train::pretrain::PretrainSettings;
use crate::{Error, Result};

const STATE: &str = "trainer_state.json";
const MOMENTS: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";

/// What a run needs to go on, besides weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    pub step: u64,
    pub updates: u64,
    pub seed: u64,
    pub batch_size: usize,
    pub accumulate: usize,
    pub data_fingerprint: String,
}

impl TrainerState {
    pub fn new(step: u64, settings: &PretrainSettings, data_fingerprint: String) -> Self {
        let PretrainSettings { seed, batch_size, accumulate, .. } = *settings;
        Self { step, updates: 0, seed, batch_size, accumulate, data_fingerprint }
    }

    /// Refuses to go on with settings under which the run would not be the same run.
    pub fn check(&self, fingerprint: &str, settings: &PretrainSettings) -> Result<()> {
        let now = Self::new(self.step, settings, fingerprint.to_owned());
        let differs = |what: &str, then: &dyn std::fmt::Display, now: &dyn std::fmt::Display| {
            Err(Error::Config(format!(
                "cannot resume: the run's {what} was {then} and is {now} now; give the same, or start another run"
            )))
        };
        if self.seed != now.seed {
            return differs("seed", &self.seed, &now.seed);
        }
        if self.batch_size != now.batch_size {
            return differs("batch size", &self.batch_size, &now.batch_size);
        }
        if self.accumulate != now.accumulate {
            return differs("accumulation", &self.accumulate, &now.accumulate);
        }
        if self.data_fingerprint != now.data_fingerprint {
            return differs("data", &self.data_fingerprint, &now.data_fingerprint);
        }
        Ok(())
    }
}

/// The name of the folder of a step.
pub(crate) fn folder_name(step: u64) -> String {
    format!("{PREFIX}{step}")
}

/// The checkpoint of the latest step in `out`, if there is any.
pub(crate) fn latest(out: &Path) -> Result<Option<(u64, PathBuf)>> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("reading", out, error)),
    };
    let mut latest: Option<(u64, PathBuf)> = None;
    for entry in entries {
        let path = entry.map_err(|error| Error::io("reading", out, error))?.path();
        let step = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|step| step.parse().ok());
        // A folder without a state is not one of ours: whole ones appear by a rename.
        if let Some(step) = step
            && path.join(STATE).exists()
            && latest.as_ref().is_none_or(|(best, _)| step > *best)
        {
            latest = Some((step, path));
        }
    }
    Ok(latest)
}

/// Writes the folder of a step under a temporary name and renames it when all of it is on the disk.
pub(crate) fn save<B: Backend>(
    out: &Path,
    trainer: &Trainer<B>,
    processor: &ImageProcessor,
    state: &TrainerState,
) -> Result<PathBuf> {
    let folder = out.join(folder_name(state.step));
    let temporary = out.join(format!(".{}.tmp", folder_name(state.step)));
    let written = write(&temporary, trainer, processor, state).and_then(|()| {
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|error| Error::io("replacing", &folder, error))?;
        }
        fs::rename(&temporary, &folder).map_err(|error| Error::io("renaming", &temporary, error))?;
        crate::files::sync_folder(out).map_err(|error| Error::io("writing", out, error))
    });
    if let Err(error) = written {
        // The first error is the one to tell; what is left of the attempt is only in the way.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    Ok(folder)
}

fn write<B: Backend>(
    folder: &Path,
    trainer: &Trainer<B>,
    processor: &ImageProcessor,
    state: &TrainerState,
) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| Error::io("removing", folder, error))?;
    }
    fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, error))?;
    trainer.model().save_pretrained(folder)?;
    processor.save(folder)?;
    trainer.save_moments(&folder.join(MOMENTS))?;
    let state = TrainerState { updates: trainer.state()?.updates, ..state.clone() };
    crate::files::write_json(&folder.join(STATE), &state)
}

/// Reads moments and state into a trainer whose model was loaded from the same folder.
pub(crate) fn load_trainer<B: Backend>(trainer: &mut Trainer<B>, folder: &Path) -> Result<TrainerState> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(|error| Error::io("reading", &path, error))?;
    let state: TrainerState =
        serde_json::from_str(&text).map_err(|error| Error::checkpoint(&path, error.to_string()))?;
    trainer.load_moments(&folder.join(MOMENTS), state.updates)?;
    Ok(state)
}
