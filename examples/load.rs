//! Times the loader on one thread the way `benches/peers/loader.py` does, and prints one line of JSON.
//!
//!     cargo run --release --example load -- FOLDER [PICTURES]
//!
//! What training does to a picture before the model sees it: read, decode, random crop of 20 to 100 % resized to 224x224
//! (bicubic), flip. The rate is per second of processor time (Linux) and by the clock.

use std::time::Instant;

use vitmae::data::{Loader, LoaderOptions, Source, SourceOptions, Training, Transform, jpeg_decoder};

const SIZE: usize = 224;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = arguments.first().ok_or("usage: load FOLDER [PICTURES]")?;
    let wanted: usize = arguments.get(1).map_or(Ok(2000), |number| number.parse())?;

    let source = Source::parse(folder, &SourceOptions::new(3, SIZE, SIZE)?)?;
    let batch_size = source.len().min(50);
    let options = LoaderOptions { batch_size, workers: 1, ..LoaderOptions::default() };
    let mut loader = Loader::new(source, Transform::Training(Training::new(SIZE, SIZE)), &options)?;
    // First buffers grow and files enter the system's cache.
    for _ in 0..loader.batches_per_epoch() + 2 {
        loader.next_batch()?;
    }
    let (started, used) = (Instant::now(), processor_seconds());
    let mut pictures = 0;
    while pictures < wanted {
        pictures += loader.next_batch()?.map_or(0, |batch| batch.len());
    }
    let (seconds, used) = (started.elapsed().as_secs_f64(), processor_seconds() - used);
    let decoder = jpeg_decoder();
    println!(
        "{{\"implementation\": \"vitmae, {decoder}\", \"pictures\": {pictures}, \"per_processor_second\": {:.1}, \
         \"per_second\": {:.1}}}",
        pictures as f64 / used,
        pictures as f64 / seconds
    );
    Ok(())
}

/// Of all threads of this process so far; the clock where the system does not say.
fn processor_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds: f64 = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .sum();
    if nanoseconds == 0.0 {
        std::time::UNIX_EPOCH.elapsed().map_or(0.0, |t| t.as_secs_f64())
    } else {
        nanoseconds / 1e9
    }
}
