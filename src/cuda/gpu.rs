//! The GPU: loading kernels, and [`Driver`] over cudarc.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::cublaslt::CublasLt;
use super::discovery::{DeviceInfo, device_count, device_info, has_event_times};
use super::embedded::{Kernel, KernelFile, Target, embedded_kernels};
use super::error::{CudaError, Result};
use super::exchange::Exchange;
use super::gemm::{GemmAddresses, GemmDescription};
use super::launch::{Argument, DeviceId, Driver, Grid, Limits, MAX_ARGUMENTS, Stream, exactly};
use super::recording::{Graph, RecordedWork};
use super::staging::Staging;
use super::timing::Mark;
use crate::ops::{Communicator, KERNELS};

/// An opened GPU with every kernel resolved. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
    functions: Arc<Functions>,
    info: Arc<DeviceInfo>,
}

impl Gpu {
    /// Opens a GPU and loads the kernels: tens of milliseconds, or seconds where they have to be compiled first.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { ordinal, count });
        }
        let info = device_info(ordinal)?;
        info.check_supported()?;
        let context = CudaContext::new(ordinal).map_err(|error| call("creating a context", error))?;
        let functions = Functions::load(&context, &info)?;
        Ok(Self { context, functions: Arc::new(functions), info: Arc::new(info) })
    }

    /// What it is.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Its context, for other libraries.
    #[must_use]
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// A new stream of its own.
    pub fn new_stream(&self) -> Result<Stream> {
        // Not `new_stream`: the first one of a context waits for the whole GPU, which would break what another thread captures.
        let stream = self.context.default_stream().fork().map_err(|error| call("creating a stream", error))?;
        self.stream(&stream)
    }

    /// A caller's stream. It must belong to this GPU's primary context, the one that cudarc uses.
    pub fn stream(&self, stream: &Arc<CudaStream>) -> Result<Stream> {
        if stream.context().cu_ctx() != self.context.cu_ctx() {
            return Err(CudaError::WrongDevice { op: "stream", argument: 0 });
        }
        Ok(Stream::new(Arc::new(GpuStream {
            gpu: self.clone(),
            stream: Arc::clone(stream),
            staging: Mutex::default(),
            products: Mutex::new(None),
            exchange: Mutex::new(None),
            allocations: AtomicU64::new(0),
            recording: AtomicBool::new(false),
            released: Mutex::default(),
        })))
    }
}

/// The loaded modules and, by [`Kernel::index`], their functions.
#[derive(Debug)]
struct Functions {
    functions: Vec<sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
    context: Arc<CudaContext>,
}

// SAFETY: the handles are names that the driver accepts from any thread of the process.
unsafe impl Send for Functions {}
// SAFETY: as above; nothing here changes after loading.
unsafe impl Sync for Functions {}

impl Functions {
    fn load(context: &Arc<CudaContext>, info: &DeviceInfo) -> Result<Self> {
        let mut loaded =
            Self { functions: Vec::with_capacity(KERNELS.len()), modules: Vec::new(), context: Arc::clone(context) };
        let mut modules = Vec::new();
        for file in embedded_kernels().files {
            let module = load_module(file, info)?;
            loaded.modules.push(module);
            modules.push((file.name, module));
        }
        for kernel in KERNELS {
            let module = modules.iter().find(|(name, _)| *name == kernel.file).map(|&(_, module)| module);
            loaded.functions.push(resolve(module, kernel.symbol, info)?);
        }
        Ok(loaded)
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for &module in &self.modules {
            // SAFETY: loaded by us and unloaded once. An error here means that the context is gone, and the module with it.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

/// Loads the best form of a kernel file that the driver accepts. A context is current.
fn load_module(file: &KernelFile, info: &DeviceInfo) -> Result<sys::CUmodule> {
    let (major, minor) = info.compute_capability;
    let mut reasons = Vec::new();
    // For those who want to see that kernels can be compiled on a machine: `0` leaves out what was compiled before.
    let embedded = std::env::var_os("VITMAE_EMBEDDED_KERNELS").is_none_or(|value| value != "0");
    for image in file.images_for(major, minor).into_iter().filter(|_| embedded) {
        match image.code().map(|code| load_image(&code)) {
            Ok(Ok(module)) => return Ok(module),
            Ok(Err(error)) => reasons.push(format!("{}: {}", image.target, text_of(error))),
            Err(damaged) => reasons.push(damaged.to_string()),
        }
    }
    let target = Target { capability: 10 * major + minor, suffix: (major == 9).then_some('a'), ptx: false };
    let compiled = file.compile(target);
    match compiled {
        Ok(image) => match load_image(&image) {
            Ok(module) => return Ok(module),
            Err(error) => reasons.push(format!("compiled now: {}", text_of(error))),
        },
        // A kernel that does not compile is a fault of its own, not one more thing that was tried.
        Err(error) if reasons.is_empty() => return Err(error.into()),
        Err(error) => reasons.push(format!("compiled now: {error}")),
    }
    Err(CudaError::NoCode { file: file.name.to_string(), major, minor, reasons: reasons.join("; ") })
}

fn load_image(bytes: &[u8]) -> std::result::Result<sys::CUmodule, DriverError> {
    // Aligned, as an ELF file in memory should be, and closed by a NUL, as PTX has to be.
    let mut words = vec![0u64; bytes.len() / 8 + 1];
    bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: a whole cubin, or PTX that ends with a NUL; the driver copies what it keeps.
    unsafe { result::module::load_data(words.as_ptr().cast()) }
}

fn resolve(module: Option<sys::CUmodule>, symbol: &'static str, info: &DeviceInfo) -> Result<sys::CUfunction> {
    let (Some(module), Ok(name)) = (module, CString::new(symbol)) else {
        let (major, minor) = info.compute_capability;
        let reasons = "the file is not embedded".to_string();
        return Err(CudaError::NoCode { file: symbol.to_string(), major, minor, reasons });
    };
    let resolving = |error| call("resolving a kernel", error);
    // SAFETY: the module is loaded.
    let function = unsafe { result::module::get_function(module, name) }.map_err(resolving)?;
    // Once, here, and not at a launch: it may not change while a graph is captured. Kernels have no other shared memory.
    let most = i32::try_from(info.shared_bytes_per_block).unwrap_or(48 << 10);
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function was just resolved.
    unsafe { result::function::set_function_attribute(function, attribute, most) }.map_err(resolving)?;
    Ok(function)
}

/// [`Driver`] over a cudarc stream. Its memory is plain addresses, so cudarc records no events for it: everything that uses it
/// runs on the one stream.
#[derive(Debug)]
struct GpuStream {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    staging: Mutex<Staging>,
    allocations: AtomicU64,
    recording: AtomicBool,
    /// What was given back while work is recorded. Locked to change `recording`.
    released: Mutex<Vec<u64>>,
    /// Started by the first matrix product.
    products: Mutex<Option<CublasLt>>,
    /// The GPUs of other processes, once this one is connected with them.
    exchange: Mutex<Option<Exchange>>,
}

impl GpuStream {
    fn bind(&self) -> Result<()> {
        self.gpu.context.bind_to_thread().map_err(|error| call("making a context current", error))
    }

    /// The same where something is dropped, which cannot return an error. The first call returns what an earlier drop left
    /// behind, if anything, and forgets it; the second one binds.
    fn bind_in_drop(&self) -> bool {
        let bound = self.bind().or_else(|error| {
            tracing::warn!("while memory of the GPU is given back: {error}");
            self.bind()
        });
        bound.is_ok()
    }

    /// The same, for what a graph cannot hold.
    fn bind_for(&self, what: &'static str) -> Result<()> {
        if self.recording.load(Ordering::Relaxed) {
            return Err(CudaError::Recording { what });
        }
        self.bind()
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exchange(&self) -> MutexGuard<'_, Option<Exchange>> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the work on the stream. The context is current.
    fn wait(&self) -> Result<()> {
        match &*self.exchange() {
            None => self.stream.synchronize().map_err(|error| call("waiting for the device", error)),
            Some(exchange) => exchange.wait(&self.stream),
        }
    }

    fn released(&self) -> MutexGuard<'_, Vec<u64>> {
        self.released.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the work on the stream, and gives memory back.
    ///
    /// # Safety
    ///
    /// As for [`Driver::release`]; the stream is not captured.
    unsafe fn free(&self, address: u64) {
        // A drop cannot return an error: a failed wait is a failure of earlier work, which is logged.
        if self.bind_in_drop() {
            if let Err(error) = self.wait() {
                tracing::warn!("before memory of the GPU is given back: {error}");
            }
            // An exchange that was started and never finished, because something failed, may still use it.
            if let Some(exchange) = &*self.exchange() {
                exchange.settle();
            }
            // SAFETY: the caller promises that the address is ours and not used again; the work on it is done.
            let _ = unsafe { result::free_sync(address) };
        }
    }
}

impl Drop for GpuStream {
    fn drop(&mut self) {
        // The slots need a current context to be given back; without one they are gone with it.
        if self.bind_in_drop() {
            // Kernels, the workspace of products and the slots may go next: the work that uses them has to end first.
            if let Err(error) = self.wait() {
                tracing::warn!("closing a stream of the GPU: {error}");
            }
            *self.staging() = Staging::default();
        }
    }
}

impl Driver for GpuStream {
    fn device(&self) -> DeviceId {
        DeviceId::Gpu(self.gpu.info.ordinal)
    }

    fn limits(&self) -> Limits {
        Limits { shared_bytes: self.gpu.info.shared_bytes_per_block, multiprocessors: self.gpu.info.multiprocessors }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind_for("reserving memory")?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a context is current; the memory is not read before it is written.
        unsafe { result::malloc_sync(bytes) }.map_err(|error| reserving("reserving memory", bytes, error))
    }

    unsafe fn release(&self, address: u64) {
        let mut released = self.released();
        if self.recording.load(Ordering::Relaxed) {
            // Waiting for a stream that is captured would spoil the capture.
            released.push(address);
            return;
        }
        drop(released);
        // SAFETY: the caller's promise; nothing is recorded.
        unsafe { self.free(address) };
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.bind_for("a copy from the host")?;
        // SAFETY: the caller promises the target; the stream is always this one.
        unsafe { self.staging().upload(&self.stream, to, bytes) }
    }

    unsafe fn download(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        self.bind_for("a copy to the host")?;
        if self.exchange().is_some() {
            // The copy itself may wait, and would not notice that another process is gone.
            self.wait()?;
        }
        // SAFETY: the caller promises the source; the target lives until the synchronisation below.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) }
            .map_err(|error| call("copying from the device", error))?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller promises both.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(|error| call("copying on the device", error))
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller promises the target.
        unsafe { result::memset_d8_async(to, value, bytes, self.stream.cu_stream()) }
            .map_err(|error| call("filling memory", error))
    }

    fn synchronize(&self) -> Result<()> {
        self.bind_for("waiting")?;
        self.wait()
    }

    unsafe fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) -> Result<()> {
        self.bind()?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
        let Some(pointers) = pointers.get_mut(..arguments.len()) else {
            return exactly(kernel.symbol(), "number of arguments", arguments.len() as u64, MAX_ARGUMENTS as u64);
        };
        for (pointer, argument) in pointers.iter_mut().zip(arguments) {
            *pointer = argument.bytes().as_ptr().cast_mut().cast();
        }
        let function = self.gpu.functions.functions[kernel.index()];
        // SAFETY: the caller promises that the arguments are the kernel's; the driver copies them before it returns.
        unsafe {
            result::launch_kernel(
                function,
                (grid.blocks, 1, 1),
                (grid.threads, 1, 1),
                grid.shared_bytes,
                self.stream.cu_stream(),
                pointers,
            )
        }
        .map_err(|error| call("launching a kernel", error))
    }

    fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed) + self.staging().allocations()
    }

    fn begin_recording(&self) -> Result<()> {
        self.bind_for("a recording")?;
        // Other threads may go on with what capture forbids, such as reserving memory on streams of their own.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let _released = self.released();
        self.stream.begin_capture(mode).map_err(|error| call("starting to capture a graph", error))?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn RecordedWork>> {
        let mut released = self.released();
        let flags = sys::CUgraphInstantiate_flags(0);
        let mut graph = self.stream.end_capture(flags);
        // cudarc first reports an error that an earlier drop left, and then has not ended the capture.
        let idle = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if graph.is_err() && self.stream.capture_status().is_ok_and(|status| status != idle) {
            let ended = self.stream.end_capture(flags);
            graph = graph.and(ended);
        }
        self.recording.store(false, Ordering::Relaxed);
        let addresses = std::mem::take(&mut *released);
        drop(released);
        for address in addresses {
            // SAFETY: whoever gave it back promised so; nothing is recorded any more.
            unsafe { self.free(address) };
        }
        match graph.map_err(|error| call("capturing a graph", error))? {
            Some(graph) => Ok(Box::new(Graph::new(graph))),
            None => Err(CudaError::Recording { what: "work that failed" }),
        }
    }

    unsafe fn gemm(&self, description: &GemmDescription, addresses: &GemmAddresses) -> Result<()> {
        self.bind()?;
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let products = match &mut *products {
            Some(products) => products,
            // It reserves its workspace.
            None if self.recording.load(Ordering::Relaxed) => {
                return Err(CudaError::Recording { what: "the first matrix product" });
            }
            none => none.insert(CublasLt::new(&self.gpu.context, &self.gpu.info)?),
        };
        // SAFETY: the caller's promise; the stream belongs to the context, which is current.
        unsafe { products.multiply(self.stream.cu_stream(), description, addresses) }
    }

    fn connect(&self, processes: &dyn Communicator) -> crate::Result<bool> {
        self.bind_for("joining other GPUs")?;
        let connected = Exchange::connect(&self.gpu.context, processes)?;
        let has_way = connected.is_some();
        *self.exchange() = connected;
        Ok(has_way)
    }

    unsafe fn start_all_reduce(&self, address: u64, length: usize) -> Result<bool> {
        self.bind_for("a sum over processes")?;
        match &*self.exchange() {
            None => Ok(false),
            // SAFETY: the caller's promise; the context is current.
            Some(exchange) => unsafe { exchange.all_reduce(&self.stream, address, length) }.map(|()| true),
        }
    }

    unsafe fn start_all_gather(&self, address: u64, length: usize, part: usize) -> Result<bool> {
        self.bind_for("an exchange between processes")?;
        match &*self.exchange() {
            None => Ok(false),
            // SAFETY: as above.
            Some(exchange) => unsafe { exchange.all_gather(&self.stream, address, length, part) }.map(|()| true),
        }
    }

    fn finish_exchanges(&self) -> Result<()> {
        self.bind_for("an exchange between processes")?;
        self.exchange().as_ref().map_or(Ok(()), |exchange| exchange.finish(&self.stream))
    }

    fn mark(&self) -> Result<Mark> {
        // An event that is captured belongs to the graph, and has no time.
        self.bind_for("a mark")?;
        if !has_event_times() {
            self.synchronize()?;
            return Ok(Mark::now());
        }
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Mark::event(event.map_err(|error| call("recording an event", error))?))
    }
}

pub(super) fn call(call: &'static str, error: DriverError) -> CudaError {
    reserving(call, 0, error)
}

/// The same for a call that asked for so many bytes.
pub(super) fn reserving(call: &'static str, bytes: usize, error: DriverError) -> CudaError {
    match error {
        DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => CudaError::OutOfMemory { bytes },
        error => CudaError::Call { call, reason: text_of(error) },
    }
}

pub(super) fn text_of(error: DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{:?} ({text})", error.0)
}
