//! Launchers of `kernels/layernorm.cu`: LayerNorm over the features of each token, and its gradients.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::gemm::GemmType;
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::{LayerNorm, LayerNormShape, Write};

const PARAMETERS: Kernel = Kernel::named("layernorm_backward_parameters");

/// Warps per block of all kernels but the one that adds up partial sums.
const WARPS: u32 = 4;

/// Columns that a unit of a warp's registers holds.
const UNIT: usize = 256;

/// Most units: D = 1280.
const MAX_UNITS: usize = 5;

/// Rows that a warp takes at once, by path.
const ROWS_PER_WARP: [u32; MAX_UNITS + 1] = [1, 4, 2, 1, 1, 1];

/// Most blocks of a backward per multiprocessor, on any path. More would add partial sums and no loads in flight that memory
/// has use for.
const MAX_BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// The backward kernels of an element type by path: for any width, then by units.
const fn backward_kernels<T: CudaElement>() -> [Kernel; MAX_UNITS + 1] {
    const {
        [
            Kernel::of::<T>("layernorm_backward_dx_any"),
            Kernel::of::<T>("layernorm_backward_dx_256"),
            Kernel::of::<T>("layernorm_backward_dx_512"),
            Kernel::of::<T>("layernorm_backward_dx_768"),
            Kernel::of::<T>("layernorm_backward_dx_1024"),
            Kernel::of::<T>("layernorm_backward_dx_1280"),
        ]
    }
}

/// Blocks that a multiprocessor holds of each, by their registers on sm_90a, at most [`MAX_BLOCKS_PER_MULTIPROCESSOR`]. A constant
/// and not the driver's answer, so that the order of the sums, and with it every bit, depends on the number of multiprocessors
/// alone. tests/kernels/layernorm.rs holds it against kernels/REPORT.md, on other architectures to one block more or less, which
/// costs time only.
const fn blocks_at_once<T: CudaElement>() -> [u32; MAX_UNITS + 1] {
    match T::TYPE {
        GemmType::F32 => [4, 3, 3, 3, 2, 2],
        GemmType::Bf16 => [4, 4, 4, 4, 3, 2],
    }
}

/// What a forward writes.
#[derive(Debug)]
pub struct LayerNormOutput<'a, T> {
    /// `[rows, D]`.
    pub y: SliceMut<'a, T>,
    /// `[rows]`, for backward.
    pub mean: SliceMut<'a, f32>,
    /// `[rows]`: reciprocal of the standard deviation, for backward.
    pub rstd: SliceMut<'a, f32>,
}

/// What a backward writes.
#[derive(Debug)]
pub struct LayerNormGradients<'a, T> {
    /// `[rows, D]`: assigned or accumulated.
    pub dx: SliceMut<'a, T>,
    /// `[D]`, accumulated.
    pub dgamma: SliceMut<'a, f32>,
    /// `[D]`, accumulated.
    pub dbeta: SliceMut<'a, f32>,
    /// [`layernorm_backward_partials`] numbers or more, with any content before and after.
    pub partials: SliceMut<'a, f32>,
}

/// What a backward reads.
#[derive(Debug)]
pub struct LayerNormSaved<'a, T> {
    /// `[rows, D]`: gradient of the output.
    pub dy: Slice<'a, T>,
    /// `[rows, D]`: forward's input.
    pub x: Slice<'a, T>,
    /// `[rows]`, from forward.
    pub mean: Slice<'a, f32>,
    /// `[rows]`, from forward.
    pub rstd: Slice<'a, f32>,
    /// `[D]`.
    pub gamma: Slice<'a, f32>,
}

/// `y = (x - mean) * rstd * gamma + beta` for `x` `[rows, D]`, `gamma` and `beta` `[D]`.
///
/// Widths up to 1280 that are whole 16-byte vectors are read once, others several times, from the caches. Buffers that are not
/// 16-byte aligned are slower.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch.
pub fn layernorm_forward<T: CudaElement>(
    stream: &Stream,
    output: &mut LayerNormOutput<'_, T>,
    x: &Slice<'_, T>,
    gamma: &Slice<'_, f32>,
    beta: &Slice<'_, f32>,
    shape: LayerNormShape,
) -> Result<()> {
    const OP: &str = "layernorm_forward";
    let LayerNormOutput { y, mean, rstd } = output;
    check(
        OP,
        shape,
        [("length of y", y.len()), ("length of x", x.len())],
        [mean.len(), rstd.len()],
        [("length of gamma", gamma.len()), ("length of beta", beta.len())],
    )?;
    let aligned = y.is_aligned_16() && x.is_aligned_16() && gamma.is_aligned_16() && beta.is_aligned_16();
    let parameters = LayerNormParameters::new::<T>(shape, aligned);
    let rows_per_block = WARPS * ROWS_PER_WARP[parameters.units()];
    let grid = Grid { blocks: parameters.rows.div_ceil(rows_per_block), threads: 32 * WARPS, shared_bytes: 0 };
    let arguments = [
        y.argument(),
        mean.argument(),
        rstd.argument(),
        x.argument(),
        gamma.argument(),
        beta.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: layernorm_forward_*(T*, float*, float*, const T*, const float*, const float*, LayerNormShape); lengths and what
    // the path needs were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("layernorm_forward") }, grid, &arguments) }
}

/// How many numbers [`layernorm_backward`] needs for partial sums on a stream's device.
#[must_use]
pub fn layernorm_backward_partials(stream: &Stream, shape: LayerNormShape) -> usize {
    let blocks = shape.rows.div_ceil(WARPS as usize).min(most_blocks(stream));
    blocks.saturating_mul(2).saturating_mul(shape.width)
}

fn most_blocks(stream: &Stream) -> usize {
    MAX_BLOCKS_PER_MULTIPROCESSOR * stream.limits().multiprocessors.max(1) as usize
}

/// The gradients of a LayerNorm: `dx` as `write` says (accumulating onto the gradient of the residual that passes the norm by),
/// `dgamma` and `dbeta` accumulated. Two launches.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch.
pub fn layernorm_backward<T: CudaElement>(
    stream: &Stream,
    gradients: &mut LayerNormGradients<'_, T>,
    saved: &LayerNormSaved<'_, T>,
    write: Write,
    shape: LayerNormShape,
) -> Result<()> {
    const OP: &str = "layernorm_backward";
    let LayerNormGradients { dx, dgamma, dbeta, partials } = gradients;
    let LayerNormSaved { dy, x, mean, rstd, gamma } = saved;
    let vectors =
        [("length of dgamma", dgamma.len()), ("length of dbeta", dbeta.len()), ("length of gamma", gamma.len())];
    check(
        OP,
        shape,
        [("length of dx", dx.len()), ("length of dy", dy.len()), ("length of x", x.len())],
        [mean.len(), rstd.len()],
        vectors,
    )?;
    let partial_count = layernorm_backward_partials(stream, shape) as u64;
    within(OP, "length of partials", partials.len() as u64, partial_count..=u64::MAX)?;
    if shape.rows == 0 {
        return Ok(());
    }
    let aligned = dx.is_aligned_16() && dy.is_aligned_16() && x.is_aligned_16() && gamma.is_aligned_16();
    let mut parameters = LayerNormParameters::new::<T>(shape, aligned && partials.is_aligned_16());
    let units = parameters.units();
    let resident = blocks_at_once::<T>()[units] * stream.limits().multiprocessors.max(1);
    parameters.blocks = parameters.rows.div_ceil(WARPS * ROWS_PER_WARP[units]).min(resident);
    parameters.accumulate = (write == Write::Accumulate).into();
    let grid = Grid { blocks: parameters.blocks, threads: 32 * WARPS, shared_bytes: 2048 * units as u32 };
    let arguments = [
        dx.argument(),
        partials.argument(),
        dy.argument(),
        x.argument(),
        mean.argument(),
        rstd.argument(),
        gamma.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: layernorm_backward_dx_*(T*, float*, const T*, const T*, const float*, const float*, const float*,
    // LayerNormShape); lengths and what the path needs were checked.
    unsafe { stream.launch(backward_kernels::<T>()[units], grid, &arguments)? };

    let grid = Grid { blocks: (2 * parameters.width).div_ceil(32), threads: 512, shared_bytes: 2048 };
    let arguments = [
        dgamma.argument(),
        dbeta.argument(),
        partials.argument(),
        Argument::value(&parameters.blocks),
        Argument::value(&parameters.width),
    ];
    // SAFETY: layernorm_backward_parameters(float*, float*, const float*, u32, u32); `blocks` rows of partials were written.
    unsafe { stream.launch(PARAMETERS, grid, &arguments) }
}

/// `LayerNormShape` of kernels/layernorm.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LayerNormParameters {
    rows: u32,
    width: u32,
    inverse_width: f32,
    epsilon: f32,
    path: u32,
    blocks: u32,
    accumulate: u32,
}

impl LayerNormParameters {
    /// For a checked shape. `aligned`: 128-bit accesses may start at every row of a width that is a multiple of the vector.
    fn new<T>(shape: LayerNormShape, aligned: bool) -> Self {
        let LayerNormShape { rows, width, epsilon } = shape;
        let path = if aligned && width.is_multiple_of(16 / size_of::<T>()) { width.div_ceil(UNIT) } else { 0 };
        Self {
            rows: rows as u32,
            width: width as u32,
            inverse_width: (1.0 / width as f64) as f32,
            epsilon: epsilon as f32,
            path: path as u32,
            blocks: 0,
            accumulate: 0,
        }
    }

    /// Units of registers; none where a row is read again for each pass.
    fn units(&self) -> usize {
        if self.path as usize > MAX_UNITS { 0 } else { self.path as usize }
    }
}

/// Checks limits and lengths: of matrices, of mean and rstd, and of vectors.
fn check<const M: usize, const V: usize>(
    op: &'static str,
    shape: LayerNormShape,
    matrices: [(&'static str, usize); M],
    statistics: [usize; 2],
    vectors: [(&'static str, usize); V],
) -> Result<()> {
    let LayerNormShape { rows, width, .. } = shape;
    within(op, "number of features", width as u64, 1..=(1 << 30) - 1)?;
    within(op, "number of rows", rows as u64, 0..=MAX_32_BIT)?;
    let elements = product(op, "number of elements", &[rows, width], u64::MAX)?;
    for (what, length) in matrices {
        exactly(op, what, length as u64, elements)?;
    }
    for (what, length) in ["length of mean", "length of rstd"].into_iter().zip(statistics) {
        exactly(op, what, length as u64, rows as u64)?;
    }
    for (what, length) in vectors {
        exactly(op, what, length as u64, width as u64)?;
    }
    Ok(())
}

impl<E: CudaElement> LayerNorm for Cuda<E> {
    fn layernorm_forward(
        &self,
        shape: LayerNormShape,
        y: &mut CudaBuffer<E>,
        mean: &mut CudaBuffer<f32>,
        rstd: &mut CudaBuffer<f32>,
        x: &CudaBuffer<E>,
        gamma: &CudaBuffer<f32>,
        beta: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "layernorm_forward";
        let LayerNormShape { rows, width, .. } = shape;
        let mut output = LayerNormOutput {
            y: y.output(op, "y", &[rows, width])?,
            mean: mean.output(op, "mean", &[rows])?,
            rstd: rstd.output(op, "rstd", &[rows])?,
        };
        let x = x.input(op, "x", &[rows, width])?;
        let (gamma, beta) = (gamma.input(op, "gamma", &[width])?, beta.input(op, "beta", &[width])?);
        Ok(layernorm_forward(self.stream(), &mut output, &x, &gamma, &beta, shape)?)
    }

    fn layernorm_backward(
        &self,
        shape: LayerNormShape,
        write: Write,
        dx: &mut CudaBuffer<E>,
        dgamma: &mut CudaBuffer<f32>,
        dbeta: &mut CudaBuffer<f32>,
        dy: &CudaBuffer<E>,
        x: &CudaBuffer<E>,
        mean: &CudaBuffer<f32>,
        rstd: &CudaBuffer<f32>,
        gamma: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "layernorm_backward";
        let LayerNormShape { rows, width, .. } = shape;
        let saved = LayerNormSaved {
            dy: dy.input(op, "dy", &[rows, width])?,
            x: x.input(op, "x", &[rows, width])?,
            mean: mean.input(op, "mean", &[rows])?,
            rstd: rstd.input(op, "rstd", &[rows])?,
            gamma: gamma.input(op, "gamma", &[width])?,
        };
        let dx = dx.output(op, "dx", &[rows, width])?;
        let dgamma = dgamma.output(op, "dgamma", &[width])?;
        let dbeta = dbeta.output(op, "dbeta", &[width])?;
        self.with_scratch(layernorm_backward_partials(self.stream(), shape), |partials| {
            let partials = partials.range(0..partials.len())?;
            let mut gradients = LayerNormGradients { dx, dgamma, dbeta, partials };
            Ok(layernorm_backward(self.stream(), &mut gradients, &saved, write, shape)?)
        })
    }
}
