//! Matrix products on a GPU: cuBLASLt, with the algorithm of each product chosen once.
//!
//! The algorithm is the fastest of those that cuBLASLt proposes, timed at the product's first call, and kept in the user's
//! cache folder, so that later runs on the same machine choose the same one and repeat bitwise. What was kept only says which
//! of the proposals to take: a file that is old, damaged or edited names none of them, and the choice is made again. While a
//! graph is captured nothing can be timed: a product that is new then gets the choice that was kept, else the first proposal.
//! `VITMAE_GEMM_TUNING=0` takes the first proposal that runs, always.
//!
//! In-place split-K reductions are not allowed, and f32 products are not computed in TF32.

mod choice;
mod descriptors;
mod library;

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, result as driver};

use self::choice::{Choice, SCHEME, choose, chosen_before, file_name};
use self::descriptors::{Preference, Product, failed};
pub use self::library::probe;
use super::discovery::DeviceInfo;
use super::embedded::{cache_folder, write_cached};
use super::error::{CudaError, Result};
use super::gemm::{GemmAddresses, GemmDescription, Layout, span};
use super::gpu::{call, reserving};

/// What NVIDIA recommends for Hopper; smaller GPUs are content with less and have room for it.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Proposals that are timed for a product, at most.
const CANDIDATES: usize = 8;

/// Products on the streams of one context, one at a time.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    /// Of products by everything that an algorithm depends on; nothing where cuBLASLt has none.
    plans: HashMap<Key, Option<Plan>>,
    /// What makes an algorithm that was kept the right one: the device and the library.
    machine: String,
    context: Arc<CudaContext>,
}

// SAFETY: handle, descriptors and memory may be used from any thread in which the context is current, by one at a time.
unsafe impl Send for CublasLt {}

impl fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CublasLt").field("machine", &self.machine).field("plans", &self.plans.len()).finish()
    }
}

/// What the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    description: GemmDescription,
    /// Whether the addend is the output.
    in_place: bool,
    /// Alignment of each address in bytes, up to 256: output, left, right, addend, bias, pre.
    alignments: [u32; 6],
}

impl Key {
    fn new(description: GemmDescription, at: &GemmAddresses) -> Self {
        let addresses = [at.output, at.left, at.right, at.addend, at.bias, at.pre];
        let alignments = addresses.map(|address| 1 << address.trailing_zeros().min(8));
        Self { description, in_place: at.addend == at.output, alignments }
    }
}

/// A product, ready to run.
struct Plan {
    product: Product,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl CublasLt {
    /// A handle for the device of a context, which is current, and its workspace.
    pub(super) fn new(context: &Arc<CudaContext>, info: &DeviceInfo) -> Result<Self> {
        let version = probe()?;
        let handle = result::create_handle().map_err(|error| failed("starting cuBLASLt", error))?;
        let (major, minor) = info.compute_capability;
        let machine = format!("{} {major}.{minor} {} cublasLt {version}", info.name, info.multiprocessors);
        let plans = HashMap::new();
        let mut started = Self { handle, workspace: 0, plans, machine, context: Arc::clone(context) };
        // SAFETY: the context is current; the memory is cuBLASLt's to initialise.
        started.workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }
            .map_err(|error| reserving("reserving cuBLASLt's workspace", WORKSPACE_BYTES, error))?;
        Ok(started)
    }

    /// Gives a product to a stream.
    ///
    /// # Safety
    ///
    /// As for [`Driver::gemm`](super::launch::Driver::gemm); the stream belongs to the context, which is current.
    pub(super) unsafe fn multiply(
        &mut self,
        stream: CUstream,
        description: &GemmDescription,
        addresses: &GemmAddresses,
    ) -> Result<()> {
        let key = Key::new(*description, addresses);
        if !self.plans.contains_key(&key) {
            // SAFETY: the caller's promise.
            let plan = unsafe { self.plan(stream, &key, addresses)? };
            self.plans.insert(key, plan);
        }
        match self.plans.get(&key) {
            // SAFETY: the caller's promise; the plan was made for these layouts and alignments.
            Some(Some(plan)) => unsafe { self.run(stream, &plan.product, &plan.algorithm, addresses) },
            _ => Err(CudaError::NoAlgorithm { product: describe(description) }),
        }
    }

    /// Makes a product and chooses its algorithm.
    ///
    /// # Safety
    ///
    /// As for [`CublasLt::multiply`].
    unsafe fn plan(&self, stream: CUstream, key: &Key, addresses: &GemmAddresses) -> Result<Option<Plan>> {
        let product = Product::new(&key.description)?;
        product.point_at(addresses)?;
        // SAFETY: the caller's stream.
        let status = unsafe { driver::stream::is_capturing(stream) };
        let status = status.map_err(|error| call("asking whether a stream is captured", error))?;
        let captured = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let tunes = std::env::var("VITMAE_GEMM_TUNING").as_deref() != Ok("0");
        let kept = cache_folder().filter(|_| tunes).map(|folder| folder.join(file_name(SCHEME, &self.machine, key)));
        let candidates = self.candidates(&product, key)?;
        if let Some(algorithm) = kept.as_deref().and_then(|path| chosen_before(path, &candidates)) {
            return Ok(Some(Plan { product, algorithm }));
        }
        let untried = candidates.first().copied();
        if captured || untried.is_none() {
            return Ok(untried.map(|algorithm| Plan { product, algorithm }));
        }
        // SAFETY: the caller's promise; the stream is not captured.
        let algorithm = match unsafe { self.fastest(stream, &product, &candidates, tunes, key, addresses)? } {
            Choice::Made(algorithm) => algorithm,
            Choice::AllRefused => return Ok(None),
            Choice::NoRoom => return Ok(untried.map(|algorithm| Plan { product, algorithm })),
        };
        if let Some(path) = kept {
            // A cache that cannot be written costs time at the next start, and a choice that may be another one then.
            if let Err(error) = write_cached(&path, bytemuck::cast_slice(&algorithm.data)) {
                tracing::debug!("cannot keep the choice of a matrix product in {}: {error}", path.display());
            }
        }
        Ok(Some(Plan { product, algorithm }))
    }

    /// What cuBLASLt proposes and the product can use, best first. No other algorithm ever runs.
    fn candidates(&self, product: &Product, key: &Key) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        const CALL: &str = "asking cuBLASLt for algorithms";
        let preference = Preference::new()?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64))?;
        // Split sums are added up in f32 in a step of their own, in a fixed order.
        let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions)?;
        let [output, left, right, addend, ..] = key.alignments;
        let addend = if key.description.adds { addend } else { output };
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &right)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &left)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &addend)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &output)?;
        let mut found = [no_result(); CANDIDATES];
        let mut count = 0;
        let Product { descriptor, a, b, d, .. } = product;
        // SAFETY: cublasLtMatmulAlgoGetHeuristic(handle, desc, A, B, C, D, preference, int, result*, int*); all exist, and the
        // array has as many entries as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                descriptor.0,
                a.0,
                b.0,
                d.0,
                d.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        match status.result() {
            Ok(()) => {}
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => return Ok(Vec::new()),
            Err(error) => return Err(failed(CALL, error)),
        }
        let count = usize::try_from(count).unwrap_or(0).min(CANDIDATES);
        let apart = key.description.adds && !key.in_place;
        let usable = found[..count].iter().filter(|candidate| {
            candidate.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && candidate.workspaceSize <= WORKSPACE_BYTES
                && (!apart || works_out_of_place(&candidate.algo))
        });
        Ok(usable.map(|candidate| candidate.algo).collect())
    }

    /// The candidate that takes the least time, or the first that runs where there is no choice or none is wanted.
    ///
    /// # Safety
    ///
    /// As for [`CublasLt::multiply`]; the stream is not captured.
    unsafe fn fastest(
        &self,
        stream: CUstream,
        product: &Product,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        tunes: bool,
        key: &Key,
        addresses: &GemmAddresses,
    ) -> Result<Choice<sys::cublasLtMatmulAlgo_t>> {
        let gemm = key.description.gemm;
        let mut addresses = *addresses;
        let mut elsewhere = None;
        if key.description.adds && key.in_place {
            // Every run would add to the output once more.
            let length = span(Layout::rows(gemm.output_stride), gemm.rows, gemm.columns);
            let bytes = length * key.description.output.bytes();
            let Some(memory) = Memory::zeros(bytes, stream)? else { return Ok(Choice::NoRoom) };
            (addresses.output, addresses.addend) = (memory.0, memory.0);
            elsewhere = Some(memory);
        }
        let is_timed = tunes && candidates.len() > 1;
        // SAFETY: the caller's promise, or memory of the same size.
        let time = |algorithm: &_| unsafe { self.time(stream, product, algorithm, is_timed, &addresses) };
        let chosen = choose(candidates, is_timed, time);
        drop(elsewhere);
        chosen
    }

    /// How long a product takes, the best of three, or no time where none is wanted; nothing where the algorithm refuses to
    /// run.
    ///
    /// # Safety
    ///
    /// As for [`CublasLt::fastest`].
    unsafe fn time(
        &self,
        stream: CUstream,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        is_timed: bool,
        addresses: &GemmAddresses,
    ) -> Result<Option<Duration>> {
        const RUNS: u32 = 4;
        let wait = || {
            // SAFETY: the caller's stream.
            let done = unsafe { driver::stream::synchronize(stream) };
            done.map_err(|error| call("waiting for a matrix product", error))
        };
        // SAFETY: what the caller promises. The first run loads the code.
        if unsafe { self.run(stream, product, algorithm, addresses) }.is_err() {
            return Ok(None);
        }
        wait()?;
        if !is_timed {
            return Ok(Some(Duration::ZERO));
        }
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            for _ in 0..RUNS {
                // SAFETY: as above.
                unsafe { self.run(stream, product, algorithm, addresses)? };
            }
            wait()?;
            best = best.min(start.elapsed() / RUNS);
        }
        Ok(Some(best))
    }

    /// Gives a product to a stream, with an algorithm.
    ///
    /// # Safety
    ///
    /// As for [`CublasLt::multiply`]; the algorithm is one for the product and the alignments of the addresses.
    unsafe fn run(
        &self,
        stream: CUstream,
        product: &Product,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        at: &GemmAddresses,
    ) -> Result<()> {
        product.point_at(at)?;
        let (one, share_of_addend) = (1.0f32, if product.adds { 1.0f32 } else { 0.0 });
        let addend = if product.adds { at.addend } else { at.output };
        let pointer = |address: u64| address as *const c_void;
        // SAFETY: cublasLtMatmul(handle, desc, alpha, A, Adesc, B, Bdesc, beta, C, Cdesc, D, Ddesc, algo, workspace, bytes,
        // stream): the descriptors describe what is at the addresses, as the caller promises; alpha and beta are read before
        // the call returns (pointer mode host); the workspace is only used on this stream.
        unsafe {
            result::matmul(
                self.handle,
                product.descriptor.0,
                (&raw const one).cast(),
                (&raw const share_of_addend).cast(),
                pointer(at.right),
                product.a.0,
                pointer(at.left),
                product.b.0,
                pointer(addend),
                product.d.0,
                pointer(at.output).cast_mut(),
                product.d.0,
                algorithm,
                pointer(self.workspace).cast_mut(),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|error| failed("multiplying matrices", error))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        self.plans.clear();
        // An error means that the context is gone, and the memory with it.
        if self.workspace != 0 {
            // SAFETY: reserved by us; freeing waits for the work that uses it.
            let _ = unsafe { driver::free_sync(self.workspace) };
        }
        // SAFETY: created by us and destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Memory for a moment.
struct Memory(u64);

impl Memory {
    /// Zeros, or nothing where there is no room.
    fn zeros(bytes: usize, stream: CUstream) -> Result<Option<Self>> {
        // SAFETY: a context is current.
        let memory = match unsafe { driver::malloc_sync(bytes) } {
            Ok(address) => Self(address),
            Err(error) => match reserving("reserving memory to time a matrix product", bytes, error) {
                CudaError::OutOfMemory { .. } => return Ok(None),
                error => return Err(error),
            },
        };
        // SAFETY: as many bytes as were reserved, on a stream of the context.
        let filled = unsafe { driver::memset_d8_async(memory.0, 0, bytes, stream) };
        filled.map_err(|error| call("filling memory", error))?;
        Ok(Some(memory))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: reserved by us; freeing waits for the work that uses it.
        let _ = unsafe { driver::free_sync(self.0) };
    }
}

/// Whether an algorithm can write elsewhere than over its addend.
fn works_out_of_place(algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
    let attribute = sys::cublasLtMatmulAlgoCapAttributes_t::CUBLASLT_ALGO_CAP_OUT_OF_PLACE_RESULT_SUPPORT;
    let (mut supported, mut written) = (0i32, 0usize);
    // SAFETY: cublasLtMatmulAlgoCapGetAttribute(algo, attribute, buffer, bytes, written): an int32_t, as the buffer.
    let status = unsafe {
        sys::cublasLtMatmulAlgoCapGetAttribute(
            algorithm,
            attribute,
            (&raw mut supported).cast(),
            size_of::<i32>(),
            &mut written,
        )
    };
    status.result().is_ok() && supported != 0
}

fn no_result() -> sys::cublasLtMatmulHeuristicResult_t {
    // SAFETY: a structure of numbers and a status, of which 0 is CUBLAS_STATUS_SUCCESS.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn describe(description: &GemmDescription) -> String {
    let GemmDescription { gemm, input, output, adds, epilogue } = description;
    let (rows, columns, depth) = (gemm.rows, gemm.columns, gemm.depth);
    format!("[{rows}, {depth}] x [{depth}, {columns}], {input:?} to {output:?}, epilogue {epilogue:?}, adds {adds}")
}
