//! The whole model on the CUDA backend, run by the emulator: outputs, gradients, masks and training.
#![cfg(feature = "cuda")]

#[path = "kernels/emulated/mod.rs"]
mod emulated;
mod goldens;
mod rounding;

use std::net::TcpListener;
use std::ops::Range;

use emulated::device;
use goldens::Case;
use half::bf16;
use rounding::Rounding;
use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::cuda::{Cuda, CudaElement};
use vitmae::distributed::{Launch, Meeting, Processes};
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking};
use vitmae::ops::{Backend, Memory, RandomMask};
use vitmae::train::{OptimizerSettings, Sharding, StepReport, Trainer};

/// The emulator with an order of blocks and threads, as a device of the model.
fn cuda<E: CudaElement>(seed: u64) -> Option<Cuda<E>> {
    Some(Cuda::new(device(seed)?.stream()))
}

#[test]
fn f32_outputs_and_gradients_are_those_of_transformers() {
    for case in &Case::all() {
        // In order, and an order that is drawn.
        for seed in [0, 2] {
            let Some(cuda) = cuda::<f32>(seed) else { return };
            let (output, gradient) = case.check(cuda, 1e-5, 1e-4);
            println!("{:32} outputs {output:.1e}  gradients {gradient:.1e}", case.name);
        }
    }
}

/// Whether bf16's attention takes a model's heads.
fn takes_bf16(case: &Case) -> bool {
    let config = MaeConfig::from_file(case.folder.join("config.json")).unwrap();
    let heads = config.hidden_size / config.num_attention_heads;
    let decoder_heads = config.decoder_hidden_size / config.decoder_num_attention_heads;
    heads.is_multiple_of(8) && decoder_heads.is_multiple_of(8)
}

#[test]
fn bf16_outputs_and_gradients_are_those_of_transformers_but_for_rounding() {
    let mut compared = 0;
    for case in Case::all().iter().filter(|case| takes_bf16(case)) {
        let naive = case.errors(Rounding::default());
        for seed in [0, 2] {
            let Some(cuda) = cuda::<bf16>(seed) else { return };
            let mut worst = 0.0f64;
            for ((name, naive), (_, found)) in naive.iter().zip(case.errors(cuda)) {
                let factor = if name.starts_with("grad.") { 3.0 } else { 2.0 };
                // Where few numbers are rounded, the naive computation may be right by luck: half a unit in bf16's last place.
                let allowed = factor * naive + 1.0 / 512.0;
                // Written so that a NaN fails.
                assert!(found <= allowed, "{}, seed {seed}: {name}: {found:.1e}, naive {naive:.1e}", case.name);
                worst = worst.max(found / (naive + 1.0 / 512.0));
            }
            println!("{:32} at most {worst:.2} of the naive error", case.name);
        }
        compared += 1;
    }
    assert!(compared >= 10, "only {compared} golden cases have heads of multiples of 8");
}

/// A small model for pictures of 16 x 24 pixels, with heads of `head` and `decoder_head` numbers.
fn config(head: usize, heads: usize, decoder_head: usize, decoder_heads: usize) -> MaeConfig {
    let mut config = MaeConfig::tiny();
    config.image_size = (16, 24).into();
    config.patch_size = (8, 8).into();
    config.hidden_size = head * heads;
    config.num_attention_heads = heads;
    config.intermediate_size = 2 * head * heads;
    config.num_hidden_layers = 1;
    config.decoder_hidden_size = decoder_head * decoder_heads;
    config.decoder_num_attention_heads = decoder_heads;
    config.decoder_intermediate_size = 2 * decoder_head * decoder_heads;
    config.decoder_num_hidden_layers = 1;
    config.mask_ratio = 0.6;
    config
}

/// Pictures as bytes, `[B, H, W, C]`.
fn pictures(config: &MaeConfig, batch: usize, seed: usize) -> Vec<u8> {
    let length = batch * config.image().length();
    (0..length).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 13 & 0xff) as u8).collect()
}

fn images<'a>(config: &MaeConfig, batch: usize, pixels: &'a [u8]) -> Images<'a> {
    let image = config.image();
    let values = ImageValues::Bytes { values: pixels, mean: &[0.5, 0.45, 0.4], std: &[0.22, 0.25, 0.3] };
    Images { batch, channels: image.channels, height: image.height, width: image.width, values }
}

/// Named results of a forward and backward pass.
fn results<B: Backend>(config: &MaeConfig, backend: B) -> Vec<(String, Vec<f32>)> {
    let model = MaeForPreTraining::new(config.clone(), backend, 5).unwrap();
    let pixels = pictures(config, 2, 0);
    let masking = Masking::random(config.mask_ratio, 11);
    let (result, gradients) =
        model.forward_backward(&images(config, 2, &pixels), &masking, None, Extras::default()).unwrap();
    let mut results = vec![
        ("mask".to_string(), result.mask),
        ("loss".to_string(), vec![result.loss as f32]),
        ("logits".to_string(), result.logits),
        ("last_hidden_state".to_string(), result.last_hidden_state),
    ];
    let layout = model.parameters().layout();
    for (index, spec) in layout.specs().iter().enumerate() {
        if let Some(gradient) = gradients.get(model.backend(), layout, index).unwrap() {
            results.push((format!("grad.{}", spec.name), gradient));
        }
    }
    results
}

#[test]
fn bf16_is_about_as_exact_as_rounding_every_activation() {
    // Heads of the encoders and decoders of B, L and H, and small ones.
    for (index, config) in [config(64, 1, 32, 1), config(80, 1, 32, 2), config(16, 3, 8, 3)].iter().enumerate() {
        let Some(cuda) = cuda::<bf16>([1, 3][index % 2]) else { return };
        let reference = results(config, Cpu::<f64>::new());
        let naive = results(config, Rounding::default());
        let found = results(config, cuda);
        let scale = |name: &str| -> f64 {
            let values = &reference.iter().find(|(other, _)| other == name).unwrap().1;
            values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
        };
        let mut worst = 0.0f64;
        for (((name, reference), (_, naive)), (_, found)) in reference.iter().zip(&naive).zip(&found) {
            if name == "mask" {
                assert_eq!(found, reference, "masks do not depend on the device");
                continue;
            }
            let norm = |values: &[f32]| -> f64 {
                let squares = values.iter().zip(reference).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
                squares.sum::<f64>().sqrt()
            };
            let factor = if name.starts_with("grad.") { 3.0 } else { 2.0 };
            // A key's bias has no gradient but rounding: its scale is that of the query's.
            let small = 2e-3 * scale(&name.replace("key.bias", "query.bias"));
            let (naive, found) = (norm(naive), norm(found));
            assert!(found <= factor * naive + small, "{name}: error {found:.2e}, naive {naive:.2e}, small {small:.2e}");
            worst = worst.max(found / (naive + small));
        }
        println!("configuration {index}: at most {worst:.2} of the naive error");
    }
}

#[test]
fn masks_do_not_depend_on_the_device() {
    let Some(cuda) = cuda::<f32>(3) else { return };
    let config = config(8, 1, 8, 1);
    let pixels = pictures(&config, 3, 0);
    fn masks<B: Backend>(config: &MaeConfig, backend: B, pixels: &[u8]) -> (Vec<f32>, Vec<u32>) {
        let model = MaeForPreTraining::new(config.clone(), backend, 0).unwrap();
        let result = model.forward(&images(config, 3, pixels), &Masking::random(0.5, 77)).unwrap();
        (result.mask, result.ids_restore)
    }
    assert_eq!(masks(&config, cuda, &pixels), masks(&config, Cpu::<f32>::new(), &pixels));
}

/// Reports and weights of a few training steps, of batches of three in micro-batches of two, with another mask, other
/// pictures and another learning rate each.
fn train<B: Backend>(
    backend: B,
    recording: bool,
    recompute: bool,
    mut behind: impl FnMut(&B),
) -> (Vec<StepReport>, Vec<(String, Vec<f32>)>) {
    let config = config(16, 1, 8, 2);
    let model = MaeForPreTraining::new(config.clone(), backend, 9).unwrap();
    let mut trainer = Trainer::new(model, OptimizerSettings::default(), 2).unwrap();
    trainer.set_recording(recording);
    trainer.set_recompute(recompute);
    let mut reports = Vec::new();
    for step in 0..4u64 {
        let pixels = pictures(&config, 3, 1000 * step as usize);
        let (images, masking) = (images(&config, 3, &pixels), Masking::random(config.mask_ratio, step));
        if recording {
            trainer.prefetch(&images, &masking).unwrap();
        }
        reports.push(trainer.step(&images, &masking, 1e-3 * (step + 1) as f64).unwrap());
        behind(trainer.model().backend());
    }
    let model = trainer.into_model();
    let names: Vec<String> = model.parameters().layout().specs().iter().map(|spec| spec.name.clone()).collect();
    let weights = names.into_iter().map(|name| {
        let values = model.parameter(&name).unwrap();
        (name, values)
    });
    (reports, weights.collect())
}

fn replay<E: CudaElement>(loss_bound: f64, weight_bound: f64)
where
    Cuda<E>: Backend,
{
    let Some(one_by_one) = cuda::<E>(0) else { return };
    let launched = train(one_by_one, false, false, |_| ());
    let mut allocations = Vec::new();
    let replayed = train(cuda::<E>(2).unwrap(), true, false, |cuda| allocations.push(cuda.stream().allocations()));
    assert_eq!(replayed, launched);
    // The first step makes the buffers, the second records.
    assert_eq!(allocations[2], allocations[1], "{allocations:?}");
    assert_eq!(allocations[3], allocations[1], "{allocations:?}");
    // Scratch memory that moves makes recordings useless: the passes are recorded again.
    let mut step = 0;
    let moved = train(cuda::<E>(1).unwrap(), true, false, |cuda| {
        step += 1;
        cuda.with_scratch((1 << 16) << step, |_| Ok(())).unwrap();
    });
    assert_eq!(moved, launched);
    let (reports, weights) = train(Cpu::<f64>::new(), true, false, |_| ());
    for (found, expected) in replayed.0.iter().zip(&reports) {
        let error = (found.loss - expected.loss).abs() / expected.loss;
        assert!(found.updated && error <= loss_bound, "{found:?} instead of {expected:?}");
    }
    assert!(reports[3].loss < reports[0].loss);
    for ((name, found), (_, expected)) in replayed.1.iter().zip(&weights) {
        let expected: Vec<f64> = expected.iter().map(|&value| f64::from(value)).collect();
        // AdamW steps by at most about the learning rate in either direction, 0.01 in all, where a gradient is near zero.
        let pairs = || found.iter().zip(&expected).map(|(&found, &expected)| (f64::from(found) - expected).abs());
        let (largest, mean) = (pairs().fold(0.0, f64::max), pairs().sum::<f64>() / expected.len() as f64);
        assert!(largest < 0.022, "{name}: {largest:.1e}");
        // A key's bias has no gradient but rounding.
        assert!(name.ends_with("key.bias") || mean < weight_bound, "{name}: {mean:.1e} on average");
    }
}

#[test]
fn replayed_steps_are_bitwise_those_launched_one_by_one_in_f32() {
    replay::<f32>(1e-5, 1e-4);
}

#[test]
fn replayed_steps_are_bitwise_those_launched_one_by_one_in_bf16() {
    replay::<bf16>(2e-2, 4e-3);
}

fn recompute<E: CudaElement>()
where
    Cuda<E>: Backend,
{
    let Some(kept) = cuda::<E>(0) else { return };
    let kept = train(kept, false, false, |_| ());
    for (seed, recording) in [(0, false), (2, true)] {
        let again = train(cuda::<E>(seed).unwrap(), recording, true, |_| ());
        assert_eq!(again, kept, "recorded: {recording}");
    }
}

#[test]
fn recomputed_activations_give_bitwise_the_same_training_in_f32() {
    recompute::<f32>();
}

#[test]
fn recomputed_activations_give_bitwise_the_same_training_in_bf16() {
    recompute::<bf16>();
}

/// Losses and gradient norms of three steps (launched, recorded, replayed) on images `part` of four, and the weights behind them.
/// Gradients are added up in small buckets while backward goes on, or all at once where there is no bucket.
fn steps<E: CudaElement>(
    part: Range<usize>,
    processes: &Processes,
    cuda: Cuda<E>,
    (bucket, sharding): (Option<usize>, Sharding),
) -> (Vec<StepReport>, Vec<f32>)
where
    Cuda<E>: Backend,
{
    let config = config(8, 2, 8, 2);
    let (pixels, length) = (pictures(&config, 4, 3), config.image().length());
    let own = &pixels[part.start * length..part.end * length];
    let model = MaeForPreTraining::new(config.clone(), cuda, 7).unwrap();
    let mut trainer = Trainer::together(model, OptimizerSettings::default(), 2, processes, sharding).unwrap();
    if let Some(bucket) = bucket {
        trainer.set_bucket(bucket).unwrap();
    }
    let step = |epoch| {
        let random = RandomMask { seed: 1, epoch };
        let masking = Masking::Random { ratio: config.mask_ratio, random, samples: None, first: part.start as u64 };
        if bucket.is_some() {
            trainer.accumulate_together(&images(&config, part.len(), own), &masking, 4).unwrap();
        } else {
            trainer.accumulate(&images(&config, part.len(), own), &masking, 4).unwrap();
            trainer.all_reduce().unwrap();
        }
        trainer.update(1e-3).unwrap()
    };
    let reports = (0..3).map(step).collect();
    let names = trainer.model().parameters().layout().specs();
    (reports, names.iter().flat_map(|spec| trainer.model().parameter(&spec.name).unwrap()).collect())
}

/// The same in two processes.
fn steps_of_two<E: CudaElement>(how: (Option<usize>, Sharding)) -> (Vec<StepReport>, Vec<f32>)
where
    Cuda<E>: Backend,
{
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let process = |rank: usize| {
        let meeting = Meeting {
            rank,
            size: 2,
            local_rank: 0,
            local_size: 1,
            address: "127.0.0.1".into(),
            port,
            run: String::new(),
        };
        let processes = Processes::join(&Launch::Tcp(meeting)).unwrap();
        steps(2 * rank..2 * rank + 2, &processes, cuda::<E>(2).unwrap(), how)
    };
    let [first, second] = std::thread::scope(|scope| {
        [0, 1].map(|rank| scope.spawn(move || process(rank))).map(|thread| thread.join().unwrap())
    });
    assert!(first == second, "the processes have different results");
    first
}

#[test]
fn processes_whose_devices_have_no_way_to_each_other_make_the_steps_of_one() {
    let Some(one) = cuda(0) else { return };
    let (alone, _) = steps::<f32>(0..4, &Processes::single(), one, (None, Sharding::Nothing));
    let (two, _) = steps_of_two::<f32>((None, Sharding::Nothing));
    for (one, two) in alone.iter().zip(&two) {
        assert!(two.updated && (one.loss - two.loss).abs() < 1e-5 * one.loss, "{one:?} {two:?}");
        assert!((one.gradient_norm - two.gradient_norm).abs() < 1e-5 * one.gradient_norm, "{one:?} {two:?}");
    }
}

fn parts<E: CudaElement>()
where
    Cuda<E>: Backend,
{
    if cuda::<E>(0).is_none() {
        return;
    }
    let whole = steps_of_two::<E>((None, Sharding::Nothing));
    for bucket in [64, 5_000, usize::MAX] {
        assert!(steps_of_two::<E>((Some(bucket), Sharding::Nothing)) == whole, "buckets of {bucket}");
    }
    assert!(steps_of_two::<E>((Some(5_000), Sharding::Optimizer)) == whole, "a shared optimiser");
}

#[test]
fn sums_between_the_parts_of_backward_and_a_shared_optimizer_change_no_bit_in_f32() {
    parts::<f32>();
}

#[test]
fn sums_between_the_parts_of_backward_and_a_shared_optimizer_change_no_bit_in_bf16() {
    parts::<bf16>();
}

#[test]
fn a_device_without_enough_memory_says_what_to_do() {
    let Some(cuda) = cuda::<f32>(0) else { return };
    let error = cuda.buffer::<f32>(1 << 48).expect_err("more than there is").to_string();
    assert!(error.contains("smaller batch"), "{error}");
}
