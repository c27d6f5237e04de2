//! NCCL: gradients from GPU to GPU, one process for each GPU. How processes meet and agree is another engine's business.
//!
//! Types come from cudarc; its functions panic where the library is missing and know it by its unversioned name only, so they are
//! looked up here. A result is read as a number, because a newer NCCL has results that an enumeration does not.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use crate::cuda::CudaError;
use crate::cuda::nvrtc::{reason_of, usual_folders};
use crate::ops::Communicator;
use crate::{Error, Result};

/// Names of the library.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// 2.10 as NCCL counts: older ones know no bf16, and nobody has tried them.
const OLDEST: c_int = 21_000;
const SUCCESS: u32 = 0;

/// What is called of the library.
struct Library {
    version: c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> u32,
    comm_init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> u32,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> u32,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> u32,
    group_start: unsafe extern "C" fn() -> u32,
    group_end: unsafe extern "C" fn() -> u32,
    comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut u32) -> u32,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> u32,
    get_error_string: unsafe extern "C" fn(u32) -> *const c_char,
}

impl Library {
    /// Loads the library once. `VITMAE_NCCL` may name it or its folder; else the system's loader and the usual folders are asked.
    fn get() -> std::result::Result<&'static Self, CudaError> {
        static LOADED: OnceLock<std::result::Result<Library, CudaError>> = OnceLock::new();
        LOADED.get_or_init(Self::find).as_ref().map_err(Clone::clone)
    }

    fn find() -> std::result::Result<Self, CudaError> {
        if let Some(path) = std::env::var_os("VITMAE_NCCL").filter(|path| !path.is_empty()).map(PathBuf::from) {
            let inside = NAMES.iter().map(|name| path.join(name)).find(|path| path.is_file());
            return Self::load(&inside.unwrap_or(path));
        }
        let folders = usual_folders("nccl");
        let inside = folders.iter().flat_map(|folder| NAMES.iter().map(move |name| folder.join(name)));
        let candidates = NAMES.iter().map(PathBuf::from).chain(inside.filter(|path| path.is_file()));
        let mut first = None;
        for path in candidates {
            match Self::load(&path) {
                Ok(library) => return Ok(library),
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or(CudaError::NcclUnusable { reason: "it was not found".into() }))
    }

    fn load(path: &Path) -> std::result::Result<Self, CudaError> {
        let unusable = |reason: String| CudaError::NcclUnusable { reason };
        // SAFETY: loading runs NCCL's initialisers, which have no preconditions.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| unusable(reason_of(&error)))?;
        /// Looks a function up. Its type must be the function's.
        unsafe fn function<F: Copy>(library: &libloading::Library, name: &str) -> std::result::Result<F, CudaError> {
            // SAFETY: the caller's promise.
            let found = unsafe { library.get::<F>(name.as_bytes()) };
            found.map(|symbol| *symbol).map_err(|_| CudaError::NcclUnusable { reason: format!("it has no {name}") })
        }
        // SAFETY: the types are those of NCCL 2's nccl.h, where an enumeration is 32 bits.
        let loaded = unsafe {
            let get_version: unsafe extern "C" fn(*mut c_int) -> u32 = function(&library, "ncclGetVersion")?;
            let mut version = 0;
            if get_version(&mut version) != SUCCESS {
                return Err(unusable("it does not tell its version".into()));
            }
            Self {
                version,
                get_unique_id: function(&library, "ncclGetUniqueId")?,
                comm_init_rank: function(&library, "ncclCommInitRank")?,
                all_reduce: function(&library, "ncclAllReduce")?,
                broadcast: function(&library, "ncclBroadcast")?,
                group_start: function(&library, "ncclGroupStart")?,
                group_end: function(&library, "ncclGroupEnd")?,
                comm_get_async_error: function(&library, "ncclCommGetAsyncError")?,
                comm_abort: function(&library, "ncclCommAbort")?,
                get_error_string: function(&library, "ncclGetErrorString")?,
            }
        };
        if loaded.version < OLDEST {
            return Err(unusable(format!("it is version {}, and 2.10 ({OLDEST}) or newer is needed", loaded.version)));
        }
        // It stays loaded, as its functions do.
        std::mem::forget(library);
        Ok(loaded)
    }

    fn check(&self, call: &'static str, status: u32) -> std::result::Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: any number is allowed; the text is a constant of the library, or null.
        let text = unsafe {
            let text = (self.get_error_string)(status);
            if text.is_null() { "no text".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        let reason = format!("{text} ({status}); NCCL_DEBUG=WARN makes NCCL say more");
        Err(CudaError::Call { call, reason })
    }
}

/// This process' GPU among those of all.
pub(crate) struct Nccl {
    library: &'static Library,
    communicator: ncclComm_t,
    /// The communicator is gone.
    aborted: AtomicBool,
    context: Arc<CudaContext>,
}

// SAFETY: a communicator may be used from any thread, by one at a time, which the mutex around this sees to.
unsafe impl Send for Nccl {}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").field("version", &self.library.version).finish_non_exhaustive()
    }
}

impl Nccl {
    /// Joins the GPUs of all processes; nothing where one of them lacks NCCL, or `VITMAE_NCCL=0` was said to one: gradients then go
    /// through the host. One process alone has nobody to join, and does so only where `VITMAE_NCCL` names the library, to try it.
    /// The context is current. Collective.
    ///
    /// # Errors
    /// Those of NCCL, and of the processes' exchange.
    pub fn connect(context: &Arc<CudaContext>, processes: &dyn Communicator) -> Result<Option<Self>> {
        let wanted = match std::env::var_os("VITMAE_NCCL").filter(|value| !value.is_empty()) {
            Some(value) => value != "0",
            None => processes.size() > 1,
        };
        let library = if wanted { Some(Library::get()) } else { None };
        if let Some(Err(error)) = &library {
            tracing::warn!("{error}; gradients go through the host, which is slow");
        }
        let library = library.and_then(std::result::Result::ok);
        let mut have = [f64::from(u8::from(library.is_some()))];
        processes.sum_f64(&mut have)?;
        let Some(library) = library.filter(|_| have[0] == processes.size() as f64) else { return Ok(None) };

        let mut id = ncclUniqueId { internal: [0; 128] };
        let mut made = Ok(());
        if processes.rank() == 0 {
            // SAFETY: the pointer is valid for a write.
            made = library.check("ncclGetUniqueId", unsafe { (library.get_unique_id)(&mut id) });
        }
        agree(processes, made)?;
        processes.broadcast(bytemuck::cast_slice_mut(&mut id.internal[..]), 0)?;

        let (rank, size) = (c_int::try_from(processes.rank()), c_int::try_from(processes.size()));
        let (Ok(rank), Ok(size)) = (rank, size) else {
            return Err(Error::Distributed("NCCL counts processes in 31 bits".into()));
        };
        let mut communicator = MaybeUninit::<ncclComm_t>::uninit();
        // SAFETY: the pointer is valid for a write, the identity is that of process 0, and the context of this process' GPU is
        // current.
        let status = unsafe { (library.comm_init_rank)(communicator.as_mut_ptr(), size, id, rank) };
        let made = library.check("ncclCommInitRank", status).map(|()| Self {
            library,
            // SAFETY: the call succeeded, so it wrote it.
            communicator: unsafe { communicator.assume_init() },
            aborted: AtomicBool::new(false),
            context: Arc::clone(context),
        });
        // An error is told at once: the others are still waiting for this GPU, and cannot be asked.
        let joined = agree(processes, Ok(made?))?;
        if rank == 0 {
            tracing::info!("{size} GPUs exchange gradients through NCCL {}", library.version);
        }
        Ok(Some(joined))
    }

    /// Gives the sum of f32 numbers, in place, to a stream. Collective.
    ///
    /// # Safety
    ///
    /// `length` numbers at `address` belong to one allocation of this communicator's GPU; the stream belongs to the context, which
    /// is current.
    pub unsafe fn all_reduce(
        &self,
        address: u64,
        length: usize,
        stream: CUstream,
    ) -> std::result::Result<(), CudaError> {
        self.usable()?;
        let numbers = address as *mut c_void;
        let (kind, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        // SAFETY: the caller's promise; NCCL allows sums in place.
        let status =
            unsafe { (self.library.all_reduce)(numbers, numbers, length, kind, sum, self.communicator, stream.cast()) };
        self.library.check("ncclAllReduce", status)
    }

    /// Gives the exchange of f32 numbers to a stream: process `r` has those from `r * part` on, `part` of them or as many as there
    /// are, and all processes get all. Collective.
    ///
    /// # Safety
    ///
    /// As for [`Nccl::all_reduce`].
    pub unsafe fn all_gather(
        &self,
        address: u64,
        length: usize,
        part: usize,
        stream: CUstream,
    ) -> std::result::Result<(), CudaError> {
        self.usable()?;
        // NCCL's own all-gather wants parts of one length.
        // SAFETY: no argument.
        self.library.check("ncclGroupStart", unsafe { (self.library.group_start)() })?;
        let mut result = Ok(());
        for (root, start) in (0..length).step_by(part.max(1)).enumerate() {
            let numbers = (address + (start * size_of::<f32>()) as u64) as *mut c_void;
            let (count, kind) = (part.min(length - start), ncclDataType_t::ncclFloat32);
            // SAFETY: the caller's promise; NCCL allows broadcasts in place. There are no more parts than processes.
            let status = unsafe {
                (self.library.broadcast)(numbers, numbers, count, kind, root as c_int, self.communicator, stream.cast())
            };
            result = result.and(self.library.check("ncclBroadcast", status));
        }
        // SAFETY: no argument; it ends the group that was started above, whatever became of it.
        result.and(self.library.check("ncclGroupEnd", unsafe { (self.library.group_end)() }))
    }

    /// An error that NCCL came upon since, such as a connection that is gone.
    ///
    /// # Errors
    /// [`CudaError::Exchange`] for that.
    pub fn failure(&self) -> std::result::Result<(), CudaError> {
        self.usable()?;
        let mut status = SUCCESS;
        // SAFETY: the communicator lives, and the pointer is valid for a write.
        let asked = unsafe { (self.library.comm_get_async_error)(self.communicator, &mut status) };
        // Behind errors there is one for work that is under way, which a communicator that waits in its calls never has.
        let found = self.library.check("ncclCommGetAsyncError", asked).and(self.library.check("NCCL", status));
        found.map_err(|error| CudaError::Exchange { reason: error.to_string() })
    }

    /// Ends all exchanges: the GPU goes on with what comes behind them, though nothing was brought.
    pub fn abort(&self) {
        if !self.aborted.swap(true, Ordering::Relaxed) {
            // SAFETY: the communicator is not used again, see `usable`. A failure here is one of a failure.
            let _ = unsafe { (self.library.comm_abort)(self.communicator) };
        }
    }

    /// Refuses to use a communicator that is gone.
    fn usable(&self) -> std::result::Result<(), CudaError> {
        match self.aborted.load(Ordering::Relaxed) {
            true => Err(CudaError::Exchange { reason: "it was aborted".into() }),
            false => Ok(()),
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if self.aborted.load(Ordering::Relaxed) || self.context.bind_to_thread().is_err() {
            return;
        }
        // Destroying may wait for the others, who need not be about to do the same; aborting does not.
        self.abort();
    }
}

/// The result of this process, where that of none is an error.
fn agree<T>(processes: &dyn Communicator, result: std::result::Result<T, CudaError>) -> Result<T> {
    let mut failures = [f64::from(u8::from(result.is_err()))];
    processes.sum_f64(&mut failures)?;
    let value = result?;
    if failures[0] > 0.0 {
        return Err(Error::Distributed("NCCL does not start in another process, which says why".into()));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_nccl_is_an_error_that_says_so() {
        let unusable = |path: &Path| match Library::load(path) {
            Err(error @ CudaError::NcclUnusable { .. }) => error.to_string(),
            Err(error) => panic!("{error:?}"),
            Ok(_) => panic!("{} is no NCCL", path.display()),
        };
        let text = unusable("libthere-is-no-such-nccl.so.2".as_ref());
        assert!(text.contains("nvidia-nccl") && text.contains("VITMAE_NCCL"), "{text}");
        if cfg!(target_os = "linux") {
            assert!(unusable("libc.so.6".as_ref()).contains("ncclGetVersion"));
        }
    }

    #[test]
    fn the_librarys_functions_are_those_that_are_called() {
        let Some(path) = std::env::var_os("VITMAE_NCCL").map(PathBuf::from).filter(|path| path.exists()) else {
            println!("skipped: VITMAE_NCCL names no NCCL");
            return;
        };
        let library = match Library::get() {
            Ok(library) => library,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        assert!(library.version >= OLDEST, "{}", library.version);
        assert!(library.check("nothing", SUCCESS).is_ok());
        let error = library.check("ncclAllReduce", 4).expect_err("an error").to_string();
        assert!(error.contains("invalid argument"), "{error}");
        // Without a GPU it may fail, and says so.
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the pointer is valid for a write.
        println!("{:?}", library.check("ncclGetUniqueId", unsafe { (library.get_unique_id)(&mut id) }));
    }
}
