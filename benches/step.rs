//! A whole training step and encoding, on the CPU.
//!
//! `cargo bench --bench step` runs ViT-B/16 at 224 pixels; in test mode a small model stands in for it. Throughput is given as
//! the bytes of weights, optimiser and activations, once each, and as the reference implementation's floating-point operations
//! as elements.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking, MemoryUse, Purpose, WorkspaceShape};
use vitmae::ops::MaskingShape;
use vitmae::train::{OptimizerSettings, Trainer};

/// Of the patches that are hidden in a step.
const RATIO: f64 = 0.75;

/// Operations for the features of one image, nothing hidden; counted as [`MaeConfig::flops`] does.
fn encode_flops(config: &MaeConfig) -> u64 {
    let (patches, width) = (config.patches(), config.hidden_size);
    let tokens = 1 + patches;
    let block = tokens * width * (4 * width + 2 * config.intermediate_size + 2 * tokens);
    2 * (config.num_hidden_layers * block + patches * width * config.image().patch_length()) as u64
}

fn throughput(config: &MaeConfig, batch: usize, keep: usize, purpose: Purpose, elements: u64) -> Throughput {
    let image = config.image();
    let shape = WorkspaceShape { batch, image, keep, purpose, interpolation: None, recompute: false };
    let bytes = MemoryUse::of(config, &shape).expect("the preset works").total();
    Throughput::ElementsAndBytes { elements, bytes }
}

/// The model, how it is called in bench ids, and a batch of random bytes for it.
fn subject() -> (MaeConfig, &'static str, usize, Vec<u8>) {
    // cargo passes `--bench` where times are wanted; criterion runs everything once otherwise.
    let testing = !std::env::args().any(|argument| argument == "--bench");
    let (mut config, name, batch) =
        if testing { (MaeConfig::tiny(), "vit_tiny", 2) } else { (MaeConfig::base(), "vit_b", 16) };
    if testing {
        config.image_size = (32, 32).into();
        config.patch_size = (8, 8).into();
    }
    let image = config.image();
    // A linear congruential generator: the values do not matter, but they are not zeros.
    let mut state = 1u32;
    let pixels = (0..batch * image.length())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    (config, name, batch, pixels)
}

fn images<'a>(config: &MaeConfig, batch: usize, pixels: &'a [u8]) -> Images<'a> {
    let image = config.image();
    let values = ImageValues::Bytes { values: pixels, mean: &[0.485, 0.456, 0.406], std: &[0.229, 0.224, 0.225] };
    Images { batch, channels: image.channels, height: image.height, width: image.width, values }
}

fn step(criterion: &mut Criterion) {
    let (config, name, batch, pixels) = subject();
    let model = MaeForPreTraining::new(config.clone(), Cpu::<f32>::new(), 0).expect("the preset works");
    let images = images(&config, batch, &pixels);

    let flops = config.flops(RATIO).expect("the preset works").step * batch as u64;
    let keep = MaskingShape::new(batch, config.patches(), RATIO).expect("a ratio").keep;
    let whole = throughput(&config, batch, config.patches(), Purpose::Encode, encode_flops(&config) * batch as u64);
    let hidden = throughput(&config, batch, keep, Purpose::Train, flops);

    let mut group = criterion.benchmark_group("encode");
    group.sample_size(10).throughput(whole);
    let view = model.encoder();
    let mut workspace = view.workspace(&images, None).expect("there is enough memory");
    group.bench_function(format!("{name}/batch_{batch}/cpu/f32"), |bencher| {
        bencher.iter(|| {
            black_box(view.encode_in(&mut workspace, &images, &Masking::None, Extras::default()).expect("it fits"))
        });
    });
    group.finish();
    drop(workspace);

    let mut group = criterion.benchmark_group("step");
    group.sample_size(10).throughput(hidden);
    let mut trainer = Trainer::new(model, OptimizerSettings::default(), 16).expect("there is enough memory");
    let mut seed = 0;
    group.bench_function(format!("{name}/batch_{batch}/cpu/f32"), |bencher| {
        bencher.iter(|| {
            seed += 1;
            black_box(trainer.step(&images, &Masking::random(RATIO, seed), 1e-5).expect("it fits"))
        });
    });
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
