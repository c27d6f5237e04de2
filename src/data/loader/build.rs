//! How lanes and workers fill a batch.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rayon::prelude::*;

use super::batch::{Batch, Buffers, Slot};
use super::{LoaderOptions, Shard};
use crate::Error;
use crate::data::image::Part;
use crate::data::order::Order;
use crate::data::source::Source;
use crate::data::transform::{Resizer, Transform};

/// A slot that meets this many bad pictures in a row gives up: the set is bad.
const CHAIN: usize = 64;

/// What lanes and workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) source: Source,
    pub(super) transform: Transform,
    pub(super) options: LoaderOptions,
    pub(super) training: bool,
    pub(super) order: Order,
    pub(super) channels: usize,
    pub(super) pool: rayon::ThreadPool,
    pub(super) scratch: Vec<Mutex<Scratch>>,
    pub(super) returned: Mutex<Receiver<Buffers>>,
    pub(super) home: SyncSender<Buffers>,
    pub(super) stop: AtomicBool,
}

/// A worker's buffers.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    file: Vec<u8>,
    part: Part,
    resizer: Resizer,
}

impl Shared {
    /// Builds the batch of a number counted from epoch 0.
    pub(super) fn build(&self, number: u64, batches: u64) -> Batch {
        let (epoch, index) = ((number / batches) as u32, (number % batches) as usize);
        let (height, width) = self.transform.size();
        let length = height * width * self.channels;
        let Buffers { mut pixels, mut samples, mut labels, mut slots } =
            { self.returned.lock().unwrap_or_else(PoisonError::into_inner).try_recv().unwrap_or_default() };
        let Shard { rank, world } = self.options.shard;
        let first = (index * world + rank) * self.options.batch_size;
        let size = if self.training {
            self.options.batch_size
        } else {
            self.options.batch_size.min(self.source.len().saturating_sub(first))
        };
        pixels.resize(size * length, 0);
        slots.resize_with(size, Slot::default);
        let order = self.training.then(|| self.order.epoch(epoch));
        self.pool.install(|| {
            pixels.par_chunks_exact_mut(length).zip(slots.par_iter_mut()).enumerate().for_each(|(at, (out, slot))| {
                self.fill(out, slot, first + at, epoch, order.as_deref());
            });
        });
        let failure = slots.iter_mut().find_map(|slot| slot.fatal.take());
        samples.clear();
        labels.clear();
        for (at, slot) in slots.iter().enumerate() {
            let Some(sample) = slot.sample else { continue };
            // Close the gaps that bad pictures leave in an evaluation.
            let to = samples.len();
            if to != at {
                pixels.copy_within(at * length..(at + 1) * length, to * length);
            }
            samples.push(sample as u64);
            labels.extend(self.source.label(sample));
        }
        pixels.truncate(samples.len() * length);
        let skipped = slots.iter().map(|slot| slot.bad.len()).sum();
        let labels = (self.source.classes().is_some() && labels.len() == samples.len()).then_some(labels);
        let home = Some(self.home.clone());
        Batch {
            pixels,
            samples,
            labels,
            height,
            width,
            channels: self.channels,
            epoch,
            index,
            skipped,
            data_wait: Duration::ZERO,
            slots,
            failure,
            home,
        }
    }

    /// Puts a picture into a slot. `place` counts slots from the start of the epoch.
    fn fill(&self, out: &mut [u8], slot: &mut Slot, place: usize, epoch: u32, order: Option<&[u32]>) {
        *slot = Slot { bad: std::mem::take(&mut slot.bad), ..Slot::default() };
        slot.bad.clear();
        let count = self.source.len();
        let worker = rayon::current_thread_index().unwrap_or(0) % self.scratch.len();
        let mut scratch = self.scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch { file, part, resizer } = &mut *scratch;
        let tries = if order.is_some() { count.min(CHAIN) } else { 1 };
        for step in 0..tries {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let place = (place + step) % count;
            let sample = order.map_or(place, |order| order[place] as usize);
            let keys = (self.options.seed, epoch, sample as u64);
            let choose = |height, width| self.transform.region(height, width, keys);
            let result = self.source.read_part(sample, file, choose, part);
            let result = result.and_then(|()| self.transform.apply_part(out, part, resizer));
            match result {
                Ok(()) => {
                    slot.sample = Some(sample);
                    return;
                }
                Err(error @ Error::Picture { .. }) => slot.bad.push((sample, error)),
                Err(error) => {
                    slot.fatal = Some(error);
                    return;
                }
            }
        }
        if order.is_some() {
            let examples: Vec<String> = slot.bad.iter().take(3).map(|(_, error)| error.to_string()).collect();
            slot.fatal = Some(Error::Data {
                source_name: self.source.description().to_owned(),
                problem: format!("{tries} pictures in a row cannot be read: {}; …", examples.join("; ")),
            });
        }
    }
}
