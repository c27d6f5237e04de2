//! What a trainer does besides plain steps: activations computed again, the loss of other pictures, a moving average of weights.

mod common;

use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{ImageValues, Images, MaeForPreTraining, Masking, MemoryUse, Purpose, WorkspaceShape};
use vitmae::ops::MaskingShape;
use vitmae::train::{OptimizerSettings, Trainer};

fn config() -> MaeConfig {
    common::config((24, 32), [32, 48, 3, 4], [16, 40, 2, 2])
}

fn pixels(batch: usize, factor: usize) -> Vec<u8> {
    (0..batch * config().image().length()).map(|i| (i * factor % 251) as u8).collect()
}

fn images(pixels: &[u8]) -> Images<'_> {
    let image = config().image();
    Images {
        batch: pixels.len() / image.length(),
        channels: image.channels,
        height: image.height,
        width: image.width,
        values: ImageValues::Bytes { values: pixels, mean: &[0.5; 3], std: &[0.25; 3] },
    }
}

fn trainer() -> Trainer<Cpu<f32>> {
    let model = MaeForPreTraining::new(config(), Cpu::<f32>::new(), 3).unwrap();
    Trainer::new(model, OptimizerSettings::default(), 2).unwrap()
}

fn weights(trainer: &Trainer<Cpu<f32>>) -> Vec<Vec<f32>> {
    let model = trainer.model();
    model.parameters().layout().specs().iter().map(|spec| model.parameter(&spec.name).unwrap()).collect()
}

#[test]
fn recomputed_activations_give_bitwise_the_same_training() {
    let pixels = pixels(5, 73);
    let images = images(&pixels);
    let train = |recompute: bool| {
        let mut trainer = trainer();
        trainer.set_recompute(recompute);
        let reports: Vec<_> =
            (0..3).map(|step| trainer.step(&images, &Masking::random(0.6, step), 1e-3).unwrap()).collect();
        let weights = weights(&trainer);
        (reports, weights)
    };
    let (kept, again) = (train(false), train(true));
    assert!(kept.0.iter().all(|report| report.updated && report.gradient_norm > 0.0));
    assert_eq!(kept, again);
}

#[test]
fn recomputing_takes_less_memory() {
    for config in [config(), MaeConfig::base()] {
        let image = config.image();
        let keep = MaskingShape::new(1, image.patches(), config.mask_ratio).unwrap().keep;
        let activations = |recompute: bool| {
            let purpose = Purpose::Train;
            let shape = WorkspaceShape { batch: 8, image, keep, purpose, interpolation: None, recompute };
            MemoryUse::of(&config, &shape).unwrap().activations as f64
        };
        let share = activations(true) / activations(false);
        assert!(share < 0.8, "{share}");
    }
}

#[test]
fn evaluating_gives_the_loss_of_a_forward_pass() {
    let mut trainer = trainer();
    let (learned, other) = (pixels(3, 73), pixels(5, 37));
    for ratio in [0.5, 0.75] {
        trainer.step(&images(&learned), &Masking::random(ratio, 1), 1e-3).unwrap();
        let masking = Masking::random(ratio, 9);
        let loss = trainer.evaluate(&images(&other), &masking).unwrap();
        // All patches at once, and all of the batch.
        let expected = trainer.model().forward(&images(&other), &masking).unwrap().loss;
        assert!((loss - expected).abs() < 1e-6 * expected, "{loss} and {expected}");
    }
}

#[test]
fn evaluating_changes_nothing_of_the_training() {
    let (learned, other) = (pixels(4, 73), pixels(3, 37));
    let (images, other) = (images(&learned), images(&other));
    let train = |evaluate: bool| {
        let mut trainer = trainer();
        let mut reports = Vec::new();
        for step in 0..3 {
            trainer.accumulate(&images, &Masking::random(0.6, step), 4).unwrap();
            trainer.launch_update(1e-3).unwrap();
            // What was brought to the device ahead of time is overwritten, and must be brought there again.
            let next = Masking::random(0.6, step + 1);
            trainer.prefetch(&images, &next).unwrap();
            reports.push(trainer.report().unwrap());
            if evaluate {
                trainer.evaluate(&other, &Masking::random(0.6, 100)).unwrap();
            }
        }
        (reports, weights(&trainer))
    };
    assert_eq!(train(false), train(true));
}

#[test]
fn the_average_follows_the_weights() {
    const DECAY: f64 = 0.7;
    let mut trainer = trainer();
    assert!(!trainer.keeps_average());
    assert!(trainer.keep_average(1.0).is_err() && trainer.keep_average(-0.1).is_err());
    trainer.keep_average(DECAY).unwrap();
    let pixels = pixels(4, 73);
    let mut expected: Vec<Vec<f64>> =
        weights(&trainer).iter().map(|values| values.iter().map(|&value| f64::from(value)).collect()).collect();
    for step in 0..4 {
        trainer.step(&images(&pixels), &Masking::random(0.6, step), 1e-2).unwrap();
        for (average, now) in expected.iter_mut().flatten().zip(weights(&trainer).into_iter().flatten()) {
            *average = DECAY * *average + (1.0 - DECAY) * f64::from(now);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    trainer.save_average(folder.path()).unwrap();
    let average = MaeForPreTraining::from_pretrained(folder.path(), Cpu::<f32>::new()).unwrap();
    let now = weights(&trainer);
    let mut moved = 0;
    for ((spec, expected), now) in average.parameters().layout().specs().iter().zip(&expected).zip(&now) {
        let found = average.parameter(&spec.name).unwrap();
        for ((&found, &expected), &now) in found.iter().zip(expected).zip(now) {
            assert!((f64::from(found) - expected).abs() < 1e-6, "{}: {found} instead of {expected}", spec.name);
            moved += usize::from(found != now);
        }
    }
    assert!(moved > 1000, "only {moved} numbers differ from the weights");
}
