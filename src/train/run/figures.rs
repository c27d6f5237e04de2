//! What a run leaves: pictures, curves and checkpoints.

use std::fs;

use crate::data::{ImageProcessor, Source};
use crate::figures::{Curve, reconstruction_grid};
use crate::model::{Extras, ImageValues, Images, Masking, Purpose, WorkspaceShape};
use crate::ops::{Backend, MaskingShape};
use crate::train::run::Run;
use crate::train::run::checkpoint::{self, TrainerState};
use crate::train::run::metrics::MetricsFile;
use crate::train::run::report::Event;
use crate::train::run::run_dir;
use crate::train::run::tensorboard::EventFile;
use crate::{Error, Result};

/// What a run writes to all the time.
pub(in crate::train) struct Files {
    pub metrics: MetricsFile,
    pub events: EventFile,
    /// Held as long as the run: no other writes to its folder.
    pub _lock: run_dir::RunLock,
}

/// Pictures in a reconstruction grid.
const SHOWN: usize = 6;

impl<B: Backend> Run<'_, B> {
    /// Writes `reconstruction-STEP.png`.
    pub(in crate::train) fn draw(&mut self, watch: &mut dyn FnMut(Event<'_>) -> bool) -> Result<()> {
        let Some(files) = &mut self.files else { return Ok(()) };
        let model = self.trainer.model();
        let config = model.config();
        let image = config.image();
        let (mean, std) = self.processor.normalization();
        let batch = self.shown.len() / image.length();
        let images = Images {
            batch,
            channels: image.channels,
            height: image.height,
            width: image.width,
            values: ImageValues::Bytes { values: &self.shown, mean: &mean, std: &std },
        };
        let masking = Masking::random(config.mask_ratio, self.settings.seed);
        let keep = MaskingShape::new(batch, image.patches(), config.mask_ratio)?.keep;
        let mut workspace = model.workspace(WorkspaceShape {
            batch,
            image,
            keep,
            purpose: Purpose::Predict,
            interpolation: None,
            recompute: false,
        })?;
        let result = model.reconstruct_in(&mut workspace, &images, &masking, Extras::default())?;
        let labels: Vec<String> = (1..=batch).map(|index| format!("picture {index}")).collect();
        let mut grid = reconstruction_grid(config, image, &images, &result, (&mean, &std), &labels)?;
        grid.footer(&format!("Step {}, loss {:.4} on these pictures.", self.done, result.loss));
        let path = self.settings.out.join(format!("reconstruction-{}.png", self.done));
        grid.save(&path)?;
        let png = fs::read(&path).map_err(|error| Error::io("reading", &path, error))?;
        files.events.picture(self.done, "reconstruction", &png)?;
        watch(Event::Wrote(&path));
        self.picture = Some(path);
        self.draw_curve(watch)
    }

    pub(in crate::train) fn draw_curve(&self, watch: &mut dyn FnMut(Event<'_>) -> bool) -> Result<()> {
        if self.history.is_empty() || self.files.is_none() {
            return Ok(());
        }
        let points: Vec<(u64, f64)> =
            self.history.iter().map(|metrics| (metrics.step, metrics.loss.unwrap_or(f64::NAN))).collect();
        let path = self.settings.out.join("loss.svg");
        Curve::new("Training loss", "mean squared error of hidden patches", &points).save(&path)?;
        watch(Event::Wrote(&path));
        Ok(())
    }

    /// Writes `checkpoint-STEP/`, whole or not at all. Collective where the optimiser's state is shared out.
    pub(in crate::train) fn save(&mut self, watch: &mut dyn FnMut(Event<'_>) -> bool) -> Result<()> {
        let moments = self.trainer.gather_moments()?;
        if self.files.is_none() {
            self.saved = Some((self.done, self.settings.out.join(checkpoint::folder_name(self.done))));
            return Ok(());
        }
        let mut state = TrainerState::new(self.done, self.settings, self.fingerprint.clone());
        state.validation_loss = self.last_validation;
        state.total_steps = self.schedule.total_steps;
        let folder = checkpoint::save(&self.settings.out, &self.trainer, moments.as_ref(), &self.processor, &state)?;
        watch(Event::Wrote(&folder));
        self.saved = Some((self.done, folder));
        let usual = if self.settings.checkpoint_every.is_none() { Some(1) } else { None };
        match self.settings.keep_checkpoints.or(usual) {
            Some(keep) => checkpoint::remove_older(&self.settings.out, self.done, keep.max(1)),
            None => Ok(()),
        }
    }

    /// Saves what was trained since the last checkpoint, where the disk or the pictures failed and not the training. Where each
    /// process has a share of the optimiser's state, all have to be there for that.
    pub(in crate::train) fn rescue(&mut self, error: Error, watch: &mut dyn FnMut(Event<'_>) -> bool) -> Error {
        let shares = self.trainer.shards_optimizer();
        // The others come here when they are told.
        let error = if shares { self.processes.tell(error) } else { error };
        let fine = matches!(
            error,
            Error::Io { .. } | Error::Data { .. } | Error::Picture { .. } | Error::Peer { .. } | Error::Distributed(_)
        );
        let saved = self.saved.as_ref().is_some_and(|(step, _)| *step == self.done);
        let wanted = fine && !saved && self.done > 0;
        let possible = if shares { self.processes.all_save(wanted) } else { wanted };
        if possible && let Err(second) = self.save(watch) {
            tracing::warn!("step {} could not be saved either: {second}", self.done);
        }
        self.explain(error)
    }

    /// Adds to an error where the last whole checkpoint is.
    pub(in crate::train) fn explain(&self, error: Error) -> Error {
        if self.files.is_none() {
            return error;
        }
        let problem = match error {
            Error::Training(problem) => problem,
            other => other.to_string(),
        };
        Error::Training(match &self.saved {
            Some((step, folder)) => format!("{problem}; the checkpoint of step {step} is whole: {}", folder.display()),
            None => format!("{problem}; no checkpoint had been written yet"),
        })
    }
}

/// The first pictures of a source that can be decoded, as the model sees them at inference.
pub(in crate::train) fn shown_pictures(source: &Source, processor: &ImageProcessor) -> Result<Vec<u8>> {
    let mut pixels = Vec::new();
    let mut found = 0;
    let mut problem = None;
    for index in 0..source.len().min(10 * SHOWN) {
        if found == SHOWN {
            break;
        }
        match source.read(index).and_then(|picture| processor.process(&picture)) {
            Ok(picture) => {
                pixels.extend_from_slice(&picture.pixels);
                found += 1;
            }
            Err(error) => problem = Some(error),
        }
    }
    match problem {
        Some(error) if found == 0 => Err(error),
        _ => Ok(pixels),
    }
}
