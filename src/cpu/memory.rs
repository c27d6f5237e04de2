//! Buffers in main memory: reference-counted allocations and handles to ranges of them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::cpu::{Cpu, Float};
use crate::ops::{Collectives, Communicator, Element, Memory, Record};
use crate::{Error, Result};

/// Wide enough for a cache line and for any vector register.
const ALIGNMENT: usize = 64;

/// From here on memory comes straight from the system, in huge pages where it has them: matrix products go through more
/// small pages than a processor remembers the places of.
const MAPPED_BYTES: usize = 2 << 20;

/// One zeroed allocation. The pages of a large one are only touched when they are first written.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) start: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

/// Who gives the memory back.
#[derive(Debug)]
enum Owner {
    Allocator(Layout),
    System { _map: MmapMut },
}

// SAFETY: an allocation is plain memory; who may read or write which part when is the business of the buffers.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    pub(super) fn zeroed(bytes: usize) -> Result<Self> {
        let failed = || Error::Device(format!("out of memory: {bytes} bytes could not be allocated"));
        if bytes >= MAPPED_BYTES {
            let mut map = MmapMut::map_anon(bytes).map_err(|_| failed())?;
            // Where the system has no huge pages, small ones do.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            let start = NonNull::new(map.as_mut_ptr()).ok_or_else(failed)?;
            return Ok(Self { start, bytes, owner: Owner::System { _map: map } });
        }
        let layout = Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(|_| failed())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
        Ok(Self { start, bytes: layout.size(), owner: Owner::Allocator(layout) })
    }

    /// How large it is.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        match &self.owner {
            // SAFETY: `start` came from `alloc_zeroed` with this layout.
            Owner::Allocator(layout) => unsafe { dealloc(self.start.as_ptr(), *layout) },
            // The mapping ends with its owner.
            Owner::System { .. } => (),
        }
    }
}

#[cfg(test)]
thread_local! {
    static ALLOCATED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Bytes of all buffers that this thread has asked for.
#[cfg(test)]
pub(crate) fn allocated_bytes() -> u64 {
    ALLOCATED.with(std::cell::Cell::get)
}

/// A range of main memory; dereferences to a slice.
///
/// Handles made by [`Memory::alias`] share their memory: see its safety section.
#[derive(Debug)]
pub struct CpuBuffer<T> {
    start: NonNull<T>,
    length: usize,
    memory: Arc<Allocation>,
}

// SAFETY: a buffer is a slice of plain numbers with exclusive use, or shares it under the contract of `Memory::alias`.
unsafe impl<T: Send> Send for CpuBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for CpuBuffer<T> {}

impl<T> Deref for CpuBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the range is inside `memory`, which lives as long as the handle; all bit patterns of `Pod` are values.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; nobody else uses the range while the handle is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl<F: Float> Memory for Cpu<F> {
    type Element = F;
    type Master = F;
    type Buffer<T: Element> = CpuBuffer<T>;

    fn buffer<T: Element>(&self, length: usize) -> Result<CpuBuffer<T>> {
        let bytes = length
            .checked_mul(size_of::<T>())
            .ok_or_else(|| Error::Device(format!("a buffer of {length} elements does not fit in memory")))?;
        let memory = Allocation::zeroed(bytes)?;
        #[cfg(test)]
        ALLOCATED.with(|allocated| allocated.set(allocated.get() + bytes as u64));
        Ok(CpuBuffer { start: memory.start.cast(), length, memory: Arc::new(memory) })
    }

    unsafe fn alias<T: Element>(&self, buffer: &CpuBuffer<T>, offset: usize, length: usize) -> Result<CpuBuffer<T>> {
        if offset.checked_add(length).is_none_or(|end| end > buffer.length) {
            return Err(Error::shape(
                "alias",
                "range",
                format!("at most {} elements", buffer.length),
                format!("{length} from {offset}"),
            ));
        }
        // SAFETY: the offset is inside the buffer's range, so inside its allocation.
        let start = unsafe { buffer.start.add(offset) };
        Ok(CpuBuffer { start, length, memory: Arc::clone(&buffer.memory) })
    }

    unsafe fn working_copy(&self, master: &CpuBuffer<F>, length: usize) -> Result<CpuBuffer<F>> {
        // SAFETY: the caller keeps the contract of `alias`.
        unsafe { self.alias(master, 0, length) }
    }

    fn refresh(&self, _working: &mut CpuBuffer<F>, _master: &CpuBuffer<F>) -> Result<()> {
        Ok(())
    }

    fn length<T: Element>(&self, buffer: &CpuBuffer<T>) -> usize {
        buffer.length
    }

    fn upload<T: Element>(&self, to: &mut CpuBuffer<T>, from: &[T]) -> Result<()> {
        let found = to.length;
        to.get_mut(..from.len())
            .ok_or_else(|| Error::shape("upload", "buffer", format!("at least {}", from.len()), found))?
            .copy_from_slice(from);
        Ok(())
    }

    fn download<T: Element>(&self, to: &mut [T], from: &CpuBuffer<T>) -> Result<()> {
        let part = from
            .get(..to.len())
            .ok_or_else(|| Error::shape("download", "buffer", format!("at least {}", to.len()), from.length))?;
        to.copy_from_slice(part);
        Ok(())
    }

    fn zero<T: Element>(&self, buffer: &mut CpuBuffer<T>) -> Result<()> {
        buffer.fill(T::default());
        Ok(())
    }
}

impl<F: Float> Collectives for Cpu<F> {
    fn all_reduce(&self, buffer: &mut CpuBuffer<F>, processes: &dyn Communicator) -> Result<()> {
        F::all_reduce(buffer, processes)
    }
}

impl<F: Float> Record for Cpu<F> {
    type Recording = std::convert::Infallible;

    fn records(&self) -> bool {
        false
    }

    fn record(&self, _work: impl FnOnce() -> Result<()>) -> Result<Self::Recording> {
        Err(Error::Device("the CPU records no work".into()))
    }

    unsafe fn replay(&self, recording: &Self::Recording) -> Result<bool> {
        match *recording {}
    }
}
