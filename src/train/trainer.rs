//! One optimiser step: forward and backward in micro-batches, then AdamW.

use std::path::Path;

use safetensors::Dtype;

use crate::model::{
    Gradients, Images, MaeForPreTraining, Masking, PositionInterpolation, Purpose, Workspace, WorkspaceShape,
    download_part,
};
use crate::ops::{AdamWSettings, AdamWState, Backend, MaskingShape};
use crate::weights::{TensorFile, write_f32, write_stream};
use crate::{Error, Result};

/// What the optimiser is told once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerSettings {
    /// Decays of the first and second moment; (0.9, 0.95) in the paper.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay of matrices; 0.05 in the paper.
    pub weight_decay: f64,
    /// The greatest gradient norm; larger gradients are scaled down to it.
    pub clip_norm: Option<f64>,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self { betas: (0.9, 0.95), epsilon: 1e-8, weight_decay: 0.05, clip_norm: None }
    }
}

/// The first and second moments of AdamW, how often they were updated, and what an update depends on; all on the device.
#[derive(Debug)]
pub struct OptimizerState<B: Backend> {
    pub(crate) first: B::Buffer<B::Master>,
    pub(crate) second: B::Buffer<B::Master>,
    pub(crate) state: B::Buffer<AdamWState>,
    learning_rate: B::Buffer<f64>,
    gradient_norm: B::Buffer<B::Master>,
    /// The loss of the step so far.
    loss: B::Buffer<B::Master>,
}

impl<B: Backend> OptimizerState<B> {
    fn new(backend: &B, length: usize) -> Result<Self> {
        Ok(Self {
            first: backend.buffer(length)?,
            second: backend.buffer(length)?,
            state: backend.buffer(1)?,
            learning_rate: backend.buffer(1)?,
            gradient_norm: backend.buffer(1)?,
            loss: backend.buffer(1)?,
        })
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The loss before the update.
    pub loss: f64,
    /// The norm of all gradients, before clipping.
    pub gradient_norm: f64,
    /// False where loss or gradients were not finite, so that nothing was updated.
    pub updated: bool,
}

/// So many steps in a row without finite gradients end the run.
const NON_FINITE_LIMIT: u64 = 10;

/// Trains a model. It owns all memory that a step needs: after the first step nothing is allocated.
#[derive(Debug)]
pub struct Trainer<B: Backend> {
    model: MaeForPreTraining<B>,
    gradients: Gradients<B>,
    pub(crate) optimizer: OptimizerState<B>,
    settings: OptimizerSettings,
    workspace: Option<Workspace<B>>,
    micro_batch: usize,
    /// The device's counters as they were read last.
    last: AdamWState,
}

impl<B: Backend> Trainer<B> {
    /// A trainer that puts at most `micro_batch` images through the model at a time.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that cannot be trained (dropout); [`Error::Device`] when there is not enough memory.
    pub fn new(model: MaeForPreTraining<B>, settings: OptimizerSettings, micro_batch: usize) -> Result<Self> {
        model.config().check_trainable()?;
        if micro_batch == 0 {
            return Err(Error::Config("a micro-batch needs at least one image".into()));
        }
        let optimizer = OptimizerState::new(model.backend(), model.parameters().layout().trained())?;
        Ok(Self {
            gradients: model.gradients()?,
            optimizer,
            settings,
            workspace: None,
            micro_batch,
            last: AdamWState::default(),
            model,
        })
    }

    /// The model as it is now.
    #[must_use]
    pub fn model(&self) -> &MaeForPreTraining<B> {
        &self.model
    }

    /// Gives the model back and drops the rest.
    #[must_use]
    pub fn into_model(self) -> MaeForPreTraining<B> {
        self.model
    }

    /// How many updates there had been at the last [`Trainer::report`].
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.last.updates
    }

    /// How many steps had been skipped at the last [`Trainer::report`] because loss or gradients were not finite.
    #[must_use]
    pub fn non_finite_steps(&self) -> u64 {
        self.last.skipped
    }

    /// The device's counters, after everything that was launched.
    pub(crate) fn state(&self) -> Result<AdamWState> {
        let mut state = [AdamWState::default()];
        self.model.backend().download(&mut state, &self.optimizer.state)?;
        Ok(state[0])
    }

    /// Writes the moments under the parameters' published names: `first_moment.NAME`, `second_moment.NAME`.
    pub(crate) fn save_moments(&self, path: &Path) -> Result<()> {
        let (backend, layout) = (self.model.backend(), self.model.parameters().layout());
        let moments = [("first_moment", &self.optimizer.first), ("second_moment", &self.optimizer.second)];
        let trained: Vec<usize> =
            (0..layout.specs().len()).filter(|&index| layout.range(index).end <= layout.trained()).collect();
        let places: Vec<_> =
            moments.iter().flat_map(|moment| trained.iter().map(move |&index| (moment, index))).collect();
        let entries = places
            .iter()
            .map(|((name, _), index)| {
                let spec = &layout.specs()[*index];
                (format!("{name}.{}", spec.name), Dtype::F32, spec.shape.clone())
            })
            .collect();
        write_stream(path, entries, |place, file| {
            let ((_, arena), index) = places[place];
            write_f32(file, &download_part(backend, arena, layout.range(index))?)
        })
    }

    /// Reads what [`Trainer::save_moments`] wrote behind `updates` updates.
    pub(crate) fn load_moments(&mut self, path: &Path, updates: u64) -> Result<()> {
        let mut file = TensorFile::open(path)?;
        let (backend, layout) = (self.model.backend(), self.model.parameters().layout());
        let moments = [("first_moment", &mut self.optimizer.first), ("second_moment", &mut self.optimizer.second)];
        for (moment, arena) in moments {
            let mut values = vec![B::Master::default(); layout.trained()];
            for (index, spec) in layout.specs().iter().enumerate() {
                let range = layout.range(index);
                if range.end > layout.trained() {
                    continue;
                }
                let name = format!("{moment}.{}", spec.name);
                let read = file.read_as_f32(&name)?;
                if read.len() != range.len() {
                    let problem = format!("{name} has {} numbers instead of {}", read.len(), range.len());
                    return Err(Error::checkpoint(path, problem));
                }
                for (value, read) in values[range].iter_mut().zip(read) {
                    *value = B::master(f64::from(read));
                }
            }
            backend.upload(arena, &values)?;
        }
        self.last = AdamWState { updates, ..AdamWState::default() };
        backend.upload(&mut self.optimizer.state, &[self.last])
    }

    /// One step on one batch: [`Trainer::accumulate`] and [`Trainer::update`].
    ///
    /// # Errors
    /// As these two.
    pub fn step(&mut self, images: &Images<'_>, masking: &Masking<'_>, learning_rate: f64) -> Result<StepReport> {
        self.accumulate(images, masking, images.batch)?;
        self.update(learning_rate)
    }

    /// Adds loss and gradients of a batch that is part of a step of `images_in_step` images. The loss of the step is the mean
    /// over the hidden patches of all of them, so that many small batches give what one large batch gives.
    ///
    /// # Errors
    /// Those of images and noise that do not fit the model.
    pub fn accumulate(&mut self, images: &Images<'_>, masking: &Masking<'_>, images_in_step: usize) -> Result<()> {
        let config = self.model.config();
        let image = images.check(config)?;
        let patches = image.patches();
        let mask = masking.check(images.batch, patches)?;
        let shape = WorkspaceShape {
            batch: self.micro_batch.min(images.batch),
            image,
            keep: mask.keep,
            purpose: Purpose::Train,
            interpolation: Some(PositionInterpolation::Grid),
        };
        let fits = |workspace: &Workspace<B>| {
            let made_for = workspace.shape();
            made_for.batch >= shape.batch && WorkspaceShape { batch: shape.batch, ..*made_for } == shape
        };
        if !self.workspace.as_ref().is_some_and(fits) {
            self.workspace = None;
        }
        let workspace = match &mut self.workspace {
            Some(workspace) => workspace,
            none => none.insert(self.model.workspace(shape)?),
        };
        let hidden_in_step = images_in_step * MaskingShape::hidden(&mask);
        let mut start = 0;
        while start < images.batch {
            let range = start..(start + shape.batch).min(images.batch);
            let (part, part_masking) = (images.part(range.clone()), masking.part(range.clone(), patches));
            let loss = &mut self.optimizer.loss;
            self.model.forward_in(workspace, &part, &part_masking, hidden_in_step, loss, None)?;
            self.model.backward(workspace, part.batch, &mut self.gradients)?;
            start = range.end;
        }
        Ok(())
    }

    /// Applies the accumulated gradients and clears them: [`Trainer::launch_update`] and [`Trainer::report`].
    ///
    /// # Errors
    /// As these two.
    pub fn update(&mut self, learning_rate: f64) -> Result<StepReport> {
        self.launch_update(learning_rate)?;
        self.report()
    }

    /// Queues the update by the accumulated gradients and clears them; nothing is read back, so that the next step can be
    /// queued right behind. Where loss or gradients are not finite, the device skips the update.
    ///
    /// # Errors
    /// Device errors.
    pub fn launch_update(&mut self, learning_rate: f64) -> Result<()> {
        let OptimizerSettings { betas, epsilon, weight_decay, clip_norm } = self.settings;
        let (length, decayed) = {
            let layout = self.model.parameters().layout();
            (layout.trained(), layout.matrices())
        };
        let settings =
            AdamWSettings { beta1: betas.0, beta2: betas.1, epsilon, weight_decay, clip_norm, length, decayed };
        let (backend, parameters) = self.model.parameters_mut();
        let optimizer = &mut self.optimizer;
        backend.upload(&mut optimizer.learning_rate, &[learning_rate])?;
        backend.gradient_norm(length, &mut optimizer.gradient_norm, &self.gradients.arena)?;
        backend.adamw_step(
            settings,
            &mut optimizer.state,
            &mut parameters.master,
            &mut parameters.working,
            &mut optimizer.first,
            &mut optimizer.second,
            &self.gradients.arena,
            &optimizer.gradient_norm,
            Some(&optimizer.loss),
            &optimizer.learning_rate,
        )?;
        backend.zero(&mut optimizer.loss)?;
        self.gradients.zero(backend)
    }

    /// Waits for the last update and says what it did.
    ///
    /// # Errors
    /// [`Error::Training`] after ten steps in a row that were not finite; device errors.
    pub fn report(&mut self) -> Result<StepReport> {
        self.last = self.state()?;
        let AdamWState { skipped_in_a_row, gradient_norm, loss, .. } = self.last;
        if skipped_in_a_row >= NON_FINITE_LIMIT {
            return Err(Error::Training(format!(
                "loss or gradients were not finite for {NON_FINITE_LIMIT} steps in a row (last loss {loss}); the weights \
                 are those of the last finite step. Try a lower learning rate, a longer warm-up or gradient clipping"
            )));
        }
        Ok(StepReport { loss, gradient_norm, updated: skipped_in_a_row == 0 })
    }
}
