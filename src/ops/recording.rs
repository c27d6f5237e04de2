//! Work that is recorded once and launched as a whole.

use std::fmt::Debug;

use crate::Result;
use crate::ops::Memory;

/// Recording what a device is asked to do, to launch it again and again without the host's part.
pub trait Record: Memory {
    /// What was recorded.
    type Recording: Debug + Send + Sync;

    /// Whether this device gains from recordings. Where it does not, [`Record::record`] is an error.
    fn records(&self) -> bool;

    /// Records what `work` asks of this device; nothing of it runs. Run the same work once before, so that nothing is allocated
    /// in it, and let it copy nothing from or to the host.
    ///
    /// # Errors
    /// What `work` returns, and device errors.
    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Recording>;

    /// Runs recorded work. Returns `false` where it cannot run any more because memory that it used was given back since: record
    /// it again.
    ///
    /// # Errors
    /// Device errors.
    ///
    /// # Safety
    /// All buffers that the work used still exist.
    unsafe fn replay(&self, recording: &Self::Recording) -> Result<bool>;
}
