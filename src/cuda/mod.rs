//! The CUDA backend: launchers that check shapes and run the kernels of `kernels/*.cu`.
//!
//! [`devices`] lists GPUs, [`Gpu::open`] opens one, [`Gpu::new_stream`] or [`Gpu::stream`] (a caller's cudarc stream) gives a
//! [`Stream`], and each op family has one module of launchers. Nothing here panics where the driver or NVRTC is missing.

pub mod adamw;
pub mod attention;
pub mod backend;
pub mod buffer;
pub mod cross_entropy;
pub mod cublaslt;
pub mod discovery;
pub mod element;
pub mod embedded;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod error;
mod exchange;
pub mod gemm;
pub mod gpu;
#[path = "../../build/hash.rs"]
mod hash;
pub mod launch;
pub mod layernorm;
pub mod linear;
pub mod loss;
pub mod masking;
pub(crate) mod nccl;
#[path = "../../build/nvrtc.rs"]
pub mod nvrtc;
pub mod patchify;
pub mod recording;
mod staging;
pub mod timing;
pub mod tokens;

pub use backend::{Cuda, CudaBuffer};
pub use discovery::{DeviceInfo, devices};
pub use element::CudaElement;
pub use embedded::{Manifest, embedded_kernels};
pub use error::{CudaError, Result};
pub use gpu::Gpu;
pub use launch::{Buffer, DeviceId, Slice, SliceMut, Stream};
pub use timing::Mark;
