//! Launchers of `kernels/masking.cu`: which patches of each sample the encoder sees.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::{self, PatchMasking};

pub use crate::ops::MaskingShape;

const NOISE: Kernel = Kernel::named("masking_forward_noise_f32");
const RANDOM: Kernel = Kernel::named("masking_forward_random");

/// Most patches per sample: two words of shared memory each, in the 48 KiB that every GPU has.
pub const MAX_PATCHES: usize = 6144;

/// Most threads per block, as the kernels are compiled.
const MAX_THREADS: usize = 256;

/// What a masking writes; every element.
#[derive(Debug)]
pub struct MaskingOutput<'a> {
    /// `[B, keep]`: visible patches in the order of the shuffle.
    pub ids_keep: SliceMut<'a, u32>,
    /// `[B, L - keep]`: hidden patches in the order of the shuffle.
    pub ids_hidden: SliceMut<'a, u32>,
    /// `[B, L]`: place of each patch in the shuffle.
    pub ids_restore: SliceMut<'a, u32>,
    /// `[B, L]`: 0 for visible, 1 for hidden patches.
    pub mask: SliceMut<'a, f32>,
}

/// Where random noise comes from: the same numbers on every device, at every batch size.
#[derive(Debug)]
pub struct RandomMask<'a> {
    /// `[B]`: each sample's index in the whole data set. The low 56 bits count.
    pub samples: Slice<'a, u64>,
    /// The run's seed.
    pub seed: u64,
    /// The epoch.
    pub epoch: u32,
}

/// Masks by given noise `[B, L]`: the `keep` smallest of each sample are visible, ties by position.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch.
pub fn masking_forward_noise(
    stream: &Stream,
    output: &mut MaskingOutput<'_>,
    noise: &Slice<'_, f32>,
    shape: MaskingShape,
) -> Result<()> {
    const OP: &str = "masking_forward_noise";
    let (grid, patches, keep) = check(OP, output, shape)?;
    exactly(OP, "length of noise", noise.len() as u64, (shape.batch * shape.patches) as u64)?;
    let arguments = [
        output.ids_keep.argument(),
        output.ids_hidden.argument(),
        output.ids_restore.argument(),
        output.mask.argument(),
        noise.argument(),
        Argument::value(&patches),
        Argument::value(&keep),
    ];
    // SAFETY: masking_forward_noise_f32(u32*, u32*, u32*, float*, const float*, u32, u32); lengths were checked.
    unsafe { stream.launch(NOISE, grid, &arguments) }
}

/// Masks by random noise.
///
/// Errors: as [`masking_forward_noise`].
pub fn masking_forward_random(
    stream: &Stream,
    output: &mut MaskingOutput<'_>,
    random: &RandomMask<'_>,
    shape: MaskingShape,
) -> Result<()> {
    const OP: &str = "masking_forward_random";
    let (grid, patches, keep) = check(OP, output, shape)?;
    exactly(OP, "length of samples", random.samples.len() as u64, shape.batch as u64)?;
    let arguments = [
        output.ids_keep.argument(),
        output.ids_hidden.argument(),
        output.ids_restore.argument(),
        output.mask.argument(),
        random.samples.argument(),
        Argument::value(&random.seed),
        Argument::value(&random.epoch),
        Argument::value(&patches),
        Argument::value(&keep),
    ];
    // SAFETY: masking_forward_random(u32*, u32*, u32*, float*, const u64*, u64, u32, u32, u32); lengths were checked.
    unsafe { stream.launch(RANDOM, grid, &arguments) }
}

/// Checks limits and output lengths; returns the grid, L and keep.
fn check(op: &'static str, output: &MaskingOutput<'_>, shape: MaskingShape) -> Result<(Grid, u32, u32)> {
    let MaskingShape { batch, patches, keep } = shape;
    within(op, "number of patches", patches as u64, 1..=MAX_PATCHES as u64)?;
    within(op, "number of visible patches", keep as u64, 0..=patches as u64)?;
    within(op, "batch", batch as u64, 0..=MAX_32_BIT)?;
    let all = product(op, "batch times patches", &[batch, patches], u64::MAX)?;
    let visible = product(op, "batch times visible patches", &[batch, keep], u64::MAX)?;
    exactly(op, "length of ids_keep", output.ids_keep.len() as u64, visible)?;
    exactly(op, "length of ids_hidden", output.ids_hidden.len() as u64, all - visible)?;
    exactly(op, "length of ids_restore", output.ids_restore.len() as u64, all)?;
    exactly(op, "length of mask", output.mask.len() as u64, all)?;
    // As many threads as patches, or an even share of them each, in whole warps.
    let rounds = patches.div_ceil(MAX_THREADS);
    let threads = patches.div_ceil(rounds).next_multiple_of(32);
    let shared_bytes = 4 * (patches.next_multiple_of(4) + patches);
    let grid = Grid { blocks: batch as u32, threads: threads as u32, shared_bytes: shared_bytes as u32 };
    Ok((grid, patches as u32, keep as u32))
}

impl<E: CudaElement> PatchMasking for Cuda<E> {
    fn masking_from_noise(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CudaBuffer<u32>,
        ids_hidden: &mut CudaBuffer<u32>,
        ids_restore: &mut CudaBuffer<u32>,
        mask: &mut CudaBuffer<f32>,
        noise: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "masking_from_noise";
        let mut output = outputs(op, shape, ids_keep, ids_hidden, ids_restore, mask)?;
        let noise = noise.input(op, "noise", &[shape.batch, shape.patches])?;
        Ok(masking_forward_noise(self.stream(), &mut output, &noise, shape)?)
    }

    fn masking_random(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CudaBuffer<u32>,
        ids_hidden: &mut CudaBuffer<u32>,
        ids_restore: &mut CudaBuffer<u32>,
        mask: &mut CudaBuffer<f32>,
        random: ops::RandomMask,
        samples: &CudaBuffer<u64>,
    ) -> crate::Result<()> {
        let op = "masking_random";
        let mut output = outputs(op, shape, ids_keep, ids_hidden, ids_restore, mask)?;
        let samples = samples.input(op, "samples", &[shape.batch])?;
        let random = RandomMask { samples, seed: random.seed, epoch: random.epoch };
        Ok(masking_forward_random(self.stream(), &mut output, &random, shape)?)
    }
}

/// The model's buffers as a launcher takes them.
fn outputs<'a>(
    op: &'static str,
    shape: MaskingShape,
    ids_keep: &'a mut CudaBuffer<u32>,
    ids_hidden: &'a mut CudaBuffer<u32>,
    ids_restore: &'a mut CudaBuffer<u32>,
    mask: &'a mut CudaBuffer<f32>,
) -> crate::Result<MaskingOutput<'a>> {
    let MaskingShape { batch, patches, keep } = shape;
    // The launcher refuses more visible patches than there are.
    let hidden = patches.saturating_sub(keep);
    Ok(MaskingOutput {
        ids_keep: ids_keep.output(op, "ids_keep", &[batch, keep])?,
        ids_hidden: ids_hidden.output(op, "ids_hidden", &[batch, hidden])?,
        ids_restore: ids_restore.output(op, "ids_restore", &[batch, patches])?,
        mask: mask.output(op, "mask", &[batch, patches])?,
    })
}
