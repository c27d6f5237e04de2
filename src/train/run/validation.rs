//! The reconstruction loss of pictures that a run does not learn from.

use std::collections::HashSet;
use std::ffi::OsStr;

use rayon::prelude::*;

use crate::data::{
    BAD_SHARE, ImageProcessor, Loader, LoaderOptions, Shard, Source, SourceOptions, Transform, too_many,
};
use crate::distributed::Processes;
use crate::model::{ImageValues, Images, Masking};
use crate::ops::{Backend, Communicator, RandomMask};
use crate::train::{PretrainSettings, Trainer};
use crate::{Error, Result};

/// The epoch whose masks hide the pictures: none that a run comes to.
const MASKS: u32 = u32::MAX;

/// Files that a message names, at most.
const EXAMPLES: usize = 3;

/// Pictures as the model sees them at inference, hidden by the same masks each time.
#[derive(Debug)]
pub(in crate::train) struct Validation {
    source: Source,
    fingerprint: String,
    processor: ImageProcessor,
    batch_size: usize,
    /// How many of them a process puts through the model at a time.
    at_a_time: usize,
    workers: usize,
    seed: u64,
    shard: Shard,
    /// Bad pictures that the log has named: each is named once in a run and not at every checkpoint.
    named: HashSet<usize>,
    /// The pictures that the last loss is of.
    pictures: Option<u64>,
    /// Losses that could not be taken.
    pub failures: u64,
}

impl Validation {
    pub fn open(
        spec: &OsStr,
        settings: &PretrainSettings,
        processor: &ImageProcessor,
        processes: &Processes,
    ) -> Result<Self> {
        let image = settings.config.image();
        let source = Source::parse(spec, &SourceOptions::new(image.channels, image.height, image.width)?)?;
        let &PretrainSettings { batch_size, micro_batch, workers, seed, .. } = settings;
        Ok(Self {
            fingerprint: source.fingerprint(),
            source,
            processor: processor.clone(),
            batch_size: batch_size.min(micro_batch),
            at_a_time: (batch_size / processes.size()).min(micro_batch).max(1),
            workers,
            seed,
            shard: Shard { rank: processes.rank(), world: processes.size() },
            named: HashSet::new(),
            pictures: None,
            failures: 0,
        })
    }

    /// Opens every file and decodes a first batch, each process its share, so that a wrong path ends the run before there is work
    /// to lose and not at its first checkpoint. Collective: they are judged together, as a share is too small to tell chance from a
    /// bad set.
    ///
    /// # Errors
    /// [`Error::Data`] where too many files cannot be opened or decoded; as [`Processes::ready`].
    pub fn check(&mut self, processes: &Processes) -> Result<()> {
        self.open_all(processes)?;
        self.decode_some(processes)
    }

    fn open_all(&self, processes: &Processes) -> Result<()> {
        let Shard { rank, world } = self.shard;
        let all = self.source.len();
        let share: Vec<usize> = (rank..all).step_by(world).collect();
        let unreadable: Vec<usize> =
            share.into_par_iter().filter(|&index| self.source.file_size(index).is_err()).collect();
        processes.ready()?;
        // How many there are, and the first ones of each process, counted from 1.
        let mut numbers = vec![0.0; 1 + EXAMPLES * world];
        numbers[0] = unreadable.len() as f64;
        for (place, index) in unreadable.iter().take(EXAMPLES).enumerate() {
            numbers[1 + EXAMPLES * rank + place] = (index + 1) as f64;
        }
        processes.sum_f64(&mut numbers)?;
        let count = numbers[0];
        if count <= BAD_SHARE * all as f64 {
            return Ok(());
        }
        let mut first: Vec<usize> = numbers[1..].iter().filter(|&&at| at > 0.0).map(|&at| at as usize - 1).collect();
        first.sort_unstable();
        let examples = first.into_iter().take(EXAMPLES).map(|index| match self.source.file_size(index) {
            Err(error) => error.to_string(),
            // It is another machine that cannot.
            Ok(_) => self.source.name(index).display().to_string(),
        });
        let examples: Vec<String> = examples.collect();
        Err(self.refuse(format!("{count} of {all} files cannot be opened: {}", examples.join("; "))))
    }

    fn decode_some(&mut self, processes: &Processes) -> Result<()> {
        // The same pictures, however many look at them.
        let mut loader = self.loader(self.batch_size.div_ceil(self.shard.world))?;
        // Processes may have no share of a small set.
        let good = loader.next_batch().map_err(of_validation)?.map_or(0, |batch| batch.len());
        self.named.extend(loader.bad_pictures_by_number());
        processes.ready()?;
        let mut counts = [good as f64, loader.bad_pictures() as f64];
        processes.sum_f64(&mut counts)?;
        let [good, bad] = counts.map(|count| count as usize);
        if good == 0 {
            return Err(self.refuse("none of its pictures can be decoded".to_owned()));
        }
        let seen = good + bad;
        if too_many(seen, bad, seen >= self.source.len(), 1) {
            return Err(self
                .refuse(format!("{bad} of {seen} pictures seen cannot be used, more than 10 %; the log names them")));
        }
        Ok(())
    }

    /// The fingerprint at the start. It tells whether processes, and a resumed run, see the same pictures.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The mean over the hidden patches of all its pictures, of which each process takes its share. `None`, on all processes,
    /// where the pictures of one of them cannot be read: that says nothing against the training, and the log has why.
    ///
    /// # Errors
    /// What the device says, and what is wrong between the processes.
    pub fn loss<B: Backend>(&mut self, trainer: &mut Trainer<B>, processes: &Processes) -> Result<Option<f64>> {
        let (own, mut problem) = match self.own_sum(trainer) {
            Ok(own) => (own, None),
            Err(error @ (Error::Data { .. } | Error::Picture { .. } | Error::Io { .. })) => ((0.0, 0), Some(error)),
            Err(error) => return Err(error),
        };
        processes.ready()?;
        let mut sums = [own.0, own.1 as f64, f64::from(u8::from(problem.is_some()))];
        processes.sum_f64(&mut sums)?;
        let [sum, pictures, failed] = sums;
        // A process with a small share cannot tell chance from a bad set; all together can.
        let all = self.source.len() as f64;
        if failed == 0.0 && all - pictures > BAD_SHARE * all {
            problem = Some(self.refuse(format!("only {pictures} of its {all} pictures can be read")));
        }
        if let Some(problem) = &problem {
            // What all have found out together, one says.
            if failed > 0.0 || processes.is_rank_0() {
                tracing::warn!("the validation loss is left out, and the run goes on: {problem}");
            }
        } else if failed > 0.0 && processes.is_rank_0() {
            tracing::warn!("the validation loss is left out, as another process cannot read its pictures");
        }
        if problem.is_some() || failed > 0.0 {
            self.failures += 1;
            return Ok(None);
        }
        let pictures = pictures as u64;
        if let Some(before) = self.pictures.replace(pictures).filter(|&before| before != pictures)
            && processes.is_rank_0()
        {
            tracing::warn!(
                "the validation loss is now of {pictures} pictures, and was of {before}: the two do not compare"
            );
        }
        Ok(Some(sum / pictures as f64))
    }

    /// The sum over this process' pictures of their losses, and how many pictures these are.
    fn own_sum<B: Backend>(&mut self, trainer: &mut Trainer<B>) -> Result<(f64, usize)> {
        // No more at a time than in training, whose memory they share.
        let mut loader = self.loader(self.at_a_time)?;
        let (mean, std) = self.processor.normalization();
        let ratio = trainer.model().config().mask_ratio;
        let (mut sum, mut pictures) = (0.0, 0);
        loop {
            let next = loader.next_batch().map_err(of_validation);
            self.named.extend(loader.bad_pictures_by_number());
            let Some(batch) = next? else { return Ok((sum, pictures)) };
            let (count, random) = (batch.len(), RandomMask { seed: self.seed, epoch: MASKS });
            let images = Images {
                batch: count,
                channels: batch.channels,
                height: batch.height,
                width: batch.width,
                values: ImageValues::Bytes { values: &batch.pixels, mean: &mean, std: &std },
            };
            let masking = Masking::Random { ratio, random, samples: Some(&batch.samples), first: 0 };
            sum += trainer.evaluate(&images, &masking)? * count as f64;
            pictures += count;
        }
    }

    fn loader(&self, batch_size: usize) -> Result<Loader> {
        let options = LoaderOptions {
            batch_size,
            workers: self.workers,
            seed: self.seed,
            shard: self.shard,
            ..Default::default()
        };
        let transform = Transform::Inference(self.processor.clone());
        let mut loader = Loader::evaluation(self.source.clone(), transform, &options)?;
        loader.do_not_name(self.named.clone());
        Ok(loader)
    }

    fn refuse(&self, problem: String) -> Error {
        of_validation(Error::Data { source_name: self.source.description().to_owned(), problem })
    }
}

/// The error of a set with the flag that it was given with.
fn of_validation(error: Error) -> Error {
    match error {
        Error::Data { source_name, problem } => Error::Data { source_name: format!("{source_name} (--val)"), problem },
        other => other,
    }
}
