//! The contract between the model and whatever runs it.
//!
//! A backend is a value of a type that implements [`Backend`]: memory, exchanges and
//! recordings, and one small trait per op family with forward and backward side by side. The model in [`crate::model`] is written once over these traits.
//!
//! Conventions, for every op unless its own page says otherwise:
//!
//! - Outputs come first (`&mut`), then inputs (`&`). A buffer may be longer than the shape needs; the rest is untouched.
//!   A shorter one is an [`Error::Shape`](crate::Error::Shape).
//! - Tensors are dense and row-major. Gradients are called `d` + the name of what they belong to.
//! - Gradients of activations **assign**; gradients of parameters **accumulate** (so that micro-batches add up).
//! - `Element` is the type of activations and weight matrices (f32, f64 or bf16); `Master` that of master weights, vectors
//!   (biases, LayerNorm scales, tokens), statistics and gradients of parameters (f32, or f64 for gradient checks).
//! - Same device, same inputs: bitwise the same outputs.

mod adamw;
mod attention;
mod collectives;
mod communicator;
mod cross_entropy;
mod element;
mod layernorm;
mod linear;
mod loss;
mod masking;
mod memory;
mod patchify;
mod recording;
mod spec;
mod tokens;

pub use crate::config::{Activation, ImageShape};
pub(crate) use adamw::power;
pub use adamw::{AdamW, AdamWSettings, AdamWState};
pub use attention::{Attention, AttentionShape};
pub use collectives::Collectives;
#[cfg(feature = "cuda")]
pub(crate) use collectives::gather_on_host;
pub(crate) use communicator::BUCKET;
pub use communicator::{Communicator, Watch};
pub use cross_entropy::{CrossEntropy, CrossEntropyShape};
pub use element::{Element, Real};
pub use layernorm::{LayerNorm, LayerNormShape};
pub use linear::{Linear, LinearShape};
pub use loss::{Loss, LossShape};
pub use masking::{MaskingShape, PatchMasking, RandomMask};
pub use memory::Memory;
pub use patchify::{Patchify, Pixels};
pub use recording::Record;
pub use spec::{Cost, KERNELS, KernelSpec, OPS, OpSpec};
pub use tokens::{Tokens, TokensShape};

/// Everything the model needs of a device.
pub trait Backend:
    Collectives + Record + PatchMasking + Patchify + Linear + Tokens + LayerNorm + Attention + Loss + CrossEntropy + AdamW
{
}

impl<T> Backend for T where
    T: Collectives
        + Record
        + PatchMasking
        + Patchify
        + Linear
        + Tokens
        + LayerNorm
        + Attention
        + Loss
        + CrossEntropy
        + AdamW
{
}

/// Whether a gradient replaces what the output holds or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The output's old content is not read.
    Assign,
    /// The result is added to the output's content.
    Accumulate,
}
