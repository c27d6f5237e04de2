//! What can go wrong between a launcher and a GPU.

use super::nvrtc::NvrtcError;

/// An error of the CUDA backend: what was expected, what was found, what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no CUDA driver on this machine.
    #[error("no CUDA driver was found ({reason}); install NVIDIA's driver, or use the CPU with --device cpu")]
    DriverMissing {
        /// What the loader said.
        reason: String,
    },
    /// A driver library is there and lacks something or does not start.
    #[error("the CUDA driver cannot be used: {reason}; update NVIDIA's driver, or use the CPU with --device cpu")]
    DriverUnusable {
        /// What is wrong.
        reason: String,
    },
    /// The driver works and the machine has no such GPU.
    #[error("there is no CUDA device {ordinal}: the driver sees {count}; check the number and CUDA_VISIBLE_DEVICES")]
    NoSuchDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU lacks bf16 matrix instructions.
    #[error(
        "{name} has compute capability {major}.{minor}, and 8.0 or newer is needed (bf16 matrix instructions); \
         use another GPU, or the CPU with --device cpu"
    )]
    DeviceTooOld {
        /// The GPU.
        name: String,
        /// Major compute capability.
        major: u32,
        /// Minor compute capability.
        minor: u32,
    },
    /// A driver call failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The call, in words.
        call: &'static str,
        /// The driver's name for the error, and its text.
        reason: String,
    },
    /// Numbers that GPUs exchange do not come, because another process is gone or NCCL has failed.
    #[error("the exchange between GPUs cannot end: {reason}")]
    Exchange {
        /// What is wrong.
        reason: String,
    },
    /// The host cannot pin memory for copies to the GPU.
    #[error(
        "the host cannot pin {bytes} bytes for copies to the GPU; free host memory, or raise the limit on locked memory \
         (ulimit -l, or that of the container)"
    )]
    OutOfPinnedMemory {
        /// How much was asked for at once.
        bytes: usize,
    },
    /// The memory of the GPU ran out.
    #[error(
        "there is no memory left for the GPU ({}); use a smaller batch (in training --micro-batch, or --recompute), or free \
         memory that other programs hold",
        asked_for(*bytes)
    )]
    OutOfMemory {
        /// How much was asked for at once; 0 where it was not said, in a call that does more than reserve memory.
        bytes: usize,
    },
    /// No form of a kernel file runs on the GPU.
    #[error("{file} has no code for a GPU of compute capability {major}.{minor}: {reasons}")]
    NoCode {
        /// The kernel file.
        file: String,
        /// Major compute capability.
        major: u32,
        /// Minor compute capability.
        minor: u32,
        /// What was tried.
        reasons: String,
    },
    /// Embedded code does not come out as the build put it in.
    #[error("the embedded code for {target} is damaged ({reason}); build or install vitmae again")]
    DamagedCode {
        /// What it was compiled for.
        target: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no cuBLASLt on this machine.
    #[error(
        "cuBLASLt was not found (searched {searched}); install the CUDA toolkit or `pip install 'nvidia-cublas==13.0.*'` and \
         set VITMAE_CUBLASLT to libcublasLt.so.13 or its folder, or use the CPU with --device cpu"
    )]
    CublasMissing {
        /// The places that were searched.
        searched: String,
    },
    /// A cuBLASLt is there and lacks something or does not load.
    #[error("cuBLASLt cannot be used: {reason}; install another version, or use the CPU with --device cpu")]
    CublasUnusable {
        /// What is wrong.
        reason: String,
    },
    /// There is no NCCL on this machine, or none that can be used.
    #[error(
        "NCCL cannot be used: {reason}; install it or `pip install nvidia-nccl-cu13` and set VITMAE_NCCL to libnccl.so.2 or its \
         folder"
    )]
    NcclUnusable {
        /// What is wrong.
        reason: String,
    },
    /// The library that multiplies matrices has no algorithm for a product.
    #[error("cuBLASLt has no algorithm for {product}; report it, or use the CPU with --device cpu")]
    NoAlgorithm {
        /// The product.
        product: String,
    },
    /// Compiling a kernel failed.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// A shape is outside what a kernel takes.
    #[error("{op}: {what} is {found}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The dimension or buffer.
        what: &'static str,
        /// What it is.
        found: u64,
        /// What it should be.
        expected: String,
    },
    /// A buffer lives on another device than the stream.
    #[error("{op}: argument {argument} lives on another device than the stream; copy it there first")]
    WrongDevice {
        /// The operation or kernel.
        op: &'static str,
        /// Which argument, from 0.
        argument: usize,
    },
    /// Work that is being recorded asked for something that cannot be repeated.
    #[error("{what} cannot be part of work that is recorded; do it before")]
    Recording {
        /// What was asked for.
        what: &'static str,
    },
    /// The emulator found a fault in a kernel.
    #[error("emulator: {0}")]
    Emulator(String),
}

/// A result of the CUDA backend.
pub type Result<T> = std::result::Result<T, CudaError>;

fn asked_for(bytes: usize) -> String {
    match bytes {
        0 => "no amount was named".to_string(),
        bytes => format!("{bytes} bytes were asked for"),
    }
}
