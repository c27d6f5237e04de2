//! The same kernels on the CPU, under checks: [`Driver`] over `kernels/emulator/runtime.cpp`. For tests.
//!
//! Slow by design: one block at a time, one fibre per CUDA thread, every access to memory checked. A fault is a
//! [`CudaError::Emulator`] that names kernel, block, thread and what happened.

use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::embedded::Kernel;
use super::error::{CudaError, Result};
use super::gemm::{EpilogueKind, GemmAddresses, GemmDescription, GemmType, Layout};
use super::launch::{Argument, DeviceId, Driver, Grid, Limits, Stream};
use super::recording::RecordedWork;
use functions::Functions;

mod functions;

/// How an emulator runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Draws the order of blocks and threads and the moment that asynchronous copies land. 0: in order; 1: backwards.
    pub seed: u64,
    /// What launchers are told that a block may have in shared memory, at most 256 KiB.
    pub shared_bytes: u32,
}

impl Default for Options {
    /// In order, with the shared memory of the smallest GPU that is supported (sm_86 and sm_89).
    fn default() -> Self {
        Self { seed: 0, shared_bytes: 99 << 10 }
    }
}

/// An emulated GPU with memory of its own.
pub struct Emulator {
    functions: Functions,
    handle: Mutex<Handle>,
    id: u64,
    options: Options,
    allocations: AtomicU64,
    /// What was asked for since the recording began, while there is one.
    recording: Mutex<Option<Vec<Step>>>,
    /// Itself, for what it recorded.
    this: Weak<Self>,
}

/// One thing that an emulator was asked to do.
#[derive(Debug, Clone)]
enum Step {
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, value: u8, bytes: usize },
    Launch { kernel: Kernel, grid: Grid, arguments: Vec<Vec<u8>> },
    Gemm { description: GemmDescription, addresses: GemmAddresses },
}

/// What an emulator recorded.
#[derive(Debug)]
struct Steps {
    emulator: Arc<Emulator>,
    steps: Vec<Step>,
}

impl RecordedWork for Steps {
    unsafe fn launch(&self) -> Result<()> {
        for step in &self.steps {
            // SAFETY: the emulator checks addresses; the arguments were promised when the step was recorded.
            unsafe { self.emulator.run(step) }?;
        }
        Ok(())
    }
}

/// The emulator's address.
struct Handle(*mut c_void);

// SAFETY: an emulator may be used from any thread, by one at a time, which the mutex sees to.
unsafe impl Send for Handle {}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emulator").field("id", &self.id).field("options", &self.options).finish_non_exhaustive()
    }
}

impl Emulator {
    /// An emulator that is part of this program.
    #[cfg(feature = "emulator")]
    pub fn new(options: Options) -> Result<Arc<Self>> {
        Self::start(Functions::LINKED, options)
    }

    /// An emulator from a shared library.
    ///
    /// # Safety
    ///
    /// The library is an emulator, built from this version of the sources.
    pub unsafe fn load(path: &Path, options: Options) -> Result<Arc<Self>> {
        // SAFETY: what the caller promises.
        let functions = unsafe { Functions::load(path) };
        Self::start(functions.map_err(|error| CudaError::Emulator(error.to_string()))?, options)
    }

    fn start(functions: Functions, options: Options) -> Result<Arc<Self>> {
        static CREATED: AtomicU64 = AtomicU64::new(0);
        // SAFETY: vitmae_emulator_new has no preconditions.
        let handle = unsafe { (functions.new)(options.seed) };
        if handle.is_null() {
            return Err(CudaError::Emulator("cannot reserve address space".to_string()));
        }
        let id = CREATED.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new_cyclic(|this| Self {
            functions,
            handle: Mutex::new(Handle(handle)),
            id,
            options,
            allocations: AtomicU64::new(0),
            recording: Mutex::new(None),
            this: this.clone(),
        }))
    }

    /// A stream for launchers.
    #[must_use]
    pub fn stream(self: &Arc<Self>) -> Stream {
        Stream::new(Arc::clone(self) as Arc<dyn Driver>)
    }

    /// Runs a kernel by name, also one that only tests have.
    ///
    /// # Safety
    ///
    /// Addresses among the arguments are of this emulator's memory, or null. What the kernel makes of them is checked.
    pub unsafe fn launch_named(&self, symbol: &str, grid: Grid, arguments: &[Argument<'_>]) -> Result<()> {
        let bytes: Vec<&[u8]> = arguments.iter().map(Argument::bytes).collect();
        // SAFETY: the caller's promise.
        unsafe { self.launch_bytes(symbol, grid, &bytes) }
    }

    /// The same with the bytes of the arguments.
    ///
    /// # Safety
    ///
    /// As for [`Emulator::launch_named`].
    unsafe fn launch_bytes(&self, symbol: &str, grid: Grid, arguments: &[&[u8]]) -> Result<()> {
        let name = CString::new(symbol).map_err(|error| CudaError::Emulator(error.to_string()))?;
        let pointers: Vec<*const c_void> = arguments.iter().map(|argument| argument.as_ptr().cast()).collect();
        let sizes: Vec<usize> = arguments.iter().map(|argument| argument.len()).collect();
        let Grid { blocks, threads, shared_bytes } = grid;
        self.call(|functions, handle| {
            let (pointers, sizes) = (pointers.as_ptr(), sizes.as_ptr());
            // SAFETY: the emulator is locked; the arrays have `count` entries. It checks number and sizes of the arguments
            // itself; the caller promises the addresses.
            unsafe {
                (functions.launch)(
                    handle,
                    name.as_ptr(),
                    blocks,
                    threads,
                    shared_bytes,
                    pointers,
                    sizes,
                    arguments.len(),
                )
            }
        })
    }

    /// Does a step now.
    ///
    /// # Safety
    ///
    /// As for the [`Driver`]'s methods.
    unsafe fn run(&self, step: &Step) -> Result<()> {
        match *step {
            // SAFETY: the emulator is locked and checks both addresses.
            Step::Copy { to, from, bytes } => {
                self.call(|functions, handle| unsafe { (functions.copy)(handle, to, from, bytes as u64) })
            }
            // SAFETY: the emulator is locked and checks the address.
            Step::Fill { to, value, bytes } => {
                self.call(|functions, handle| unsafe { (functions.fill)(handle, to, value.into(), bytes as u64) })
            }
            Step::Launch { kernel, grid, ref arguments } => {
                let arguments: Vec<&[u8]> = arguments.iter().map(Vec::as_slice).collect();
                // SAFETY: the caller's promise.
                unsafe { self.launch_bytes(kernel.symbol(), grid, &arguments) }
            }
            Step::Gemm { ref description, ref addresses } => self.multiply(description, addresses),
        }
    }

    /// Does a step now, or keeps it where work is recorded.
    ///
    /// # Safety
    ///
    /// As for the [`Driver`]'s methods.
    unsafe fn give(&self, step: Step) -> Result<()> {
        if let Some(steps) = &mut *self.recording() {
            steps.push(step);
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.run(&step) }
    }

    fn recording(&self) -> MutexGuard<'_, Option<Vec<Step>>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails where work is recorded, as on a GPU.
    fn refuse_recording(&self, what: &'static str) -> Result<()> {
        match *self.recording() {
            Some(_) => Err(CudaError::Recording { what }),
            None => Ok(()),
        }
    }

    /// A matrix `[rows, columns]` as f32, in dense rows. Its elements must have been written.
    fn read_matrix(&self, at: u64, of: GemmType, layout: Layout, rows: usize, columns: usize) -> Result<Vec<f32>> {
        let (lines, width) = if layout.transposed { (columns, rows) } else { (rows, columns) };
        let mut matrix = vec![0.0; rows * columns];
        let mut bytes = vec![0u8; width * of.bytes()];
        for line in 0..lines {
            let from = at + (line * layout.stride * of.bytes()) as u64;
            let (to, count) = (bytes.as_mut_ptr().cast(), bytes.len() as u64);
            // SAFETY: the emulator is locked and checks the source.
            self.call(|functions, handle| unsafe { (functions.readable)(handle, from, count) })?;
            // SAFETY: as above; the target is a slice.
            self.call(|functions, handle| unsafe { (functions.download)(handle, to, from, count) })?;
            for (index, value) in bytes.chunks_exact(of.bytes()).enumerate() {
                let bits = value.iter().rev().fold(0, |bits: u32, &byte| bits << 8 | u32::from(byte));
                let bits = if of == GemmType::Bf16 { bits << 16 } else { bits };
                let at = if layout.transposed { index * columns + line } else { line * columns + index };
                matrix[at] = f32::from_bits(bits);
            }
        }
        Ok(matrix)
    }

    /// Multiplies matrices.
    fn multiply(&self, description: &GemmDescription, addresses: &GemmAddresses) -> Result<()> {
        let GemmDescription { gemm, input, output, adds, epilogue } = *description;
        let (rows, columns, depth) = (gemm.rows, gemm.columns, gemm.depth);
        let like_output = Layout::rows(gemm.output_stride);
        let left = self.read_matrix(addresses.left, input, gemm.left, rows, depth)?;
        let right = self.read_matrix(addresses.right, input, gemm.right, depth, columns)?;
        let mut sums = vec![0.0f32; rows * columns];
        for (sums, left) in sums.chunks_exact_mut(columns).zip(left.chunks_exact(depth)) {
            for (&left, right) in left.iter().zip(right.chunks_exact(columns)) {
                sums.iter_mut().zip(right).for_each(|(sum, &right)| *sum += left * right);
            }
        }
        if adds {
            let addend = self.read_matrix(addresses.addend, output, like_output, rows, columns)?;
            sums.iter_mut().zip(addend).for_each(|(sum, addend)| *sum += addend);
        }
        if matches!(epilogue, EpilogueKind::Bias | EpilogueKind::BiasGeluTanh) {
            let bias = self.read_matrix(addresses.bias, output, Layout::rows(columns), 1, columns)?;
            let rows = sums.chunks_exact_mut(columns);
            rows.for_each(|row| row.iter_mut().zip(&bias).for_each(|(sum, bias)| *sum += bias));
        }
        if epilogue == EpilogueKind::BiasGeluTanh {
            self.write_matrix(addresses.pre, output, gemm.output_stride, &sums, columns)?;
            sums.iter_mut().for_each(|sum| *sum = gelu_tanh(*sum));
        }
        self.write_matrix(addresses.output, output, gemm.output_stride, &sums, columns)
    }

    /// Writes rows of f32 as rows of a type, rounded.
    fn write_matrix(&self, at: u64, of: GemmType, stride: usize, matrix: &[f32], columns: usize) -> Result<()> {
        for (row, values) in matrix.chunks_exact(columns).enumerate() {
            let bytes: Vec<u8> = match of {
                GemmType::F32 => values.iter().flat_map(|value| value.to_ne_bytes()).collect(),
                GemmType::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_ne_bytes()).collect(),
            };
            let to = at + (row * stride * of.bytes()) as u64;
            let (from, count) = (bytes.as_ptr().cast(), bytes.len() as u64);
            // SAFETY: the emulator is locked and checks the target; the source is a slice.
            self.call(|functions, handle| unsafe { (functions.upload)(handle, to, from, count) })?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Handle> {
        // Nothing in C++ is left half done by a Rust panic.
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls a function that returns 1 where all is well.
    fn call(&self, function: impl FnOnce(&Functions, *mut c_void) -> c_int) -> Result<()> {
        let handle = self.lock();
        if function(&self.functions, handle.0) == 1 {
            return Ok(());
        }
        // SAFETY: the message is NUL-terminated and lives until the next call, which the lock keeps away.
        let message = unsafe { CStr::from_ptr((self.functions.message)(handle.0)) };
        Err(CudaError::Emulator(message.to_string_lossy().into_owned()))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let handle = self.lock();
        // SAFETY: created by `new` and deleted once.
        unsafe { (self.functions.delete)(handle.0) };
    }
}

impl Driver for Emulator {
    fn device(&self) -> DeviceId {
        DeviceId::Emulator(self.id)
    }

    fn limits(&self) -> Limits {
        Limits { shared_bytes: self.options.shared_bytes, multiprocessors: 4 }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.refuse_recording("reserving memory")?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        let handle = self.lock();
        // SAFETY: the emulator is locked.
        match unsafe { (self.functions.allocate)(handle.0, bytes as u64) } {
            0 => Err(CudaError::OutOfMemory { bytes }),
            address => Ok(address),
        }
    }

    unsafe fn release(&self, address: u64) {
        // SAFETY: the emulator is locked. A drop has nobody to tell of an address that is not its own.
        let _ = self.call(|functions, handle| unsafe { (functions.release)(handle, address) });
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_recording("a copy from the host")?;
        let (from, count) = (bytes.as_ptr().cast(), bytes.len() as u64);
        // SAFETY: the emulator is locked and checks the target; the source is a slice.
        self.call(|functions, handle| unsafe { (functions.upload)(handle, to, from, count) })
    }

    unsafe fn download(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        self.refuse_recording("a copy to the host")?;
        let (to, count) = (bytes.as_mut_ptr().cast(), bytes.len() as u64);
        // SAFETY: the emulator is locked and checks the source; the target is a slice.
        self.call(|functions, handle| unsafe { (functions.download)(handle, to, from, count) })
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.give(Step::Copy { to, from, bytes }) }
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.give(Step::Fill { to, value, bytes }) }
    }

    fn synchronize(&self) -> Result<()> {
        self.refuse_recording("waiting")
    }

    unsafe fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) -> Result<()> {
        let arguments = arguments.iter().map(|argument| argument.bytes().to_vec()).collect();
        // SAFETY: the caller promises that the arguments are the kernel's.
        unsafe { self.give(Step::Launch { kernel, grid, arguments }) }
    }

    fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    fn begin_recording(&self) -> Result<()> {
        self.refuse_recording("a recording")?;
        *self.recording() = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn RecordedWork>> {
        let steps = self.recording().take();
        match (steps, self.this.upgrade()) {
            (Some(steps), Some(emulator)) => Ok(Box::new(Steps { emulator, steps })),
            _ => Err(CudaError::Recording { what: "the end of a recording that was never begun" }),
        }
    }

    unsafe fn gemm(&self, description: &GemmDescription, addresses: &GemmAddresses) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.give(Step::Gemm { description: *description, addresses: *addresses }) }
    }
}

/// GELU in its tanh form.
fn gelu_tanh(x: f32) -> f32 {
    let x = f64::from(x);
    let factor = (2.0 / std::f64::consts::PI).sqrt();
    (0.5 * x * (1.0 + (factor * (x + 0.044715 * x * x * x)).tanh())) as f32
}
