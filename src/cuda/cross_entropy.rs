//! Launcher of `kernels/cross_entropy.cu`: softmax cross-entropy and its gradient.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use super::loss::sum_losses;
use crate::ops::CrossEntropy;

pub use crate::ops::CrossEntropyShape;

/// Rows of a block, one warp each.
const WARPS: u32 = 4;

/// What a cross-entropy writes.
#[derive(Debug)]
pub struct CrossEntropyOutput<'a, T> {
    /// `[1]`, added to.
    pub loss: SliceMut<'a, f32>,
    /// `[rows]`.
    pub row_loss: SliceMut<'a, f32>,
    /// `[rows, K]`.
    pub dlogits: SliceMut<'a, T>,
}

/// `CrossEntropyShape` of kernels/cross_entropy.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CrossEntropyParameters {
    rows: u32,
    classes: u32,
    vectorized: u32,
    hit: f32,
    smoothing: f32,
    spread: f32,
    scale: f32,
}

/// Loss and gradient of `logits` `[rows, K]` for `labels` `[rows]`, as [`CrossEntropy`] has them.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch. A label that is no class makes
/// its row and the loss NaN.
pub fn cross_entropy_forward_backward<T: CudaElement>(
    stream: &Stream,
    output: &mut CrossEntropyOutput<'_, T>,
    logits: &Slice<'_, T>,
    labels: &Slice<'_, u32>,
    shape: CrossEntropyShape,
) -> Result<()> {
    const OP: &str = "cross_entropy_forward_backward";
    let CrossEntropyShape { rows, classes, smoothing, scale } = shape;
    let CrossEntropyOutput { loss, row_loss, dlogits } = output;
    within(OP, "rows", rows as u64, 0..=MAX_32_BIT)?;
    within(OP, "classes", classes as u64, 1..=MAX_32_BIT)?;
    let numbers = product(OP, "length of logits", &[rows, classes], u64::MAX)?;
    exactly(OP, "length of logits", logits.len() as u64, numbers)?;
    exactly(OP, "length of dlogits", dlogits.len() as u64, numbers)?;
    exactly(OP, "length of row_loss", row_loss.len() as u64, rows as u64)?;
    exactly(OP, "length of labels", labels.len() as u64, rows as u64)?;
    exactly(OP, "length of loss", loss.len() as u64, 1)?;
    let whole = classes.is_multiple_of(16 / size_of::<T>());
    let parameters = CrossEntropyParameters {
        rows: rows as u32,
        classes: classes as u32,
        vectorized: (whole && logits.is_aligned_16() && dlogits.is_aligned_16()).into(),
        hit: (1.0 - smoothing) as f32,
        smoothing: smoothing as f32,
        spread: (smoothing / classes as f64) as f32,
        scale: scale as f32,
    };
    let arguments =
        [row_loss.argument(), dlogits.argument(), logits.argument(), labels.argument(), Argument::value(&parameters)];
    let grid = Grid { blocks: (rows as u32).div_ceil(WARPS), threads: 32 * WARPS, shared_bytes: 0 };
    // SAFETY: cross_entropy_forward_backward_*(float*, T*, const T*, const u32*, CrossEntropyShape); lengths and alignment were
    // checked.
    unsafe { stream.launch(const { Kernel::of::<T>("cross_entropy_forward_backward") }, grid, &arguments)? };
    sum_losses(stream, loss, &row_loss.as_slice(), scale)
}

impl<E: CudaElement> CrossEntropy for Cuda<E> {
    fn cross_entropy_forward_backward(
        &self,
        shape: CrossEntropyShape,
        loss: &mut CudaBuffer<f32>,
        row_loss: &mut CudaBuffer<f32>,
        dlogits: &mut CudaBuffer<E>,
        logits: &CudaBuffer<E>,
        labels: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "cross_entropy_forward_backward";
        let CrossEntropyShape { rows, classes, .. } = shape;
        let mut output = CrossEntropyOutput {
            loss: loss.output(op, "loss", &[1])?,
            row_loss: row_loss.output(op, "row_loss", &[rows])?,
            dlogits: dlogits.output(op, "dlogits", &[rows, classes])?,
        };
        let logits = logits.input(op, "logits", &[rows, classes])?;
        let labels = labels.input(op, "labels", &[rows])?;
        Ok(cross_entropy_forward_backward(self.stream(), &mut output, &logits, &labels, shape)?)
    }
}
