//! `checkpoint-STEP/` folders: the model as transformers saves it, and beside it what a run needs to go on.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::MaeConfig;
use crate::data::{ImageProcessor, jpeg_decoder};
use crate::ops::Backend;
use crate::train::Trainer;
use crate::train::data_parallel::moments::Moments;
use crate::train::settings::{Fingerprints, PretrainSettings};
use crate::weights::{Checkpoint, TensorFile};
use crate::{Error, Result};

const STATE: &str = "trainer_state.json";
/// The model with the averaged weights, where the run keeps them.
const AVERAGE: &str = "ema";
const MOMENTS: &str = "optimizer.safetensors";
const WEIGHTS: &str = "model.safetensors";
/// What the name of a checkpoint begins with.
pub(in crate::train) const PREFIX: &str = "checkpoint-";

/// What a run needs to be resumed, besides weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    pub step: u64,
    pub updates: u64,
    data_fingerprint: String,
    /// The pictures that validation losses are of.
    #[serde(default)]
    validation: Option<String>,
    /// Theirs, as that of the pictures that are learned from.
    #[serde(default)]
    validation_fingerprint: Option<String>,
    /// How long the run was to be, which its learning rates follow from.
    #[serde(default)]
    pub total_steps: u64,
    /// CRC-32C of the files beside this one.
    #[serde(default)]
    checksums: BTreeMap<String, u32>,
    /// The loss of the validation pictures, where it was taken at this step.
    #[serde(default)]
    pub validation_loss: Option<f64>,
    /// What the run was on, and what unpacked JPEG files, as far as it is known.
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    jpeg_decoder: Option<String>,
    /// The decay of the average, under the name that older versions gave it.
    #[serde(default, skip_serializing)]
    average_decay: Option<serde_json::Value>,
    /// The settings that must be the same where the run is resumed.
    #[serde(flatten)]
    settings: serde_json::Map<String, serde_json::Value>,
}

impl TrainerState {
    pub fn new(step: u64, settings: &PretrainSettings, fingerprints: Fingerprints) -> Self {
        Self {
            step,
            updates: 0,
            data_fingerprint: fingerprints.data,
            validation: settings.validation.as_ref().map(|spec| spec.to_string_lossy().into_owned()),
            validation_fingerprint: fingerprints.validation,
            total_steps: 0,
            checksums: BTreeMap::new(),
            validation_loss: None,
            device: Some(settings.device.clone()).filter(|device| !device.is_empty()),
            jpeg_decoder: Some(jpeg_decoder().to_owned()),
            average_decay: None,
            settings: settings.resumed_fields(),
        }
    }

    /// Refuses to resume with settings under which the run would not be the same run.
    pub fn check(&self, fingerprints: &Fingerprints, settings: &PretrainSettings) -> Result<()> {
        let now = Self::new(self.step, settings, fingerprints.clone());
        for (what, then, now) in
            [("device", &self.device, &now.device), ("JPEG decoder", &self.jpeg_decoder, &now.jpeg_decoder)]
        {
            if let (Some(then), Some(now)) = (then, now)
                && then != now
            {
                tracing::warn!("the run's {what} was {then} and is {now} now: it is resumed, though not bit for bit");
            }
        }
        let text = |name: &Option<String>| name.clone().unwrap_or_else(|| "not given".to_owned());
        // One set may be at several paths, and another one at the same. Older checkpoints have the path alone.
        let validation = match (&self.validation_fingerprint, &now.validation_fingerprint) {
            (Some(then), Some(now)) => ("val (fingerprint of names, sizes and classes)", then.clone(), now.clone()),
            _ => ("val", text(&self.validation), text(&now.validation)),
        };
        let data =
            ("data (fingerprint of names, sizes and classes)", self.data_fingerprint.clone(), now.data_fingerprint);
        let mut then = self.settings.clone();
        if let Some(decay) = &self.average_decay {
            then.insert("ema".to_owned(), decay.clone());
        }
        same(settings.compared(&then).chain([data, validation]))
    }
}

/// Refuses to resume with another model than the run's; the message names the first field of `config.json` that differs.
pub(crate) fn check_config(then: &MaeConfig, now: &MaeConfig) -> Result<()> {
    let fields = |config: &MaeConfig| -> serde_json::Map<String, serde_json::Value> {
        serde_json::from_str(&config.to_json()).unwrap_or_default()
    };
    let (then, now) = (fields(then), fields(now));
    let shown = |value: Option<&serde_json::Value>| value.map_or("not given".to_owned(), ToString::to_string);
    let names = then.keys().chain(now.keys());
    same(names.map(|name| (name.as_str(), shown(then.get(name)), shown(now.get(name)))))
}

/// Refuses to go on with pictures that are prepared otherwise than those that the checkpoint in `folder` has seen.
pub(crate) fn check_processor(folder: &Path, now: &ImageProcessor) -> Result<()> {
    let Some(then) = ImageProcessor::of_checkpoint(folder)? else { return Ok(()) };
    same([("preprocessing", then.to_json().to_string(), now.to_json().to_string())])
}

/// Refuses the first setting `(name, then, now)` that is not as it was.
fn same<'a>(settings: impl IntoIterator<Item = (&'a str, String, String)>) -> Result<()> {
    match settings.into_iter().find(|(_, then, now)| then != now) {
        None => Ok(()),
        Some((what, then, now)) => Err(Error::Config(format!(
            "cannot resume: the run's {what} was {then} and is {now} now; give the same, or start another run"
        ))),
    }
}

/// The model of the run in `out`, as its latest whole checkpoint has it; nothing where there is no checkpoint.
///
/// # Errors
/// [`Error::Io`] and [`Error::Checkpoint`] for a folder that cannot be read, or without a whole checkpoint.
pub fn config_of_run(out: &Path) -> Result<Option<MaeConfig>> {
    latest(out)?.map(|(_, folder)| MaeConfig::from_file(folder.join("config.json"))).transpose()
}

/// Refuses to resume the run in `out` from the checkpoint of `step`, unless this is the newest whole checkpoint of the run.
///
/// # Errors
/// [`Error::Io`] for a folder that cannot be read; [`Error::Checkpoint`] for a checkpoint that is damaged, or none;
/// [`Error::Config`] for one that is not the last.
pub fn check_last_checkpoint(out: &Path, step: u64) -> Result<()> {
    let newest_first = all(out)?;
    let Some((_, chosen)) = newest_first.iter().find(|(other, _)| *other == step) else {
        return Err(Error::checkpoint(
            out.join(folder_name(step)),
            format!("it has no {STATE}: it is no checkpoint of a run"),
        ));
    };
    check_whole(chosen)?;
    let newer = newest_first.iter().take_while(|(other, _)| *other > step);
    match newer.map(|(_, folder)| folder).find(|folder| check_whole(folder).is_ok()) {
        None => Ok(()),
        Some(last) => Err(Error::Config(format!(
            "a run goes on from its last checkpoint, which is {}; move what is newer away first",
            last.display()
        ))),
    }
}

/// The name of the folder of a step.
pub(crate) fn folder_name(step: u64) -> String {
    format!("{PREFIX}{step}")
}

/// The latest checkpoint in `out` that is whole, if there is any checkpoint. Damaged ones are named in the log.
///
/// # Errors
/// What is wrong with the latest one, if none is whole.
pub(crate) fn latest(out: &Path) -> Result<Option<(u64, PathBuf)>> {
    let mut first = None;
    for (step, folder) in all(out)? {
        match check_whole(&folder) {
            Ok(()) => return Ok(Some((step, folder))),
            Err(error) => {
                tracing::warn!("{} is damaged, looking for an older checkpoint: {error}", folder.display());
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(None), Err)
}

/// Whether there is any checkpoint in `out`, whole or not.
pub(crate) fn exists(out: &Path) -> Result<bool> {
    Ok(!all(out)?.is_empty())
}

/// Every checkpoint in `out`, the latest first.
fn all(out: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("reading", out, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io("reading", out, error))?.path();
        let step = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|step| step.parse::<u64>().ok().filter(|number| number.to_string() == step));
        // A folder without a state is not one of ours: whole ones appear by a rename.
        if let Some(step) = step
            && path.join(STATE).exists()
        {
            found.push((step, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

/// The checkpoint in `out` with the lowest validation loss, and that loss; of equal ones the latest.
pub(crate) fn best(out: &Path) -> Result<Option<(f64, PathBuf)>> {
    let mut best: Option<(f64, PathBuf)> = None;
    for (_, folder) in all(out)? {
        // A damaged one is none, here as elsewhere.
        let loss = read_state(&folder).ok().and_then(|state| state.validation_loss);
        if let Some(loss) = loss
            && best.as_ref().is_none_or(|(lowest, _)| loss < *lowest)
        {
            best = Some((loss, folder));
        }
    }
    Ok(best)
}

/// Removes the checkpoints in `out` before `step`, but for as many of the newest that `keep` are left with that of `step`, and
/// for the best.
pub(crate) fn remove_older(out: &Path, step: u64, keep: usize) -> Result<()> {
    let best = best(out)?.map(|(_, folder)| folder);
    let older = all(out)?.into_iter().filter(|(other, _)| *other < step);
    for (_, folder) in older.skip(keep - 1).filter(|(_, folder)| Some(folder) != best.as_ref()) {
        remove(&set_aside(&folder)?)?;
    }
    Ok(())
}

/// Gives a checkpoint that is to be removed a temporary name, in one step: whatever ends the removal that follows, no folder is
/// left that looks like a checkpoint and is not whole, and the next run in this folder clears what is left.
fn set_aside(folder: &Path) -> Result<PathBuf> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = folder.with_file_name(format!(".{name}.old.tmp"));
    if aside.exists() {
        remove(&aside)?;
    }
    fs::rename(folder, &aside).map_err(|error| Error::io("renaming", folder, error))?;
    Ok(aside)
}

fn remove(folder: &Path) -> Result<()> {
    fs::remove_dir_all(folder).map_err(|error| Error::io("removing", folder, error))
}

/// Whether the files of a checkpoint are what was written.
fn check_whole(folder: &Path) -> Result<()> {
    let state = read_state(folder)?;
    Checkpoint::open(folder)?.require_config()?;
    TensorFile::open(folder.join(MOMENTS))?;
    for (name, expected) in &state.checksums {
        let path = folder.join(name);
        if checksum(&path)? != *expected {
            return Err(Error::checkpoint(path, "it is not what was written: its checksum differs"));
        }
    }
    Ok(())
}

/// CRC-32C of a file.
fn checksum(path: &Path) -> Result<u32> {
    let unreadable = |error| Error::io("reading", path, error);
    let mut file = fs::File::open(path).map_err(unreadable)?;
    let (mut buffer, mut sum) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => return Ok(sum),
            length => sum = crc32c::crc32c_append(sum, &buffer[..length]),
        }
    }
}

fn read_state(folder: &Path) -> Result<TrainerState> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(|error| Error::io("reading", &path, error))?;
    serde_json::from_str(&text).map_err(|error| Error::checkpoint(&path, error.to_string()))
}

/// Writes the folder of a step under a temporary name and renames it when all of it is on the disk. `moments` are those of all
/// processes, where each has a share of them.
pub(crate) fn save<B: Backend>(
    out: &Path,
    trainer: &Trainer<B>,
    moments: Option<&Moments<B::Master>>,
    processor: &ImageProcessor,
    state: &TrainerState,
) -> Result<PathBuf> {
    let folder = out.join(folder_name(state.step));
    let temporary = out.join(format!(".{}.tmp", folder_name(state.step)));
    let written = write(&temporary, trainer, moments, processor, state).and_then(|()| {
        let mut replaced = None;
        if folder.exists() {
            if !folder.join(STATE).exists() {
                let cause = std::io::Error::other("there is a folder of that name that is no checkpoint of a run");
                return Err(Error::io("replacing", &folder, cause));
            }
            replaced = Some(set_aside(&folder)?);
        }
        fs::rename(&temporary, &folder).map_err(|error| Error::io("renaming", &temporary, error))?;
        crate::files::sync_folder(out).map_err(|error| Error::io("writing", out, error))?;
        replaced.map_or(Ok(()), |replaced| remove(&replaced))
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
    moments: Option<&Moments<B::Master>>,
    processor: &ImageProcessor,
    state: &TrainerState,
) -> Result<()> {
    if folder.exists() {
        remove(folder)?;
    }
    fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, error))?;
    trainer.model().save_pretrained(folder)?;
    processor.save(folder)?;
    trainer.save_moments(&folder.join(MOMENTS), moments)?;
    if trainer.keeps_average() {
        trainer.save_average(folder.join(AVERAGE))?;
        processor.save(folder.join(AVERAGE))?;
    }
    let average = format!("{AVERAGE}/{WEIGHTS}");
    let mut checksums = BTreeMap::new();
    for name in [WEIGHTS, MOMENTS, &average].into_iter().filter(|name| folder.join(name).exists()) {
        checksums.insert(name.to_owned(), checksum(&folder.join(name))?);
    }
    let state = TrainerState { updates: trainer.state()?.updates, checksums, ..state.clone() };
    crate::files::write_json(&folder.join(STATE), &state)
}

/// Reads moments and state into a trainer whose model was loaded from the same folder, where `check` agrees with the state. The
/// moments are returned for the other processes.
pub(crate) fn load_trainer<B: Backend>(
    trainer: &mut Trainer<B>,
    folder: &Path,
    check: impl FnOnce(&TrainerState) -> Result<()>,
) -> Result<(TrainerState, Moments<B::Master>)> {
    let path = folder.join(STATE);
    let state = read_state(folder)?;
    if folder.file_name() != Some(std::ffi::OsStr::new(&folder_name(state.step))) {
        return Err(Error::checkpoint(
            &path,
            format!("it is of step {}, and its folder's name says otherwise", state.step),
        ));
    }
    check(&state)?;
    let moments = trainer.read_moments(&folder.join(MOMENTS))?;
    trainer.set_moments(&moments, state.updates)?;
    trainer.load_average(&folder.join(AVERAGE))?;
    Ok((state, moments))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that is killed while it removes a checkpoint leaves nothing that looks like one, and the next run clears the rest.
    #[test]
    fn a_removal_that_ends_half_way_leaves_no_checkpoint() {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join(folder_name(3));
        fs::create_dir(&folder).unwrap();
        for name in [STATE, MOMENTS, WEIGHTS] {
            fs::write(folder.join(name), "some").unwrap();
        }
        let aside = set_aside(&folder).unwrap();
        fs::remove_file(aside.join(STATE)).unwrap();
        let names = || fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        assert!(!names().iter().any(|name| name.to_string_lossy().starts_with(PREFIX)), "{:?}", names());
        assert_eq!(all(out.path()).unwrap(), []);
        let taken = crate::train::run::run_dir::take(out.path(), false).unwrap();
        assert_eq!(names(), [".lock"]);
        drop(taken);
    }
}
