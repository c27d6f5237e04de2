//! Finding the driver without panicking, and listing GPUs.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{DriverError, result, sys};

use super::error::{CudaError, Result};
use super::gpu::{call, text_of};
use super::nvrtc::reason_of;

/// Names of the driver library that cudarc tries too.
const DRIVER_LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// What the backend calls through cudarc, which panics on a symbol that is missing.
const DRIVER_SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuCtxGetStreamPriorityRange",
    "cuStreamCreate",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
];

/// Whether the driver can tell the time between events; drivers before CUDA 12.8 lack the symbol that cudarc calls.
static EVENT_TIMES: AtomicBool = AtomicBool::new(false);

/// Whether it can, once the driver was found.
pub(super) fn has_event_times() -> bool {
    EVENT_TIMES.load(Ordering::Relaxed)
}

/// One GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number, as in `--device cuda:N`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability: 9 and 0 for 9.0.
    pub compute_capability: (u32, u32),
    /// Its memory.
    pub memory_bytes: u64,
    /// Its multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory that a block may ask for.
    pub shared_bytes_per_block: u32,
    /// The CUDA version of the driver: 13 and 0 for 13.0.
    pub driver_version: (u32, u32),
}

impl DeviceInfo {
    /// A GPU of which nothing is known, for tests.
    #[cfg(test)]
    pub(crate) fn unknown(ordinal: usize) -> Self {
        Self {
            ordinal,
            name: String::new(),
            compute_capability: (0, 0),
            memory_bytes: 0,
            multiprocessors: 0,
            shared_bytes_per_block: 0,
            driver_version: (13, 0),
        }
    }

    /// Fails with what to do about it where the GPU is too old for the kernels.
    pub fn check_supported(&self) -> Result<()> {
        let (major, minor) = self.compute_capability;
        if major >= 8 {
            return Ok(());
        }
        Err(CudaError::DeviceTooOld { name: self.name.clone(), major, minor })
    }
}

/// Every GPU that the driver shows, whether the kernels support it or not. Creates no context.
///
/// Without a driver this is [`CudaError::DriverMissing`], and costs a few failed look-ups the first time.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    (0..device_count()?).map(device_info).collect()
}

/// Loads and starts the driver once; everything else here comes after it.
fn probe() -> Result<()> {
    static PROBED: OnceLock<Result<()>> = OnceLock::new();
    PROBED.get_or_init(|| probe_libraries(DRIVER_LIBRARIES)).clone()
}

fn probe_libraries(names: &[&str]) -> Result<()> {
    let mut reason = String::new();
    for name in names {
        // SAFETY: loading the driver runs its initialisers, which have no preconditions.
        let library = match unsafe { libloading::Library::new(*name) } {
            Ok(library) => library,
            Err(error) => {
                reason = reason_of(&error);
                continue;
            }
        };
        for symbol in DRIVER_SYMBOLS {
            // SAFETY: the symbol is only looked up, as an address.
            if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
                return Err(CudaError::DriverUnusable { reason: format!("{name} has no {symbol}") });
            }
        }
        // SAFETY: as above.
        let event_times = unsafe { library.get::<*const ()>(b"cuEventElapsedTime_v2") }.is_ok();
        EVENT_TIMES.store(event_times, Ordering::Relaxed);
        // It stays loaded, so that cudarc gets this one.
        std::mem::forget(library);
        return match result::init() {
            Ok(()) => Ok(()),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(()),
            Err(DriverError(sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => Err(CudaError::DriverUnusable {
                reason: format!(
                    "{name} is the toolkit's stub for linking, not a driver; take it out of the library path"
                ),
            }),
            Err(error) => Err(CudaError::DriverUnusable { reason: format!("cuInit: {}", text_of(error)) }),
        };
    }
    Err(CudaError::DriverMissing { reason })
}

/// How many GPUs there are.
pub(super) fn device_count() -> Result<usize> {
    probe()?;
    match result::device::get_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        // No GPU, or none visible.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_NOT_INITIALIZED)) => Ok(0),
        Err(error) => Err(call("counting devices", error)),
    }
}

/// What a GPU is.
pub(super) fn device_info(ordinal: usize) -> Result<DeviceInfo> {
    let device = result::device::get(ordinal as i32).map_err(|error| call("opening a device", error))?;
    let attribute = |which| {
        // SAFETY: the device was just returned by the driver.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.map(i32::unsigned_abs).map_err(|error| call("reading a device's attributes", error))
    };
    use sys::CUdevice_attribute as Attribute;
    let mut version = 0;
    // SAFETY: the pointer is valid for a write.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| call("reading the driver's version", error))?;
    let version = version.unsigned_abs();
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device).map_err(|error| call("reading a device's name", error))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: the device was just returned by the driver.
        memory_bytes: unsafe { result::device::total_mem(device) }
            .map_err(|error| call("reading a device's memory", error))? as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver_version: (version / 1000, version % 1000 / 10),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Gpu;

    #[test]
    fn a_missing_driver_is_an_error_that_says_what_to_do() {
        let error = probe_libraries(&["libthere-is-no-such-driver.so"]).expect_err("no such library");
        assert!(matches!(error, CudaError::DriverMissing { .. }));
        assert!(error.to_string().contains("--device cpu"), "{error}");
    }

    #[test]
    fn a_library_that_is_no_driver_is_an_error() {
        if cfg!(not(target_os = "linux")) {
            println!("skipped: the test knows only Linux's libraries");
            return;
        }
        let error = probe_libraries(&["libc.so.6"]).expect_err("no driver");
        assert!(matches!(error, CudaError::DriverUnusable { .. }), "{error}");
    }

    #[test]
    fn an_old_gpu_is_named() {
        let info = DeviceInfo { name: "Tesla T4".into(), compute_capability: (7, 5), ..DeviceInfo::unknown(0) };
        let text = info.check_supported().expect_err("too old").to_string();
        assert!(text.contains("Tesla T4") && text.contains("7.5") && text.contains("8.0"), "{text}");
    }

    #[test]
    fn listing_devices_never_panics() {
        match devices() {
            Ok(devices) => println!("{devices:?}"),
            Err(error) => println!("{error}"),
        }
        assert!(Gpu::open(usize::MAX).is_err());
    }
}
