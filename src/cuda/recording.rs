//! Work that was recorded once and is launched as a whole: a CUDA graph, or the emulator's list of what it was asked to do.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::CudaGraph;

use super::error::{CudaError, Result};
use super::launch::Stream;

/// What a [`Driver`](super::launch::Driver) recorded.
pub trait RecordedWork: fmt::Debug + Send + Sync {
    /// Gives all of it to the stream that it was recorded from, in the order in which it was recorded.
    ///
    /// # Safety
    ///
    /// All memory that the work reads and writes is still allocated: no buffer of it was dropped, neither since the recording
    /// nor during it. What was dropped is another buffer's by now, or nobody's. And the stream that it was recorded from, or a
    /// clone of it, still lives: it owns the kernels and the memory of matrix products.
    unsafe fn launch(&self) -> Result<()>;
}

impl Stream {
    /// Records what `work` gives to this stream; nothing of it runs. `work` cannot reserve memory, wait, copy from or to the
    /// host, mark a time, or be the first on its stream to multiply matrices: do that before.
    ///
    /// A buffer that `work` drops is given back when the recording ends, which ends the right to launch what uses it. `work`
    /// makes no slice with `Slice::from_cudarc`, whose events cross the recording's boundary, and drops no buffer of another
    /// stream, which the driver would free while this thread captures: either makes the recording fail.
    ///
    /// # Errors
    /// What `work` returns; [`CudaError::Recording`] for what cannot be recorded; a failed driver call.
    pub fn record<F: From<CudaError>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), F>,
    ) -> std::result::Result<Box<dyn RecordedWork>, F> {
        self.driver().begin_recording()?;
        let outcome = work();
        // Ended in any case, or the stream would never run anything again. The first error is the one to tell.
        let recorded = self.driver().end_recording();
        outcome?;
        Ok(recorded?)
    }
}

/// An instantiated CUDA graph.
pub(super) struct Graph(Mutex<Exclusive>);

/// cudarc's graph, which one thread at a time may use.
struct Exclusive(CudaGraph);

// SAFETY: the driver accepts a graph from any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for Exclusive {}

impl Graph {
    pub fn new(graph: CudaGraph) -> Self {
        Self(Mutex::new(Exclusive(graph)))
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl RecordedWork for Graph {
    unsafe fn launch(&self) -> Result<()> {
        let graph = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        graph.0.launch().map_err(|error| super::gpu::call("launching a graph", error))
    }
}
