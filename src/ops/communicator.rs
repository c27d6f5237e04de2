//! The processes that train together, as far as a device needs them.

use std::fmt::Debug;

use crate::Result;

/// Numbers that are exchanged at a time.
pub(crate) const BUCKET: usize = 8 << 20;

/// Looks whether other processes are still there; see [`Communicator::watch`].
pub type Watch = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// Processes that exchange numbers. Every call is collective: all processes make the same calls in the same order, with as many
/// numbers each. After an error nothing more can be exchanged.
pub trait Communicator: Debug + Send + Sync {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// All processes, at least 1.
    fn size(&self) -> usize;

    /// Adds `values` up over all processes, in place. All get the same bits.
    ///
    /// # Errors
    /// [`Error::Distributed`](crate::Error::Distributed) where a process is gone or does something else.
    fn sum(&self, values: &mut [f32]) -> Result<()>;

    /// The same in f64.
    ///
    /// # Errors
    /// As [`Communicator::sum`].
    fn sum_f64(&self, values: &mut [f64]) -> Result<()>;

    /// Copies the bytes of process `root` to all.
    ///
    /// # Errors
    /// As [`Communicator::sum`].
    fn broadcast(&self, bytes: &mut [u8], root: usize) -> Result<()>;

    /// Waits until all processes are here.
    ///
    /// # Errors
    /// As [`Communicator::sum`].
    fn barrier(&self) -> Result<()>;

    /// Whether the others are still there, as far as can be seen without exchanging anything. It does not wait, and is not
    /// collective.
    ///
    /// # Errors
    /// [`Error::Distributed`](crate::Error::Distributed) where a process is gone.
    fn alive(&self) -> Result<()> {
        Ok(())
    }

    /// [`Communicator::alive`] for whoever waits for a device, and does not keep this alive.
    fn watch(&self) -> Watch {
        Box::new(|| Ok(()))
    }

    /// Says that this process makes no more calls because an exchange failed: whoever waits for it need not.
    fn abandon(&self) {}
}
