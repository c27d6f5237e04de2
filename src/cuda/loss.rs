//! Launchers of `kernels/loss.cu`: the masked reconstruction loss and its gradient.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Divider, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use super::patchify::BytePixels;
use crate::ops::{ImageShape, Loss, Pixels};

pub use crate::ops::LossShape;

const SUM: Kernel = Kernel::named("loss_sum");

/// Patches of a block, one warp each.
const WARPS: u32 = 4;

/// Threads of the one block that adds up the patches' losses; each has a sum in shared memory.
const SUM_GRID: Grid = Grid { blocks: 1, threads: 512, shared_bytes: 8 * 512 };

/// Most channels of byte images: each has two constants in shared memory.
const MAX_CHANNELS: u64 = 2048;

/// What a loss writes.
#[derive(Debug)]
pub struct LossOutput<'a, T> {
    /// `[1]`, added to.
    pub loss: SliceMut<'a, f32>,
    /// `[B · n]`: mean squared error of each patch; 0 where it is visible.
    pub patch_loss: SliceMut<'a, f32>,
    /// `[B · n, ph · pw · C]`: the gradient; 0 where the patch is visible.
    pub dprediction: SliceMut<'a, T>,
}

/// What a loss reads besides the pixels.
#[derive(Debug)]
pub struct LossInput<'a, T> {
    /// `[B · n, ph · pw · C]`, in the order (p, q, c).
    pub prediction: Slice<'a, T>,
    /// `[B, n]`: the predicted patches.
    pub ids: Slice<'a, u32>,
    /// `[B, L]`: 0 for visible patches.
    pub mask: Slice<'a, f32>,
}

/// Compares predicted patches with those of byte images `[B, H, W, C]`: loss and gradient.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch. An id that is no patch makes
/// its row and the loss NaN.
pub fn loss_forward_backward_bytes<T: CudaElement>(
    stream: &Stream,
    output: &mut LossOutput<'_, T>,
    input: &LossInput<'_, T>,
    pixels: &BytePixels<'_>,
    shape: LossShape,
) -> Result<()> {
    const OP: &str = "loss_forward_backward_bytes";
    let BytePixels { pixels, mean, std } = pixels;
    let channels = shape.image.channels as u64;
    within(OP, "channels", channels, 1..=MAX_CHANNELS)?;
    exactly(OP, "length of mean", mean.len() as u64, channels)?;
    exactly(OP, "length of std", std.len() as u64, channels)?;
    let mut parameters = check(OP, output, input, pixels.len(), shape)?;
    let vector = parameters.vector as usize;
    let line = shape.image.patch_width * shape.image.channels;
    let row = shape.image.width * shape.image.channels;
    let wide = line.is_multiple_of(vector) && row.is_multiple_of(vector) && pixels.is_aligned(vector);
    parameters.wide = wide.into();
    let arguments = [
        output.patch_loss.argument(),
        output.dprediction.argument(),
        input.prediction.argument(),
        pixels.argument(),
        mean.argument(),
        std.argument(),
        input.ids.argument(),
        input.mask.argument(),
        Argument::value(&parameters),
    ];
    let grid = Grid { shared_bytes: 8 * channels as u32, ..grid(&parameters) };
    // SAFETY: loss_forward_backward_u8_*(float*, T*, const T*, const u8*, const float*, const float*, const u32*, const float*,
    // LossShape); lengths, alignment and limits were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("loss_forward_backward_u8") }, grid, &arguments)? };
    add_up(stream, output, shape)
}

/// Compares predicted patches with those of normalised images `[B, C, H, W]`: loss and gradient.
///
/// Errors: as [`loss_forward_backward_bytes`].
pub fn loss_forward_backward_f32<T: CudaElement>(
    stream: &Stream,
    output: &mut LossOutput<'_, T>,
    input: &LossInput<'_, T>,
    pixels: &Slice<'_, f32>,
    shape: LossShape,
) -> Result<()> {
    const OP: &str = "loss_forward_backward_f32";
    let parameters = check(OP, output, input, pixels.len(), shape)?;
    let arguments = [
        output.patch_loss.argument(),
        output.dprediction.argument(),
        input.prediction.argument(),
        pixels.argument(),
        input.ids.argument(),
        input.mask.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: loss_forward_backward_f32_*(float*, T*, const T*, const float*, const u32*, const float*, LossShape); lengths,
    // alignment and limits were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("loss_forward_backward_f32") }, grid(&parameters), &arguments)? };
    add_up(stream, output, shape)
}

/// Adds the patches' losses to the loss.
fn add_up<T: CudaElement>(stream: &Stream, output: &mut LossOutput<'_, T>, shape: LossShape) -> Result<()> {
    sum_losses(stream, &mut output.loss, &output.patch_loss.as_slice(), shape.scale)
}

/// Adds `scale` times the sum of `losses` to `loss` `[1]`, in a fixed order.
pub(super) fn sum_losses(
    stream: &Stream,
    loss: &mut SliceMut<'_, f32>,
    losses: &Slice<'_, f32>,
    scale: f64,
) -> Result<()> {
    const OP: &str = "loss_sum";
    exactly(OP, "length of loss", loss.len() as u64, 1)?;
    within(OP, "number of losses", losses.len() as u64, 0..=MAX_32_BIT)?;
    if losses.is_empty() {
        return Ok(());
    }
    let (rows, scale) = (losses.len() as u32, scale as f32);
    let arguments = [loss.argument(), losses.argument(), Argument::value(&rows), Argument::value(&scale)];
    // SAFETY: loss_sum(float*, const float*, u32, float); lengths were checked.
    unsafe { stream.launch(SUM, SUM_GRID, &arguments) }
}

/// `LossShape` of kernels/loss.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LossParameters {
    rows: u32,
    patches: u32,
    channels: u32,
    height: u32,
    width: u32,
    patch_height: u32,
    patch_width: u32,
    length: u32,
    vector: u32,
    wide: u32,
    normalise: u32,
    factor: f32,
    predicted: Divider,
    grid_width: Divider,
    line: Divider,
    channel: Divider,
}

fn grid(parameters: &LossParameters) -> Grid {
    Grid { blocks: parameters.rows.div_ceil(WARPS), threads: 32 * WARPS, shared_bytes: 0 }
}

/// Checks limits and lengths, and chooses the vectors.
fn check<T: CudaElement>(
    op: &'static str,
    output: &LossOutput<'_, T>,
    input: &LossInput<'_, T>,
    pixels: usize,
    shape: LossShape,
) -> Result<LossParameters> {
    let LossShape { image, batch, predicted, norm_pix_loss, scale } = shape;
    let ImageShape { channels, height, width, patch_height, patch_width } = image;
    let sizes = [("channels", channels), ("patch height", patch_height), ("patch width", patch_width)];
    for (what, size) in sizes {
        within(op, what, size as u64, 1..=MAX_32_BIT)?;
    }
    within(op, "image height", height as u64, patch_height as u64..=MAX_32_BIT)?;
    within(op, "image width", width as u64, patch_width as u64..=MAX_32_BIT)?;
    exactly(op, "image height modulo patch height", (height % patch_height) as u64, 0)?;
    exactly(op, "image width modulo patch width", (width % patch_width) as u64, 0)?;
    let numbers = product(op, "pixels of an image", &[channels, height, width], MAX_32_BIT)? as usize;
    let rows = product(op, "number of rows", &[batch, predicted], MAX_32_BIT)?;
    let (patches, length) = (image.patches(), image.patch_length());
    exactly(op, "length of pixels", pixels as u64, product(op, "pixels", &[batch, numbers], u64::MAX)?)?;
    exactly(op, "length of ids", input.ids.len() as u64, rows)?;
    exactly(op, "length of mask", input.mask.len() as u64, product(op, "mask", &[batch, patches], u64::MAX)?)?;
    exactly(op, "length of loss", output.loss.len() as u64, 1)?;
    exactly(op, "length of patch_loss", output.patch_loss.len() as u64, rows)?;
    let elements = product(op, "length of prediction", &[rows as usize, length], u64::MAX)?;
    exactly(op, "length of prediction", input.prediction.len() as u64, elements)?;
    exactly(op, "length of dprediction", output.dprediction.len() as u64, elements)?;
    let fits = |vector: &usize| {
        let bytes = (vector * size_of::<T>()).min(16);
        length.is_multiple_of(*vector) && input.prediction.is_aligned(bytes) && output.dprediction.is_aligned(bytes)
    };
    let vector = [8, 4].into_iter().find(fits).unwrap_or(1);
    let divider = |divisor: usize| Divider::new(divisor as u32);
    Ok(LossParameters {
        rows: rows as u32,
        patches: patches as u32,
        channels: channels as u32,
        height: height as u32,
        width: width as u32,
        patch_height: patch_height as u32,
        patch_width: patch_width as u32,
        length: length as u32,
        vector: vector as u32,
        wide: 0,
        normalise: norm_pix_loss.into(),
        factor: (2.0 * scale / length as f64) as f32,
        predicted: divider(predicted),
        grid_width: divider(width / patch_width),
        line: divider(patch_width * channels),
        channel: divider(channels),
    })
}

impl<E: CudaElement> Loss for Cuda<E> {
    fn loss_forward_backward(
        &self,
        shape: LossShape,
        loss: &mut CudaBuffer<f32>,
        patch_loss: &mut CudaBuffer<f32>,
        dprediction: &mut CudaBuffer<E>,
        prediction: &CudaBuffer<E>,
        pixels: Pixels<'_, Self>,
        ids: &CudaBuffer<u32>,
        mask: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "loss_forward_backward";
        let LossShape { image, batch, predicted, .. } = shape;
        image.check()?;
        let (patches, length) = (image.patches(), image.patch_length());
        let mut output = LossOutput {
            loss: loss.output(op, "loss", &[1])?,
            patch_loss: patch_loss.output(op, "patch_loss", &[batch, predicted])?,
            dprediction: dprediction.output(op, "dprediction", &[batch, predicted, length])?,
        };
        let input = LossInput {
            prediction: prediction.input(op, "prediction", &[batch, predicted, length])?,
            ids: ids.input(op, "ids", &[batch, predicted])?,
            mask: mask.input(op, "mask", &[batch, patches])?,
        };
        let sizes = [batch, image.channels, image.height, image.width];
        match pixels {
            Pixels::Normalized(pixels) => {
                let pixels = pixels.input(op, "pixels", &sizes)?;
                loss_forward_backward_f32(self.stream(), &mut output, &input, &pixels, shape)?;
            }
            Pixels::Bytes { values, mean, std } => {
                let pixels = BytePixels {
                    pixels: values.input(op, "pixels", &sizes)?,
                    mean: mean.input(op, "mean", &[image.channels])?,
                    std: std.input(op, "std", &[image.channels])?,
                };
                loss_forward_backward_bytes(self.stream(), &mut output, &input, &pixels, shape)?;
            }
        }
        Ok(())
    }
}
