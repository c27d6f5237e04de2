//! Times a training step and encoding the way `benches/peers/train_step.py` does, and prints one line of JSON.
//!
//!     cargo run --release --example measure -- [train|encode] [MODEL] [BATCH] [STEPS] [MICRO_BATCH] [cpu|cuda|cuda:N] [f32|bf16]
//!
//! The batch is in memory: data loading is no part of either figure. The peak is that of the whole process (Linux).

use std::time::Instant;

use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking};
use vitmae::ops::Backend;
use vitmae::train::{OptimizerSettings, Trainer};

/// What to time.
struct Work {
    mode: String,
    config: MaeConfig,
    batch: usize,
    steps: usize,
    micro_batch: usize,
    /// Steps that are given to the device before it is waited for.
    group: usize,
    pixels: Vec<u8>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.to_owned());
    let (mode, model) = (argument(0, "train"), argument(1, "base"));
    let batch: usize = argument(2, "16").parse()?;
    let steps: usize = argument(3, "10").parse()?;
    let micro_batch: usize = argument(4, "16").parse()?;
    let (device, precision) = (argument(5, "cpu"), argument(6, "f32"));

    let config = MaeConfig::by_name(&model)?;
    let flops = config.flops(0.75)?.step as f64;
    let mut random = vitmae::random::RandomStream::new(0, 0, 0, 255);
    let pixels: Vec<u8> = (0..batch * config.image().length()).map(|_| (random.next_u32() >> 24) as u8).collect();
    let group = if device == "cpu" { 1 } else { 5.min(steps) };
    let work = Work { mode: mode.clone(), config, batch, steps, micro_batch, group, pixels };
    let threads = std::thread::available_parallelism()?.get();
    let mut seconds = match (device.as_str(), precision.as_str()) {
        ("cpu", "f32") => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            pool.install(|| work.measure(Cpu::<f32>::new()))?
        }
        #[cfg(feature = "cuda")]
        (cuda, "f32" | "bf16") if cuda == "cuda" || cuda.starts_with("cuda:") => {
            let ordinal = cuda.strip_prefix("cuda:").map_or(Ok(0), str::parse)?;
            let stream = vitmae::cuda::Gpu::open(ordinal)?.new_stream()?;
            match precision.as_str() {
                "f32" => work.measure(vitmae::cuda::Cuda::<f32>::new(stream))?,
                _ => work.measure(vitmae::cuda::Cuda::<half::bf16>::new(stream))?,
            }
        }
        _ => return Err(format!("there is no {device} with {precision}").into()),
    };
    seconds.sort_by(f64::total_cmp);
    let rate = |seconds: f64| batch as f64 / seconds;
    let middle = rate(seconds[seconds.len() / 2]);
    println!(
        "{{\"implementation\": \"vitmae\", \"mode\": \"{mode}\", \"batch\": {batch}, \"device\": \"{device}\", \"precision\": \
         \"{precision}\", \"threads\": {threads}, \"images_per_second\": {middle:.3}, \"fastest\": {:.3}, \"slowest\": {:.3}, \
         \"tflops_per_second\": {:.3}, \"peak_rss_mb\": {}}}",
        rate(seconds[0]),
        rate(seconds[seconds.len() - 1]),
        // Of a training step; encoding has other operations.
        if mode == "encode" { 0.0 } else { middle * flops / 1e12 },
        peak_megabytes()
    );
    Ok(())
}

impl Work {
    /// Seconds of each step, or of each group of steps divided by their number.
    fn measure<B: Backend>(&self, backend: B) -> vitmae::Result<Vec<f64>> {
        let Self { batch, micro_batch, .. } = *self;
        let image = self.config.image();
        let values =
            ImageValues::Bytes { values: &self.pixels, mean: &[0.485, 0.456, 0.406], std: &[0.229, 0.224, 0.225] };
        let images = Images { batch, channels: image.channels, height: image.height, width: image.width, values };
        let model = MaeForPreTraining::new(self.config.clone(), backend, 0)?;
        // Reading anything back waits for the work before.
        let flag = model.backend().buffer::<u32>(1)?;
        if self.mode == "encode" {
            let view = model.encoder();
            let mut workspace = view.workspace(&images, None)?;
            return self.time(
                &mut workspace,
                |workspace, _| view.encode_in(workspace, &images, &Masking::None, Extras::default()).map(|_| ()),
                |_| model.backend().download(&mut [0], &flag),
            );
        }
        let mut trainer = Trainer::new(model, OptimizerSettings::default(), micro_batch)?;
        // Kernels of a recorded step are launched as a whole: without ranges for a profiler.
        trainer.set_recording(std::env::var("VITMAE_MEASURE_GRAPHS").as_deref() != Ok("0"));
        self.time(
            &mut trainer,
            |trainer, step| {
                trainer.accumulate(&images, &Masking::random(0.75, step), batch)?;
                trainer.launch_update(1.5e-4)
            },
            |trainer| trainer.model().backend().download(&mut [0], &flag),
        )
    }

    fn time<S>(
        &self,
        state: &mut S,
        work: impl Fn(&mut S, u64) -> vitmae::Result<()>,
        wait: impl Fn(&S) -> vitmae::Result<()>,
    ) -> vitmae::Result<Vec<f64>> {
        // Steps that are not counted: the first allocates, the second finds everything in place; a device that records does
        // so then, and shows its usual pace later.
        let warm_up = if self.group == 1 { 2 } else { 5 };
        for step in 0..warm_up {
            work(state, step)?;
        }
        wait(state)?;
        let mut seconds = Vec::new();
        for group in 0..self.steps.div_ceil(self.group) {
            let started = Instant::now();
            for step in 0..self.group {
                work(state, warm_up + (group * self.group + step) as u64)?;
            }
            wait(state)?;
            seconds.push(started.elapsed().as_secs_f64() / self.group as f64);
        }
        Ok(seconds)
    }
}

/// The largest resident set so far.
fn peak_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) / 1024
}
