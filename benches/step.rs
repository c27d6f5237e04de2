//! A whole training step and encoding, on the CPU.
//!
//! `cargo bench --bench step` runs ViT-B/16 at 224 pixels; in test mode a small model stands in for it.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking};
use vitmae::train::{OptimizerSettings, Trainer};

/// The model, how it is called in bench ids, and a batch of random bytes for it.
fn subject() -> (MaeConfig, &'static str, usize, Vec<u8>) {
    let testing = std::env::args().any(|argument| argument == "--test");
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
    let values = ImageValues::Bytes { values: pixels, mean: &[0.485, 0.456, 0.406], deviation: &[0.229, 0.224, 0.225] };
    Images { batch, channels: image.channels, height: image.height, width: image.width, values }
}

fn step(criterion: &mut Criterion) {
    let (config, name, batch, pixels) = subject();
    let model = MaeForPreTraining::new(config.clone(), Cpu::<f32>::new(), 0).expect("the preset works");
    let images = images(&config, batch, &pixels);

    let mut group = criterion.benchmark_group("encode");
    group.sample_size(10).throughput(Throughput::Elements(batch as u64));
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
    group.sample_size(10).throughput(Throughput::Elements(batch as u64));
    let mut trainer = Trainer::new(model, OptimizerSettings::default(), 16).expect("there is enough memory");
    let mut seed = 0;
    group.bench_function(format!("{name}/batch_{batch}/cpu/f32"), |bencher| {
        bencher.iter(|| {
            seed += 1;
            black_box(trainer.step(&images, &Masking::random(0.75, seed), 1e-5).expect("it fits"))
        });
    });
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
