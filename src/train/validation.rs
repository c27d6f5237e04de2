//! The reconstruction loss of pictures that a run does not learn from.

use std::ffi::OsStr;

use crate::data::{ImageProcessor, Loader, LoaderOptions, Shard, Source, SourceOptions, Transform};
use crate::distributed::Processes;
use crate::model::{ImageValues, Images, Masking};
use crate::ops::{Backend, Communicator, RandomMask};
use crate::train::{PretrainSettings, Trainer};
use crate::{Error, Result};

/// The epoch whose masks hide the pictures: none that a run comes to.
const MASKS: u32 = u32::MAX;

/// Pictures as the model sees them at inference, hidden by the same masks each time.
#[derive(Debug)]
pub(super) struct Validation {
    source: Source,
    processor: ImageProcessor,
    batch_size: usize,
    workers: usize,
    seed: u64,
}

impl Validation {
    pub fn open(spec: &OsStr, settings: &PretrainSettings, processor: &ImageProcessor) -> Result<Self> {
        let image = settings.config.image();
        let source = Source::parse(spec, &SourceOptions::new(image.channels, image.height, image.width)?)?;
        let &PretrainSettings { batch_size, micro_batch, workers, seed, .. } = settings;
        // No more at a time than in training: they share its memory.
        Ok(Self { source, processor: processor.clone(), batch_size: batch_size.min(micro_batch), workers, seed })
    }

    /// Tells whether processes see the same pictures.
    pub fn fingerprint(&self) -> String {
        self.source.fingerprint()
    }

    /// The mean over the hidden patches of all its pictures, of which each process takes its share.
    pub fn loss<B: Backend>(&self, trainer: &mut Trainer<B>, processes: &Processes) -> Result<f64> {
        let options = LoaderOptions {
            batch_size: self.batch_size,
            workers: self.workers,
            seed: self.seed,
            shard: Shard { rank: processes.rank(), world: processes.size() },
            ..Default::default()
        };
        let transform = Transform::Inference(self.processor.clone());
        let mut loader = Loader::evaluation(self.source.clone(), transform, &options)?;
        let (mean, deviation) = self.processor.normalization();
        let ratio = trainer.model().config().mask_ratio;
        let (mut sum, mut pictures) = (0.0, 0);
        let of_validation = |error| match error {
            Error::Data { source_name, problem } => {
                Error::Data { source_name: format!("{source_name} (--val)"), problem }
            }
            other => other,
        };
        while let Some(batch) = loader.next_batch().map_err(of_validation)? {
            let (count, random) = (batch.len(), RandomMask { seed: self.seed, epoch: MASKS });
            let images = Images {
                batch: count,
                channels: batch.channels,
                height: batch.height,
                width: batch.width,
                values: ImageValues::Bytes { values: &batch.pixels, mean: &mean, deviation: &deviation },
            };
            let masking = Masking::Random { ratio, random, samples: Some(&batch.samples), first: 0 };
            sum += trainer.evaluate(&images, &masking)? * count as f64;
            pictures += count;
        }
        processes.ready()?;
        let mut sums = [sum, pictures as f64];
        processes.sum_f64(&mut sums)?;
        let [sum, pictures] = sums;
        if pictures == 0.0 {
            let source_name = self.source.description().to_owned();
            return Err(Error::Data { source_name, problem: "none of its pictures can be decoded".to_owned() });
        }
        Ok(sum / pictures)
    }
}

impl<B: Backend> Trainer<B> {
    /// The loss of a batch, the mean over its hidden patches; neither weights nor gradients change. It uses the memory of a
    /// training step, and allocates what is missing of it.
    ///
    /// # Errors
    /// Those of images and noise that do not fit the model; device errors.
    pub fn evaluate(&mut self, images: &Images<'_>, masking: &Masking<'_>) -> Result<f64> {
        let mask = self.fit(images, masking)?;
        // What lies prepared is overwritten.
        self.prefetched = None;
        let Self { model, workspace: Some(workspace), validation_loss, micro_batch, .. } = self else { return Ok(0.0) };
        let backend = model.backend();
        backend.zero(validation_loss)?;
        let hidden = images.batch * mask.hidden();
        for range in super::trainer::micro_batches(images.batch, workspace.shape().batch.min(*micro_batch)) {
            let (images, masking) = (images.part(range.clone()), masking.part(range, mask.patches));
            model.forward_in(workspace, &images, &masking, hidden, validation_loss, None)?;
        }
        let mut loss = [B::Master::default()];
        backend.download(&mut loss, validation_loss)?;
        Ok(B::master_f64(loss[0]))
    }
}
