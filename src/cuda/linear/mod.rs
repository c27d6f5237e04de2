//! Linear layers: matrix products through [`Stream::gemm`], and launchers of `kernels/linear.cu` for what surrounds them.

mod ops;

use half::bf16;

use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::{CudaError, Result};
use super::gemm::{Addend, Epilogue, Gemm, GemmElement, GemmType, Layout};
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::{Activation, LinearShape, Write};

const FINISH: Kernel = Kernel::named("linear_bias_backward_finish_f32");
const ROUND: Kernel = Kernel::named("linear_bias_round_bf16");

/// Threads of a block, and vectors that each handles, in the elementwise kernels.
const THREADS: u32 = 256;
const PER_THREAD: usize = 2;
/// Parts of the rows that are summed by themselves for a bias's gradient, at most: enough blocks for a large GPU.
const PARTS: usize = 256;
/// Rows of such a part, at least: each of a block's warps has a few in flight.
const PART_ROWS: usize = 32;

/// `y = addend + x weightᵀ + bias`, with y and the addend `[rows, outputs]`, x `[rows, inputs]`, weight `[outputs, inputs]`,
/// bias `[outputs]`.
///
/// Errors: as [`Stream::gemm`].
pub fn linear_forward<T: CudaElement>(
    stream: &Stream,
    y: &mut SliceMut<'_, T>,
    addend: Addend<'_, T>,
    x: &Slice<'_, T>,
    weight: &Slice<'_, T>,
    bias: Option<&Slice<'_, T>>,
    shape: LinearShape,
) -> Result<()> {
    let epilogue = bias.map_or(Epilogue::Nothing, Epilogue::Bias);
    stream.gemm(forward_gemm(shape), y, x, weight, addend, epilogue)
}

/// `pre = x weightᵀ + bias` and `y = activation(pre)`.
///
/// Errors: as [`Stream::gemm`].
#[expect(clippy::too_many_arguments, reason = "two outputs and three inputs")]
pub fn linear_activation_forward<T: CudaElement>(
    stream: &Stream,
    y: &mut SliceMut<'_, T>,
    pre: &mut SliceMut<'_, T>,
    x: &Slice<'_, T>,
    weight: &Slice<'_, T>,
    bias: Option<&Slice<'_, T>>,
    shape: LinearShape,
    activation: Activation,
) -> Result<()> {
    let length = product("linear_activation_forward", "length of y", &[shape.rows, shape.outputs], u64::MAX)? as usize;
    if let Some(bias) = bias.filter(|_| has_epilogue::<T>(activation, shape.outputs, pre.is_aligned_16())) {
        let epilogue = Epilogue::BiasGeluTanh { bias, pre: pre.range(0..length)? };
        match stream.gemm(forward_gemm(shape), y, x, weight, Addend::Nothing, epilogue) {
            Err(CudaError::NoAlgorithm { .. }) => {}
            done => return done,
        }
    }
    linear_forward(stream, pre, Addend::Nothing, x, weight, bias, shape)?;
    activation_forward(stream, &mut y.range(0..length)?, &pre.as_slice().range(0..length)?, activation)
}

/// `dx (+)= dy weight`.
///
/// Errors: as [`Stream::gemm`].
pub fn linear_backward_input<T: CudaElement>(
    stream: &Stream,
    dx: &mut SliceMut<'_, T>,
    dy: &Slice<'_, T>,
    weight: &Slice<'_, T>,
    shape: LinearShape,
    write: Write,
) -> Result<()> {
    stream.gemm(input_gemm(shape), dx, dy, weight, addend_of(write), Epilogue::Nothing)
}

/// `dpre = (dy weight) * activation'(pre)`, with `pre` `[rows, inputs]`.
///
/// Errors: as [`Stream::gemm`].
pub fn linear_activation_backward_input<T: CudaElement>(
    stream: &Stream,
    dpre: &mut SliceMut<'_, T>,
    dy: &Slice<'_, T>,
    weight: &Slice<'_, T>,
    pre: &Slice<'_, T>,
    shape: LinearShape,
    activation: Activation,
) -> Result<()> {
    const OP: &str = "linear_activation_backward_input";
    let length = product(OP, "length of dpre", &[shape.rows, shape.inputs], u64::MAX)? as usize;
    linear_backward_input(stream, dpre, dy, weight, shape, Write::Assign)?;
    activation_backward(stream, &mut dpre.range(0..length)?, &pre.range(0..length)?, activation)
}

/// `dweight += dyᵀ x`, in f32 `[outputs, inputs]`.
///
/// Errors: as [`Stream::gemm`].
pub fn linear_backward_weight<T: CudaElement>(
    stream: &Stream,
    dweight: &mut SliceMut<'_, f32>,
    dy: &Slice<'_, T>,
    x: &Slice<'_, T>,
    shape: LinearShape,
) -> Result<()> {
    if shape.rows == 0 {
        return Ok(());
    }
    stream.gemm(weight_gemm(shape), dweight, dy, x, Addend::Output, Epilogue::Nothing)
}

/// `y = activation(pre)`, for as many elements as both have.
///
/// Errors: slices of different lengths or on another device, a failed launch.
pub fn activation_forward<T: CudaElement>(
    stream: &Stream,
    y: &mut SliceMut<'_, T>,
    pre: &Slice<'_, T>,
    activation: Activation,
) -> Result<()> {
    elementwise(
        "activation_forward",
        stream,
        const { Kernel::of::<T>("linear_activation_forward") },
        y,
        pre,
        activation,
    )
}

/// `dpre *= activation'(pre)`, in place: `dpre` holds the gradient of the activation's output before.
///
/// Errors: as [`activation_forward`].
pub fn activation_backward<T: CudaElement>(
    stream: &Stream,
    dpre: &mut SliceMut<'_, T>,
    pre: &Slice<'_, T>,
    activation: Activation,
) -> Result<()> {
    elementwise(
        "activation_backward",
        stream,
        const { Kernel::of::<T>("linear_activation_backward") },
        dpre,
        pre,
        activation,
    )
}

fn elementwise<T: CudaElement>(
    op: &'static str,
    stream: &Stream,
    kernel: Kernel,
    out: &mut SliceMut<'_, T>,
    pre: &Slice<'_, T>,
    activation: Activation,
) -> Result<()> {
    exactly(op, "length of the output", out.len() as u64, pre.len() as u64)?;
    let blocks = out.len().div_ceil(THREADS as usize * PER_THREAD * vector::<T>()) as u64;
    within(op, "blocks", blocks, 0..=MAX_32_BIT)?;
    let length = out.len() as u64;
    let function = number_of(activation);
    let vectorized = u32::from(out.is_aligned_16() && pre.is_aligned_16());
    let grid = Grid { blocks: blocks as u32, threads: THREADS, shared_bytes: 0 };
    let arguments = [
        out.argument(),
        pre.argument(),
        Argument::value(&length),
        Argument::value(&function),
        Argument::value(&vectorized),
    ];
    // SAFETY: linear_activation_*(T*, const T*, u64, u32, u32); both have `length` elements.
    unsafe { stream.launch(kernel, grid, &arguments) }
}

/// The number of an activation in kernels/linear.cu.
fn number_of(activation: Activation) -> u32 {
    match activation {
        Activation::Gelu => 0,
        Activation::GeluTanh => 1,
        Activation::Relu => 2,
        Activation::Silu => 3,
        Activation::QuickGelu => 4,
    }
}

/// Numbers of scratch memory that [`bias_backward`] needs.
#[must_use]
pub fn bias_backward_scratch(rows: usize, columns: usize) -> usize {
    parts(rows).0.saturating_mul(columns)
}

/// `dbias[j] += sum of dy[r, j] over r`, with dy `[rows, columns]`, in an order that depends on the shape alone.
///
/// Errors: a shape outside the limits, a slice of another length or device, too little scratch memory, a failed launch.
pub fn bias_backward<T: CudaElement>(
    stream: &Stream,
    dbias: &mut SliceMut<'_, f32>,
    scratch: &mut SliceMut<'_, f32>,
    dy: &Slice<'_, T>,
    rows: usize,
    columns: usize,
) -> Result<()> {
    const OP: &str = "bias_backward";
    let Some((sums, grid)) = row_sums(OP, dbias, scratch, dy, dy.is_aligned_16(), rows, columns)? else {
        return Ok(());
    };
    let arguments = [scratch.argument(), dy.argument(), Argument::value(&sums)];
    // SAFETY: linear_bias_backward_partial_*(float*, const T*, RowSums); lengths were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("linear_bias_backward_partial") }, grid, &arguments)? };
    finish(stream, dbias, scratch, parts(rows).0 as u32, sums.columns)
}

/// Backward's three needs of an activation in one pass: `dpre *= activation'(pre)`, in place, `y = activation(pre)`, and
/// `dbias[j] += sum of dpre[r, j] over r`. The scratch memory is that of [`bias_backward`].
///
/// Errors: as [`bias_backward`].
#[expect(clippy::too_many_arguments, reason = "three outputs")]
pub fn activation_backward_bias<T: CudaElement>(
    stream: &Stream,
    dpre: &mut SliceMut<'_, T>,
    y: &mut SliceMut<'_, T>,
    dbias: &mut SliceMut<'_, f32>,
    scratch: &mut SliceMut<'_, f32>,
    pre: &Slice<'_, T>,
    rows: usize,
    columns: usize,
    activation: Activation,
) -> Result<()> {
    const OP: &str = "activation_backward_bias";
    exactly(OP, "length of dpre", dpre.len() as u64, pre.len() as u64)?;
    exactly(OP, "length of y", y.len() as u64, pre.len() as u64)?;
    let aligned = dpre.is_aligned_16() && y.is_aligned_16() && pre.is_aligned_16();
    let Some((sums, grid)) = row_sums(OP, dbias, scratch, pre, aligned, rows, columns)? else { return Ok(()) };
    let function = number_of(activation);
    let arguments = [
        scratch.argument(),
        dpre.argument(),
        y.argument(),
        pre.argument(),
        Argument::value(&sums),
        Argument::value(&function),
    ];
    // SAFETY: linear_activation_backward_bias_*(float*, T*, T*, const T*, RowSums, u32); lengths were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("linear_activation_backward_bias") }, grid, &arguments)? };
    finish(stream, dbias, scratch, parts(rows).0 as u32, sums.columns)
}

/// `RowSums` of kernels/linear.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct RowSums {
    rows: u32,
    columns: u32,
    tiles: u32,
    part_rows: u32,
    vectorized: u32,
}

/// Checks limits and lengths of sums over the rows of `matrix`, and lays out the launch; nothing where there is nothing to do.
fn row_sums<T: CudaElement>(
    op: &'static str,
    dbias: &SliceMut<'_, f32>,
    scratch: &SliceMut<'_, f32>,
    matrix: &Slice<'_, T>,
    aligned: bool,
    rows: usize,
    columns: usize,
) -> Result<Option<(RowSums, Grid)>> {
    within(op, "rows", rows as u64, 0..=MAX_32_BIT)?;
    within(op, "columns", columns as u64, 0..=MAX_32_BIT)?;
    let elements = product(op, "length of the matrix", &[rows, columns], u64::MAX)?;
    exactly(op, "length of the matrix", matrix.len() as u64, elements)?;
    exactly(op, "length of dbias", dbias.len() as u64, columns as u64)?;
    if rows == 0 || columns == 0 {
        return Ok(None);
    }
    let needed = bias_backward_scratch(rows, columns);
    within(op, "length of the scratch memory", scratch.len() as u64, needed as u64..=u64::MAX)?;
    let (parts, part_rows) = parts(rows);
    let tiles = columns.div_ceil(32 * vector::<T>());
    let blocks = product(op, "blocks", &[parts, tiles], MAX_32_BIT)? as u32;
    let sums = RowSums {
        rows: rows as u32,
        columns: columns as u32,
        tiles: tiles as u32,
        part_rows: part_rows as u32,
        vectorized: (aligned && columns.is_multiple_of(vector::<T>())).into(),
    };
    Ok(Some((sums, Grid { blocks, threads: THREADS, shared_bytes: 1024 * vector::<T>() as u32 })))
}

/// `dbias[j] += sum of partial[c, j] over c`. The lengths were checked.
fn finish(
    stream: &Stream,
    dbias: &mut SliceMut<'_, f32>,
    partial: &SliceMut<'_, f32>,
    parts: u32,
    columns: u32,
) -> Result<()> {
    let grid = Grid { blocks: columns.div_ceil(32), threads: 512, shared_bytes: 2048 };
    let numbers = [parts, columns];
    let [parts, columns] = numbers.each_ref().map(Argument::value);
    // SAFETY: linear_bias_backward_finish_f32(float*, const float*, u32, u32); lengths were checked.
    unsafe { stream.launch(FINISH, grid, &[dbias.argument(), partial.argument(), parts, columns]) }
}

/// Rounds a bias to the type that the epilogue of a product in bf16 takes.
///
/// Errors: slices of different lengths or on another device, a failed launch.
pub fn bias_round(stream: &Stream, rounded: &mut SliceMut<'_, bf16>, bias: &Slice<'_, f32>) -> Result<()> {
    const OP: &str = "bias_round";
    within(OP, "length of the bias", bias.len() as u64, 0..=MAX_32_BIT)?;
    exactly(OP, "length of the rounded bias", rounded.len() as u64, bias.len() as u64)?;
    let columns = bias.len() as u32;
    let grid = Grid { blocks: columns.div_ceil(128), threads: 128, shared_bytes: 0 };
    let arguments = [rounded.argument(), bias.argument(), Argument::value(&columns)];
    // SAFETY: linear_bias_round_bf16(bf16*, const float*, u32); both have `columns` elements.
    unsafe { stream.launch(ROUND, grid, &arguments) }
}

/// Elements of 16 bytes.
fn vector<T>() -> usize {
    16 / size_of::<T>()
}

/// How the rows of a bias's gradient are cut: the number of parts, and the rows of all but the last.
fn parts(rows: usize) -> (usize, usize) {
    let part_rows = rows.div_ceil(PARTS).max(PART_ROWS);
    (rows.div_ceil(part_rows), part_rows)
}

fn forward_gemm(shape: LinearShape) -> Gemm {
    let LinearShape { rows, inputs, outputs } = shape;
    let (left, right) = (Layout::rows(inputs), Layout::transposed(inputs));
    Gemm { rows, columns: outputs, depth: inputs, left, right, output_stride: outputs }
}

fn input_gemm(shape: LinearShape) -> Gemm {
    let LinearShape { rows, inputs, outputs } = shape;
    let (left, right) = (Layout::rows(outputs), Layout::rows(inputs));
    Gemm { rows, columns: inputs, depth: outputs, left, right, output_stride: inputs }
}

fn weight_gemm(shape: LinearShape) -> Gemm {
    let LinearShape { rows, inputs, outputs } = shape;
    let (left, right) = (Layout::transposed(outputs), Layout::rows(inputs));
    Gemm { rows: outputs, columns: inputs, depth: rows, left, right, output_stride: inputs }
}

fn addend_of<'a, T>(write: Write) -> Addend<'a, T> {
    match write {
        Write::Assign => Addend::Nothing,
        Write::Accumulate => Addend::Output,
    }
}

/// Whether a product's epilogue can apply an activation: only GELU in its tanh form, where rows allow it. In f32 the own
/// kernel is exact and the product is what takes the time.
fn has_epilogue<T: GemmElement>(activation: Activation, width: usize, aligned: bool) -> bool {
    T::TYPE == GemmType::Bf16 && activation == Activation::GeluTanh && width.is_multiple_of(8) && aligned
}
