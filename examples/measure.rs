//! Times a training step and encoding the way `benches/peers/train_step.py` does, and prints one line of JSON.
//!
//!     cargo run --release --example measure -- [train|encode] [MODEL] [BATCH] [STEPS] [MICRO_BATCH]
//!
//! The batch is in memory: data loading is no part of either figure. The peak is that of the whole process (Linux).

use std::time::Instant;

use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking};
use vitmae::train::{OptimizerSettings, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.to_owned());
    let (mode, model) = (argument(0, "train"), argument(1, "base"));
    let batch: usize = argument(2, "16").parse()?;
    let steps: usize = argument(3, "10").parse()?;
    let micro_batch: usize = argument(4, "16").parse()?;

    let config = MaeConfig::by_name(&model)?;
    let image = config.image();
    let mut random = vitmae::ops::philox::RandomStream::new(0, 0, 0, 255);
    let pixels: Vec<u8> = (0..batch * image.length()).map(|_| (random.next_u32() >> 24) as u8).collect();
    let images = Images {
        batch,
        channels: image.channels,
        height: image.height,
        width: image.width,
        values: ImageValues::Bytes { values: &pixels, mean: &[0.485, 0.456, 0.406], deviation: &[0.229, 0.224, 0.225] },
    };
    let model = MaeForPreTraining::new(config, Cpu::<f32>::new(), 0)?;
    let threads = std::thread::available_parallelism()?.get();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let mut seconds = Vec::new();
    pool.install(|| -> vitmae::Result<()> {
        // Two steps that are not counted: the first allocates, the second finds everything in place.
        let mut time = |work: &mut dyn FnMut(u64) -> vitmae::Result<()>| -> vitmae::Result<()> {
            for step in 0..steps as u64 + 2 {
                let started = Instant::now();
                work(step)?;
                if step >= 2 {
                    seconds.push(started.elapsed().as_secs_f64());
                }
            }
            Ok(())
        };
        if mode == "encode" {
            let view = model.encoder();
            let mut workspace = view.workspace(&images, None)?;
            time(&mut |_| view.encode_in(&mut workspace, &images, &Masking::None, Extras::default()).map(|_| ()))
        } else {
            let mut trainer = Trainer::new(model, OptimizerSettings::default(), micro_batch)?;
            time(&mut |step| trainer.step(&images, &Masking::random(0.75, step), 1.5e-4).map(|_| ()))
        }
    })?;
    seconds.sort_by(f64::total_cmp);
    let rate = |seconds: f64| batch as f64 / seconds;
    println!(
        "{{\"implementation\": \"vitmae\", \"mode\": \"{mode}\", \"batch\": {batch}, \"threads\": {threads}, \
         \"images_per_second\": {:.3}, \"fastest\": {:.3}, \"slowest\": {:.3}, \"peak_rss_mb\": {}}}",
        rate(seconds[seconds.len() / 2]),
        rate(seconds[0]),
        rate(seconds[seconds.len() - 1]),
        peak_megabytes()
    );
    Ok(())
}

/// The largest resident set so far.
fn peak_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) / 1024
}
