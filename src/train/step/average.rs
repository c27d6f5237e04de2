//! A moving average of the weights beside the weights themselves.

use std::path::Path;

use crate::model::Objective;
use crate::ops::{Backend, Real};
use crate::train::Trainer;
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// An exponential moving average of all trained parameters.
#[derive(Debug)]
pub(in crate::train) struct Average<B: Backend> {
    /// What an update keeps of the average.
    pub decay: f64,
    /// In the layout of the parameters, without the position tables.
    pub weights: B::Buffer<B::Master>,
}

impl<B: Backend, O: Objective<B>> Trainer<B, O> {
    /// Keeps an exponential moving average of the weights from now on, which starts as the weights are: each update makes it
    /// `decay * average + (1 - decay) * weights`. It takes as much memory as the master weights.
    ///
    /// # Errors
    /// [`Error::Config`] for a decay outside `[0, 1)`; [`Error::Device`] when there is not enough memory.
    pub fn keep_average(&mut self, decay: f64) -> Result<()> {
        if !(0.0..1.0).contains(&decay) {
            return Err(Error::Config(format!(
                "the decay of an average of weights is from 0 to below 1, found {decay}"
            )));
        }
        let (backend, parameters) = self.model.parameters_mut();
        let length = parameters.layout().trained();
        let mut weights = backend.buffer(length)?;
        // From zero, without memory: the weights themselves.
        backend.weights_average(length, 0.0, &mut weights, &parameters.master)?;
        self.forget_passes();
        self.average = Some(Average { decay, weights });
        Ok(())
    }

    /// Whether an average is kept.
    #[must_use]
    pub fn keeps_average(&self) -> bool {
        self.average.is_some()
    }

    /// Writes a model with the averaged weights into a folder, as
    /// [`MaeForPreTraining::save_pretrained`](crate::model::MaeForPreTraining::save_pretrained) does with its own; nothing where
    /// none are kept.
    ///
    /// # Errors
    /// [`Error::Io`]; what the folder held before stays whole.
    pub fn save_average(&self, folder: impl AsRef<Path>) -> Result<()> {
        match &self.average {
            Some(average) => self.model.save_with(folder.as_ref(), &average.weights),
            None => Ok(()),
        }
    }

    /// Reads the average that [`Trainer::save_average`] wrote; one must be kept.
    pub(in crate::train) fn load_average(&mut self, folder: &Path) -> Result<()> {
        let Some(average) = &mut self.average else { return Ok(()) };
        let (backend, layout) = (self.model.backend(), self.model.parameters().layout());
        let mut values = vec![B::Master::default(); layout.trained()];
        Checkpoint::open(folder)?.read_into(layout.specs(), |index, read| {
            let range = layout.range(index);
            if let Some(values) = values.get_mut(range) {
                values.iter_mut().zip(read).for_each(|(value, &read)| *value = B::Master::from_f64(read.into()));
            }
            Ok(())
        })?;
        backend.upload(&mut average.weights, &values)
    }
}
