//! Batches, built ahead of the step that needs them.
//!
//! Which pictures a batch holds, and their crops, depend on (seed, epoch, batch) and the set alone: not on the number
//! of workers, on timing, or on where a run was resumed.

mod batch;
mod build;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use batch::Batch;
use build::Shared;

use crate::data::health::Health;
use crate::data::order::Order;
use crate::data::source::Source;
use crate::data::transform::Transform;
use crate::{Error, Result};

/// Two batches are built at a time, so that the last pictures of one do not leave workers idle.
const LANES: usize = 2;

/// A place in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Passes over the set before this one.
    pub epoch: u32,
    /// Batches of this epoch before this one.
    pub batch: usize,
}

/// Which part of every batch is built here, when several processes train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This process, from 0.
    pub rank: usize,
    /// All processes.
    pub world: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { rank: 0, world: 1 }
    }
}

/// How batches are made.
#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    /// Pictures per batch and process.
    pub batch_size: usize,
    /// The run's seed: order, crops and flips.
    pub seed: u64,
    /// Threads that read and decode; 0 is one for each core.
    pub workers: usize,
    /// Finished batches that wait to be taken, at most (rounded up to an even number).
    pub prefetch: usize,
    /// The first batch.
    pub start: Position,
    /// This process' part of each batch.
    pub shard: Shard,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self {
            batch_size: 64,
            seed: 0,
            workers: 0,
            prefetch: LANES,
            start: Position::default(),
            shard: Shard::default(),
        }
    }
}

/// Yields batches, read and decoded on threads of its own.
///
/// **Training** ([`Loader::new`]) never ends. Each epoch has its own order. Batches are always full: the pictures that are
/// left over at the end of an epoch are left out of it, and a set smaller than a batch is repeated until it fills one. A
/// picture that cannot be decoded is logged and replaced by the next good one in the epoch's order.
///
/// **Evaluation** ([`Loader::evaluation`]) passes over the set once, in order, without randomness; the last batch may be
/// smaller, and a picture that cannot be decoded is logged and left out.
///
/// Both end with an error if more than 10 % of the pictures are bad: at once when that is beyond chance, else after the whole
/// set, or an epoch of it, was seen.
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    lanes: Vec<Receiver<Batch>>,
    threads: Vec<JoinHandle<()>>,
    /// The number of the next batch, counted from epoch 0.
    next: u64,
    /// The number after the last one, in evaluation.
    end: u64,
    /// How many have been taken.
    taken: usize,
    health: Health,
    waited: Duration,
    failed: Option<String>,
}

impl Loader {
    /// Endless batches for training.
    ///
    /// # Errors
    /// [`Error::Config`] for impossible settings, [`Error::Data`] for an empty source, [`Error::Io`] when threads cannot
    /// be started.
    pub fn new(source: Source, transform: Transform, options: &LoaderOptions) -> Result<Self> {
        Self::start(source, transform, options, true)
    }

    /// One pass in order. `seed` does not matter; `start` may skip batches.
    ///
    /// # Errors
    /// As [`Loader::new`]; [`Error::Config`] for a random transform.
    pub fn evaluation(source: Source, transform: Transform, options: &LoaderOptions) -> Result<Self> {
        if matches!(transform, Transform::Training(_)) {
            return Err(Error::Config("evaluation takes Transform::Inference: random crops would not repeat".into()));
        }
        Self::start(source, transform, options, false)
    }

    fn start(source: Source, transform: Transform, options: &LoaderOptions, training: bool) -> Result<Self> {
        transform.check()?;
        let Shard { rank, world } = options.shard;
        if options.batch_size == 0 || rank >= world {
            return Err(Error::Config(format!(
                "a loader needs a batch size of at least 1 and rank < world, found {} and {rank} of {world}",
                options.batch_size
            )));
        }
        let empty = |problem: &str| Error::Data { source_name: source.description().into(), problem: problem.into() };
        let count = u32::try_from(source.len()).map_err(|_| empty("more than 2^32 - 1 pictures"))?;
        if count == 0 {
            return Err(empty("there are no pictures in it"));
        }
        let channels = source.channels();
        let (height, width) = transform.size();
        let length = [options.batch_size, height, width, channels].iter().try_fold(1_usize, |n, m| n.checked_mul(*m));
        // Batches are made on threads that cannot fail: ask for the memory of one here.
        if length.is_none_or(|length| Vec::<u8>::new().try_reserve_exact(length).is_err()) {
            return Err(Error::Config(format!(
                "a batch of {} pictures of {height}x{width}x{channels} does not fit in memory",
                options.batch_size
            )));
        }
        let workers = match options.workers {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            workers => workers.min(1024),
        };
        let threads_refused = |error: std::io::Error| Error::Io {
            action: "starting",
            path: PathBuf::from("loader threads"),
            cause: error,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|index| format!("vitmae-data-{index}"))
            .build()
            .map_err(|error| threads_refused(std::io::Error::other(error)))?;
        let waiting = options.prefetch.max(1).div_ceil(LANES);
        // Every batch that can exist at once has room to come back: waiting, being built, and held by the caller.
        let (home, returned) = sync_channel(LANES * (waiting + 1) + 4);
        let batches = batches_per_epoch(source.len(), options.batch_size * world, training) as u64;
        let first = u64::from(options.start.epoch) * batches + options.start.batch as u64;
        let health = Health::new(source.len(), world);
        let shared = Arc::new(Shared {
            order: Order::new(count, options.seed),
            source,
            transform,
            options: *options,
            training,
            channels,
            pool,
            scratch: (0..workers).map(|_| Mutex::default()).collect(),
            returned: Mutex::new(returned),
            home,
            stop: AtomicBool::new(false),
        });
        let mut loader = Self {
            shared,
            lanes: Vec::new(),
            threads: Vec::new(),
            next: first,
            end: if training { u64::MAX } else { batches },
            taken: 0,
            health,
            waited: Duration::ZERO,
            failed: None,
        };
        for lane in 0..LANES {
            let (sender, receiver) = sync_channel(waiting);
            let shared = Arc::clone(&loader.shared);
            let numbers = (first + lane as u64..loader.end).step_by(LANES);
            let thread = std::thread::Builder::new()
                .name(format!("vitmae-batch-{lane}"))
                .spawn(move || {
                    for number in numbers {
                        let stopped = || shared.stop.load(Ordering::Relaxed);
                        if stopped() || sender.send(shared.build(number, batches)).is_err() {
                            break;
                        }
                    }
                })
                .map_err(threads_refused)?;
            loader.lanes.push(receiver);
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Batches of an epoch; at least 1.
    #[must_use]
    pub fn batches_per_epoch(&self) -> usize {
        let shared = &self.shared;
        let batch = shared.options.batch_size * shared.options.shard.world;
        batches_per_epoch(shared.source.len(), batch, shared.training)
    }

    /// The place of the next batch: a loader that starts there continues this one.
    #[must_use]
    pub fn position(&self) -> Position {
        let batches = self.batches_per_epoch() as u64;
        Position { epoch: (self.next / batches) as u32, batch: (self.next % batches) as usize }
    }

    /// The source it reads.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.shared.source
    }

    /// How long all calls of [`Loader::next_batch`] together have waited.
    #[must_use]
    pub fn data_wait(&self) -> Duration {
        self.waited
    }

    /// How many pictures were found to be bad, each counted once.
    #[must_use]
    pub fn bad_pictures(&self) -> usize {
        self.health.bad()
    }

    /// The numbers of the bad pictures.
    pub(crate) fn bad_pictures_by_number(&self) -> impl Iterator<Item = usize> {
        self.health.bad_pictures.iter().copied()
    }

    /// These bad pictures have already been reported: they are counted and skipped, but not logged again.
    pub(crate) fn do_not_name(&mut self, pictures: HashSet<usize>) {
        self.health.known = pictures;
    }

    /// The next batch; `None` at the end of an evaluation.
    ///
    /// # Errors
    /// [`Error::Data`] when more than 10 % of the pictures are bad, with how many and which, and errors of the source that
    /// are not about one picture. The loader yields nothing more after that.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            if let Some(problem) = &self.failed {
                return Err(self.refuse(problem.clone()));
            }
            if self.next >= self.end {
                return Ok(None);
            }
            let asked = Instant::now();
            let received = self.lanes[self.taken % LANES].recv();
            let waited = asked.elapsed();
            self.waited += waited;
            let Ok(mut batch) = received else {
                self.failed = Some("the threads that read it have stopped".to_owned());
                continue;
            };
            self.next += 1;
            self.taken += 1;
            batch.data_wait = waited;
            if let Err(error) = self.account(&mut batch) {
                self.failed = Some(match &error {
                    Error::Data { problem, .. } => problem.clone(),
                    other => other.to_string(),
                });
                return Err(error);
            }
            // Every picture of an evaluation's batch was bad.
            if !batch.is_empty() {
                return Ok(Some(batch));
            }
        }
    }

    fn refuse(&self, problem: String) -> Error {
        Error::Data { source_name: self.shared.source.description().to_owned(), problem }
    }

    /// Logs and counts what was bad.
    fn account(&mut self, batch: &mut Batch) -> Result<()> {
        // Of a set that is refused, ten bad pictures are logged.
        let most = if batch.failure.is_some() { self.health.bad() + 10 } else { usize::MAX };
        for slot in &mut batch.slots {
            for (index, error) in slot.bad.drain(..) {
                if self.health.saw_bad(index, &error) && self.health.bad() <= most {
                    tracing::warn!(%error, "skipped a picture that cannot be used");
                }
            }
        }
        for sample in &batch.samples {
            self.health.saw(*sample as usize);
        }
        if let Some(error) = batch.failure.take() {
            return Err(error);
        }
        if self.health.is_refused(self.taken >= self.batches_per_epoch()) {
            return Err(self.refuse(self.health.problem()));
        }
        Ok(())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Lanes that wait for room see that nobody receives any more.
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn batches_per_epoch(count: usize, batch: usize, training: bool) -> usize {
    if training { (count / batch).max(1) } else { count.div_ceil(batch) }
}
