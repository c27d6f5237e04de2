//! Single kernels in somebody else's program: on its own cudarc context, stream and memory, ordered among its own work.
//!
//!     cargo run --release --example own_stream
//!
//! One short function per op family calls a launcher or two on the caller's stream and slices, lets the CPU do the same, and
//! returns the largest difference. Every launcher can be called so: `vitmae::cuda` has one module of them per family, and `f32`
//! may be `bf16` where cudarc's feature `f16` is on.

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr};
use vitmae::cpu::Cpu;
use vitmae::cuda::adamw::{AdamWArenas, AdamWInput, adamw_step, gradient_norm, gradient_norm_partials};
use vitmae::cuda::attention::{attention_backward, attention_forward};
use vitmae::cuda::cross_entropy::{CrossEntropyOutput, cross_entropy_forward_backward};
use vitmae::cuda::gemm::Addend;
use vitmae::cuda::layernorm::{
    LayerNormGradients, LayerNormOutput, LayerNormSaved, layernorm_backward, layernorm_backward_partials,
    layernorm_forward,
};
use vitmae::cuda::linear::{activation_forward, linear_forward};
use vitmae::cuda::loss::{LossInput, LossOutput, loss_forward_backward_bytes};
use vitmae::cuda::masking::{MaskingOutput, masking_forward_noise};
use vitmae::cuda::patchify::{BytePixels, PatchifyShape, patchify_visible_forward_bytes};
use vitmae::cuda::tokens::tokens_unshuffle_forward;
use vitmae::cuda::{Gpu, Slice, SliceMut, Stream};
use vitmae::ops::{
    Activation, AdamW, AdamWSettings, AdamWState, Attention, AttentionShape, CrossEntropy, CrossEntropyShape, Element,
    ImageShape, LayerNorm, LayerNormShape, Linear, LinearShape, Loss, LossShape, MaskingShape, Memory, PatchMasking,
    Patchify, Pixels, Tokens, TokensShape, Write,
};
use vitmae::random::RandomStream;

type Outcome<T> = Result<T, Box<dyn Error>>;
type Host<T> = <Cpu<f32> as Memory>::Buffer<T>;

const BATCH: usize = 4;
const IMAGE: ImageShape = ImageShape { channels: 3, height: 64, width: 64, patch_height: 16, patch_width: 16 };
const PATCHES: usize = 16;
const VISIBLE: usize = 4;
const HIDDEN: usize = PATCHES - VISIBLE;
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// What the caller has, and the CPU to compare with.
struct Caller {
    own: Arc<CudaStream>,
    /// The same stream in the launchers' terms.
    stream: Stream,
    cpu: Cpu<f32>,
}

impl Caller {
    /// Memory of the caller with these values.
    fn given<T: DeviceRepr>(&self, values: &[T]) -> Outcome<CudaSlice<T>> {
        Ok(self.own.clone_htod(values)?)
    }

    /// Memory of the caller for results.
    fn room(&self, length: usize) -> Outcome<CudaSlice<f32>> {
        Ok(self.own.alloc_zeros(length)?)
    }

    /// A slice tells cudarc, when it is dropped, that its memory was used on the stream: drop it after the launches.
    fn read<'a, T: bytemuck::Pod>(&'a self, memory: &'a CudaSlice<T>) -> Slice<'a, T> {
        Slice::from_cudarc(memory, &self.own)
    }

    fn write<'a, T: bytemuck::Pod>(&'a self, memory: &'a mut CudaSlice<T>) -> SliceMut<'a, T> {
        SliceMut::from_cudarc(memory, &self.own)
    }

    /// The same values for the CPU.
    fn host<T: Element>(&self, values: &[T]) -> Outcome<Host<T>> {
        let mut buffer = self.cpu.buffer(values.len())?;
        self.cpu.upload(&mut buffer, values)?;
        Ok(buffer)
    }

    fn host_room(&self, length: usize) -> Outcome<Host<f32>> {
        Ok(self.cpu.buffer(length)?)
    }

    /// The largest difference of what the GPU found to what the CPU did. The caller's own work goes on, here a copy, on the same
    /// stream and in the same order.
    fn difference(&self, found: &CudaSlice<f32>, expected: &Host<f32>) -> Outcome<f32> {
        let found = self.own.clone_dtoh(found)?;
        self.own.synchronize()?;
        let mut values = vec![0.0; found.len()];
        self.cpu.download(&mut values, expected)?;
        // A NaN is a difference too.
        let differences = found.iter().zip(&values).map(|(found, expected)| (found - expected).abs());
        Ok(differences.fold(0.0, |largest, value| if value <= largest { largest } else { value }))
    }
}

/// Numbers in [-1, 1).
fn numbers(of: u64, length: usize) -> Vec<f32> {
    let mut random = RandomStream::new(1, 0, of, 255);
    (0..length).map(|_| random.next_u32() as i32 as f32 / (1u32 << 31) as f32).collect()
}

fn pictures() -> Vec<u8> {
    let mut random = RandomStream::new(1, 0, 0, 255);
    (0..BATCH * IMAGE.length()).map(|_| (random.next_u32() >> 24) as u8).collect()
}

/// The first patches of every picture from `first` on.
fn patches(first: usize, count: usize) -> Vec<u32> {
    (0..BATCH).flat_map(|_| (first..first + count).map(|patch| patch as u32)).collect()
}

/// Which patches are hidden, from noise.
fn masking(at: &Caller) -> Outcome<f32> {
    let shape = MaskingShape { batch: BATCH, patches: PATCHES, keep: VISIBLE };
    let noise = numbers(1, BATCH * PATCHES);
    let (given, mut mask) = (at.given(&noise)?, at.room(noise.len())?);
    let mut keep = at.own.alloc_zeros::<u32>(BATCH * VISIBLE)?;
    let mut hidden = at.own.alloc_zeros::<u32>(BATCH * HIDDEN)?;
    let mut restore = at.own.alloc_zeros::<u32>(noise.len())?;
    {
        let mut output = MaskingOutput {
            ids_keep: at.write(&mut keep),
            ids_hidden: at.write(&mut hidden),
            ids_restore: at.write(&mut restore),
            mask: at.write(&mut mask),
        };
        masking_forward_noise(&at.stream, &mut output, &at.read(&given), shape)?;
    }
    let cpu = &at.cpu;
    let (mut keep, mut hidden, mut restore) =
        (cpu.buffer(BATCH * VISIBLE)?, cpu.buffer(BATCH * HIDDEN)?, cpu.buffer(noise.len())?);
    let mut expected = at.host_room(noise.len())?;
    cpu.masking_from_noise(shape, &mut keep, &mut hidden, &mut restore, &mut expected, &at.host(&noise)?)?;
    at.difference(&mask, &expected)
}

/// Rows of visible patches, from bytes.
fn patchify(at: &Caller) -> Outcome<f32> {
    let (bytes, ids) = (pictures(), patches(3, VISIBLE));
    let length = BATCH * VISIBLE * IMAGE.patch_length();
    let (pixels, keep, mut rows) = (at.given(&bytes)?, at.given(&ids)?, at.room(length)?);
    let (mean, std) = (at.given(&MEAN)?, at.given(&DEVIATION)?);
    let input = BytePixels { pixels: at.read(&pixels), mean: at.read(&mean), std: at.read(&std) };
    let shape = PatchifyShape { image: IMAGE, batch: BATCH, keep: VISIBLE };
    patchify_visible_forward_bytes(&at.stream, &mut at.write(&mut rows), &input, &at.read(&keep), shape)?;

    let (values, keep, mut expected) = (at.host(&bytes)?, at.host(&ids)?, at.host_room(length)?);
    let (mean, std) = (at.host(&MEAN)?, at.host(&DEVIATION)?);
    let pixels = Pixels::Bytes { values: &values, mean: &mean, std: &std };
    at.cpu.patchify_visible_forward(IMAGE, BATCH, VISIBLE, &mut expected, pixels, &keep)?;
    at.difference(&rows, &expected)
}

/// The decoder's input: visible tokens where they belong, mask tokens in the gaps, positions added.
fn tokens(at: &Caller) -> Outcome<f32> {
    const WIDTH: usize = 64;
    let shape = TokensShape { batch: BATCH, patches: PATCHES, selected: VISIBLE, width: WIDTH };
    let length = BATCH * (1 + PATCHES) * WIDTH;
    let (x, token) = (numbers(2, BATCH * (1 + VISIBLE) * WIDTH), numbers(3, WIDTH));
    let (table, restore) = (numbers(4, (1 + PATCHES) * WIDTH), patches(0, PATCHES));
    let (x_given, token_given, mut y) = (at.given(&x)?, at.given(&token)?, at.room(length)?);
    let (table_given, restore_given) = (at.given(&table)?, at.given(&restore)?);
    {
        let (x, token, table) = (at.read(&x_given), at.read(&token_given), at.read(&table_given));
        let out = &mut at.write(&mut y);
        tokens_unshuffle_forward(&at.stream, out, &x, &token, &table, &at.read(&restore_given), shape)?;
    }
    let (x, token, mut expected) = (at.host(&x)?, at.host(&token)?, at.host_room(length)?);
    let (table, restore) = (at.host(&table)?, at.host(&restore)?);
    at.cpu.tokens_unshuffle_forward(shape, &mut expected, &x, &token, &table, &restore)?;
    at.difference(&y, &expected)
}

/// A layer with its bias, by cuBLASLt, and GELU.
fn linear(at: &Caller) -> Outcome<f32> {
    let shape = LinearShape { rows: 20, inputs: 64, outputs: 96 };
    let length = shape.rows * shape.outputs;
    let (x, weight) = (numbers(5, shape.rows * shape.inputs), numbers(6, shape.outputs * shape.inputs));
    let bias = numbers(7, shape.outputs);
    let (x_given, weight_given, bias_given) = (at.given(&x)?, at.given(&weight)?, at.given(&bias)?);
    let (mut pre, mut y) = (at.room(length)?, at.room(length)?);
    {
        let (x, weight, bias) = (at.read(&x_given), at.read(&weight_given), at.read(&bias_given));
        let out = &mut at.write(&mut pre);
        linear_forward(&at.stream, out, Addend::Nothing, &x, &weight, Some(&bias), shape)?;
    }
    activation_forward(&at.stream, &mut at.write(&mut y), &at.read(&pre), Activation::Gelu)?;

    let (x, weight, bias) = (at.host(&x)?, at.host(&weight)?, at.host(&bias)?);
    let (mut pre, mut expected) = (at.host_room(length)?, at.host_room(length)?);
    at.cpu.linear_forward(shape, &mut pre, &x, &weight, Some(&bias))?;
    at.cpu.activation_forward(length, Activation::Gelu, &mut expected, &pre)?;
    at.difference(&y, &expected)
}

/// A norm and its gradients, of which those of the parameters are added to what is there.
fn layernorm(at: &Caller) -> Outcome<f32> {
    let shape = LayerNormShape { rows: 20, width: 96, epsilon: 1e-6 };
    let (x, dy) = (numbers(8, shape.rows * shape.width), numbers(9, shape.rows * shape.width));
    let (gamma, beta) = (numbers(10, shape.width), numbers(11, shape.width));
    let (x_given, dy_given) = (at.given(&x)?, at.given(&dy)?);
    let (gamma_given, beta_given) = (at.given(&gamma)?, at.given(&beta)?);
    let (mut y, mut dx) = (at.room(x.len())?, at.room(x.len())?);
    let (mut mean, mut rstd) = (at.room(shape.rows)?, at.room(shape.rows)?);
    let (mut dgamma, mut dbeta) = (at.given(&gamma)?, at.given(&beta)?);
    let mut partials = at.room(layernorm_backward_partials(&at.stream, shape))?;
    {
        let mut output = LayerNormOutput { y: at.write(&mut y), mean: at.write(&mut mean), rstd: at.write(&mut rstd) };
        let (gamma, beta) = (at.read(&gamma_given), at.read(&beta_given));
        layernorm_forward(&at.stream, &mut output, &at.read(&x_given), &gamma, &beta, shape)?;
    }
    {
        let mut gradients = LayerNormGradients {
            dx: at.write(&mut dx),
            dgamma: at.write(&mut dgamma),
            dbeta: at.write(&mut dbeta),
            partials: at.write(&mut partials),
        };
        let saved = LayerNormSaved {
            dy: at.read(&dy_given),
            x: at.read(&x_given),
            mean: at.read(&mean),
            rstd: at.read(&rstd),
            gamma: at.read(&gamma_given),
        };
        layernorm_backward(&at.stream, &mut gradients, &saved, Write::Assign, shape)?;
    }
    let (mut dgamma_expected, mut dbeta_expected) = (at.host(&gamma)?, at.host(&beta)?);
    let (x, dy, gamma, beta) = (at.host(&x)?, at.host(&dy)?, at.host(&gamma)?, at.host(&beta)?);
    let (mut y_expected, mut dx_expected) = (at.host_room(y.len())?, at.host_room(y.len())?);
    let (mut mean, mut rstd) = (at.host_room(shape.rows)?, at.host_room(shape.rows)?);
    at.cpu.layernorm_forward(shape, &mut y_expected, &mut mean, &mut rstd, &x, &gamma, &beta)?;
    let (dx_out, dgamma_out, dbeta_out) = (&mut dx_expected, &mut dgamma_expected, &mut dbeta_expected);
    at.cpu.layernorm_backward(shape, Write::Assign, dx_out, dgamma_out, dbeta_out, &dy, &x, &mean, &rstd, &gamma)?;
    let forward = at.difference(&y, &y_expected)?;
    let gradients = at.difference(&dx, &dx_expected)?.max(at.difference(&dbeta, &dbeta_expected)?);
    Ok(forward.max(gradients).max(at.difference(&dgamma, &dgamma_expected)?))
}

/// Attention and the gradient of the packed queries, keys and values.
fn attention(at: &Caller) -> Outcome<f32> {
    let shape = AttentionShape { batch: BATCH, tokens: 17, heads: 2, head_dim: 32 };
    let rows = BATCH * shape.tokens;
    let (qkv, dout) = (numbers(12, 3 * rows * shape.width()), numbers(13, rows * shape.width()));
    let (qkv_given, dout_given) = (at.given(&qkv)?, at.given(&dout)?);
    let (mut out, mut dqkv) = (at.room(dout.len())?, at.room(qkv.len())?);
    let mut log_sum_exp = at.room(rows * shape.heads)?;
    {
        let qkv = at.read(&qkv_given);
        attention_forward(&at.stream, &mut at.write(&mut out), &mut at.write(&mut log_sum_exp), &qkv, shape)?;
        let (dout, statistics) = (at.read(&dout_given), at.read(&log_sum_exp));
        attention_backward(&at.stream, &mut at.write(&mut dqkv), &dout, &qkv, &statistics, shape)?;
    }

    let (mut out_expected, mut dqkv_expected) = (at.host_room(dout.len())?, at.host_room(qkv.len())?);
    let mut statistics = at.host_room(rows * shape.heads)?;
    let (qkv, dout) = (at.host(&qkv)?, at.host(&dout)?);
    at.cpu.attention_forward(shape, &mut out_expected, &mut statistics, &qkv)?;
    at.cpu.attention_backward(shape, &mut dqkv_expected, &dout, &qkv, &statistics)?;
    Ok(at.difference(&out, &out_expected)?.max(at.difference(&dqkv, &dqkv_expected)?))
}

/// The loss of hidden patches against the pictures' bytes, and its gradient.
fn loss(at: &Caller) -> Outcome<f32> {
    let shape = LossShape { image: IMAGE, batch: BATCH, predicted: HIDDEN, norm_pix_loss: true, scale: 1.0 };
    let (bytes, ids) = (pictures(), patches(VISIBLE, HIDDEN));
    let (prediction, mask) = (numbers(14, BATCH * HIDDEN * IMAGE.patch_length()), vec![1.0; BATCH * PATCHES]);
    let (bytes_given, ids_given) = (at.given(&bytes)?, at.given(&ids)?);
    let (prediction_given, mask_given) = (at.given(&prediction)?, at.given(&mask)?);
    let (mean, std) = (at.given(&MEAN)?, at.given(&DEVIATION)?);
    let (mut value, mut of_patch, mut gradient) = (at.room(1)?, at.room(BATCH * HIDDEN)?, at.room(prediction.len())?);
    {
        let mut output = LossOutput {
            loss: at.write(&mut value),
            patch_loss: at.write(&mut of_patch),
            dprediction: at.write(&mut gradient),
        };
        let input =
            LossInput { prediction: at.read(&prediction_given), ids: at.read(&ids_given), mask: at.read(&mask_given) };
        let pixels = BytePixels { pixels: at.read(&bytes_given), mean: at.read(&mean), std: at.read(&std) };
        loss_forward_backward_bytes(&at.stream, &mut output, &input, &pixels, shape)?;
    }
    let (mean, std, values) = (at.host(&MEAN)?, at.host(&DEVIATION)?, at.host(&bytes)?);
    let pixels = Pixels::Bytes { values: &values, mean: &mean, std: &std };
    let (mut loss, mut patch_loss) = (at.host_room(1)?, at.host_room(BATCH * HIDDEN)?);
    let mut expected = at.host_room(prediction.len())?;
    let (prediction, ids, mask) = (at.host(&prediction)?, at.host(&ids)?, at.host(&mask)?);
    let (gradient_out, cpu) = (&mut expected, &at.cpu);
    cpu.loss_forward_backward(shape, &mut loss, &mut patch_loss, gradient_out, &prediction, pixels, &ids, &mask)?;
    Ok(at.difference(&value, &loss)?.max(at.difference(&gradient, &expected)?))
}

/// A classifier's loss and its gradient.
fn cross_entropy(at: &Caller) -> Outcome<f32> {
    let shape = CrossEntropyShape { rows: 20, classes: 10, smoothing: 0.1, scale: 1.0 / 20.0 };
    let logits = numbers(15, shape.rows * shape.classes);
    let labels: Vec<u32> = (0..20).map(|row| row % 10).collect();
    let (logits_given, labels_given) = (at.given(&logits)?, at.given(&labels)?);
    let (mut value, mut of_row, mut gradient) = (at.room(1)?, at.room(shape.rows)?, at.room(logits.len())?);
    {
        let mut output = CrossEntropyOutput {
            loss: at.write(&mut value),
            row_loss: at.write(&mut of_row),
            dlogits: at.write(&mut gradient),
        };
        let (logits, labels) = (at.read(&logits_given), at.read(&labels_given));
        cross_entropy_forward_backward(&at.stream, &mut output, &logits, &labels, shape)?;
    }
    let (mut loss, mut row_loss) = (at.host_room(1)?, at.host_room(shape.rows)?);
    let mut expected = at.host_room(logits.len())?;
    let (logits, labels) = (at.host(&logits)?, at.host(&labels)?);
    at.cpu.cross_entropy_forward_backward(shape, &mut loss, &mut row_loss, &mut expected, &logits, &labels)?;
    Ok(at.difference(&value, &loss)?.max(at.difference(&gradient, &expected)?))
}

/// The gradients' norm and one step of the optimiser, which is decided on the GPU.
fn adamw(at: &Caller) -> Outcome<f32> {
    let length = 1000;
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.05,
        clip_norm: Some(1.0),
        length,
        decayed: 600,
    };
    let (master, gradient) = (numbers(16, length), numbers(17, length));
    let (mut master_given, gradient_given) = (at.given(&master)?, at.given(&gradient)?);
    let (mut first, mut second) = (at.room(length)?, at.room(length)?);
    let (mut norm, mut factors) = (at.room(1)?, at.room(8)?);
    let (mut partials, rate) = (at.room(gradient_norm_partials(length))?, at.given(&[1e-2f64])?);
    // cudarc makes no zeros of a structure that it does not know; the stream does, in memory that the caller owns as well.
    let mut state = at.stream.zeros::<AdamWState>(1)?;
    let gradient_read = at.read(&gradient_given);
    gradient_norm(&at.stream, &mut at.write(&mut norm), &mut at.write(&mut partials), &gradient_read)?;
    {
        let mut arenas = AdamWArenas {
            state: state.as_mut_slice(),
            master: at.write(&mut master_given),
            working: None,
            first_moment: at.write(&mut first),
            second_moment: at.write(&mut second),
            factors: at.write(&mut factors),
        };
        let input =
            AdamWInput { gradient: gradient_read, norm: at.read(&norm), loss: None, learning_rate: at.read(&rate) };
        adamw_step(&at.stream, &mut arenas, &input, settings)?;
    }
    let mut expected = at.host(&master)?;
    let (gradient, rate) = (at.host(&gradient)?, at.host(&[1e-2f64])?);
    let (mut first, mut second, mut norm_expected) = (at.host_room(length)?, at.host_room(length)?, at.host_room(1)?);
    // On the CPU the working copy is the masters themselves.
    let (mut state, mut working) = (at.cpu.buffer(1)?, at.host_room(0)?);
    let cpu = &at.cpu;
    cpu.gradient_norm(length, &mut norm_expected, &gradient)?;
    let (moments, norm_read) = ((&mut first, &mut second), &norm_expected);
    let (state, working) = (&mut state, &mut working);
    cpu.adamw_step(settings, state, &mut expected, working, moments.0, moments.1, &gradient, norm_read, None, &rate)?;
    Ok(at.difference(&norm, &norm_expected)?.max(at.difference(&master_given, &expected)?))
}

/// A call on the caller's stream: the largest difference to the CPU.
type Call = fn(&Caller) -> Outcome<f32>;

/// The families, and how far f32 may be from the CPU's.
const CALLS: [(&str, Call, f32); 9] = [
    ("masking", masking, 0.0),
    ("patchify", patchify, 1e-5),
    ("tokens", tokens, 1e-6),
    ("linear", linear, 1e-4),
    ("layernorm", layernorm, 1e-4),
    ("attention", attention, 1e-4),
    ("loss", loss, 1e-4),
    ("cross_entropy", cross_entropy, 1e-5),
    ("adamw", adamw, 1e-4),
];

fn main() -> Outcome<()> {
    // Opens the GPU and loads the kernels; without a driver this is an error that says so.
    let gpu = Gpu::open(0)?;
    // What the caller has anyway: a context and a stream. It must be the device's primary context, as cudarc's are.
    let own = CudaContext::new(0)?.new_stream()?;
    let caller = Caller { stream: gpu.stream(&own)?, own, cpu: Cpu::new() };
    println!("{}: the largest difference to the CPU", gpu.info().name);
    let mut differ = Vec::new();
    for (family, call, allowed) in CALLS {
        let difference = call(&caller)?;
        println!("{family:14} {difference:e}");
        // Written so that a NaN fails.
        if !matches!(difference.partial_cmp(&allowed), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            differ.push(family);
        }
    }
    if differ.is_empty() { Ok(()) } else { Err(format!("the GPU and the CPU differ in {differ:?}").into()) }
}
