//! Launchers of `kernels/attention_*.cu`: multi-head self-attention.
//!
//! bf16 has three kinds of kernels, chosen by the shape and by how much shared memory a block may have: for short sequences,
//! for those of which a head fits into shared memory, and for all others. f32 has one kind.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::{CudaError, Result};
use super::gemm::GemmType;
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::Attention;

pub use crate::ops::AttentionShape;

/// Most features of a head.
const MAX_HEAD_DIM: u64 = 128;

/// Most tokens of which a head stays in shared memory; beyond it, blocks that share a head keep more of a GPU busy.
const MAX_RESIDENT: usize = 320;

/// A kernel and its grid: this many blocks per head.
#[derive(Debug, Clone, Copy)]
struct Launch {
    kernel: Kernel,
    tiles: usize,
    warps: usize,
    shared_bytes: u64,
}

/// The launches of a backward pass.
#[derive(Debug, Clone, Copy)]
enum Backward {
    /// All of it in one.
    One(Launch),
    /// Row sums, then keys and values, then queries.
    Three([Launch; 3]),
}

/// A head's features are a multiple of this.
const fn features<T: CudaElement>() -> usize {
    match T::TYPE {
        GemmType::F32 => 1,
        GemmType::Bf16 => 8,
    }
}

/// The launch of a forward pass on a device whose blocks have this much shared memory.
fn forward<T: CudaElement>(shape: AttentionShape, shared: u32) -> Launch {
    if T::TYPE == GemmType::F32 {
        return plain(shape, const { Kernel::named("attention_forward_f32") }, 384, 4608);
    }
    let candidates = [forward_whole(shape), forward_resident(shape)];
    let fits = |launch: &Launch| launch.shared_bytes <= u64::from(shared);
    candidates.into_iter().flatten().find(fits).unwrap_or_else(|| forward_streamed(shape))
}

/// The same for a backward pass.
fn backward<T: CudaElement>(shape: AttentionShape, shared: u32) -> Backward {
    if T::TYPE == GemmType::F32 {
        // Delta keeps no scores.
        let parts = [(PLAIN_DELTA, 0), (PLAIN_KEYS, 8448), (PLAIN_QUERIES, 8448)];
        return Backward::Three(parts.map(|(kernel, scores)| plain(shape, kernel, 512, scores)));
    }
    let candidates = [backward_whole(shape), backward_resident(shape)];
    let fits = |launch: &Launch| launch.shared_bytes <= u64::from(shared);
    match candidates.into_iter().flatten().find(fits) {
        Some(launch) => Backward::One(launch),
        None => Backward::Three(backward_streamed(shape)),
    }
}

const PLAIN_DELTA: Kernel = Kernel::named("attention_backward_delta_f32");
const PLAIN_KEYS: Kernel = Kernel::named("attention_backward_keys_f32");
const PLAIN_QUERIES: Kernel = Kernel::named("attention_backward_queries_f32");

/// Bytes of a row of `width` bf16 features in shared memory.
const fn row_bytes(width: usize) -> usize {
    2 * width + 16
}

/// A kernel of attention_plain.cu: `per_feature` bytes for each feature of the tiles' rows, and `rest`.
fn plain(shape: AttentionShape, kernel: Kernel, per_feature: u64, rest: u64) -> Launch {
    let features = shape.head_dim.next_multiple_of(16) as u64 + 1;
    Launch { kernel, tiles: shape.tokens.div_ceil(32), warps: 8, shared_bytes: per_feature * features + rest }
}

/// Features and tokens that a kernel for short sequences takes; `None` where another one is better or needed. Narrow heads
/// have a kernel of their own.
fn whole(shape: AttentionShape) -> Option<(usize, usize)> {
    match (shape.head_dim, shape.tokens) {
        (33..=64, ..=64) => Some((64, 64)),
        (33..=64, ..=80) => Some((64, 80)),
        (65..=80, ..=80) => Some((80, 80)),
        _ => None,
    }
}

fn forward_whole(shape: AttentionShape) -> Option<Launch> {
    let (width, rows) = whole(shape)?;
    let kernel = match (width, rows) {
        (64, 64) => Kernel::named("attention_forward_whole_d64_n64_bf16"),
        (64, _) => Kernel::named("attention_forward_whole_d64_n80_bf16"),
        _ => Kernel::named("attention_forward_whole_d80_n80_bf16"),
    };
    Some(Launch { kernel, tiles: 1, warps: rows / 16, shared_bytes: (3 * rows * row_bytes(width)) as u64 })
}

fn backward_whole(shape: AttentionShape) -> Option<Launch> {
    let (width, rows) = whole(shape)?;
    let kernel = match (width, rows) {
        (64, 64) => Kernel::named("attention_backward_whole_d64_n64_bf16"),
        (64, _) => Kernel::named("attention_backward_whole_d64_n80_bf16"),
        _ => Kernel::named("attention_backward_whole_d80_n80_bf16"),
    };
    let (row, warps) = (row_bytes(width), rows / 16);
    let shared_bytes = rows * (3 * row + row.max(row_bytes(rows)) + 4 + 4 * warps);
    Some(Launch { kernel, tiles: 1, warps, shared_bytes: shared_bytes as u64 })
}

fn forward_resident(shape: AttentionShape) -> Option<Launch> {
    // Features, queries of a warp at a time, and most warps that leave room for another block's registers.
    let (kernel, width, queries, most) = match shape.head_dim {
        ..=32 => (Kernel::named("attention_forward_resident_d32_bf16"), 32, 32, 5),
        33..=64 => (Kernel::named("attention_forward_resident_d64_bf16"), 64, 32, 5),
        65..=80 => (Kernel::named("attention_forward_resident_d80_bf16"), 80, 16, 9),
        _ => return None,
    };
    if shape.tokens > MAX_RESIDENT {
        return None;
    }
    let groups = shape.tokens.div_ceil(queries);
    let turns = groups.div_ceil(most).max(1);
    let rows = 2 * shape.tokens.next_multiple_of(16) + groups * queries;
    let warps = groups.div_ceil(turns).max(1);
    Some(Launch { kernel, tiles: 1, warps, shared_bytes: (rows * row_bytes(width)) as u64 })
}

/// Queries of a step of the resident backward kernels.
const QUERIES: usize = 32;

fn backward_resident(shape: AttentionShape) -> Option<Launch> {
    // The most warps are those of the kernel's registers.
    let (kernel, width, most) = match shape.head_dim {
        ..=32 => (Kernel::named("attention_backward_resident_d32_bf16"), 32, 12),
        33..=64 => (Kernel::named("attention_backward_resident_d64_bf16"), 64, 8),
        _ => return None,
    };
    let warps = shape.tokens.div_ceil(32).max(1);
    if warps > most {
        return None;
    }
    // For each token a row of four tiles, its scores of a step and a reference; for each warp and query a partial delta.
    let shared_bytes = 32 * warps * (4 * row_bytes(width) + row_bytes(QUERIES) + 4) + 4 * QUERIES * warps;
    Some(Launch { kernel, tiles: 1, warps, shared_bytes: shared_bytes as u64 })
}

fn forward_streamed(shape: AttentionShape) -> Launch {
    let (kernel, width, queries) = match shape.head_dim {
        ..=32 => (Kernel::named("attention_forward_streamed_d32_bf16"), 32, 128),
        33..=64 => (Kernel::named("attention_forward_streamed_d64_bf16"), 64, 128),
        65..=80 => (Kernel::named("attention_forward_streamed_d80_bf16"), 80, 64),
        _ => (Kernel::named("attention_forward_streamed_d128_bf16"), 128, 64),
    };
    let shared_bytes = ((queries + 256) * row_bytes(width)) as u64;
    Launch { kernel, tiles: shape.tokens.div_ceil(queries), warps: 4, shared_bytes }
}

fn backward_streamed(shape: AttentionShape) -> [Launch; 3] {
    // Features, queries or keys of a block, and keys of a stage.
    let (kernels, width, rows, stage) = match shape.head_dim {
        ..=32 => (D32, 32, 128, 64),
        33..=64 => (D64, 64, 128, 64),
        65..=80 => (D80, 80, 64, 64),
        _ => (D128, 128, 64, 32),
    };
    let by_query = 2 * (rows + 2 * stage) * row_bytes(width);
    let by_key = 2 * (rows + 64) * row_bytes(width) + 512;
    let tiles = shape.tokens.div_ceil(rows);
    let launch = |kernel, bytes| Launch { kernel, tiles, warps: 4, shared_bytes: bytes as u64 };
    let [delta, keys, queries] = kernels;
    [launch(delta, by_query), launch(keys, by_key), launch(queries, by_query)]
}

const D32: [Kernel; 3] = [
    Kernel::named("attention_backward_delta_d32_bf16"),
    Kernel::named("attention_backward_keys_d32_bf16"),
    Kernel::named("attention_backward_queries_d32_bf16"),
];
const D64: [Kernel; 3] = [
    Kernel::named("attention_backward_delta_d64_bf16"),
    Kernel::named("attention_backward_keys_d64_bf16"),
    Kernel::named("attention_backward_queries_d64_bf16"),
];
const D80: [Kernel; 3] = [
    Kernel::named("attention_backward_delta_d80_bf16"),
    Kernel::named("attention_backward_keys_d80_bf16"),
    Kernel::named("attention_backward_queries_d80_bf16"),
];
const D128: [Kernel; 3] = [
    Kernel::named("attention_backward_delta_d128_bf16"),
    Kernel::named("attention_backward_keys_d128_bf16"),
    Kernel::named("attention_backward_queries_d128_bf16"),
];

/// `out = softmax(q kᵀ / sqrt(D)) v` per head: qkv `[B, N, 3, H, D]`, out `[B, N, H · D]`, and the natural log-sum-exp of the
/// scaled scores, `[B, H, N]`.
///
/// Errors: a head of more than 128 features, or in bf16 of no multiple of 8; a shape outside the limits; a buffer of another
/// length or device, or in bf16 one that is not 16-byte aligned; a failed launch.
pub fn attention_forward<T: CudaElement>(
    stream: &Stream,
    out: &mut SliceMut<'_, T>,
    log_sum_exp: &mut SliceMut<'_, f32>,
    qkv: &Slice<'_, T>,
    shape: AttentionShape,
) -> Result<()> {
    const OP: &str = "attention_forward";
    let parameters = check::<T>(OP, qkv.len(), log_sum_exp.len(), shape)?;
    exactly(OP, "length of out", out.len() as u64, numbers(shape))?;
    aligned::<T>(
        OP,
        &[
            ("alignment of out", alignment(|bytes| out.is_aligned(bytes))),
            ("alignment of qkv", alignment(|bytes| qkv.is_aligned(bytes))),
        ],
    )?;
    let launch = forward::<T>(shape, stream.limits().shared_bytes);
    let arguments = [out.argument(), log_sum_exp.argument(), qkv.argument(), Argument::value(&parameters)];
    // SAFETY: attention_forward_*(T*, float*, const T*, AttentionShape); lengths, alignment and limits were checked.
    unsafe { stream.launch(launch.kernel, grid(OP, launch, shape)?, &arguments) }
}

/// `dqkv` `[B, N, 3, H, D]` (assigned) from `dout` `[B, N, H · D]`, qkv and the log-sum-exp of the forward pass.
///
/// Errors: as [`attention_forward`].
pub fn attention_backward<T: CudaElement>(
    stream: &Stream,
    dqkv: &mut SliceMut<'_, T>,
    dout: &Slice<'_, T>,
    qkv: &Slice<'_, T>,
    log_sum_exp: &Slice<'_, f32>,
    shape: AttentionShape,
) -> Result<()> {
    const OP: &str = "attention_backward";
    let parameters = check::<T>(OP, qkv.len(), log_sum_exp.len(), shape)?;
    exactly(OP, "length of dout", dout.len() as u64, numbers(shape))?;
    exactly(OP, "length of dqkv", dqkv.len() as u64, qkv.len() as u64)?;
    let buffers = [
        ("alignment of dqkv", alignment(|bytes| dqkv.is_aligned(bytes))),
        ("alignment of dout", alignment(|bytes| dout.is_aligned(bytes))),
        ("alignment of qkv", alignment(|bytes| qkv.is_aligned(bytes))),
    ];
    aligned::<T>(OP, &buffers)?;
    let arguments =
        [dqkv.argument(), dout.argument(), qkv.argument(), log_sum_exp.argument(), Argument::value(&parameters)];
    let run = |launch: Launch| -> Result<()> {
        // SAFETY: attention_backward_*(T*, const T*, const T*, const float*, AttentionShape); lengths, alignment and limits
        // were checked, and the three launches come in their order.
        unsafe { stream.launch(launch.kernel, grid(OP, launch, shape)?, &arguments) }
    };
    match backward::<T>(shape, stream.limits().shared_bytes) {
        Backward::One(launch) => run(launch),
        Backward::Three(launches) => launches.into_iter().try_for_each(run),
    }
}

/// The probabilities themselves, `[B, H, N, N]`, for looking at.
///
/// Errors: as [`attention_forward`].
pub fn attention_probabilities<T: CudaElement>(
    stream: &Stream,
    probabilities: &mut SliceMut<'_, T>,
    qkv: &Slice<'_, T>,
    log_sum_exp: &Slice<'_, f32>,
    shape: AttentionShape,
) -> Result<()> {
    const OP: &str = "attention_probabilities";
    let parameters = check::<T>(OP, qkv.len(), log_sum_exp.len(), shape)?;
    let scores = product(OP, "probabilities", &[shape.batch, shape.heads, shape.tokens, shape.tokens], u64::MAX)?;
    exactly(OP, "length of probabilities", probabilities.len() as u64, scores)?;
    let launch = plain(shape, const { Kernel::of::<T>("attention_probabilities") }, 256, 0);
    let arguments = [probabilities.argument(), qkv.argument(), log_sum_exp.argument(), Argument::value(&parameters)];
    // SAFETY: attention_probabilities_*(T*, const T*, const float*, AttentionShape); lengths and limits were checked.
    unsafe { stream.launch(launch.kernel, grid(OP, launch, shape)?, &arguments) }
}

impl<E: CudaElement> Attention for Cuda<E> {
    fn attention_forward(
        &self,
        shape: AttentionShape,
        out: &mut CudaBuffer<E>,
        log_sum_exp: &mut CudaBuffer<f32>,
        qkv: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "attention_forward";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let mut out = out.output(op, "out", &[batch, tokens, heads, head_dim])?;
        let mut log_sum_exp = log_sum_exp.output(op, "log_sum_exp", &[batch, heads, tokens])?;
        let qkv = qkv.input(op, "qkv", &[batch, tokens, 3, heads, head_dim])?;
        Ok(attention_forward(self.stream(), &mut out, &mut log_sum_exp, &qkv, shape)?)
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        dqkv: &mut CudaBuffer<E>,
        dout: &CudaBuffer<E>,
        qkv: &CudaBuffer<E>,
        log_sum_exp: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "attention_backward";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let mut dqkv = dqkv.output(op, "dqkv", &[batch, tokens, 3, heads, head_dim])?;
        let dout = dout.input(op, "dout", &[batch, tokens, heads, head_dim])?;
        let qkv = qkv.input(op, "qkv", &[batch, tokens, 3, heads, head_dim])?;
        let log_sum_exp = log_sum_exp.input(op, "log_sum_exp", &[batch, heads, tokens])?;
        Ok(attention_backward(self.stream(), &mut dqkv, &dout, &qkv, &log_sum_exp, shape)?)
    }

    fn attention_probabilities(
        &self,
        shape: AttentionShape,
        probabilities: &mut CudaBuffer<E>,
        qkv: &CudaBuffer<E>,
        log_sum_exp: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "attention_probabilities";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let mut probabilities = probabilities.output(op, "probabilities", &[batch, heads, tokens, tokens])?;
        let qkv = qkv.input(op, "qkv", &[batch, tokens, 3, heads, head_dim])?;
        let log_sum_exp = log_sum_exp.input(op, "log_sum_exp", &[batch, heads, tokens])?;
        Ok(attention_probabilities(self.stream(), &mut probabilities, &qkv, &log_sum_exp, shape)?)
    }
}

/// `AttentionShape` of kernels/attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AttentionParameters {
    tokens: u32,
    heads: u32,
    head_dim: u32,
    scale: f32,
}

/// Elements of the output; `check` has seen that they can be counted.
fn numbers(shape: AttentionShape) -> u64 {
    (shape.batch * shape.tokens * shape.heads * shape.head_dim) as u64
}

/// Checks limits and the lengths that all ops have.
fn check<T: CudaElement>(
    op: &'static str,
    qkv: usize,
    log_sum_exp: usize,
    shape: AttentionShape,
) -> Result<AttentionParameters> {
    let AttentionShape { batch, tokens, heads, head_dim } = shape;
    within(op, "features of a head", head_dim as u64, 1..=MAX_HEAD_DIM)?;
    if !head_dim.is_multiple_of(features::<T>()) {
        let expected = format!("a multiple of {}; f32 takes any number up to {MAX_HEAD_DIM}", features::<T>());
        return Err(CudaError::Shape { op, what: "features of a head", found: head_dim as u64, expected });
    }
    for (what, size) in [("batch", batch), ("tokens", tokens), ("heads", heads)] {
        within(op, what, size as u64, 0..=MAX_32_BIT)?;
    }
    // Kernels count the tokens of a batch in 32 bits.
    product(op, "number of tokens", &[batch, tokens], MAX_32_BIT)?;
    let expected = product(op, "length of qkv", &[batch, tokens, 3, heads, head_dim], i64::MAX as u64)?;
    exactly(op, "length of qkv", qkv as u64, expected)?;
    let expected = product(op, "length of log_sum_exp", &[batch, heads, tokens], u64::MAX)?;
    exactly(op, "length of log_sum_exp", log_sum_exp as u64, expected)?;
    let (tokens, heads) = (tokens as u32, heads as u32);
    Ok(AttentionParameters { tokens, heads, head_dim: head_dim as u32, scale: shape.scale() as f32 })
}

/// Fails where bf16 rows do not start at a multiple of 16 bytes. `buffers`: names, and what their addresses are multiples of.
fn aligned<T: CudaElement>(op: &'static str, buffers: &[(&'static str, u64)]) -> Result<()> {
    let needed = if features::<T>() > 1 { 16 } else { 1 };
    match buffers.iter().find(|(_, found)| *found < needed) {
        None => Ok(()),
        Some(&(what, found)) => Err(CudaError::Shape { op, what, found, expected: "at least 16".to_string() }),
    }
}

/// The largest power of two up to 16 for which `is_aligned` holds.
fn alignment(is_aligned: impl Fn(usize) -> bool) -> u64 {
    [16, 8, 4, 2].into_iter().find(|&bytes| is_aligned(bytes)).unwrap_or(1) as u64
}

/// The grid: nothing where there are no tokens.
fn grid(op: &'static str, launch: Launch, shape: AttentionShape) -> Result<Grid> {
    let Launch { tiles, warps, shared_bytes, .. } = launch;
    let tiles = if shape.tokens == 0 { 0 } else { tiles };
    let blocks = product(op, "number of blocks", &[shape.batch, shape.heads, tiles], MAX_32_BIT)?;
    Ok(Grid { blocks: blocks as u32, threads: 32 * warps as u32, shared_bytes: shared_bytes as u32 })
}
