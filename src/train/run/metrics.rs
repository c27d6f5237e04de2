//! `metrics.jsonl`: one object per optimiser step.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Optimiser steps, from 1.
    pub step: u64,
    /// Epochs after this step, in fractions.
    pub epoch: f64,
    /// Mean squared error over hidden patches, before the update; null where it was not finite.
    pub loss: Option<f64>,
    /// The learning rate of the update.
    pub learning_rate: f64,
    /// Images of the step over its time, waiting for data included.
    pub images_per_second: f64,
    /// The norm of all gradients, before clipping; null where it was not finite.
    pub gradient_norm: Option<f64>,
    /// The share of the step that was spent waiting for data.
    pub data_wait: f64,
    /// Operations per second of the reference implementation as a share of the device's peak; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// The loss of the validation pictures after this step, where it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Present where the step was skipped because loss or gradients were not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// Appends to `metrics.jsonl`.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsFile {
    /// Opens the file, keeping the lines up to step `resume_from` and giving them back.
    pub fn open(path: &Path, resume_from: u64) -> Result<(Self, Vec<Metrics>)> {
        let mut kept = Vec::new();
        if resume_from > 0 && path.exists() {
            let file = File::open(path).map_err(|error| Error::io("reading", path, error))?;
            for line in BufReader::new(file).split(b'\n') {
                let line = line.map_err(|error| Error::io("reading", path, error))?;
                match serde_json::from_slice::<Metrics>(&line) {
                    Ok(metrics) if metrics.step <= resume_from => kept.push(metrics),
                    // Steps after the checkpoint are done again.
                    Ok(_) => (),
                    // The last line may be cut where the run was killed.
                    Err(_) => tracing::warn!(
                        "{}: left out a line that is no step: {:?}",
                        path.display(),
                        String::from_utf8_lossy(&line)
                    ),
                }
            }
        }
        crate::files::write_atomically(path, |file| {
            kept.iter().try_for_each(|metrics| file.bytes(format!("{}\n", to_line(metrics)).as_bytes()))
        })?;
        let file = OpenOptions::new().append(true).open(path).map_err(|error| Error::io("opening", path, error))?;
        Ok((Self { path: path.to_owned(), file: BufWriter::new(file) }, kept))
    }

    /// Appends a line and hands it to the operating system.
    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        writeln!(self.file, "{}", to_line(metrics))
            .and_then(|()| self.file.flush())
            .map_err(|error| Error::io("writing", &self.path, error))
    }
}

fn to_line(metrics: &Metrics) -> String {
    // Numbers, text and options: cannot fail.
    serde_json::to_string(metrics).unwrap_or_default()
}
