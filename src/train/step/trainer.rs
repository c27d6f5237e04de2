//! One optimiser step: forward and backward in micro-batches, then AdamW.

use std::ops::Range;

use crate::distributed::Processes;
use crate::model::{Batch, Gradients, Images, MaeForPreTraining, MaskedImages, Masking, Objective};
use crate::nvtx::range;
use crate::ops::{AdamWSettings, AdamWState, BUCKET, Backend, Real};
use crate::train::data_parallel::{Exchange, MicroBatch, Sharding};
use crate::train::step::average::Average;
use crate::train::step::graphs::{Pass, Passes};
use crate::{Error, Result};

/// What the optimiser is told once.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
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

/// The first and second moments of AdamW, how often they were updated, and what an update depends on; all on the device. The
/// moments are those of this process' share of the parameters.
#[derive(Debug)]
pub struct OptimizerState<B: Backend> {
    pub(crate) first: B::Buffer<B::Master>,
    pub(crate) second: B::Buffer<B::Master>,
    pub(crate) state: B::Buffer<AdamWState>,
    learning_rate: B::Buffer<f64>,
    gradient_norm: B::Buffer<B::Master>,
    /// The loss of the step so far.
    pub(in crate::train) loss: B::Buffer<B::Master>,
}

impl<B: Backend> OptimizerState<B> {
    /// With the moments of `length` parameters.
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

/// Trains a model. It owns all memory that a step needs: after the first step nothing is allocated; on a
/// device that records, after the second.
#[derive(Debug)]
pub struct Trainer<B: Backend, O: Objective<B> = MaeForPreTraining<B>> {
    pub(in crate::train) model: O,
    pub(in crate::train) gradients: Gradients<B, O::Layers>,
    pub(crate) optimizer: OptimizerState<B>,
    settings: OptimizerSettings,
    workspace: Option<Room<O::Shape, O::Workspace>>,
    pub(in crate::train) micro_batch: usize,
    recompute: bool,
    pub(in crate::train) passes: Passes<B>,
    /// The identity of the batch whose first micro-batch lies prepared in the workspace.
    prefetched: Option<[u64; 8]>,
    /// The device's counters as they were read last.
    pub(in crate::train) last: AdamWState,
    /// The loss of what is evaluated between steps.
    pub(in crate::train) validation_loss: B::Buffer<B::Master>,
    /// The average of the weights, where one is kept.
    pub(in crate::train) average: Option<Average<B>>,
    /// The processes that make each step together.
    pub(in crate::train) exchange: Exchange,
}

/// A workspace and what it was made for.
#[derive(Debug)]
struct Room<S, W> {
    size: usize,
    shape: S,
    workspace: W,
}

/// Ranges of at most `most` images.
fn micro_batches(batch: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..batch).step_by(most.max(1)).map(move |start| start..(start + most).min(batch))
}

impl<B: Backend, O: Objective<B>> Trainer<B, O> {
    /// A trainer that puts at most `micro_batch` images through the model at a time.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that cannot be trained (dropout); [`Error::Device`] when there is not enough memory.
    pub fn new(model: O, settings: OptimizerSettings, micro_batch: usize) -> Result<Self> {
        Self::with_exchange(model, settings, micro_batch, &Processes::single(), Sharding::Nothing)
    }

    pub(in crate::train) fn with_exchange(
        model: O,
        settings: OptimizerSettings,
        micro_batch: usize,
        processes: &Processes,
        sharding: Sharding,
    ) -> Result<Self> {
        model.check_trainable()?;
        if micro_batch == 0 {
            return Err(Error::Config("a micro-batch needs at least one image".into()));
        }
        let exchange = Exchange::new(&model, processes, sharding, BUCKET)?;
        let optimizer = OptimizerState::new(model.backend(), exchange.share.len())?;
        Ok(Self {
            gradients: model.gradients()?,
            optimizer,
            settings,
            workspace: None,
            micro_batch,
            recompute: false,
            passes: Passes::new(true),
            prefetched: None,
            last: AdamWState::default(),
            validation_loss: model.backend().buffer(1)?,
            average: None,
            exchange,
            model,
        })
    }

    /// Whether backward computes the blocks' activations again instead of keeping them: less memory, a third more time, the
    /// same results.
    pub fn set_recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// Whether a device that gains from it gets each pass as one recording (a CUDA graph) from its second time on. It does so
    /// unless told otherwise; the results are the same.
    pub fn set_recording(&mut self, recording: bool) {
        self.passes.enable(recording);
    }

    /// To be called where what a pass does changes, or before memory that it uses is dropped.
    pub(in crate::train) fn forget_passes(&mut self) {
        self.passes.forget();
    }

    /// The model as it is now.
    #[must_use]
    pub fn model(&self) -> &O {
        &self.model
    }

    /// What was accumulated since the last update, which clears it.
    #[must_use]
    pub fn gradients(&self) -> &Gradients<B, O::Layers> {
        &self.gradients
    }

    /// Gives the model back and drops the rest.
    #[must_use]
    pub fn into_model(self) -> O {
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

    /// One step on one batch: [`Trainer::accumulate_batch`] and [`Trainer::update`].
    ///
    /// # Errors
    /// As these two.
    pub fn step_batch(&mut self, batch: &O::Batch<'_>, learning_rate: f64) -> Result<StepReport> {
        self.accumulate_batch(batch, batch.size())?;
        self.update(learning_rate)
    }

    /// Adds loss and gradients of a batch that is part of a step of `size_of_step` inputs. The loss of the step is the mean over
    /// all of them, so that many small batches give what one large batch gives.
    ///
    /// # Errors
    /// Device errors.
    pub fn accumulate_batch(&mut self, batch: &O::Batch<'_>, size_of_step: usize) -> Result<()> {
        self.accumulate_part(batch, size_of_step, false)
    }

    /// The same. Where `all_reduce` says so, the sums over all processes start as soon as the last micro-batch has what they need;
    /// an error after that ends what the processes do together.
    pub(in crate::train) fn accumulate_part(
        &mut self,
        batch: &O::Batch<'_>,
        size_of_step: usize,
        all_reduce: bool,
    ) -> Result<()> {
        self.fit(batch)?;
        let prefetched = self.prefetched.take() == Some(batch.identity());
        let Self { model, gradients, optimizer, workspace: Some(room), passes, exchange, micro_batch, .. } = self
        else {
            return Ok(());
        };
        let Room { size: most, shape, workspace } = room;
        let terms_in_step = size_of_step * O::terms(shape);
        for (index, range) in micro_batches(batch.size(), (*most).min(*micro_batch)).enumerate() {
            if index > 0 || !prefetched {
                model.prepare(workspace, &batch.part(range.clone()))?;
            }
            let size = range.len();
            if all_reduce && range.end == batch.size() {
                exchange.processes.ready()?;
                let work = MicroBatch { model, workspace, size, terms_in_step };
                return exchange.backward_and_sum(work, gradients, optimizer, passes);
            }
            // SAFETY: a pass depends on nothing else, and it is forgotten before a buffer of the workspace is dropped. Weights,
            // gradients and the optimiser's state live as long as the trainer.
            unsafe {
                passes.run(model.backend(), Pass::ForwardBackward { size, terms_in_step }, || {
                    model.forward(workspace, size, terms_in_step, &mut optimizer.loss)?;
                    model.backward(workspace, size, gradients, 0..model.parameters().layout().stages())
                })?;
            }
        }
        Ok(())
    }

    /// Brings the first inputs of the batch that is to be accumulated next to the device, after the work that it has:
    /// between [`Trainer::launch_update`] and [`Trainer::report`], so that the device does not wait for it after the report.
    /// Until then the batch stays as it is. The result is the same as without.
    ///
    /// # Errors
    /// As [`Trainer::accumulate_batch`].
    pub fn prefetch_batch(&mut self, batch: &O::Batch<'_>) -> Result<()> {
        self.prefetched = None;
        self.fit(batch)?;
        let Some(Room { size, workspace, .. }) = &mut self.workspace else { return Ok(()) };
        if let Some(range) = micro_batches(batch.size(), (*size).min(self.micro_batch)).next() {
            self.model.prepare(workspace, &batch.part(range))?;
            self.prefetched = Some(batch.identity());
        }
        Ok(())
    }

    /// The loss of a batch; neither weights nor gradients change. It uses the memory of a training step, and allocates what is
    /// missing of it.
    ///
    /// # Errors
    /// Device errors.
    pub fn evaluate_batch(&mut self, batch: &O::Batch<'_>) -> Result<f64> {
        self.fit(batch)?;
        // What lies prepared is overwritten.
        self.prefetched = None;
        let Self { model, workspace: Some(room), validation_loss, micro_batch, .. } = self else { return Ok(0.0) };
        let Room { size, shape, workspace } = room;
        let backend = model.backend();
        backend.zero(validation_loss)?;
        let terms = batch.size() * O::terms(shape);
        for range in micro_batches(batch.size(), (*size).min(*micro_batch)) {
            model.prepare(workspace, &batch.part(range.clone()))?;
            model.forward(workspace, range.len(), terms, validation_loss)?;
        }
        let mut loss = [B::Master::default()];
        backend.download(&mut loss, validation_loss)?;
        Ok(loss[0].to_f64())
    }

    /// Makes a workspace for the micro-batches of a batch where there is none that fits.
    fn fit(&mut self, batch: &O::Batch<'_>) -> Result<()> {
        let (size, shape) = (self.micro_batch.min(batch.size()), self.model.shape(batch, self.recompute));
        if self.workspace.as_ref().is_none_or(|room| room.size < size || room.shape != shape) {
            self.passes.forget();
            self.prefetched = None;
            self.workspace = None;
            self.workspace = Some(Room { size, shape, workspace: self.model.workspace(size, &shape)? });
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
    /// queued right behind. Where loss or gradients are not finite, the device skips the update. Collective where the optimiser's
    /// state is shared out.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`] where a process is gone.
    pub fn launch_update(&mut self, learning_rate: f64) -> Result<()> {
        let launched = self.queue_update(learning_rate);
        self.exchange.ending(launched)
    }

    fn queue_update(&mut self, learning_rate: f64) -> Result<()> {
        let _range = range(format_args!("update"));
        let OptimizerSettings { betas, epsilon, weight_decay, clip_norm } = self.settings;
        let (trained, matrices) = {
            let layout = self.model.parameters().layout();
            (layout.trained(), layout.matrices())
        };
        let Self { model, gradients, optimizer, passes, average, exchange, .. } = self;
        let (backend, parameters) = model.parameters_mut();
        let (start, length) = (exchange.share.start, exchange.share.len());
        let decayed = exchange.share.end.min(matrices).saturating_sub(start);
        let settings =
            AdamWSettings { beta1: betas.0, beta2: betas.1, epsilon, weight_decay, clip_norm, length, decayed };
        // SAFETY: the trainer is borrowed mutably, so these are the only handles to the arenas that are in use.
        let (gradient, mut master, mut working) = unsafe {
            (
                backend.alias(&gradients.arena, start, length)?,
                backend.alias(&parameters.master, start, length)?,
                backend.alias(&parameters.working, start.min(matrices), decayed)?,
            )
        };
        backend.upload(&mut optimizer.learning_rate, &[learning_rate])?;
        // SAFETY: an update depends on the settings, which do not change, and on buffers that live as long as the trainer.
        unsafe {
            passes.run(backend, Pass::Update, || {
                backend.gradient_norm(trained, &mut optimizer.gradient_norm, &gradients.arena)?;
                backend.adamw_step(
                    settings,
                    &mut optimizer.state,
                    &mut master,
                    &mut working,
                    &mut optimizer.first,
                    &mut optimizer.second,
                    &gradient,
                    &optimizer.gradient_norm,
                    Some(&optimizer.loss),
                    &optimizer.learning_rate,
                )?;
                if let (Some(Average { decay, weights }), None) = (&mut *average, exchange.sharded) {
                    backend.weights_average(trained, *decay, weights, &parameters.master)?;
                }
                backend.zero(&mut optimizer.loss)?;
                gradients.zero(backend)
            })?;
        }
        let Some(part) = exchange.sharded else { return Ok(()) };
        exchange.gather_weights(backend, &parameters.master, trained, part)?;
        // SAFETY: as above.
        unsafe {
            passes.run(backend, Pass::Exchanged, || {
                parameters.refresh(backend)?;
                match &mut *average {
                    Some(Average { decay, weights }) => {
                        backend.weights_average(trained, *decay, weights, &parameters.master)
                    }
                    None => Ok(()),
                }
            })
        }
    }

    /// Waits for the last update and says what it did.
    ///
    /// # Errors
    /// [`Error::Training`] after ten steps in a row that were not finite; device errors.
    pub fn report(&mut self) -> Result<StepReport> {
        self.last = self.exchange.ending(self.state())?;
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

/// Pre-training, with images and masking as they are.
impl<B: Backend> Trainer<B> {
    fn batch<'a>(&self, images: &Images<'a>, masking: &Masking<'a>) -> Result<MaskedImages<'a>> {
        MaskedImages::new(self.model.config(), images, masking)
    }

    /// As [`Trainer::step_batch`].
    ///
    /// # Errors
    /// Those of images and masking that do not fit the model; as [`Trainer::step_batch`].
    pub fn step(&mut self, images: &Images<'_>, masking: &Masking<'_>, learning_rate: f64) -> Result<StepReport> {
        self.step_batch(&self.batch(images, masking)?, learning_rate)
    }

    /// As [`Trainer::accumulate_batch`]. The loss of the step is the mean over the hidden patches of all its images.
    ///
    /// # Errors
    /// Those of images and masking that do not fit the model; as [`Trainer::accumulate_batch`].
    pub fn accumulate(&mut self, images: &Images<'_>, masking: &Masking<'_>, images_in_step: usize) -> Result<()> {
        self.accumulate_batch(&self.batch(images, masking)?, images_in_step)
    }

    /// As [`Trainer::prefetch_batch`].
    ///
    /// # Errors
    /// Those of images and masking that do not fit the model; as [`Trainer::prefetch_batch`].
    pub fn prefetch(&mut self, images: &Images<'_>, masking: &Masking<'_>) -> Result<()> {
        self.prefetch_batch(&self.batch(images, masking)?)
    }

    /// As [`Trainer::evaluate_batch`]: the mean over the batch's hidden patches.
    ///
    /// # Errors
    /// Those of images and masking that do not fit the model; as [`Trainer::evaluate_batch`].
    pub fn evaluate(&mut self, images: &Images<'_>, masking: &Masking<'_>) -> Result<f64> {
        self.evaluate_batch(&self.batch(images, masking)?)
    }

    /// As [`Trainer::accumulate_batch_together`].
    ///
    /// # Errors
    /// Those of images and masking that do not fit the model; as [`Trainer::accumulate_batch_together`].
    pub fn accumulate_together(
        &mut self,
        images: &Images<'_>,
        masking: &Masking<'_>,
        images_in_step: usize,
    ) -> Result<()> {
        self.accumulate_batch_together(&self.batch(images, masking)?, images_in_step)
    }
}
