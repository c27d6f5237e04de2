//! Launchers of `kernels/tokens.cu`: the class token, positions, mask tokens, and selecting patches.
//!
//! Widths that are whole 16-byte vectors, in buffers that start on a multiple of 16 bytes, move 128 bits at a time; all others
//! work, more slowly. The errors of every launcher: a shape outside the limits, a buffer of another length or device, a failed
//! launch.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Divider, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::{Tokens, TokensShape};

const MASK_TOKEN: Kernel = Kernel::named("tokens_unshuffle_backward_mask_token");

const WARPS: u32 = 8;
const THREADS: u32 = 32 * WARPS;

/// Samples of a thread in unshuffle forward.
const SAMPLES: usize = 4;

/// Tokens of a block in gather backward.
const CHUNK: usize = 32;

/// Blocks of unshuffle backward per multiprocessor, about as many as it holds.
const SUM_BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// The encoder's input `x` `[B, 1 + n, D]` from `patches` `[B, n, D]`, `class_token` `[D]`, `positions` `[1 + L, D]` and `ids_keep`
/// `[B, n]`. An id that is no patch gives a row of NaN.
pub fn tokens_assemble_forward<T: CudaElement>(
    stream: &Stream,
    x: &mut SliceMut<'_, T>,
    patches: &Slice<'_, T>,
    class_token: &Slice<'_, f32>,
    positions: &Slice<'_, f32>,
    ids_keep: &Slice<'_, u32>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_assemble_forward", shape)?;
    let Sizes { whole, short, .. } = launch.sizes;
    launch.length("length of x", x.len(), &[shape.batch, short, shape.width])?;
    launch.length("length of patches", patches.len(), &[shape.batch, shape.selected, shape.width])?;
    launch.length("length of class_token", class_token.len(), &[shape.width])?;
    launch.length("length of positions", positions.len(), &[whole, shape.width])?;
    launch.length("length of ids_keep", ids_keep.len(), &[shape.batch, shape.selected])?;
    let aligned = x.is_aligned_16() && patches.is_aligned_16();
    let aligned = aligned && class_token.is_aligned_16() && positions.is_aligned_16();
    let (parameters, grid) = launch.copies::<T>(aligned, shape.batch, short)?;
    let arguments = [
        x.argument(),
        patches.argument(),
        class_token.argument(),
        positions.argument(),
        ids_keep.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: tokens_assemble_forward_*(T*, const T*, const float*, const float*, const u32*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_assemble_forward") }, grid, &arguments) }
}

/// `dpatches` `[B, n, D]` (assigned) and `dclass_token` `[D]` (accumulated) from `dx` `[B, 1 + n, D]`.
pub fn tokens_assemble_backward<T: CudaElement>(
    stream: &Stream,
    dpatches: &mut SliceMut<'_, T>,
    dclass_token: &mut SliceMut<'_, f32>,
    dx: &Slice<'_, T>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_assemble_backward", shape)?;
    launch.length("length of dpatches", dpatches.len(), &[shape.batch, shape.selected, shape.width])?;
    launch.length("length of dclass_token", dclass_token.len(), &[shape.width])?;
    launch.length("length of dx", dx.len(), &[shape.batch, launch.sizes.short, shape.width])?;
    if shape.batch == 0 {
        return Ok(());
    }
    let aligned = dpatches.is_aligned_16() && dx.is_aligned_16();
    let (mut parameters, mut grid) = launch.copies::<T>(aligned, shape.batch, shape.selected)?;
    parameters.class_blocks = parameters.width.div_ceil(32);
    grid.blocks += parameters.class_blocks;
    grid.shared_bytes = 4 * THREADS;
    let arguments = [dpatches.argument(), dclass_token.argument(), dx.argument(), Argument::value(&parameters)];
    // SAFETY: tokens_assemble_backward_*(T*, float*, const T*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_assemble_backward") }, grid, &arguments) }
}

/// The decoder's input `y` `[B, 1 + L, D]` from `x` `[B, 1 + n, D]`, `mask_token` `[D]`, `positions` `[1 + L, D]` and `ids_restore`
/// `[B, L]`.
pub fn tokens_unshuffle_forward<T: CudaElement>(
    stream: &Stream,
    y: &mut SliceMut<'_, T>,
    x: &Slice<'_, T>,
    mask_token: &Slice<'_, f32>,
    positions: &Slice<'_, f32>,
    ids_restore: &Slice<'_, u32>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_unshuffle_forward", shape)?;
    let Sizes { whole, short, .. } = launch.sizes;
    launch.selects_patches()?;
    launch.length("length of y", y.len(), &[shape.batch, whole, shape.width])?;
    launch.length("length of x", x.len(), &[shape.batch, short, shape.width])?;
    launch.length("length of mask_token", mask_token.len(), &[shape.width])?;
    launch.length("length of positions", positions.len(), &[whole, shape.width])?;
    launch.length("length of ids_restore", ids_restore.len(), &[shape.batch, shape.patches])?;
    let aligned = y.is_aligned_16() && x.is_aligned_16();
    let aligned = aligned && mask_token.is_aligned_16() && positions.is_aligned_16();
    let (parameters, grid) = launch.copies::<T>(aligned, shape.batch.div_ceil(SAMPLES), whole)?;
    let arguments = [
        y.argument(),
        x.argument(),
        mask_token.argument(),
        positions.argument(),
        ids_restore.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: tokens_unshuffle_forward_*(T*, const T*, const float*, const float*, const u32*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_unshuffle_forward") }, grid, &arguments) }
}

/// How many numbers [`tokens_unshuffle_backward`] needs for partial sums on a stream's device.
#[must_use]
pub fn tokens_unshuffle_backward_partials(stream: &Stream, shape: TokensShape) -> usize {
    // As many slabs as the narrowest tiles make, 32 columns each, is not more than this.
    most_slabs(stream, 1, shape).saturating_mul(shape.width)
}

/// Slabs of tokens, each with a partial sum, for `tiles` tiles of columns.
fn most_slabs(stream: &Stream, tiles: usize, shape: TokensShape) -> usize {
    let blocks = SUM_BLOCKS_PER_MULTIPROCESSOR * stream.limits().multiprocessors.max(1) as usize;
    let tokens = shape.batch.saturating_mul(shape.patches.saturating_add(1));
    blocks.div_ceil(tiles).min(tokens.div_ceil(WARPS as usize))
}

/// `dx` `[B, 1 + n, D]` (assigned) and `dmask_token` `[D]` (accumulated) from `dy` `[B, 1 + L, D]` and `ids_restore` `[B, L]`, in which
/// the ranks below `n` are all there. `partials`: [`tokens_unshuffle_backward_partials`] numbers or more, with any content
/// before and after. Two launches.
pub fn tokens_unshuffle_backward<T: CudaElement>(
    stream: &Stream,
    dx: &mut SliceMut<'_, T>,
    dmask_token: &mut SliceMut<'_, f32>,
    partials: &mut SliceMut<'_, f32>,
    dy: &Slice<'_, T>,
    ids_restore: &Slice<'_, u32>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_unshuffle_backward", shape)?;
    let Sizes { whole, short, .. } = launch.sizes;
    launch.selects_patches()?;
    launch.length("length of dx", dx.len(), &[shape.batch, short, shape.width])?;
    launch.length("length of dmask_token", dmask_token.len(), &[shape.width])?;
    launch.length("length of dy", dy.len(), &[shape.batch, whole, shape.width])?;
    launch.length("length of ids_restore", ids_restore.len(), &[shape.batch, shape.patches])?;
    let partial_count = tokens_unshuffle_backward_partials(stream, shape) as u64;
    within(launch.op, "length of partials", partials.len() as u64, partial_count..=u64::MAX)?;
    if shape.batch == 0 {
        return Ok(());
    }
    let aligned = dx.is_aligned_16() && dy.is_aligned_16();
    let (mut parameters, _) = launch.copies::<T>(aligned, shape.batch, whole)?;
    let accesses = launch.accesses::<T>(aligned);
    let tiles = accesses.div_ceil(32);
    let slabs = most_slabs(stream, tiles, shape);
    parameters.slabs = slabs as u32;
    // Here threads share tokens, not accesses.
    parameters.items = (shape.batch * whole) as u32;
    let blocks = product(launch.op, "number of blocks", &[tiles, slabs], MAX_32_BIT)? as u32;
    let shared_bytes = 4 * THREADS * (shape.width / accesses) as u32;
    let grid = Grid { blocks, threads: THREADS, shared_bytes };
    let arguments =
        [dx.argument(), partials.argument(), dy.argument(), ids_restore.argument(), Argument::value(&parameters)];
    // SAFETY: tokens_unshuffle_backward_*(T*, float*, const T*, const u32*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_unshuffle_backward") }, grid, &arguments)? };

    let grid = Grid { blocks: parameters.width.div_ceil(32), threads: THREADS, shared_bytes: 4 * THREADS };
    let (slabs, width) = (Argument::value(&parameters.slabs), Argument::value(&parameters.width));
    // SAFETY: tokens_unshuffle_backward_mask_token(float*, const float*, u32, u32); `slabs` rows of partials were written.
    unsafe { stream.launch(MASK_TOKEN, grid, &[dmask_token.argument(), partials.argument(), slabs, width]) }
}

/// `y[b, j] = x[b, 1 + ids[b, j]]`: `y` `[B, n, D]`, `x` `[B, 1 + L, D]`, `ids` `[B, n]`. An id that is no patch gives a row of NaN.
pub fn tokens_gather_forward<T: CudaElement>(
    stream: &Stream,
    y: &mut SliceMut<'_, T>,
    x: &Slice<'_, T>,
    ids: &Slice<'_, u32>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_gather_forward", shape)?;
    launch.length("length of y", y.len(), &[shape.batch, shape.selected, shape.width])?;
    launch.length("length of x", x.len(), &[shape.batch, launch.sizes.whole, shape.width])?;
    launch.length("length of ids", ids.len(), &[shape.batch, shape.selected])?;
    let aligned = y.is_aligned_16() && x.is_aligned_16();
    let (parameters, grid) = launch.copies::<T>(aligned, shape.batch, shape.selected)?;
    let arguments = [y.argument(), x.argument(), ids.argument(), Argument::value(&parameters)];
    // SAFETY: tokens_gather_forward_*(T*, const T*, const u32*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_gather_forward") }, grid, &arguments) }
}

/// `dx` `[B, 1 + L, D]` (assigned): `dy` `[B, n, D]` at the patches `ids` `[B, n]`, distinct in each sample, and zero elsewhere.
pub fn tokens_gather_backward<T: CudaElement>(
    stream: &Stream,
    dx: &mut SliceMut<'_, T>,
    dy: &Slice<'_, T>,
    ids: &Slice<'_, u32>,
    shape: TokensShape,
) -> Result<()> {
    let launch = Launch::new("tokens_gather_backward", shape)?;
    let whole = launch.sizes.whole;
    launch.length("length of dx", dx.len(), &[shape.batch, whole, shape.width])?;
    launch.length("length of dy", dy.len(), &[shape.batch, shape.selected, shape.width])?;
    launch.length("length of ids", ids.len(), &[shape.batch, shape.selected])?;
    let (mut parameters, _) = launch.copies::<T>(dx.is_aligned_16() && dy.is_aligned_16(), shape.batch, whole)?;
    let chunks = whole.div_ceil(CHUNK);
    parameters.tokens = Divider::new(chunks as u32);
    let blocks = (shape.batch * chunks) as u32;
    let grid = Grid { blocks, threads: THREADS, shared_bytes: 4 * CHUNK as u32 };
    let arguments = [dx.argument(), dy.argument(), ids.argument(), Argument::value(&parameters)];
    // SAFETY: tokens_gather_backward_*(T*, const T*, const u32*, TokensShape); checked above.
    unsafe { stream.launch(const { Kernel::of::<T>("tokens_gather_backward") }, grid, &arguments) }
}

/// `TokensShape` of kernels/tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct TokensParameters {
    batch: u32,
    patches: u32,
    selected: u32,
    width: u32,
    vectorized: u32,
    items: u32,
    accesses: Divider,
    tokens: Divider,
    slabs: u32,
    class_blocks: u32,
}

/// Sizes that follow from a shape.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Tokens of the whole sequence, 1 + L.
    whole: usize,
    /// Tokens of the selected patches and the class token, 1 + n.
    short: usize,
}

/// A launch being checked.
struct Launch {
    op: &'static str,
    shape: TokensShape,
    sizes: Sizes,
}

impl Launch {
    fn new(op: &'static str, shape: TokensShape) -> Result<Self> {
        within(op, "number of features", shape.width as u64, 1..=MAX_32_BIT)?;
        let sizes = Sizes { whole: shape.patches.saturating_add(1), short: shape.selected.saturating_add(1) };
        within(op, "number of tokens of a sample", sizes.whole.max(sizes.short) as u64, 1..=MAX_32_BIT)?;
        within(op, "batch", shape.batch as u64, 0..=MAX_32_BIT)?;
        product(op, "number of tokens", &[shape.batch, sizes.whole.max(sizes.short)], MAX_32_BIT)?;
        Ok(Self { op, shape, sizes })
    }

    fn length(&self, what: &'static str, found: usize, sizes: &[usize]) -> Result<()> {
        exactly(self.op, what, found as u64, product(self.op, what, sizes, u64::MAX)?)
    }

    fn selects_patches(&self) -> Result<()> {
        within(self.op, "selected patches", self.shape.selected as u64, 0..=self.shape.patches as u64)
    }

    /// 128-bit accesses to a token where they are possible, else accesses to single elements.
    fn accesses<T>(&self, aligned: bool) -> usize {
        let vector = 16 / size_of::<T>();
        if aligned && self.shape.width.is_multiple_of(vector) { self.shape.width / vector } else { self.shape.width }
    }

    /// One access per thread to each of `tokens` tokens of `samples` samples, or groups of samples.
    fn copies<T>(&self, aligned: bool, samples: usize, tokens: usize) -> Result<(TokensParameters, Grid)> {
        let TokensShape { batch, patches, selected, width } = self.shape;
        let accesses = self.accesses::<T>(aligned);
        let most = [batch, self.sizes.whole.max(self.sizes.short), accesses];
        product(self.op, "number of accesses", &most, MAX_32_BIT)?;
        let items = (samples * tokens * accesses) as u32;
        let parameters = TokensParameters {
            batch: batch as u32,
            patches: patches as u32,
            selected: selected as u32,
            width: width as u32,
            vectorized: (accesses < width).into(),
            items,
            accesses: Divider::new(accesses as u32),
            tokens: Divider::new(tokens as u32),
            slabs: 0,
            class_blocks: 0,
        };
        Ok((parameters, Grid { blocks: items.div_ceil(THREADS), threads: THREADS, shared_bytes: 0 }))
    }
}

impl<E: CudaElement> Tokens for Cuda<E> {
    fn tokens_assemble_forward(
        &self,
        shape: TokensShape,
        x: &mut CudaBuffer<E>,
        patches: &CudaBuffer<E>,
        class_token: &CudaBuffer<f32>,
        positions: &CudaBuffer<f32>,
        ids_keep: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "tokens_assemble_forward";
        let (TokensShape { batch, selected, width, .. }, Sizes { whole, short }) = sizes(op, shape)?;
        let mut x = x.output(op, "x", &[batch, short, width])?;
        let patches = patches.input(op, "patches", &[batch, selected, width])?;
        let class_token = class_token.input(op, "class_token", &[width])?;
        let positions = positions.input(op, "positions", &[whole, width])?;
        let ids_keep = ids_keep.input(op, "ids_keep", &[batch, selected])?;
        let stream = self.stream();
        Ok(tokens_assemble_forward(stream, &mut x, &patches, &class_token, &positions, &ids_keep, shape)?)
    }

    fn tokens_assemble_backward(
        &self,
        shape: TokensShape,
        dpatches: &mut CudaBuffer<E>,
        dclass_token: &mut CudaBuffer<f32>,
        dx: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "tokens_assemble_backward";
        let (TokensShape { batch, selected, width, .. }, Sizes { short, .. }) = sizes(op, shape)?;
        let mut dpatches = dpatches.output(op, "dpatches", &[batch, selected, width])?;
        let mut dclass_token = dclass_token.output(op, "dclass_token", &[width])?;
        let dx = dx.input(op, "dx", &[batch, short, width])?;
        Ok(tokens_assemble_backward(self.stream(), &mut dpatches, &mut dclass_token, &dx, shape)?)
    }

    fn tokens_unshuffle_forward(
        &self,
        shape: TokensShape,
        y: &mut CudaBuffer<E>,
        x: &CudaBuffer<E>,
        mask_token: &CudaBuffer<f32>,
        positions: &CudaBuffer<f32>,
        ids_restore: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "tokens_unshuffle_forward";
        let (TokensShape { batch, patches, width, .. }, Sizes { whole, short }) = sizes(op, shape)?;
        let mut y = y.output(op, "y", &[batch, whole, width])?;
        let x = x.input(op, "x", &[batch, short, width])?;
        let mask_token = mask_token.input(op, "mask_token", &[width])?;
        let positions = positions.input(op, "positions", &[whole, width])?;
        let ids_restore = ids_restore.input(op, "ids_restore", &[batch, patches])?;
        Ok(tokens_unshuffle_forward(self.stream(), &mut y, &x, &mask_token, &positions, &ids_restore, shape)?)
    }

    fn tokens_unshuffle_backward(
        &self,
        shape: TokensShape,
        dx: &mut CudaBuffer<E>,
        dmask_token: &mut CudaBuffer<f32>,
        dy: &CudaBuffer<E>,
        ids_restore: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "tokens_unshuffle_backward";
        let (TokensShape { batch, patches, width, .. }, Sizes { whole, short }) = sizes(op, shape)?;
        let mut dx = dx.output(op, "dx", &[batch, short, width])?;
        let mut dmask_token = dmask_token.output(op, "dmask_token", &[width])?;
        let dy = dy.input(op, "dy", &[batch, whole, width])?;
        let ids_restore = ids_restore.input(op, "ids_restore", &[batch, patches])?;
        let stream = self.stream();
        self.with_scratch(tokens_unshuffle_backward_partials(stream, shape), |partials| {
            Ok(tokens_unshuffle_backward(stream, &mut dx, &mut dmask_token, partials, &dy, &ids_restore, shape)?)
        })
    }

    fn tokens_gather_forward(
        &self,
        shape: TokensShape,
        y: &mut CudaBuffer<E>,
        x: &CudaBuffer<E>,
        ids: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "tokens_gather_forward";
        let (TokensShape { batch, selected, width, .. }, Sizes { whole, .. }) = sizes(op, shape)?;
        let mut y = y.output(op, "y", &[batch, selected, width])?;
        let x = x.input(op, "x", &[batch, whole, width])?;
        let ids = ids.input(op, "ids", &[batch, selected])?;
        Ok(tokens_gather_forward(self.stream(), &mut y, &x, &ids, shape)?)
    }

    fn tokens_gather_backward(
        &self,
        shape: TokensShape,
        dx: &mut CudaBuffer<E>,
        dy: &CudaBuffer<E>,
        ids: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "tokens_gather_backward";
        let (TokensShape { batch, selected, width, .. }, Sizes { whole, .. }) = sizes(op, shape)?;
        let mut dx = dx.output(op, "dx", &[batch, whole, width])?;
        let dy = dy.input(op, "dy", &[batch, selected, width])?;
        let ids = ids.input(op, "ids", &[batch, selected])?;
        Ok(tokens_gather_backward(self.stream(), &mut dx, &dy, &ids, shape)?)
    }
}

/// A shape with its sizes, once they are known to be in the limits.
fn sizes(op: &'static str, shape: TokensShape) -> Result<(TokensShape, Sizes)> {
    Launch::new(op, shape).map(|launch| (launch.shape, launch.sizes))
}
