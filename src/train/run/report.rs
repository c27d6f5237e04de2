//! What a run tells, under way and at its end.

use std::path::{Path, PathBuf};

use crate::train::Metrics;

/// What a run tells whoever watches it.
#[derive(Debug)]
pub enum Event<'a> {
    /// The run starts, or resumes, at a step.
    Started {
        /// Steps of the whole run.
        total_steps: u64,
        /// Steps done before.
        done: u64,
        /// Pictures in the set.
        pictures: usize,
        /// Trained parameters.
        parameters: usize,
    },
    /// A step is done.
    Step(&'a Metrics),
    /// A file or folder was written.
    Wrote(&'a Path),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct PretrainReport {
    /// Steps done in all.
    pub steps: u64,
    /// Whether it was asked to stop before its end.
    pub interrupted: bool,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The last reconstruction picture.
    pub picture: Option<PathBuf>,
    /// The loss curve.
    pub curve: PathBuf,
    /// The mean loss of the first and of the last tenth of the steps.
    pub loss: Option<(f64, f64)>,
    /// Pictures that could not be decoded.
    pub skipped_pictures: usize,
    /// Steps that were skipped because they were not finite.
    pub skipped_steps: u64,
    /// Validation losses that were left out because their pictures could not be read.
    pub failed_validations: u64,
    /// The kept checkpoint with the lowest validation loss, and that loss.
    pub best: Option<(f64, PathBuf)>,
}

/// The mean loss of the first and last tenth of the steps.
pub(in crate::train) fn first_and_last(history: &[Metrics]) -> Option<(f64, f64)> {
    let losses: Vec<f64> = history.iter().filter_map(|metrics| metrics.loss).collect();
    let tenth = losses.len().div_ceil(10);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    (tenth > 0).then(|| (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..])))
}
