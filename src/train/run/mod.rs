//! A whole pre-training run and the files that it leaves.
//!
//! ```text
//! OUT/recipe.json               the resolved settings
//! OUT/metrics.jsonl             one line per step
//! OUT/events.out.tfevents.*     the same and the pictures, for TensorBoard
//! OUT/loss.svg                  the same as a picture
//! OUT/checkpoint-STEP/          config.json, model.safetensors, preprocessor_config.json, trainer state
//! OUT/reconstruction-STEP.png   the same few pictures each time
//! ```

pub(in crate::train) mod checkpoint;
mod figures;
pub(in crate::train) mod metrics;
pub(in crate::train) mod report;
mod run_dir;
mod starvation;
mod tensorboard;
mod validation;

use std::path::PathBuf;
use std::time::Instant;

use crate::data::{
    Batch, ImageProcessor, Loader, LoaderOptions, Position, Shard, Source, SourceOptions, Training, Transform,
    jpeg_decoder,
};
use crate::distributed::Processes;
use crate::files::write_json;
use crate::model::{ImageValues, Images, MaeForPreTraining, Masking};
use crate::ops::{Backend, MaskingShape, RandomMask};
use crate::train::run::figures::{Files, shown_pictures};
use crate::train::run::metrics::{Metrics, MetricsFile};
use crate::train::run::report::{Event, PretrainReport, first_and_last};
use crate::train::run::starvation::Starvation;
use crate::train::run::tensorboard::EventFile;
use crate::train::run::validation::Validation;
use crate::train::settings::{Fingerprints, PretrainSettings, Recipe, RunLength};
use crate::train::{Schedule, Trainer};
use crate::{Error, Result};

/// Trains until the end of the run, or until `watch` answers `false`.
///
/// # Errors
/// Everything that can go wrong: settings, data, files, numbers. A checkpoint that was written before stays whole.
pub fn pretrain<B: Backend>(
    backend: B,
    settings: &PretrainSettings,
    watch: &mut dyn FnMut(Event<'_>) -> bool,
) -> Result<PretrainReport> {
    pretrain_together(backend, settings, &Processes::single(), watch)
}

/// The same in several processes, each of which calls this with the same settings. Batches are shared out evenly; process 0 alone
/// writes files; all end at the same step, and an error of one ends all.
///
/// # Errors
/// As [`pretrain`]; [`Error::Config`] for a batch that cannot be shared out, [`Error::Peer`] where another process has failed,
/// [`Error::Distributed`] where one is gone.
pub fn pretrain_together<B: Backend>(
    backend: B,
    settings: &PretrainSettings,
    processes: &Processes,
    watch: &mut dyn FnMut(Event<'_>) -> bool,
) -> Result<PretrainReport> {
    let mut run = None;
    let trained = Run::start(backend, settings, processes, watch).and_then(|started| run.insert(started).train(watch));
    // The run lives until all know how it ended: its device may still be of use to the others.
    let trained = processes.finish(trained);
    drop(run);
    trained
}

/// A run under way.
pub(in crate::train) struct Run<'s, B: Backend> {
    pub settings: &'s PretrainSettings,
    pub trainer: Trainer<B>,
    pub loader: Loader,
    /// Those of the pictures as they were when the run was started.
    pub fingerprint: Fingerprints,
    /// The batch that was prefetched.
    pub upcoming: Option<Batch>,
    pub processor: ImageProcessor,
    /// Mean and standard deviation per channel.
    pub normalization: (Vec<f32>, Vec<f32>),
    /// The pictures of the reconstruction grid, `[SHOWN, H, W, C]`.
    pub shown: Vec<u8>,
    pub schedule: Schedule,
    pub steps_per_epoch: f64,
    /// Operations of the reference implementation in a training step.
    pub flops_per_image: f64,
    pub validation: Option<Validation>,
    /// The validation loss of the last step that has one.
    pub last_validation: Option<f64>,
    pub starvation: Starvation,
    pub processes: Processes,
    /// Process 0 has these.
    pub files: Option<Files>,
    pub history: Vec<Metrics>,
    pub done: u64,
    pub picture: Option<PathBuf>,
    pub saved: Option<(u64, PathBuf)>,
}

/// More pictures in a step than this are a slip of the keyboard: no run would come to its first update.
const MOST_IMAGES_PER_STEP: usize = 1 << 24;

impl<'s, B: Backend> Run<'s, B> {
    fn start(
        backend: B,
        settings: &'s PretrainSettings,
        processes: &Processes,
        watch: &mut dyn FnMut(Event<'_>) -> bool,
    ) -> Result<Self> {
        let PretrainSettings { out, config, seed, batch_size, accumulate, .. } = settings;
        config.validate()?;
        config.check_trainable()?;
        if *batch_size == 0 || *accumulate == 0 {
            return Err(Error::Config("batch size and accumulation must be at least 1".into()));
        }
        if batch_size.checked_mul(*accumulate).is_none_or(|images| images > MOST_IMAGES_PER_STEP) {
            return Err(Error::Config(format!(
                "batch size {batch_size} times accumulation {accumulate} is more than {MOST_IMAGES_PER_STEP} pictures in a step"
            )));
        }
        let share = processes.share_of(*batch_size)?;
        let image = config.image();
        MaskingShape::new(*batch_size, image.patches(), config.mask_ratio)?;
        settings.check()?;
        for data in [Some(&settings.data), settings.validation.as_ref()].into_iter().flatten() {
            run_dir::refuse_inside("the run's folder", out, data)?;
            settings
                .events
                .as_ref()
                .map_or(Ok(()), |events| run_dir::refuse_inside("the folder of TensorBoard's events", events, data))?;
        }
        if processes.is_rank_0() {
            run_dir::refuse_to_overwrite(out, settings.resume)?;
        }

        let processor = match &settings.from {
            Some(from) => ImageProcessor::of_checkpoint(from)?.map(|found| found.with_size(image.height, image.width)),
            None => None,
        };
        let processor = processor.unwrap_or_else(|| ImageProcessor::new(image.height, image.width, image.channels));
        let source = Source::parse(&settings.data, &SourceOptions::new(image.channels, image.height, image.width)?)?;
        let pictures = source.len();
        let validation = settings.validation.as_ref();
        let mut validation =
            validation.map(|spec| Validation::open(spec, settings, &processor, processes)).transpose()?;
        let fingerprint = Fingerprints {
            data: source.fingerprint(),
            validation: validation.as_ref().map(|validation| validation.fingerprint().to_owned()),
        };
        settings.check_fingerprints(&fingerprint)?;
        let shown = shown_pictures(&source, &processor)?;

        let images_per_step = batch_size * accumulate;
        // A set smaller than a batch fills it by starting over, so an epoch is never less than a step.
        let batches_per_epoch = (pictures / batch_size).max(1) as f64;
        let steps_per_epoch = batches_per_epoch / *accumulate as f64;
        let total_steps = match settings.length {
            RunLength::Steps(steps) => steps,
            RunLength::Epochs(epochs) => ((epochs as f64 * steps_per_epoch).round() as u64).max(1),
        };
        let warmup_steps = match settings.warmup_epochs {
            Some(epochs) => epochs * steps_per_epoch,
            None => (total_steps as f64 / 20.0).min(40.0 * steps_per_epoch),
        };
        let schedule = Schedule {
            peak: settings
                .learning_rate
                .unwrap_or_else(|| Schedule::peak(settings.base_learning_rate, images_per_step)),
            minimum: settings.minimum_learning_rate,
            warmup_steps,
            total_steps,
        };

        let (lock, resumed) = match processes.is_rank_0() {
            true => run_dir::take(out, settings.resume).map(|(lock, resumed)| (Some(lock), resumed))?,
            false => (None, None),
        };
        processes.ready()?;
        processes.check_same(&settings.shared::<B>(&processor, &fingerprint, &schedule))?;
        validation.as_mut().map_or(Ok(()), |validation| validation.check(processes))?;
        // The others get weights and moments from process 0.
        let model = match (&resumed, &settings.from) {
            (Some((_, folder)), _) => MaeForPreTraining::from_pretrained(folder, backend)?,
            (None, Some(from)) if processes.is_rank_0() => {
                MaeForPreTraining::from_pretrained_as(from, config.clone(), backend)?
            }
            _ => MaeForPreTraining::new(config.clone(), backend, *seed)?,
        };
        if let Some((_, folder)) = &resumed {
            checkpoint::check_config(model.config(), config)?;
            checkpoint::check_processor(folder, &processor)?;
        }
        let parameters = model.parameters().layout().trained();
        let trainer_flops = config.flops(config.mask_ratio)?.step;
        processes.ready()?;
        let sharding = settings.sharding;
        let mut trainer = Trainer::together(model, settings.optimizer, settings.micro_batch, processes, sharding)?;
        trainer.set_recompute(settings.recompute);
        if let Some(decay) = settings.average_decay {
            trainer.keep_average(decay)?;
        }
        let (mut done, mut last_validation, mut moments) = (0, None, None);
        if let Some((step, folder)) = &resumed {
            let (state, loaded) =
                checkpoint::load_trainer(&mut trainer, folder, |state| state.check(&fingerprint, settings))?;
            (last_validation, moments) = (state.validation_loss, Some(loaded));
            done = *step;
            if done > total_steps {
                return Err(Error::Config(format!(
                    "cannot resume: the run has done {done} steps, and {total_steps} are asked for; ask for more"
                )));
            }
            if ![0, total_steps].contains(&state.total_steps) {
                tracing::warn!(
                    "the run was to have {} steps: its learning rates now follow from {total_steps}",
                    state.total_steps
                );
            }
        }

        let recipe = Recipe {
            vitmae_version: env!("CARGO_PKG_VERSION").to_owned(),
            data_fingerprint: fingerprint.data.clone(),
            validation_fingerprint: fingerprint.validation.clone(),
            pictures,
            resumed_at: (done > 0).then_some(done),
            total_steps,
            steps_per_epoch,
            schedule,
            jpeg_decoder: Some(jpeg_decoder().to_owned()),
            processes: Some(processes.size()),
            settings: settings.clone(),
        };
        let (mut files, mut history) = (None, Vec::new());
        if let Some(lock) = lock {
            let events = EventFile::create(settings.events.as_ref().unwrap_or(out), done)?;
            write_json(&out.join("recipe.json"), &recipe)?;
            let (metrics, kept) = MetricsFile::open(&out.join("metrics.jsonl"), done)?;
            files = Some(Files { metrics, events, _lock: lock });
            history = kept;
        }
        processes.ready()?;
        let done = processes.share_number(done)?;
        trainer.start_together(moments, done > 0)?;

        let (batches, seen) = (batches_per_epoch as u64, done * *accumulate as u64);
        let position = Position { epoch: (seen / batches) as u32, batch: (seen % batches) as usize };
        let options = LoaderOptions {
            batch_size: share,
            seed: *seed,
            workers: settings.workers,
            start: position,
            shard: Shard { rank: processes.rank(), world: processes.size() },
            ..LoaderOptions::default()
        };
        let transform = Transform::Training(Training::new(image.height, image.width));
        let loader = Loader::new(source, transform, &options)?;
        watch(Event::Started { total_steps, done, pictures, parameters });
        Ok(Self {
            settings,
            trainer,
            loader,
            fingerprint,
            upcoming: None,
            normalization: processor.normalization(),
            processor,
            shown,
            schedule,
            steps_per_epoch,
            flops_per_image: trainer_flops as f64,
            validation,
            last_validation,
            starvation: Starvation::default(),
            processes: processes.clone(),
            files,
            history,
            done,
            picture: None,
            // On all processes, as what becomes of a run follows from it.
            saved: (done > 0).then(|| (done, out.join(checkpoint::folder_name(done)))),
        })
    }

    fn train(&mut self, watch: &mut dyn FnMut(Event<'_>) -> bool) -> Result<PretrainReport> {
        let total = self.schedule.total_steps;
        let pictures = self.settings.picture_every.unwrap_or(self.tenth());
        let checkpoints = self.checkpoint_every();
        if self.done == 0 {
            self.draw(watch)?;
        }
        let mut interrupted = false;
        while self.done < total {
            let metrics = match self.step() {
                Ok(metrics) => metrics,
                Err(error) => return Err(self.rescue(error, watch)),
            };
            let stop = !watch(Event::Step(&metrics));
            let ((), stop) = self.processes.agree_to_stop(Ok(()), stop).map_err(|error| self.rescue(error, watch))?;
            let go_on = !stop;
            let skipped = metrics.skipped;
            self.history.push(metrics);
            let last = self.done == total;
            if last || !go_on || (self.done.is_multiple_of(checkpoints) && !skipped) {
                let same = self.trainer.stay_together().map_err(|error| self.rescue(error, watch))?;
                if !same && self.processes.is_rank_0() {
                    tracing::warn!(
                        "step {}: the weights of the processes had drifted apart, as on processors of different kinds; all have \
                         those of process 0 now",
                        self.done
                    );
                }
                self.save(watch).map_err(|error| self.explain(error))?;
            }
            if last || self.done.is_multiple_of(pictures) {
                self.draw(watch).map_err(|error| self.rescue(error, watch))?;
            }
            if !go_on && !last {
                interrupted = true;
                break;
            }
        }
        self.draw_curve(watch).map_err(|error| self.explain(error))?;
        let best = match self.files {
            Some(_) => checkpoint::best(&self.settings.out).map_err(|error| self.explain(error))?,
            None => None,
        };
        let checkpoint = match self.saved.take() {
            Some((_, folder)) => folder,
            None => {
                self.save(watch)?;
                self.settings.out.join(checkpoint::folder_name(self.done))
            }
        };
        Ok(PretrainReport {
            steps: self.done,
            interrupted,
            checkpoint,
            picture: self.picture.clone(),
            curve: self.settings.out.join("loss.svg"),
            loss: first_and_last(&self.history),
            skipped_pictures: self.loader.bad_pictures(),
            skipped_steps: self.trainer.non_finite_steps(),
            failed_validations: self.validation.as_ref().map_or(0, |validation| validation.failures),
            best,
        })
    }

    fn tenth(&self) -> u64 {
        self.schedule.total_steps.div_ceil(10).max(1)
    }

    fn checkpoint_every(&self) -> u64 {
        self.settings.checkpoint_every.unwrap_or(self.tenth())
    }

    /// Loads, accumulates and updates once.
    fn step(&mut self) -> Result<Metrics> {
        let started = Instant::now();
        let PretrainSettings { accumulate, batch_size, seed, .. } = *self.settings;
        let ratio = self.trainer.model().config().mask_ratio;
        let mut waited = 0.0;
        for part in 1..=accumulate {
            let batch = match self.upcoming.take() {
                Some(batch) => batch,
                None => self.next_batch(&mut waited)?,
            };
            let (images, masking) = training_input(&batch, &self.normalization, ratio, seed);
            if part < accumulate {
                self.trainer.accumulate(&images, &masking, batch_size * accumulate)?;
            } else {
                self.trainer.accumulate_together(&images, &masking, batch_size * accumulate)?;
            }
        }
        let learning_rate = self.schedule.at(self.done);
        self.trainer.launch_update(learning_rate)?;
        // While the device works on this step, the next one's pictures are fetched and brought to it.
        let upcoming = if self.done + 1 < self.schedule.total_steps { self.prefetch(&mut waited) } else { Ok(()) };
        let report = self.trainer.report()?;
        self.done += 1;
        if !report.updated && self.processes.is_rank_0() {
            tracing::warn!(
                "step {}: loss {} or gradient norm {} is not finite; the update was skipped",
                self.done,
                report.loss,
                report.gradient_norm
            );
        }
        let seconds = started.elapsed().as_secs_f64();
        let processes = self.processes.size() as f64;
        let images_per_second = (batch_size * accumulate) as f64 / seconds;
        if let Some(starved) = self.starvation.see(waited, seconds, Instant::now()) {
            tracing::warn!(
                "step {}: the loader does not keep up: {:.0} % of the last {} steps ({:.0} of {:.0} seconds) was spent waiting \
                 for pictures; give it more threads (--num-workers), smaller pictures or a faster disk",
                self.done,
                100.0 * starved.waited / starved.seconds,
                starved.steps,
                starved.waited,
                starved.seconds
            );
        }
        // The step is done, even if its validation fails: its line is written before an error is returned.
        let validated = self.validate();
        let metrics = Metrics {
            step: self.done,
            epoch: self.done as f64 / self.steps_per_epoch,
            loss: Some(report.loss).filter(|loss| loss.is_finite()),
            learning_rate,
            images_per_second,
            mfu: self.settings.peak_flops.map(|peak| images_per_second * self.flops_per_image / (peak * processes)),
            validation_loss: validated.as_ref().ok().copied().flatten(),
            gradient_norm: Some(report.gradient_norm).filter(|norm| norm.is_finite()),
            data_wait: waited / seconds,
            skipped: !report.updated,
        };
        let Some(files) = &mut self.files else { return upcoming.and(validated).map(|_| metrics) };
        files.metrics.append(&metrics)?;
        let mut scalars = vec![
            ("loss", report.loss),
            ("learning_rate", learning_rate),
            ("gradient_norm", report.gradient_norm),
            ("images_per_second", images_per_second),
            ("data_wait", metrics.data_wait),
            ("epoch", metrics.epoch),
        ];
        scalars.extend(metrics.mfu.map(|mfu| ("mfu", mfu)));
        scalars.extend(metrics.validation_loss.map(|loss| ("validation_loss", loss)));
        files.events.scalars(self.done, &scalars)?;
        upcoming?;
        validated?;
        Ok(metrics)
    }

    /// The validation loss, at the steps of checkpoints.
    fn validate(&mut self) -> Result<Option<f64>> {
        self.last_validation = None;
        let due = self.done == self.schedule.total_steps || self.done.is_multiple_of(self.checkpoint_every());
        let Some(validation) = self.validation.as_mut().filter(|_| due) else { return Ok(None) };
        let Some(loss) = validation.loss(&mut self.trainer, &self.processes)? else { return Ok(None) };
        if !loss.is_finite() && self.processes.is_rank_0() {
            tracing::warn!("step {}: the validation loss is not finite", self.done);
        }
        if !loss.is_finite() {
            return Ok(None);
        }
        tracing::info!("step {}: validation loss {loss:.4}", self.done);
        self.last_validation = Some(loss);
        Ok(self.last_validation)
    }

    /// The next batch, and the time that it took to come.
    fn next_batch(&mut self, waited: &mut f64) -> Result<Batch> {
        let asked = Instant::now();
        let batch = self.loader.next_batch()?;
        *waited += asked.elapsed().as_secs_f64();
        batch.ok_or_else(|| Error::Training("the pictures ended before the run did".into()))
    }

    /// Fetches the next step's first batch and brings it to the device.
    fn prefetch(&mut self, waited: &mut f64) -> Result<()> {
        let batch = self.next_batch(waited)?;
        let ratio = self.trainer.model().config().mask_ratio;
        let (images, masking) = training_input(&batch, &self.normalization, ratio, self.settings.seed);
        self.trainer.prefetch(&images, &masking)?;
        self.upcoming = Some(batch);
        Ok(())
    }
}

/// A batch as the trainer takes it.
fn training_input<'a>(
    batch: &'a Batch,
    (mean, std): &'a (Vec<f32>, Vec<f32>),
    ratio: f64,
    seed: u64,
) -> (Images<'a>, Masking<'a>) {
    let Batch { channels, height, width, .. } = *batch;
    let values = ImageValues::Bytes { values: &batch.pixels, mean, std };
    let random = RandomMask { seed, epoch: batch.epoch };
    let masking = Masking::Random { ratio, random, samples: Some(&batch.samples), first: 0 };
    (Images { batch: batch.len(), channels, height, width, values }, masking)
}
