//! Memory on a device: buffers that own it, and slices of them or of what cudarc manages.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::SyncOnDrop;

use super::error::{CudaError, Result};
use super::launch::{Argument, DeviceId, Driver};

/// Memory on a device, given back when dropped.
///
/// A buffer may be used on any stream of its device; ordering work between two streams is the caller's business.
#[derive(Debug)]
pub struct Buffer<T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, device: self.driver.device(), guard: None, element: PhantomData }
    }

    /// All of it, to be written.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> SliceMut<'_, T> {
        SliceMut {
            address: self.address,
            len: self.len,
            device: self.driver.device(),
            guard: None,
            element: PhantomData,
        }
    }
}

impl Buffer<u8> {
    /// `len` elements from a byte on. Both lie inside, and the byte is a multiple of the element's alignment.
    pub(crate) fn part<T: Pod>(&self, byte: usize, len: usize) -> Slice<'_, T> {
        debug_assert!(byte + len * size_of::<T>() <= self.len);
        let address = self.address + byte as u64;
        Slice { address, len, device: self.driver.device(), guard: None, element: PhantomData }
    }

    /// The same, to be written.
    ///
    /// # Safety
    ///
    /// Nobody else uses these elements while the result lives.
    pub(crate) unsafe fn part_mut<T: Pod>(&self, byte: usize, len: usize) -> SliceMut<'_, T> {
        debug_assert!(byte + len * size_of::<T>() <= self.len);
        let address = self.address + byte as u64;
        SliceMut { address, len, device: self.driver.device(), guard: None, element: PhantomData }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: the address came from this driver and is dropped here.
            unsafe { self.driver.release(self.address) };
        }
    }
}

/// Memory on a device that a launch reads.
#[derive(Debug)]
pub struct Slice<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) device: DeviceId,
    /// Tells cudarc, when dropped, that its memory was used on a stream.
    #[allow(dead_code, reason = "held for its drop")]
    guard: Option<SyncOnDrop<'a>>,
    pub(super) element: PhantomData<&'a [T]>,
}

impl<'a, T: Pod> Slice<'a, T> {
    /// Memory that cudarc manages, to be read by work on `stream`. Drop the slice after the launches that use it. Not inside
    /// [`Stream::record`](super::launch::Stream::record).
    pub fn from_cudarc(
        memory: &'a impl cudarc::driver::DevicePtr<T>,
        stream: &'a cudarc::driver::CudaStream,
    ) -> Slice<'a, T> {
        let (address, guard) = memory.device_ptr(stream);
        let device = DeviceId::Gpu(stream.context().ordinal());
        Slice { address, len: memory.len(), device, guard: Some(guard), element: PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements `range` of it.
    pub fn range(&self, range: Range<usize>) -> Result<Slice<'_, T>> {
        let (address, len) = part_of::<T>(self.address, self.len, &range)?;
        Ok(Slice { address, len, device: self.device, guard: None, element: PhantomData })
    }

    /// The same bytes as elements of another type, which needs no more alignment; what is left over is cut off.
    pub(super) fn reinterpret<U: Pod>(&self) -> Slice<'_, U> {
        debug_assert!(align_of::<U>() <= align_of::<T>());
        let len = self.len * size_of::<T>() / size_of::<U>();
        Slice { address: self.address, len, device: self.device, guard: None, element: PhantomData }
    }

    /// Its address, as a kernel argument.
    #[must_use]
    pub fn argument(&self) -> Argument<'_> {
        Argument::address(&self.address, (self.len > 0).then_some(self.device))
    }

    /// Address, length and device.
    pub(super) fn place(&self) -> (u64, usize, DeviceId) {
        (self.address, self.len, self.device)
    }

    /// Whether 128-bit accesses may start here.
    #[must_use]
    pub fn is_aligned_16(&self) -> bool {
        self.is_aligned(16)
    }

    /// Whether accesses of so many bytes may start here.
    #[must_use]
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.address.is_multiple_of(bytes as u64)
    }
}

/// Memory on a device that a launch writes.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) device: DeviceId,
    #[allow(dead_code, reason = "held for its drop")]
    guard: Option<SyncOnDrop<'a>>,
    pub(super) element: PhantomData<&'a mut [T]>,
}

impl<'a, T: Pod> SliceMut<'a, T> {
    /// Memory that cudarc manages, to be written by work on `stream`. Drop the slice after the launches that use it. Not inside
    /// [`Stream::record`](super::launch::Stream::record).
    pub fn from_cudarc(
        memory: &'a mut impl cudarc::driver::DevicePtrMut<T>,
        stream: &'a cudarc::driver::CudaStream,
    ) -> SliceMut<'a, T> {
        let len = memory.len();
        let (address, guard) = memory.device_ptr_mut(stream);
        let device = DeviceId::Gpu(stream.context().ordinal());
        SliceMut { address, len, device, guard: Some(guard), element: PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same memory, to be read.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, device: self.device, guard: None, element: PhantomData }
    }

    /// Elements `range` of it.
    pub fn range(&mut self, range: Range<usize>) -> Result<SliceMut<'_, T>> {
        let (address, len) = part_of::<T>(self.address, self.len, &range)?;
        Ok(SliceMut { address, len, device: self.device, guard: None, element: PhantomData })
    }

    /// The same bytes as elements of another type, which needs no more alignment; what is left over is cut off.
    pub(super) fn reinterpret<U: Pod>(&mut self) -> SliceMut<'_, U> {
        debug_assert!(align_of::<U>() <= align_of::<T>());
        let len = self.len * size_of::<T>() / size_of::<U>();
        SliceMut { address: self.address, len, device: self.device, guard: None, element: PhantomData }
    }

    /// Two parts of it that can be written in one launch: the first `middle` elements, and the rest.
    pub fn split_at(&mut self, middle: usize) -> Result<(SliceMut<'_, T>, SliceMut<'_, T>)> {
        let parts = [0..middle, middle..self.len].map(|range| part_of::<T>(self.address, self.len, &range));
        let [first, rest] = parts;
        let whole = |(address, len)| SliceMut { address, len, device: self.device, guard: None, element: PhantomData };
        Ok((whole(first?), whole(rest?)))
    }

    /// Its address, as a kernel argument.
    #[must_use]
    pub fn argument(&self) -> Argument<'_> {
        Argument::address(&self.address, (self.len > 0).then_some(self.device))
    }

    /// Address, length and device.
    pub(super) fn place(&self) -> (u64, usize, DeviceId) {
        (self.address, self.len, self.device)
    }

    /// Whether 128-bit accesses may start here.
    #[must_use]
    pub fn is_aligned_16(&self) -> bool {
        self.is_aligned(16)
    }

    /// Whether accesses of so many bytes may start here.
    #[must_use]
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.address.is_multiple_of(bytes as u64)
    }
}

fn part_of<T>(address: u64, len: usize, range: &Range<usize>) -> Result<(u64, usize)> {
    if range.start > range.end || range.end > len {
        let expected = format!("a range within 0..{len}");
        return Err(CudaError::Shape { op: "slice", what: "end of the range", found: range.end as u64, expected });
    }
    Ok((address + (range.start * size_of::<T>()) as u64, range.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_outside_a_slice_are_errors() {
        assert!(part_of::<f32>(256, 10, &(0..11)).is_err());
        assert_eq!(part_of::<f32>(256, 10, &(2..10)).ok(), Some((264, 8)));
    }
}
