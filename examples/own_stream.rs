//! Single kernels in somebody else's program: on its own cudarc context, stream and memory, ordered among its own work.
//!
//!     cargo run --release --example own_stream
//!
//! Patches of pictures are cut out, normalised by a LayerNorm and attend to each other, each step one launch on the caller's
//! stream; then the CPU does the same, and the difference is printed. Every kernel can be called so: `vitmae::cuda` has one
//! module of launchers per op family, and `f32` may be `bf16` where cudarc's feature `f16` is on.

use cudarc::driver::{CudaContext, CudaSlice};
use vitmae::cpu::Cpu;
use vitmae::cuda::attention::attention_forward;
use vitmae::cuda::layernorm::{LayerNormOutput, layernorm_forward};
use vitmae::cuda::patchify::{BytePixels, PatchifyShape, patchify_visible_forward_bytes};
use vitmae::cuda::{Gpu, Slice, SliceMut};
use vitmae::ops::philox::RandomStream;
use vitmae::ops::{Attention, AttentionShape, ImageShape, LayerNorm, LayerNormShape, Memory, Patchify, Pixels};

const IMAGE: ImageShape = ImageShape { channels: 3, height: 224, width: 224, patch_height: 16, patch_width: 16 };
const BATCH: usize = 4;
const VISIBLE: usize = 49;
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// A row of 768 numbers is read as query, key and value of 4 heads of 64 features.
const ATTENTION: AttentionShape = AttentionShape { batch: BATCH, tokens: VISIBLE, heads: 4, head_dim: 64 };
const NORM: LayerNormShape = LayerNormShape { rows: BATCH * VISIBLE, width: 768, epsilon: 1e-6 };

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut random = RandomStream::new(1, 0, 0, 255);
    let pictures: Vec<u8> = (0..BATCH * IMAGE.length()).map(|_| (random.next_u32() >> 24) as u8).collect();
    let ids: Vec<u32> = (0..BATCH).flat_map(|_| (0..VISIBLE as u32).map(|patch| 4 * patch)).collect();

    // Opens the GPU and loads the kernels; without a driver this is an error that says so.
    let gpu = Gpu::open(0)?;
    // What the caller has anyway: a context, a stream, memory. It must be the device's primary context, as cudarc's are.
    let context = CudaContext::new(0)?;
    let own = context.new_stream()?;
    let pixels = own.clone_htod(&pictures)?;
    let (keep, mean, deviation) = (own.clone_htod(&ids)?, own.clone_htod(&MEAN)?, own.clone_htod(&DEVIATION)?);
    let (gamma, beta) = (own.clone_htod(&[1.0f32; 768])?, own.clone_htod(&[0.0f32; 768])?);
    let mut rows: CudaSlice<f32> = own.alloc_zeros(NORM.rows * NORM.width)?;
    let mut normed: CudaSlice<f32> = own.alloc_zeros(NORM.rows * NORM.width)?;
    let mut statistics = [own.alloc_zeros::<f32>(NORM.rows)?, own.alloc_zeros::<f32>(NORM.rows)?];
    let mut attended: CudaSlice<f32> = own.alloc_zeros(NORM.rows * ATTENTION.width())?;
    let mut log_sum_exp: CudaSlice<f32> = own.alloc_zeros(BATCH * ATTENTION.heads * VISIBLE)?;

    // The same stream in the launchers' terms. A slice tells cudarc, when it is dropped, that its memory was used there: drop
    // it after the launches.
    let stream = gpu.stream(&own)?;
    {
        let input = BytePixels {
            pixels: Slice::from_cudarc(&pixels, &own),
            mean: Slice::from_cudarc(&mean, &own),
            deviation: Slice::from_cudarc(&deviation, &own),
        };
        let shape = PatchifyShape { image: IMAGE, batch: BATCH, keep: VISIBLE };
        let mut rows = SliceMut::from_cudarc(&mut rows, &own);
        patchify_visible_forward_bytes(&stream, &mut rows, &input, &Slice::from_cudarc(&keep, &own), shape)?;
    }
    {
        let [mean, rstd] = &mut statistics;
        let mut output = LayerNormOutput {
            y: SliceMut::from_cudarc(&mut normed, &own),
            mean: SliceMut::from_cudarc(mean, &own),
            rstd: SliceMut::from_cudarc(rstd, &own),
        };
        let (gamma, beta) = (Slice::from_cudarc(&gamma, &own), Slice::from_cudarc(&beta, &own));
        layernorm_forward(&stream, &mut output, &Slice::from_cudarc(&rows, &own), &gamma, &beta, NORM)?;
    }
    {
        let mut out = SliceMut::from_cudarc(&mut attended, &own);
        let mut log_sum_exp = SliceMut::from_cudarc(&mut log_sum_exp, &own);
        attention_forward(&stream, &mut out, &mut log_sum_exp, &Slice::from_cudarc(&normed, &own), ATTENTION)?;
    }
    // The caller's own work goes on, on the same stream and in the same order.
    let found = own.clone_dtoh(&attended)?;
    own.synchronize()?;

    let expected = on_the_cpu(&pictures, &ids)?;
    let difference = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max);
    println!("{}: {} numbers, the largest difference to the CPU is {difference:e}", gpu.info().name, found.len());
    if difference < 1e-4 { Ok(()) } else { Err("the GPU and the CPU differ".into()) }
}

fn on_the_cpu(pictures: &[u8], ids: &[u32]) -> vitmae::Result<Vec<f32>> {
    let cpu = Cpu::<f32>::new();
    let floats = |length| cpu.buffer::<f32>(length);
    let (mut pixels, mut keep) = (cpu.buffer(pictures.len())?, cpu.buffer(ids.len())?);
    cpu.upload(&mut pixels, pictures)?;
    cpu.upload(&mut keep, ids)?;
    let (mut mean, mut deviation, mut gamma, beta) = (floats(3)?, floats(3)?, floats(768)?, floats(768)?);
    cpu.upload(&mut mean, &MEAN)?;
    cpu.upload(&mut deviation, &DEVIATION)?;
    cpu.upload(&mut gamma, &[1.0; 768])?;
    let (mut rows, mut normed) = (floats(NORM.rows * NORM.width)?, floats(NORM.rows * NORM.width)?);
    let values = Pixels::Bytes { values: &pixels, mean: &mean, deviation: &deviation };
    cpu.patchify_visible_forward(IMAGE, BATCH, VISIBLE, &mut rows, values, &keep)?;
    let (mut row_mean, mut rstd) = (floats(NORM.rows)?, floats(NORM.rows)?);
    cpu.layernorm_forward(NORM, &mut normed, &mut row_mean, &mut rstd, &rows, &gamma, &beta)?;
    let mut log_sum_exp = floats(BATCH * ATTENTION.heads * VISIBLE)?;
    let mut out = vec![0.0; NORM.rows * ATTENTION.width()];
    let mut attended = floats(out.len())?;
    cpu.attention_forward(ATTENTION, &mut attended, &mut log_sum_exp, &normed)?;
    cpu.download(&mut out, &attended)?;
    Ok(out)
}
