//! Buffers on a device.

use std::fmt::Debug;

use crate::Result;
use crate::ops::{Element, Real};

/// Memory of a device.
///
/// Parameters, gradients and moments each live in one flat arena, so that the optimiser walks them in one launch and an
/// all-reduce in a few buckets; the layers hold [aliases](Memory::alias) of parts of it.
pub trait Memory: Debug + Send + Sync + Sized + 'static {
    /// Activations and weight matrices.
    type Element: Real;
    /// Master weights, vectors, statistics and parameter gradients.
    type Master: Real;
    /// A range of device memory with elements of type `T`.
    type Buffer<T: Element>: Debug + Send + Sync;

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

    /// Makes something out of buffers that share one allocation, where the device gains from that. `make` may be called twice, the
    /// first time to measure: it asks for the same buffers each time and reads none of them.
    ///
    /// # Errors
    /// What `make` returns; [`Error::Device`](crate::Error::Device) when there is not enough memory.
    fn in_one_allocation<T>(&self, make: impl Fn(&Self) -> Result<T>) -> Result<T> {
        make(self)
    }

    /// Whether small batches leave this device idle, so that it should get many images at a time.
    fn wants_large_batches(&self) -> bool {
        false
    }
}
