//! Launchers of `kernels/adamw.cu`: the norm of gradients, and AdamW over a flat arena.

use half::bf16;

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, within};
use crate::ops::AdamW;

pub use crate::ops::{AdamWSettings, AdamWState};

const NORM_PARTIAL: Kernel = Kernel::named("gradient_norm_partial");
const NORM_FINISH: Kernel = Kernel::named("gradient_norm_finish");
const PREPARE: Kernel = Kernel::named("adamw_prepare");
const UPDATE_F32: Kernel = Kernel::named("adamw_update_f32");
const UPDATE_BF16: Kernel = Kernel::named("adamw_update_bf16");
const ROUND: Kernel = Kernel::named("masters_to_bf16");
const AVERAGE: Kernel = Kernel::named("weights_average");

/// Threads of a block of all kernels but the one that prepares.
const THREADS: u32 = 256;

/// Parameters of a block of the update.
const TILE: u64 = 2048;

/// Gradients of a block of the norm, up to [`MAX_NORM_BLOCKS`] blocks; then a block takes more.
const NORM_TILE: usize = 8192;

/// Enough blocks to fill every GPU, and few enough partial sums for one block.
const MAX_NORM_BLOCKS: usize = 1024;

/// Numbers that [`adamw_step`] needs for what it hands from launch to launch.
pub const ADAMW_FACTORS: usize = 8;

/// Numbers of scratch memory that [`gradient_norm`] needs, for partial sums in f64.
#[must_use]
pub fn gradient_norm_partials(length: usize) -> usize {
    2 * norm_blocks(length)
}

/// Of the length alone, so that every GPU gives the same bits.
fn norm_blocks(length: usize) -> usize {
    length.div_ceil(NORM_TILE).clamp(1, MAX_NORM_BLOCKS)
}

/// Writes the Euclidean norm of `gradient` `[n]` to `norm` `[1]`, summed in f64 in an order that depends on n and on whether
/// `gradient` is 16-byte aligned; NaN or infinite where a gradient is, and infinite where the norm is beyond f32.
///
/// `partials`: [`gradient_norm_partials`] numbers, 16-byte aligned, with any content before and after.
///
/// Errors: a buffer of another length, alignment or device, a failed launch.
pub fn gradient_norm(
    stream: &Stream,
    norm: &mut SliceMut<'_, f32>,
    partials: &mut SliceMut<'_, f32>,
    gradient: &Slice<'_, f32>,
) -> Result<()> {
    const OP: &str = "gradient_norm";
    let length = gradient.len() as u64;
    let count = norm_blocks(gradient.len()) as u32;
    exactly(OP, "length of norm", norm.len() as u64, 1)?;
    exactly(OP, "length of partials", partials.len() as u64, 2 * u64::from(count))?;
    exactly(OP, "alignment of partials in bytes", if partials.is_aligned_16() { 16 } else { 4 }, 16)?;
    let vectorized = u32::from(gradient.is_aligned_16());
    let grid = Grid { blocks: count, threads: THREADS, shared_bytes: 8 * THREADS };
    let arguments = [
        partials.argument(),
        gradient.argument(),
        Argument::value(&length),
        Argument::value(&count),
        Argument::value(&vectorized),
    ];
    // SAFETY: gradient_norm_partial(double*, const float*, u64, u32, u32); lengths and alignment were checked.
    unsafe { stream.launch(NORM_PARTIAL, grid, &arguments)? };
    let arguments = [norm.argument(), partials.argument(), Argument::value(&count)];
    // SAFETY: gradient_norm_finish(float*, const double*, u32); as above.
    unsafe { stream.launch(NORM_FINISH, Grid { blocks: 1, ..grid }, &arguments) }
}

/// What an update changes. All arenas have the parameters in the same order.
#[derive(Debug)]
pub struct AdamWArenas<'a> {
    /// `[1]`.
    pub state: SliceMut<'a, AdamWState>,
    /// `[n]`.
    pub master: SliceMut<'a, f32>,
    /// `[decayed]`: receives the updated matrices, rounded; none where the model uses the masters themselves.
    pub working: Option<SliceMut<'a, bf16>>,
    /// `[n]`.
    pub first_moment: SliceMut<'a, f32>,
    /// `[n]`.
    pub second_moment: SliceMut<'a, f32>,
    /// [`ADAMW_FACTORS`] numbers, 16-byte aligned, with any content before and after.
    pub factors: SliceMut<'a, f32>,
}

/// What an update reads.
#[derive(Debug)]
pub struct AdamWInput<'a> {
    /// `[n]`.
    pub gradient: Slice<'a, f32>,
    /// `[1]`, from [`gradient_norm`].
    pub norm: Slice<'a, f32>,
    /// `[1]`: the step is skipped where it is not finite.
    pub loss: Option<Slice<'a, f32>>,
    /// `[1]`.
    pub learning_rate: Slice<'a, f64>,
}

/// One update, as [`AdamW::adamw_step`] has it: skipped and counted where norm or loss are not finite.
///
/// Errors: a buffer of another length, alignment or device, a failed launch.
pub fn adamw_step(
    stream: &Stream,
    arenas: &mut AdamWArenas<'_>,
    input: &AdamWInput<'_>,
    settings: AdamWSettings,
) -> Result<()> {
    const OP: &str = "adamw_step";
    let AdamWArenas { state, master, working, first_moment, second_moment, factors } = arenas;
    let AdamWInput { gradient, norm, loss, learning_rate } = input;
    let (length, decayed) = (settings.length as u64, settings.decayed as u64);
    within(OP, "number of decayed parameters", decayed, 0..=length)?;
    let lengths = [
        ("length of state", state.len(), 1),
        ("length of master", master.len(), length),
        ("length of first_moment", first_moment.len(), length),
        ("length of second_moment", second_moment.len(), length),
        ("length of gradient", gradient.len(), length),
        ("length of factors", factors.len(), ADAMW_FACTORS as u64),
        ("length of norm", norm.len(), 1),
        ("length of loss", loss.as_ref().map_or(1, Slice::len), 1),
        ("length of learning_rate", learning_rate.len(), 1),
        ("length of working", working.as_ref().map_or(settings.decayed, SliceMut::len), decayed),
    ];
    for (what, found, expected) in lengths {
        exactly(OP, what, found as u64, expected)?;
    }
    exactly(OP, "alignment of factors in bytes", if factors.is_aligned_16() { 16 } else { 4 }, 16)?;
    let parameters = AdamWParameters {
        beta1: settings.beta1,
        beta2: settings.beta2,
        epsilon: settings.epsilon,
        weight_decay: settings.weight_decay,
        clip_norm: settings.clip_norm.unwrap_or(f64::INFINITY),
    };
    let none = 0_u64;
    let arguments = [
        factors.argument(),
        state.argument(),
        norm.argument(),
        loss.as_ref().map_or_else(|| Argument::value(&none), Slice::argument),
        learning_rate.argument(),
        Argument::value(&parameters),
    ];
    let grid = Grid { blocks: 1, threads: 32, shared_bytes: 0 };
    // SAFETY: adamw_prepare(AdamWFactors*, AdamWState*, const float*, const float*, const double*, AdamWParameters); lengths
    // and alignment were checked; the loss may be null.
    unsafe { stream.launch(PREPARE, grid, &arguments)? };

    let working_aligned = working.as_ref().is_none_or(SliceMut::is_aligned_16);
    let vectorized = u32::from(
        working_aligned
            && gradient.is_aligned_16()
            && [&*master, first_moment, second_moment].into_iter().all(SliceMut::is_aligned_16),
    );
    let grid = tiles(OP, length)?;
    let (master, first, second) = (master.argument(), first_moment.argument(), second_moment.argument());
    let rest = [
        first,
        second,
        gradient.argument(),
        factors.argument(),
        Argument::value(&length),
        Argument::value(&decayed),
        Argument::value(&vectorized),
    ];
    let [first, second, gradient, factors, length, decayed, vectorized] = rest;
    match working {
        None => {
            let arguments = [master, first, second, gradient, factors, length, decayed, vectorized];
            // SAFETY: adamw_update_f32(float*, float*, float*, const float*, const AdamWFactors*, u64, u64, u32); as above.
            unsafe { stream.launch(UPDATE_F32, grid, &arguments) }
        }
        Some(working) => {
            let working = working.argument();
            let arguments = [master, working, first, second, gradient, factors, length, decayed, vectorized];
            // SAFETY: adamw_update_bf16(float*, bf16*, float*, float*, const float*, const AdamWFactors*, u64, u64, u32); as
            // above.
            unsafe { stream.launch(UPDATE_BF16, grid, &arguments) }
        }
    }
}

/// Rounds `master` `[n]` into `working` `[n]`.
///
/// Errors: a buffer of another length or device, a failed launch.
pub fn masters_to_bf16(stream: &Stream, working: &mut SliceMut<'_, bf16>, master: &Slice<'_, f32>) -> Result<()> {
    const OP: &str = "masters_to_bf16";
    let length = working.len() as u64;
    exactly(OP, "length of master", master.len() as u64, length)?;
    let vectorized = u32::from(working.is_aligned_16() && master.is_aligned_16());
    let grid = tiles(OP, length)?;
    let arguments = [working.argument(), master.argument(), Argument::value(&length), Argument::value(&vectorized)];
    // SAFETY: masters_to_bf16(bf16*, const float*, u64, u32); lengths were checked.
    unsafe { stream.launch(ROUND, grid, &arguments) }
}

/// Moves `average` `[n]` towards `master` `[n]` by `1 - decay` of what lies between them.
///
/// Errors: a buffer of another length or device, a failed launch.
pub fn weights_average(
    stream: &Stream,
    average: &mut SliceMut<'_, f32>,
    master: &Slice<'_, f32>,
    decay: f64,
) -> Result<()> {
    const OP: &str = "weights_average";
    let length = average.len() as u64;
    exactly(OP, "length of master", master.len() as u64, length)?;
    let share = (1.0 - decay) as f32;
    let vectorized = u32::from(average.is_aligned_16() && master.is_aligned_16());
    let grid = tiles(OP, length)?;
    let arguments = [
        average.argument(),
        master.argument(),
        Argument::value(&share),
        Argument::value(&length),
        Argument::value(&vectorized),
    ];
    // SAFETY: weights_average(float*, const float*, float, u64, u32); lengths were checked.
    unsafe { stream.launch(AVERAGE, grid, &arguments) }
}

fn tiles(op: &'static str, length: u64) -> Result<Grid> {
    within(op, "number of parameters", length, 0..=MAX_32_BIT * TILE)?;
    Ok(Grid { blocks: length.div_ceil(TILE) as u32, threads: THREADS, shared_bytes: 0 })
}

/// `AdamWParameters` of kernels/adamw.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AdamWParameters {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    clip_norm: f64,
}

impl<E: CudaElement> AdamW for Cuda<E> {
    fn gradient_norm(
        &self,
        length: usize,
        norm: &mut CudaBuffer<f32>,
        gradient: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "gradient_norm";
        let mut norm = norm.output(op, "norm", &[1])?;
        let gradient = gradient.input(op, "gradient", &[length])?;
        self.with_scratch(gradient_norm_partials(length), |partials| {
            Ok(gradient_norm(self.stream(), &mut norm, partials, &gradient)?)
        })
    }

    fn adamw_step(
        &self,
        settings: AdamWSettings,
        state: &mut CudaBuffer<AdamWState>,
        master: &mut CudaBuffer<f32>,
        working: &mut CudaBuffer<E>,
        first_moment: &mut CudaBuffer<f32>,
        second_moment: &mut CudaBuffer<f32>,
        gradient: &CudaBuffer<f32>,
        norm: &CudaBuffer<f32>,
        loss: Option<&CudaBuffer<f32>>,
        learning_rate: &CudaBuffer<f64>,
    ) -> crate::Result<()> {
        let op = "adamw_step";
        let AdamWSettings { length, decayed, .. } = settings;
        let input = AdamWInput {
            gradient: gradient.input(op, "gradient", &[length])?,
            norm: norm.input(op, "norm", &[1])?,
            loss: loss.map(|loss| loss.input(op, "loss", &[1])).transpose()?,
            learning_rate: learning_rate.input(op, "learning_rate", &[1])?,
        };
        self.with_scratch(ADAMW_FACTORS, |factors| {
            let mut arenas = AdamWArenas {
                state: state.output(op, "state", &[1])?,
                master: master.output(op, "master", &[length])?,
                working: working.working_copy(op, decayed)?,
                first_moment: first_moment.output(op, "first_moment", &[length])?,
                second_moment: second_moment.output(op, "second_moment", &[length])?,
                factors: factors.range(0..ADAMW_FACTORS)?,
            };
            Ok(adamw_step(self.stream(), &mut arenas, &input, settings)?)
        })
    }

    fn weights_average(
        &self,
        length: usize,
        decay: f64,
        average: &mut CudaBuffer<f32>,
        master: &CudaBuffer<f32>,
    ) -> crate::Result<()> {
        let op = "weights_average";
        let mut average = average.output(op, "average", &[length])?;
        let master = master.input(op, "master", &[length])?;
        Ok(weights_average(self.stream(), &mut average, &master, decay)?)
    }
}
