//! The CUDA backend as the model sees it: a stream, and buffers that share one allocation.
//!
//! Each op family implements its trait of [`crate::ops`] in its own module, over the launchers there.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::element::CudaElement;
use super::error::CudaError;
use super::launch::{Buffer, Slice, SliceMut, Stream};
use super::recording::RecordedWork;
use crate::ops::{Collectives, Communicator, Element, Memory, Record, gather_on_host};
use crate::{Error, Result};

/// A GPU, or the emulator, as a device of the model: everything runs on one stream. Cheap to clone.
#[derive(Debug)]
pub struct Cuda<E> {
    stream: Stream,
    scratch: Arc<Mutex<Scratch>>,
    /// Where buffers come from while [`Memory::in_one_allocation`] makes them.
    arena: Option<Arc<Mutex<Arena>>>,
    element: PhantomData<E>,
}

/// Memory that launches borrow.
#[derive(Debug, Default)]
struct Scratch {
    memory: Option<Buffer<f32>>,
    /// How often the memory became another one. An address alone would not tell: it can come back.
    generation: u64,
}

impl<E> Clone for Cuda<E> {
    fn clone(&self) -> Self {
        Self {
            stream: self.stream.clone(),
            scratch: Arc::clone(&self.scratch),
            arena: self.arena.clone(),
            element: PhantomData,
        }
    }
}

impl<E: CudaElement> Cuda<E> {
    /// A backend whose work goes to `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, scratch: Arc::default(), arena: None, element: PhantomData }
    }

    /// Where its work goes.
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Lends `length` numbers of device memory with arbitrary content to the launches that `work` makes: partial sums and
    /// the like. They are the next caller's as soon as `work` returns, which is right because launches on one stream run in
    /// order.
    ///
    /// The memory only grows, so that after the first step nothing is allocated. Growing gives the old memory back, for which
    /// the host waits until the launches that use it are done. A captured graph keeps the address that it saw: run what it
    /// captures once before; after the memory has grown, [`Record::replay`] refuses the graph.
    ///
    /// `work` must not ask for scratch memory itself: it would wait for its own.
    ///
    /// # Errors
    /// What `work` returns, or [`Error::Cuda`] when there is not enough memory.
    pub fn with_scratch<R>(&self, length: usize, work: impl FnOnce(&mut SliceMut<'_, f32>) -> Result<R>) -> Result<R> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = &mut *scratch;
        let memory = match scratch.memory.take_if(|memory| memory.len() >= length) {
            Some(memory) => memory,
            None => self.larger(scratch, length)?,
        };
        let memory = scratch.memory.insert(memory);
        work(&mut memory.as_mut_slice().range(0..length)?)
    }

    /// Scratch memory of at least `length` numbers, in place of what there is. Where there is no room for it, what there was
    /// stays, or as much of it anew.
    fn larger(&self, scratch: &mut Scratch, length: usize) -> Result<Buffer<f32>> {
        // Rounded up, so that many sizes soon meet in one allocation.
        let length = length.checked_next_power_of_two().unwrap_or(length);
        let mut larger = self.stream.uninitialised(length);
        if matches!(larger, Err(CudaError::OutOfMemory { .. }))
            && let Some(old) = scratch.memory.take()
        {
            // Its room may be what is missing.
            scratch.generation += 1;
            let old_length = old.len();
            drop(old);
            larger = self.stream.uninitialised(length);
            if larger.is_err() {
                scratch.memory = self.stream.uninitialised(old_length).ok();
            }
        }
        let larger = larger?;
        scratch.generation += 1;
        Ok(larger)
    }
}

impl<E> Cuda<E> {
    /// A device that takes its buffers from an arena, and the arena.
    fn with_arena(&self, memory: Option<Arc<Buffer<u8>>>) -> (Self, Arc<Mutex<Arena>>) {
        let arena = Arc::new(Mutex::new(Arena { memory, used: 0 }));
        (Self { arena: Some(Arc::clone(&arena)), ..self.clone() }, arena)
    }

    fn arena(&self) -> Option<MutexGuard<'_, Arena>> {
        self.arena.as_ref().map(|arena| arena.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether buffers are only counted, and have no memory.
    fn measures(&self) -> bool {
        self.arena().is_some_and(|arena| arena.memory.is_none())
    }

    /// Adds numbers up over all processes by way of the host.
    fn sum_on_host(&self, buffer: &mut CudaBuffer<f32>, processes: &dyn Communicator) -> Result<()>
    where
        E: CudaElement,
    {
        let mut values = vec![0.0; buffer.length];
        self.download(&mut values, buffer)?;
        processes.sum(&mut values)?;
        self.upload(buffer, &values)
    }

    /// Which scratch memory there is.
    fn scratch_generation(&self) -> u64 {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).generation
    }
}

/// One allocation that buffers are cut from, or, without memory, a count of what they will need.
#[derive(Debug)]
struct Arena {
    memory: Option<Arc<Buffer<u8>>>,
    used: usize,
}

/// Every buffer starts at a multiple of this, as an allocation of its own would.
const ALIGNMENT: usize = 256;

/// Recorded work, and the scratch memory that it saw.
#[derive(Debug)]
pub struct CudaRecording {
    work: Box<dyn RecordedWork>,
    scratch_generation: u64,
}

/// Elements of an allocation on the device, which lives as long as any buffer of it.
#[derive(Debug)]
pub struct CudaBuffer<T> {
    memory: Arc<Buffer<u8>>,
    /// Where it starts in the allocation.
    byte: usize,
    length: usize,
    element: PhantomData<T>,
}

impl<T: Element> CudaBuffer<T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// All of it, to be read.
    #[must_use]
    pub fn slice(&self) -> Slice<'_, T> {
        self.memory.part(self.byte, self.length)
    }

    /// All of it, to be written.
    #[must_use]
    pub fn slice_mut(&mut self) -> SliceMut<'_, T> {
        // SAFETY: whoever made an alias promised to use one handle at a time.
        unsafe { self.memory.part_mut(self.byte, self.length) }
    }

    /// The first `sizes` (multiplied) elements, to be read: how an op takes its inputs.
    pub(crate) fn input(&self, op: &'static str, what: &'static str, sizes: &[usize]) -> Result<Slice<'_, T>> {
        let length = checked(op, what, sizes, self.length)?;
        Ok(self.memory.part(self.byte, length))
    }

    /// The first `sizes` (multiplied) elements, to be written: how an op takes its outputs.
    pub(crate) fn output(&mut self, op: &'static str, what: &'static str, sizes: &[usize]) -> Result<SliceMut<'_, T>> {
        let length = checked(op, what, sizes, self.length)?;
        // SAFETY: as for `slice_mut`.
        Ok(unsafe { self.memory.part_mut(self.byte, length) })
    }
}

impl<E: CudaElement> CudaBuffer<E> {
    /// The first `length` elements of a working copy, to be written; none where it is the masters themselves.
    pub(super) fn working_copy(&mut self, op: &'static str, length: usize) -> Result<Option<SliceMut<'_, bf16>>> {
        if E::is_master() {
            return Ok(None);
        }
        let length = checked(op, "working", &[length], self.length)?;
        // SAFETY: as for `slice_mut`; what is not f32 is bf16.
        Ok(Some(unsafe { self.memory.part_mut(self.byte, length) }))
    }
}

fn checked(op: &'static str, what: &'static str, sizes: &[usize], found: usize) -> Result<usize> {
    let length = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    match length {
        Some(length) if length <= found => Ok(length),
        _ => Err(Error::shape(op, what, format!("at least {sizes:?} elements"), found)),
    }
}

impl<E: CudaElement> Memory for Cuda<E> {
    type Element = E;
    type Master = f32;
    type Buffer<T: Element> = CudaBuffer<T>;

    fn buffer<T: Element>(&self, length: usize) -> Result<CudaBuffer<T>> {
        let bytes = length.saturating_mul(size_of::<T>());
        let Some(mut arena) = self.arena() else {
            let memory = Arc::new(self.stream.zeros(bytes)?);
            return Ok(CudaBuffer { memory, byte: 0, length, element: PhantomData });
        };
        let byte = arena.used;
        arena.used = byte.saturating_add(bytes).saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        let memory = match &arena.memory {
            Some(memory) if arena.used <= memory.len() => Arc::clone(memory),
            Some(memory) => return Err(Error::shape("in_one_allocation", "bytes", memory.len(), arena.used)),
            None => Arc::new(self.stream.uninitialised(0)?),
        };
        Ok(CudaBuffer { memory, byte, length, element: PhantomData })
    }

    unsafe fn alias<T: Element>(&self, buffer: &CudaBuffer<T>, offset: usize, length: usize) -> Result<CudaBuffer<T>> {
        if offset.checked_add(length).is_none_or(|end| end > buffer.length) {
            let found = format!("{length} from {offset} on");
            return Err(Error::shape("alias", "range", format!("inside {} elements", buffer.length), found));
        }
        let byte = buffer.byte + offset * size_of::<T>();
        Ok(CudaBuffer { memory: Arc::clone(&buffer.memory), byte, length, element: PhantomData })
    }

    unsafe fn working_copy(&self, master: &CudaBuffer<f32>, length: usize) -> Result<CudaBuffer<E>> {
        if !E::is_master() {
            return self.buffer(length);
        }
        // SAFETY: the caller's promise.
        let alias = unsafe { self.alias(master, 0, length)? };
        Ok(CudaBuffer { memory: alias.memory, byte: alias.byte, length, element: PhantomData })
    }

    fn refresh(&self, working: &mut CudaBuffer<E>, master: &CudaBuffer<f32>) -> Result<()> {
        if E::is_master() {
            return Ok(());
        }
        let length = working.length;
        let master = master.input("refresh", "master", &[length])?;
        if let Some(mut working) = working.working_copy("refresh", length)? {
            super::adamw::masters_to_bf16(&self.stream, &mut working, &master)?;
        }
        Ok(())
    }

    fn length<T: Element>(&self, buffer: &CudaBuffer<T>) -> usize {
        buffer.length
    }

    fn upload<T: Element>(&self, to: &mut CudaBuffer<T>, from: &[T]) -> Result<()> {
        if self.measures() {
            return Ok(());
        }
        let mut to = to.output("upload", "target", &[from.len()])?;
        Ok(self.stream.write(&mut to, from)?)
    }

    fn download<T: Element>(&self, to: &mut [T], from: &CudaBuffer<T>) -> Result<()> {
        let from = from.input("download", "source", &[to.len()])?;
        Ok(self.stream.read(to, &from)?)
    }

    fn zero<T: Element>(&self, buffer: &mut CudaBuffer<T>) -> Result<()> {
        if self.measures() {
            return Ok(());
        }
        Ok(self.stream.fill(&mut buffer.slice_mut(), 0)?)
    }

    fn in_one_allocation<T>(&self, make: impl Fn(&Self) -> Result<T>) -> Result<T> {
        if self.arena.is_some() {
            return make(self);
        }
        let (measuring, arena) = self.with_arena(None);
        make(&measuring)?;
        let bytes = arena.lock().unwrap_or_else(PoisonError::into_inner).used;
        let memory = self.stream.zeros(bytes)?;
        make(&self.with_arena(Some(Arc::new(memory))).0)
    }

    fn wants_large_batches(&self) -> bool {
        true
    }
}

impl<E: CudaElement> Collectives for Cuda<E> {
    fn connect(&self, processes: &dyn Communicator) -> Result<bool> {
        self.stream.driver().connect(processes)
    }

    fn all_reduce(&self, buffer: &mut CudaBuffer<f32>, processes: &dyn Communicator) -> Result<()> {
        if self.stream.all_reduce(&mut buffer.slice_mut())? {
            return Ok(());
        }
        self.sum_on_host(buffer, processes)
    }

    fn start_all_reduce(&self, buffer: &mut CudaBuffer<f32>, processes: &dyn Communicator) -> Result<()> {
        // SAFETY: the contract of this method: nobody touches the buffer until the sums are finished.
        if unsafe { self.stream.start_all_reduce(&mut buffer.slice_mut()) }? {
            return Ok(());
        }
        self.sum_on_host(buffer, processes)
    }

    fn finish_all_reduces(&self) -> Result<()> {
        Ok(self.stream.finish_exchanges()?)
    }

    fn all_gather(&self, buffer: &mut CudaBuffer<f32>, part: usize, processes: &dyn Communicator) -> Result<()> {
        if self.stream.all_gather(&mut buffer.slice_mut(), part)? {
            return Ok(());
        }
        gather_on_host(self, buffer, part, processes)
    }
}

impl<E: CudaElement> Record for Cuda<E> {
    type Recording = CudaRecording;

    fn records(&self) -> bool {
        true
    }

    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaRecording> {
        let work = self.stream.record(work)?;
        Ok(CudaRecording { work, scratch_generation: self.scratch_generation() })
    }

    unsafe fn replay(&self, recording: &CudaRecording) -> Result<bool> {
        if recording.scratch_generation != self.scratch_generation() {
            return Ok(false);
        }
        // SAFETY: the caller promises the buffers, and the scratch memory is still the one that was recorded.
        unsafe { recording.work.launch() }?;
        Ok(true)
    }
}
