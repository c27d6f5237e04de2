//! The way from a GPU to those of other processes: NCCL on a stream of its own, beside the work of this process.
//!
//! An exchange ends when all processes have joined it. One that dies leaves the others' GPUs waiting for ever, so hosts that wait
//! for theirs look for the other processes now and then.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, result};

use super::error::{CudaError, Result};
use super::gpu::call;
use crate::cuda::nccl::Nccl;
use crate::ops::{Communicator, Watch};

/// How long a host that waits sleeps at a time.
const NAP: Duration = Duration::from_micros(50);
/// How often it looks for the other processes.
const LOOK: Duration = Duration::from_secs(1);

/// The GPUs of other processes, once this one is connected with them.
pub(super) struct Exchange {
    nccl: Nccl,
    stream: Arc<CudaStream>,
    watch: Watch,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("nccl", &self.nccl).finish_non_exhaustive()
    }
}

impl Exchange {
    /// Joins the GPUs of all processes, where NCCL is to be had. The context is current. Collective.
    pub fn connect(context: &Arc<CudaContext>, processes: &dyn Communicator) -> crate::Result<Option<Self>> {
        // Before NCCL, whose start is collective. Few blocks do an exchange: they are to get their turn at once.
        let failed = |error| call("creating a stream", error);
        let (_, highest) = result::stream::get_priority_range().map_err(failed)?;
        let stream = context.new_stream_with_priority(highest).map_err(failed)?;
        let nccl = Nccl::connect(context, processes)?;
        Ok(nccl.map(|nccl| Self { nccl, stream, watch: processes.watch() }))
    }

    /// Adds f32 numbers up over all processes, behind the work that `behind` has, beside what it gets from now on. Collective.
    ///
    /// # Safety
    ///
    /// `length` numbers at `address` belong to one allocation of this GPU, and no work uses them before [`Exchange::finish`]. The
    /// context is current.
    pub unsafe fn all_reduce(&self, behind: &CudaStream, address: u64, length: usize) -> Result<()> {
        self.stream.join(behind).map_err(|error| call("waiting for gradients", error))?;
        // SAFETY: the caller's promise.
        unsafe { self.nccl.all_reduce(address, length, self.stream.cu_stream()) }
    }

    /// The same for giving all processes the numbers of each, `part` of them.
    ///
    /// # Safety
    ///
    /// As for [`Exchange::all_reduce`].
    pub unsafe fn all_gather(&self, behind: &CudaStream, address: u64, length: usize, part: usize) -> Result<()> {
        self.stream.join(behind).map_err(|error| call("waiting for weights", error))?;
        // SAFETY: the caller's promise.
        unsafe { self.nccl.all_gather(address, length, part, self.stream.cu_stream()) }
    }

    /// Puts what `stream` gets from now on behind all exchanges.
    pub fn finish(&self, stream: &CudaStream) -> Result<()> {
        stream.join(&self.stream).map_err(|error| call("waiting for other processes", error))
    }

    /// Waits for the work of `stream`, which may wait for exchanges, as long as the other processes are there. The context is
    /// current.
    ///
    /// # Errors
    /// [`CudaError::Exchange`] where one of them is gone: exchanges are aborted, and what they were to bring is not there.
    pub fn wait(&self, stream: &CudaStream) -> Result<()> {
        let waiting = |error| call("waiting for the device", error);
        let behind = stream.record_event(None).map_err(waiting)?;
        let mut look = Instant::now() + LOOK;
        while !behind.try_is_complete().map_err(waiting)? {
            std::thread::sleep(NAP);
            if Instant::now() >= look {
                self.look()?;
                look = Instant::now() + LOOK;
            }
        }
        Ok(())
    }

    /// Waits for all exchanges, whether or not they were finished, for as long as the other processes are there.
    pub fn settle(&self) {
        // What this is for comes behind a failure, which is the one to tell.
        let _ = self.wait(&self.stream);
    }

    fn look(&self) -> Result<()> {
        let found = self
            .nccl
            .failure()
            .and_then(|()| (self.watch)().map_err(|error| CudaError::Exchange { reason: error.to_string() }));
        found.inspect_err(|_| self.nccl.abort())
    }
}
