//! Pinned host memory through which uploads go, so that a copy neither waits for the device nor keeps the caller's memory.
//!
//! Bytes are copied into a slot, from there the device fetches them in the order of its stream, and an event says when the slot
//! is free again. Large uploads, such as pictures, alternate between two slots: the host fills one while the device reads the
//! other. Small ones have slots of their own, so that a few numbers do not wait behind the pictures.

use std::ptr::NonNull;

use cudarc::driver::{CudaStream, result, sys};

use super::error::{CudaError, Result};
use super::gpu::call;

/// Uploads up to this many bytes take a small slot.
const SMALL_BYTES: usize = 64 << 10;
const SMALL_SLOTS: usize = 16;
const LARGE_SLOTS: usize = 2;
/// A larger upload is cut into pieces.
const LARGEST_BYTES: usize = 256 << 20;

/// The slots of one stream. Its context must be current in every call, and when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Staging {
    small: Ring<Slot>,
    large: Ring<Slot>,
    allocations: u64,
}

/// Slots that take turns, made when their first turn comes.
#[derive(Debug)]
struct Ring<S> {
    slots: Vec<S>,
    next: usize,
}

impl<S> Default for Ring<S> {
    fn default() -> Self {
        Self { slots: Vec::new(), next: 0 }
    }
}

impl<S> Ring<S> {
    /// The next of `count` slots, and whether it was made now. A slot that cannot be made leaves the turn where it was.
    fn take(&mut self, count: usize, make: impl FnOnce() -> Result<S>) -> Result<(&mut S, bool)> {
        let index = self.next;
        let is_new = index >= self.slots.len();
        if is_new {
            self.slots.push(make()?);
        }
        self.next = (index + 1) % count;
        Ok((&mut self.slots[index], is_new))
    }
}

#[derive(Debug)]
struct Slot {
    memory: NonNull<u8>,
    capacity: usize,
    /// Recorded behind the last copy out of the slot.
    free: sys::CUevent,
}

// SAFETY: pinned memory and events belong to no thread; the owner's lock keeps two from using them at once.
unsafe impl Send for Slot {}

impl Staging {
    /// How often pinned memory was reserved.
    pub fn allocations(&self) -> u64 {
        self.allocations
    }

    /// Copies `bytes` to the device behind the work that `stream` has; they may be reused on return.
    ///
    /// # Safety
    ///
    /// `bytes.len()` bytes at `to` belong to one allocation of the stream's device. All calls name the same stream.
    pub unsafe fn upload(&mut self, stream: &CudaStream, to: u64, bytes: &[u8]) -> Result<()> {
        for (piece, bytes) in bytes.chunks(LARGEST_BYTES).enumerate() {
            let to = to + (piece * LARGEST_BYTES) as u64;
            let slot = self.free_slot(bytes.len())?;
            // SAFETY: the slot has this many bytes, and the device is done with it.
            let staged = unsafe {
                slot.memory.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                std::slice::from_raw_parts(slot.memory.as_ptr(), bytes.len())
            };
            // SAFETY: the caller promises the target; the slot is not written again before the event.
            unsafe {
                result::memcpy_htod_async(to, staged, stream.cu_stream())
                    .and_then(|()| result::event::record(slot.free, stream.cu_stream()))
            }
            .map_err(|error| call("copying to the device", error))?;
        }
        Ok(())
    }

    /// A slot of at least `bytes` bytes that the device has no use for.
    fn free_slot(&mut self, bytes: usize) -> Result<&Slot> {
        let is_small = bytes <= SMALL_BYTES;
        let (ring, count) = if is_small { (&mut self.small, SMALL_SLOTS) } else { (&mut self.large, LARGE_SLOTS) };
        let (slot, is_new) = ring.take(count, || Slot::new(if is_small { SMALL_BYTES } else { bytes }))?;
        self.allocations += u64::from(is_new);
        // SAFETY: the event is ours and was not destroyed; one that was never recorded counts as done.
        unsafe { result::event::synchronize(slot.free) }.map_err(|error| call("waiting for a copy", error))?;
        if slot.capacity < bytes {
            *slot = Slot::new(bytes)?;
            self.allocations += 1;
        }
        Ok(slot)
    }
}

impl Slot {
    fn new(bytes: usize) -> Result<Self> {
        let capacity = bytes.next_power_of_two().min(LARGEST_BYTES);
        // SAFETY: a context is current; the memory is written before it is read.
        let memory = unsafe { result::malloc_host(capacity, 0) };
        let memory = memory.map_err(|error| match call("pinning host memory", error) {
            CudaError::OutOfMemory { .. } => CudaError::OutOfPinnedMemory { bytes: capacity },
            error => error,
        })?;
        let Some(memory) = NonNull::new(memory.cast()) else {
            return Err(CudaError::OutOfPinnedMemory { bytes: capacity });
        };
        match result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING) {
            Ok(free) => Ok(Self { memory, capacity, free }),
            Err(error) => {
                // SAFETY: just reserved, and used by nobody. The first error is the one to tell.
                let _ = unsafe { result::free_host(memory.as_ptr().cast()) };
                Err(call("creating an event", error))
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: both are ours and used for the last time; the copy out of the slot is waited for. A failure means that the
        // context is gone, and they with it.
        unsafe {
            let _ = result::event::synchronize(self.free);
            let _ = result::event::destroy(self.free);
            let _ = result::free_host(self.memory.as_ptr().cast());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_cannot_be_made_leaves_the_others_in_turn() {
        let mut ring = Ring::default();
        let mut take = |made: Result<char>| ring.take(2, || made).map(|(&mut slot, is_new)| (slot, is_new)).ok();
        let full = || Err(CudaError::OutOfMemory { bytes: 1 });
        assert_eq!(take(full()), None);
        assert_eq!(take(Ok('a')), Some(('a', true)));
        assert_eq!(take(full()), None);
        assert_eq!(take(full()), None);
        assert_eq!(take(Ok('b')), Some(('b', true)));
        assert_eq!(take(Ok('c')), Some(('a', false)));
        assert_eq!(take(full()), Some(('b', false)));
        assert_eq!(take(full()), Some(('a', false)));
    }
}
