//! Buffers on a device.

use std::fmt::Debug;

use crate::Result;
use crate::ops::{BUCKET, Communicator};

/// A number type that buffers hold.
pub trait Element: bytemuck::Pod + Default + Debug + Send + Sync + 'static {}

impl<T: bytemuck::Pod + Default + Debug + Send + Sync + 'static> Element for T {}

/// Memory of a device.
///
/// Parameters, gradients and moments each live in one flat arena, so that the optimiser walks them in one launch and an
/// all-reduce in a few buckets; the layers hold [aliases](Memory::alias) of parts of it.
pub trait Memory: Debug + Send + Sync + Sized + 'static {
    /// Activations and weight matrices.
    type Element: Element;
    /// Master weights, vectors, statistics and parameter gradients.
    type Master: Element;
    /// A range of device memory with elements of type `T`.
    type Buffer<T: Element>: Debug + Send + Sync;
    /// Work that was recorded once and is launched as a whole.
    type Recording: Debug + Send + Sync;

    /// One zeroed buffer of `length` elements.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when there is not enough memory; the message says how much was asked for.
    fn buffer<T: Element>(&self, length: usize) -> Result<Self::Buffer<T>>;

    /// A second handle to elements `offset..offset + length` of `buffer`, which keeps the memory alive.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when the range is not inside the buffer.
    ///
    /// # Safety
    /// Two handles to the same element must not be in use at the same time when one of the uses is `&mut`. Keep them in one
    /// owner that lends only one of them at a time.
    unsafe fn alias<T: Element>(
        &self,
        buffer: &Self::Buffer<T>,
        offset: usize,
        length: usize,
    ) -> Result<Self::Buffer<T>>;

    /// Room for the working copy of the first `length` masters: an alias of them where `Element` is `Master`, else new memory
    /// that [`Memory::refresh`] fills.
    ///
    /// # Errors
    /// As [`Memory::buffer`].
    ///
    /// # Safety
    /// As [`Memory::alias`].
    unsafe fn working_copy(
        &self,
        master: &Self::Buffer<Self::Master>,
        length: usize,
    ) -> Result<Self::Buffer<Self::Element>>;

    /// Rounds the first masters into their working copy, after they were loaded. Nothing to do where the copy is an alias.
    ///
    /// # Errors
    /// Device errors.
    fn refresh(&self, working: &mut Self::Buffer<Self::Element>, master: &Self::Buffer<Self::Master>) -> Result<()>;

    /// The number of elements in a buffer.
    fn length<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize;

    /// Copies `from` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when `to` is shorter than `from`; device errors.
    fn upload<T: Element>(&self, to: &mut Self::Buffer<T>, from: &[T]) -> Result<()>;

    /// Copies the start of `from` into all of `to`, and waits until it is there.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when `from` is shorter than `to`; device errors.
    fn download<T: Element>(&self, to: &mut [T], from: &Self::Buffer<T>) -> Result<()>;

    /// Sets every element to zero.
    ///
    /// # Errors
    /// Device errors.
    fn zero<T: Element>(&self, buffer: &mut Self::Buffer<T>) -> Result<()>;

    /// Joins this device with those of the other processes, where it has a way of its own to them; whether it has. Collective.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`](crate::Error::Distributed).
    fn connect(&self, _processes: &dyn Communicator) -> Result<bool> {
        Ok(false)
    }

    /// Adds `buffer` up over all processes, in place, behind the work that the device has. Collective.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`](crate::Error::Distributed).
    fn all_reduce(&self, buffer: &mut Self::Buffer<Self::Master>, processes: &dyn Communicator) -> Result<()> {
        let mut values = vec![Self::Master::default(); self.length(buffer)];
        self.download(&mut values, buffer)?;
        let mut sums: Vec<f64> = values.iter().map(|&value| Self::master_f64(value)).collect();
        processes.sum_f64(&mut sums)?;
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = Self::master(sum);
        }
        self.upload(buffer, &values)
    }

    /// Starts what [`Memory::all_reduce`] does: a device with a way of its own to the others does it while it goes on with the
    /// work that it gets from now on, which must not touch the buffer before [`Memory::finish_all_reduces`]. Collective.
    ///
    /// # Errors
    /// As [`Memory::all_reduce`].
    fn start_all_reduce(&self, buffer: &mut Self::Buffer<Self::Master>, processes: &dyn Communicator) -> Result<()> {
        self.all_reduce(buffer, processes)
    }

    /// Puts what the device gets to do from now on behind all sums that were started.
    ///
    /// # Errors
    /// Device errors.
    fn finish_all_reduces(&self) -> Result<()> {
        Ok(())
    }

    /// Gives all processes the numbers of each: process `r` has those from `r * part` on, `part` of them or as many as there
    /// are. Collective.
    ///
    /// # Errors
    /// As [`Memory::all_reduce`].
    fn all_gather(
        &self,
        buffer: &mut Self::Buffer<Self::Master>,
        part: usize,
        processes: &dyn Communicator,
    ) -> Result<()> {
        gather_on_host(self, buffer, part, processes)
    }

    /// Makes something out of buffers that share one allocation, where that is worth it: `make` may be called twice, first to
    /// measure. It asks for the same buffers each time and reads none of them.
    ///
    /// # Errors
    /// What `make` returns; [`Error::Device`](crate::Error::Device) when there is not enough memory.
    fn together<T>(&self, make: impl Fn(&Self) -> Result<T>) -> Result<T> {
        make(self)
    }

    /// Whether this device gains from recorded work.
    fn records(&self) -> bool {
        false
    }

    /// Records what `work` asks of this device; nothing of it runs. Run the same work once before, so that nothing is allocated
    /// in it, and let it copy nothing from or to the host.
    ///
    /// # Errors
    /// What `work` returns, and device errors.
    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Recording>;

    /// Runs recorded work. `false` where it cannot run any more because memory that it used was given back meanwhile: record it
    /// again.
    ///
    /// # Errors
    /// Device errors.
    ///
    /// # Safety
    /// All buffers that the work used still exist.
    unsafe fn replay(&self, recording: &Self::Recording) -> Result<bool>;

    /// `value` as an element of activations.
    fn element(value: f64) -> Self::Element;
    /// `value` as a master number.
    fn master(value: f64) -> Self::Master;
    /// An element of activations as f64.
    fn element_f64(value: Self::Element) -> f64;
    /// A master number as f64.
    fn master_f64(value: Self::Master) -> f64;
}

/// [`Memory::all_gather`] by way of the host.
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
