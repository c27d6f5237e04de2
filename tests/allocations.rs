//! A warmed-up call of an op, or step of a trainer, on the CPU allocates nothing, on any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use vitmae::config::MaeConfig;
use vitmae::cpu::{Cpu, CpuBuffer};
use vitmae::model::{ImageValues, Images, MaeForPreTraining, Masking as HiddenPatches};
use vitmae::ops::{
    Activation, AdamW, AdamWSettings, AdamWState, Attention, AttentionShape, CrossEntropy, CrossEntropyShape,
    ImageShape, LayerNorm, LayerNormShape, Linear, LinearShape, Loss, LossShape, MaskingShape, Memory, PatchMasking,
    Patchify, Pixels, RandomMask, Tokens, TokensShape, Write,
};
use vitmae::train::{OptimizerSettings, Trainer};

/// How often memory was asked for.
static COUNT: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls every op once, with buffers that are there already.
struct Step {
    cpu: Cpu,
    floats: Vec<CpuBuffer<f32>>,
    ids: Vec<CpuBuffer<u32>>,
    samples: CpuBuffer<u64>,
    bytes: CpuBuffer<u8>,
    state: CpuBuffer<AdamWState>,
    learning_rate: CpuBuffer<f64>,
}

const LENGTH: usize = 2 * 197 * 512;

impl Step {
    fn new() -> Self {
        let cpu = Cpu::new();
        let floats = (0..10).map(|_| cpu.buffer(LENGTH).unwrap()).collect();
        let ids = (0..3).map(|_| cpu.buffer(2 * 196).unwrap()).collect();
        let (samples, bytes) = (cpu.buffer(2).unwrap(), cpu.buffer(2 * 3 * 224 * 224).unwrap());
        Self { cpu, floats, ids, samples, bytes, state: cpu.buffer(1).unwrap(), learning_rate: cpu.buffer(1).unwrap() }
    }

    fn run(&mut self) -> vitmae::Result<()> {
        let Self { cpu, floats, ids, samples, bytes, state, learning_rate } = self;
        let [a, b, c, d, e, f, g, h, i, j] = &mut floats[..] else { unreachable!() };
        let [keep, hidden, restore] = &mut ids[..] else { unreachable!() };
        let masking = MaskingShape { batch: 2, patches: 196, keep: 49 };
        cpu.masking_random(masking, keep, hidden, restore, a, RandomMask { seed: 1, epoch: 2 }, samples)?;
        cpu.masking_from_noise(masking, keep, hidden, restore, a, b)?;
        let image = ImageShape { channels: 3, height: 224, width: 224, patch_height: 16, patch_width: 16 };
        let pixels: Pixels<Cpu> = Pixels::Bytes { values: bytes, mean: a, std: b };
        cpu.patchify_visible_forward(image, 2, 49, c, pixels, keep)?;
        let loss = LossShape { image, batch: 2, predicted: 100, norm_pix_loss: true, scale: 0.1 };
        cpu.loss_forward_backward(loss, c, d, e, f, pixels, hidden, a)?;
        let classes = CrossEntropyShape { rows: 300, classes: 500, smoothing: 0.1, scale: 0.1 };
        cpu.cross_entropy_forward_backward(classes, c, d, e, f, hidden)?;
        let tokens = TokensShape { batch: 2, patches: 196, selected: 49, width: 512 };
        cpu.tokens_assemble_forward(tokens, c, d, e, f, keep)?;
        cpu.tokens_assemble_backward(tokens, c, d, e)?;
        cpu.tokens_unshuffle_forward(tokens, c, d, e, f, restore)?;
        cpu.tokens_unshuffle_backward(tokens, c, d, e, restore)?;
        cpu.tokens_gather_forward(tokens, c, d, keep)?;
        cpu.tokens_gather_backward(tokens, c, d, keep)?;
        let norm = LayerNormShape { rows: 300, width: 512, epsilon: 1e-6 };
        cpu.layernorm_forward(norm, c, d, e, f, g, h)?;
        cpu.layernorm_backward(norm, Write::Accumulate, c, d, e, f, g, h, i, j)?;
        for (inputs, outputs) in [(512, 300), (300, 512), (33, 7)] {
            let linear = LinearShape { rows: 394, inputs, outputs };
            cpu.linear_forward(linear, c, d, e, Some(f))?;
            cpu.linear_residual_forward(linear, c, d, e, f, Some(g))?;
            cpu.linear_activation_forward(linear, Activation::Gelu, c, d, e, f, Some(g))?;
            cpu.linear_backward_input(linear, Write::Assign, c, d, e)?;
            cpu.linear_activation_backward_input(linear, Activation::Gelu, c, d, e, f)?;
            cpu.linear_activation_backward(linear, Activation::Gelu, c, d, Some(e), f, g, h)?;
            cpu.linear_backward_weight(linear, c, Some(d), e, f)?;
        }
        cpu.activation_forward(LENGTH, Activation::Gelu, c, d)?;
        let attention = AttentionShape { batch: 2, tokens: 100, heads: 5, head_dim: 64 };
        cpu.attention_forward(attention, c, d, e)?;
        cpu.attention_backward(attention, c, d, e, f)?;
        cpu.attention_probabilities(attention, c, d, e)?;
        cpu.gradient_norm(LENGTH, i, c)?;
        let settings = AdamWSettings {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.05,
            clip_norm: Some(1.0),
            length: LENGTH,
            decayed: LENGTH / 2,
        };
        cpu.adamw_step(settings, state, c, d, e, f, g, i, Some(j), learning_rate)?;
        cpu.weights_average(LENGTH, 0.99, d, c)
    }
}

fn every_op_allocates_nothing() {
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut step = Step::new();
        pool.install(|| {
            step.run().unwrap();
            step.run().unwrap();
            let before = COUNT.load(Ordering::SeqCst);
            for _ in 0..5 {
                step.run().unwrap();
            }
            let count = COUNT.load(Ordering::SeqCst) - before;
            assert_eq!(count, 0, "allocations on {threads} threads");
        });
    }
}

/// Two micro-batches of bytes.
fn a_trainer_allocates_nothing() {
    let mut config = MaeConfig::tiny();
    config.image_size = (32, 32).into();
    config.patch_size = (8, 8).into();
    let image = config.image();
    let pixels: Vec<u8> = (0..4 * image.length()).map(|i| (i * 73 % 251) as u8).collect();
    let images = Images {
        batch: 4,
        channels: image.channels,
        height: image.height,
        width: image.width,
        values: ImageValues::Bytes { values: &pixels, mean: &[0.5; 3], std: &[0.25; 3] },
    };
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for recompute in [false, true] {
            let model = MaeForPreTraining::new(config.clone(), Cpu::<f32>::new(), 3).unwrap();
            let mut trainer = Trainer::new(model, OptimizerSettings::default(), 2).unwrap();
            trainer.set_recompute(recompute);
            pool.install(|| {
                let mut step = |seed| trainer.step(&images, &HiddenPatches::random(0.75, seed), 1e-3).unwrap();
                let first = step(0);
                step(1);
                let before = COUNT.load(Ordering::SeqCst);
                let last = (2..5).map(&mut step).last();
                let count = COUNT.load(Ordering::SeqCst) - before;
                assert_eq!(count, 0, "allocations on {threads} threads, recompute {recompute}");
                assert!(last.is_some_and(|last| last.updated && last.loss != first.loss));
            });
        }
    }
}

/// One test, because another one's allocations would be counted too.
#[test]
fn a_warmed_up_step_allocates_nothing() {
    every_op_allocates_nothing();
    a_trainer_allocates_nothing();
}
