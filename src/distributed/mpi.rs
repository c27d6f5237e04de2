//! MPI: what `mpirun` and `srun --mpi=pmix` start.
//!
//! MPI ends the whole job where an exchange fails or a process dies, and its launcher says which process that was; so calls here do
//! not fail. Sums go through a buffer of a few megabytes, because a count in MPI has 32 bits and numbers in place have no portable
//! name.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::Equivalence;

use crate::ops::Communicator;
use crate::{Error, Result};

/// Numbers, or bytes, that are exchanged at a time.
const CHUNK: usize = 1 << 20;

/// All processes of an MPI job.
pub(super) struct Mpi {
    rank: usize,
    size: usize,
    abandoned: AtomicBool,
    /// What was sent. Locked during a call, as calls from several threads may not overlap.
    sent: Mutex<Sent>,
    /// Finalises MPI when it is dropped.
    _universe: Universe,
}

#[derive(Default)]
struct Sent {
    f32: Vec<f32>,
    f64: Vec<f64>,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Mpi {
    /// Starts MPI. Drop the result on the same thread.
    pub fn start() -> Result<Self> {
        let failed = |problem: &str| Error::Distributed(format!("MPI cannot be used: {problem}"));
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("it was started before in this process"))?;
        if threading < Threading::Serialized {
            return Err(failed("this MPI serves one thread only; install one with thread support"));
        }
        let world = SimpleCommunicator::world();
        let (rank, size) = (world.rank().unsigned_abs() as usize, world.size().unsigned_abs() as usize);
        Ok(Self { rank, size, abandoned: AtomicBool::new(false), sent: Mutex::default(), _universe: universe })
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds up in chunks.
fn sum<T: Copy + Equivalence>(values: &mut [T], sent: &mut Vec<T>) {
    let world = SimpleCommunicator::world();
    for chunk in values.chunks_mut(CHUNK) {
        sent.clear();
        sent.extend_from_slice(chunk);
        world.all_reduce_into(&sent[..], chunk, SystemOperation::sum());
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        sum(values, &mut self.sent().f32);
        Ok(())
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        sum(values, &mut self.sent().f64);
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        let _serial = self.sent();
        let world = SimpleCommunicator::world();
        let root = i32::try_from(root).map_err(|_| Error::Distributed("MPI counts processes in 31 bits".into()))?;
        for chunk in bytes.chunks_mut(CHUNK) {
            world.process_at_rank(root).broadcast_into(chunk);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let _serial = self.sent();
        SimpleCommunicator::world().barrier();
        Ok(())
    }

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // Finalising would wait for the others, who wait for this one.
        if self.abandoned.load(Ordering::Relaxed) || std::thread::panicking() {
            SimpleCommunicator::world().abort(1);
        }
    }
}
