//! Several processes that train one model: each takes its share of every batch, gradients are added up, and all make the same
//! update.
//!
//! | engine | file | started by | for |
//! | --- | --- | --- | --- |
//! | one process | `single.rs` | | |
//! | MPI (feature `mpi`) | `mpi.rs` | `mpirun`, `srun --mpi=pmix` | CPUs, and GPUs to meet and agree |
//! | sockets | `tcp.rs`, `rendezvous.rs` | torchrun or whatever sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` | the same |
//! | NCCL (feature `cuda`) | `cuda/nccl.rs` | comes on top of either | gradients from GPU to GPU |
//!
//! [`Processes`] is what training works with. Its rule: an error of one process is an error of all. After whatever
//! may fail in one process alone comes [`Processes::ready`] (or [`Processes::agree`]), and only then an exchange.

mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod rendezvous;
mod single;
mod tcp;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

pub use launcher::{Launch, Meeting};

use crate::ops::{BUCKET, Communicator, Memory, Watch};
use crate::{Error, Result};

/// How long processes wait for each other at the start.
const PATIENCE: Duration = Duration::from_secs(120);
/// Seconds that they may be told to wait: a week.
const LONGEST: u64 = 7 * 24 * 3600;

/// All processes work.
const RUNNING: u8 = 0;
/// One has failed, and all know.
const FAILED: u8 = 1;
/// An exchange has failed: nothing more can be agreed on.
const BROKEN: u8 = 2;
/// One has failed, and all have come to the end of what they do together.
const ENDED: u8 = 3;

/// The processes of a run, as one of them sees them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Processes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engine: Box<dyn Communicator>,
    local_rank: usize,
    local_size: usize,
    state: AtomicU8,
}

impl Shared {
    fn break_off(&self) {
        self.state.store(BROKEN, Ordering::Relaxed);
        self.engine.abandon();
    }

    /// Whether something can still come from the others.
    fn alive(&self) -> Result<()> {
        if self.state.load(Ordering::Relaxed) == BROKEN {
            return Err(broken());
        }
        self.engine.alive().inspect_err(|_| self.break_off())
    }
}

fn broken() -> Error {
    Error::Distributed("an earlier exchange between the processes has failed".into())
}

impl Processes {
    fn over(engine: Box<dyn Communicator>, local_rank: usize, local_size: usize) -> Self {
        Self { shared: Arc::new(Shared { engine, local_rank, local_size, state: AtomicU8::new(RUNNING) }) }
    }

    /// This process alone.
    #[must_use]
    pub fn single() -> Self {
        Self::over(Box::new(single::Single), 0, 1)
    }

    /// Joins the processes that were started together. Drop the last clone on the thread that called this.
    ///
    /// # Errors
    /// [`Error::Distributed`] where they do not meet within two minutes (`VITMAE_RENDEZVOUS_SECONDS` says otherwise), or were
    /// started by MPI and this build lacks the feature `mpi`.
    pub fn join(launch: &Launch) -> Result<Self> {
        match launch {
            Launch::Single => Ok(Self::single()),
            Launch::Tcp(meeting) => {
                let engine =
                    tcp::Tcp::meet(meeting, patience(std::env::var("VITMAE_RENDEZVOUS_SECONDS").ok().as_deref())?)?;
                Ok(Self::over(Box::new(engine), meeting.local_rank, meeting.local_size))
            }
            Launch::Mpi { local_rank, local_size, .. } => Self::over_mpi(*local_rank, *local_size),
        }
    }

    #[cfg(feature = "mpi")]
    fn over_mpi(local_rank: usize, local_size: usize) -> Result<Self> {
        Ok(Self::over(Box::new(mpi::Mpi::start()?), local_rank, local_size))
    }

    #[cfg(not(feature = "mpi"))]
    fn over_mpi(_local_rank: usize, _local_size: usize) -> Result<Self> {
        Err(Error::Distributed(
            "MPI started this process, and this program was built without the feature `mpi`: build it with --features mpi \
             (needs an MPI and libclang), or start the processes with RANK, WORLD_SIZE and MASTER_ADDR set"
                .into(),
        ))
    }

    /// This process, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.shared.engine.rank()
    }

    /// All processes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.shared.engine.size()
    }

    /// Whether this is process 0, which alone writes files.
    #[must_use]
    pub fn is_rank_0(&self) -> bool {
        self.rank() == 0
    }

    /// This process among those of its machine, from 0: the GPU that it takes.
    #[must_use]
    pub fn local_rank(&self) -> usize {
        self.shared.local_rank
    }

    /// The processes of this machine, as far as known: they share its cores.
    #[must_use]
    pub fn local_size(&self) -> usize {
        self.shared.local_size
    }

    /// An error of one process becomes one of all: of the first that failed its own, of the others [`Error::Peer`]. Collective.
    ///
    /// # Errors
    /// These; [`Error::Distributed`] where a process is gone.
    pub fn agree<T, E: From<Error>>(&self, result: std::result::Result<T, E>) -> std::result::Result<T, E> {
        self.agree_to_stop(result, false).map(|(value, _)| value)
    }

    /// Tells the others of an error, and gives back the one to go on with: this one, or the first other's. Collective with
    /// [`Processes::agree`].
    pub(crate) fn tell(&self, error: Error) -> Error {
        match self.agree::<std::convert::Infallible, Error>(Err(error)) {
            Err(error) => error,
        }
    }

    /// As [`Processes::agree`], and besides whether any process wants to stop.
    ///
    /// # Errors
    /// As [`Processes::agree`].
    pub fn agree_to_stop<T, E: From<Error>>(
        &self,
        result: std::result::Result<T, E>,
        stop: bool,
    ) -> std::result::Result<(T, bool), E> {
        if self.size() == 1 || self.state() != RUNNING {
            return result.map(|value| (value, stop));
        }
        let mut counts = [f64::from(u8::from(result.is_err())), f64::from(u8::from(stop))];
        if let Err(error) = self.sum_f64(&mut counts) {
            return Err(result.err().unwrap_or_else(|| error.into()));
        }
        let [failures, stops] = counts;
        if failures == 0.0 {
            return result.map(|value| (value, stops > 0.0));
        }
        let mut failed = vec![0.0; self.size()];
        failed[self.rank()] = f64::from(u8::from(result.is_err()));
        if let Err(error) = self.sum_f64(&mut failed) {
            return Err(result.err().unwrap_or_else(|| error.into()));
        }
        self.shared.state.store(FAILED, Ordering::Relaxed);
        let rank = failed.iter().position(|&failed| failed > 0.0).unwrap_or(0);
        match result {
            Err(error) if rank == self.rank() => Err(error),
            _ => Err(Error::Peer { rank, size: self.size() }.into()),
        }
    }

    /// Goes on where all others do as well: to be called before an exchange, behind what may have failed in one of them alone. One
    /// that failed is at [`Processes::agree`] or [`Processes::finish`] meanwhile. Collective.
    ///
    /// # Errors
    /// As [`Processes::agree`].
    pub fn ready(&self) -> Result<()> {
        self.agree(Ok(()))
    }

    /// The end of what the processes do together: agrees on the result and, where one has failed, waits for the others, so that
    /// none is ended by its launcher while it saves what there is. Collective.
    ///
    /// # Errors
    /// As [`Processes::agree`].
    pub fn finish<T, E: From<Error>>(&self, result: std::result::Result<T, E>) -> std::result::Result<T, E> {
        let result = self.agree(result);
        // Those that save what there is are waited for; whoever is gone cannot be.
        while self.state() == FAILED {
            let mut still_to_come = [0.0, 0.0];
            if self.sum_f64(&mut still_to_come).is_ok() && still_to_come[0] == 0.0 {
                self.shared.state.store(ENDED, Ordering::Relaxed);
            }
        }
        result
    }

    /// Behind a failure that all know of, and in front of [`Processes::finish`]: whether all processes are here and can save
    /// together what there is. Collective with [`Processes::finish`].
    pub(crate) fn all_save(&self, can: bool) -> bool {
        // This one comes to `finish` later, and can save or not.
        let mut saving = [1.0, f64::from(u8::from(can))];
        self.state() == FAILED && self.sum_f64(&mut saving).is_ok() && saving[1] == self.size() as f64
    }

    /// The bytes of process 0, however many. Collective.
    ///
    /// # Errors
    /// As [`Communicator::broadcast`].
    pub fn share(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.broadcast(&mut length, 0)?;
        let mut bytes = bytes;
        bytes.resize(usize::try_from(u64::from_le_bytes(length)).unwrap_or(0), 0);
        self.broadcast(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The number of process 0. Collective.
    ///
    /// # Errors
    /// As [`Communicator::broadcast`].
    pub fn share_number(&self, number: u64) -> Result<u64> {
        let mut bytes = number.to_le_bytes();
        self.broadcast(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// How many of the pictures of a batch each process takes.
    ///
    /// # Errors
    /// [`Error::Config`] where it is not the same for all.
    pub fn share_of(&self, batch_size: usize) -> Result<usize> {
        let size = self.size();
        if batch_size.is_multiple_of(size) {
            return Ok(batch_size / size);
        }
        let (less, more) = (batch_size / size * size, batch_size.div_ceil(size) * size);
        let less = if less == 0 { String::new() } else { format!("{less} or ") };
        Err(Error::Config(format!(
            "a batch of {batch_size} pictures cannot be shared out evenly among {size} processes; take {less}{more}"
        )))
    }

    /// Fails on all processes where one of them has another setting than process 0. Collective.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting; as [`Processes::agree`].
    pub fn check_same(&self, settings: &[(impl AsRef<str>, String)]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let mine: Vec<&String> = settings.iter().map(|(_, value)| value).collect();
        let rank_0 = self.share(serde_json::to_vec(&mine).unwrap_or_default())?;
        let rank_0: Vec<String> = serde_json::from_slice(&rank_0).unwrap_or_default();
        let differs = settings.iter().enumerate().find(|(index, (_, mine))| rank_0.get(*index) != Some(mine));
        self.agree(match differs {
            None => Ok(()),
            Some((index, (name, mine))) => Err(Error::Config(format!(
                "the processes have different settings: {} is {mine} here and {} on process 0",
                name.as_ref(),
                rank_0.get(index).map_or("unknown", String::as_str)
            ))),
        })
    }

    /// The numbers of process 0 in all processes' memory. Collective.
    ///
    /// # Errors
    /// Device errors; as [`Communicator::broadcast`].
    pub(crate) fn broadcast_buffer<M: Memory, T: crate::ops::Element>(
        &self,
        memory: &M,
        buffer: &mut M::Buffer<T>,
    ) -> Result<()> {
        let length = memory.length(buffer);
        let mut values = vec![T::default(); length.min(BUCKET)];
        for start in (0..length).step_by(BUCKET) {
            let values = &mut values[..BUCKET.min(length - start)];
            // SAFETY: the only handle to this part that is in use, as the buffer is borrowed mutably.
            let mut part = unsafe { memory.alias(buffer, start, values.len())? };
            if self.is_rank_0() {
                memory.download(values, &part)?;
            }
            self.broadcast(bytemuck::cast_slice_mut(values), 0)?;
            if !self.is_rank_0() {
                memory.upload(&mut part, values)?;
            }
        }
        Ok(())
    }

    fn state(&self) -> u8 {
        self.shared.state.load(Ordering::Relaxed)
    }

    /// Nothing can be exchanged any more.
    pub(crate) fn break_off(&self) {
        self.shared.break_off();
    }

    fn exchange(&self, exchange: impl FnOnce(&dyn Communicator) -> Result<()>) -> Result<()> {
        if self.state() == BROKEN {
            return Err(broken());
        }
        exchange(&*self.shared.engine).inspect_err(|_| self.break_off())
    }
}

/// How long to wait for each other, as the variable says.
fn patience(given: Option<&str>) -> Result<Duration> {
    let Some(text) = given else { return Ok(PATIENCE) };
    match text.trim().parse() {
        Ok(seconds) if seconds <= LONGEST => Ok(Duration::from_secs(seconds)),
        _ => Err(Error::Config(format!(
            "the variable VITMAE_RENDEZVOUS_SECONDS is {text:?}, expected a number of seconds, at most {LONGEST}"
        ))),
    }
}

impl Communicator for Processes {
    fn rank(&self) -> usize {
        self.rank()
    }

    fn size(&self) -> usize {
        self.size()
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        self.exchange(|engine| engine.sum(values))
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.exchange(|engine| engine.sum_f64(values))
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.exchange(|engine| engine.broadcast(bytes, root))
    }

    fn barrier(&self) -> Result<()> {
        self.exchange(|engine| engine.barrier())
    }

    fn alive(&self) -> Result<()> {
        self.shared.alive()
    }

    fn watch(&self) -> Watch {
        let shared = Arc::downgrade(&self.shared);
        Box::new(move || match shared.upgrade() {
            Some(shared) => shared.alive(),
            None => Err(broken()),
        })
    }

    fn abandon(&self) {
        self.break_off();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_a_number_of_seconds() {
        assert_eq!(patience(None).expect("default"), PATIENCE);
        assert_eq!(patience(Some(" 7 ")).expect("seconds"), Duration::from_secs(7));
        for text in ["", "abc", "-1", "1e3", "604801", "18446744073709551615", "99999999999999999999"] {
            let error = patience(Some(text)).expect_err(text).to_string();
            assert!(error.contains("VITMAE_RENDEZVOUS_SECONDS"), "{error}");
        }
    }
}
