//! Exchanging numbers with the devices of other processes.

use crate::Result;
use crate::ops::{BUCKET, Communicator, Memory, Real};

/// Exchanges between the devices of processes that train together: directly where [`Collectives::connect`] found a way, else
/// through the host. Every call is collective: all processes make the same calls in the same order.
pub trait Collectives: Memory {
    /// Connects this device to those of the other processes; returns whether a direct path exists.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`](crate::Error::Distributed).
    fn connect(&self, _processes: &dyn Communicator) -> Result<bool> {
        Ok(false)
    }

    /// Adds `buffer` up over all processes, in place, after the work that the device has.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`](crate::Error::Distributed).
    fn all_reduce(&self, buffer: &mut Self::Buffer<Self::Master>, processes: &dyn Communicator) -> Result<()> {
        let mut values = vec![Self::Master::default(); self.length(buffer)];
        self.download(&mut values, buffer)?;
        let mut sums: Vec<f64> = values.iter().map(|&value| value.to_f64()).collect();
        processes.sum_f64(&mut sums)?;
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = Self::Master::from_f64(sum);
        }
        self.upload(buffer, &values)
    }

    /// Starts what [`Collectives::all_reduce`] does. A device with a direct path does it beside the work that it gets from now on,
    /// which must not touch the buffer before [`Collectives::finish_all_reduces`].
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn start_all_reduce(&self, buffer: &mut Self::Buffer<Self::Master>, processes: &dyn Communicator) -> Result<()> {
        self.all_reduce(buffer, processes)
    }

    /// Orders the work that the device gets from now on after all sums that were started.
    ///
    /// # Errors
    /// Device errors.
    fn finish_all_reduces(&self) -> Result<()> {
        Ok(())
    }

    /// Gives all processes the numbers of each: process `r` has those from `r * part` on, `part` of them or as many as there
    /// are.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`].
    fn all_gather(
        &self,
        buffer: &mut Self::Buffer<Self::Master>,
        part: usize,
        processes: &dyn Communicator,
    ) -> Result<()> {
        gather_on_host(self, buffer, part, processes)
    }
}

/// [`Collectives::all_gather`] through the host.
pub(crate) fn gather_on_host<M: Memory>(
    memory: &M,
    buffer: &mut M::Buffer<M::Master>,
    part: usize,
    processes: &dyn Communicator,
) -> Result<()> {
    if processes.size() == 1 {
        return Ok(());
    }
    let length = memory.length(buffer);
    let mut values = vec![M::Master::default(); BUCKET.min(part)];
    for root in 0..processes.size() {
        let end = length.min((root + 1).saturating_mul(part));
        for start in (root.saturating_mul(part)..end).step_by(BUCKET) {
            let values = &mut values[..BUCKET.min(end - start)];
            // SAFETY: the only handle to this part that is in use, as the buffer is borrowed mutably.
            let mut piece = unsafe { memory.alias(buffer, start, values.len())? };
            if processes.rank() == root {
                memory.download(values, &piece)?;
            }
            processes.broadcast(bytemuck::cast_slice_mut(values), root)?;
            if processes.rank() != root {
                memory.upload(&mut piece, values)?;
            }
        }
    }
    Ok(())
}
