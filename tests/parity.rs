//! The model against transformers and PyTorch, on the committed golden values (`tests/golden/README.md`).

mod goldens;

use std::collections::BTreeMap;
use std::fs;

use goldens::{Case, Tensor, assert_close, cases, read};
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeEncoder, MaeForPreTraining, Masking};
use vitmae::train::{OptimizerSettings, Trainer};

/// Of loss, predictions, hidden states and attention.
const OUTPUT_BOUND: f64 = 1e-5;
/// Of every gradient.
const GRADIENT_BOUND: f64 = 1e-4;

#[test]
fn outputs_and_gradients_are_those_of_transformers() {
    for case in Case::all() {
        let (output, gradient) = case.check(Cpu::<f32>::new(), OUTPUT_BOUND, GRADIENT_BOUND);
        println!("{:32} outputs {output:.1e}  gradients {gradient:.1e}", case.name);
    }
}

#[test]
fn the_training_path_gives_the_same_loss_and_gradients_as_predicting_everything() {
    // In training only hidden patches are predicted, in micro-batches. One AdamW-free way to see the gradients: their norm.
    for case in Case::all().iter().filter(|case| case.interpolation.is_none()) {
        let open = || MaeForPreTraining::from_pretrained(&case.folder, Cpu::<f64>::new()).unwrap();
        let model = open();
        let pixels = case.pixels.f32();
        let images = case.images(&pixels);
        let masking = Masking::Noise { ratio: model.config().mask_ratio, noise: &case.noise };
        let (result, gradients) = model.forward_backward(&images, &masking, None, Extras::default()).unwrap();
        let layout = model.parameters().layout();
        let norm = (0..layout.specs().len())
            .filter_map(|index| gradients.get(model.backend(), layout, index).unwrap())
            .flatten()
            .map(|value| f64::from(value).powi(2))
            .sum::<f64>()
            .sqrt();
        for micro_batch in [1, 2, 16] {
            let mut trainer = Trainer::new(open(), OptimizerSettings::default(), micro_batch).unwrap();
            let report = trainer.step(&images, &masking, 0.0).unwrap();
            assert!((report.loss - result.loss).abs() <= 1e-12 * result.loss.abs(), "{}: loss", case.name);
            let difference = (report.gradient_norm - norm).abs();
            assert!(difference <= 1e-6 * norm, "{}: norm {} and {norm}", case.name, report.gradient_norm);
        }
    }
}

#[test]
fn features_without_masking_are_those_of_transformers() {
    let mut compared = 0;
    for case in Case::all() {
        let Some(expected) = case.expected.get("encoded") else { continue };
        let pixels = case.pixels.f32();
        let encoder = MaeEncoder::from_pretrained(&case.folder, Cpu::<f32>::new()).unwrap();
        let result = encoder.view().encode_with(&case.images(&pixels), case.interpolation, Extras::default()).unwrap();
        assert_close(&case.name, "encoded", &result.last_hidden_state, expected, OUTPUT_BOUND);
        compared += 1;
    }
    assert!(compared >= 10, "only {compared} cases have features");
}

/// Pixels and noise of one step of the AdamW case.
fn adamw_step(trainer: &mut Trainer<Cpu>, input: &BTreeMap<String, Tensor>, step: usize) -> vitmae::Result<()> {
    let pixels = &input[&format!("pixel_values.{step}")];
    let [batch, channels, height, width] = pixels.shape[..] else { panic!("pixels have four dimensions") };
    let (values, noise) = (pixels.f32(), input[&format!("noise.{step}")].f32());
    let images = Images { batch, channels, height, width, values: ImageValues::Normalized(&values) };
    let ratio = trainer.model().config().mask_ratio;
    trainer.accumulate(&images, &Masking::Noise { ratio, noise: &noise }, batch)
}

fn adamw_trainer() -> (Trainer<Cpu>, BTreeMap<String, Tensor>) {
    let folder = cases().join("adamw");
    let model = MaeForPreTraining::from_pretrained(&folder, Cpu::<f32>::new()).unwrap();
    let settings = OptimizerSettings { clip_norm: Some(0.1), ..OptimizerSettings::default() };
    (Trainer::new(model, settings, 8).unwrap(), read(&folder.join("input.safetensors")))
}

#[test]
fn a_report_that_is_read_late_changes_nothing() {
    let ((mut late, input), (mut early, _)) = (adamw_trainer(), adamw_trainer());
    let mut last = None;
    for step in 0..3 {
        adamw_step(&mut early, &input, step).unwrap();
        last = Some(early.update(1e-3).unwrap());
        adamw_step(&mut late, &input, step).unwrap();
        late.launch_update(1e-3).unwrap();
    }
    assert_eq!(Some(late.report().unwrap()), last);
    assert_eq!((late.updates(), late.non_finite_steps()), (3, 0));
    for spec in early.model().parameters().layout().specs() {
        let (early, late) = (early.model().parameter(&spec.name), late.model().parameter(&spec.name));
        assert_eq!(early.unwrap(), late.unwrap(), "{}", spec.name);
    }
}

#[test]
fn ten_steps_in_a_row_that_are_not_finite_end_a_run() {
    let (mut trainer, input) = adamw_trainer();
    adamw_step(&mut trainer, &input, 0).unwrap();
    // Breaks the weights.
    assert!(trainer.update(f64::INFINITY).unwrap().updated);
    for skipped in 1..=10 {
        adamw_step(&mut trainer, &input, 1).unwrap();
        match trainer.update(1e-3) {
            Ok(report) => assert!(skipped < 10 && !report.updated && !report.loss.is_finite(), "{report:?}"),
            Err(error) => assert!(skipped == 10 && error.to_string().contains("10 steps in a row"), "{error}"),
        }
        assert_eq!((trainer.updates(), trainer.non_finite_steps()), (1, skipped));
    }
}

#[test]
fn five_adamw_steps_follow_pytorch() {
    let folder = cases().join("adamw");
    let input = read(&folder.join("input.safetensors"));
    let expected = read(&folder.join("expected.safetensors"));
    let text = fs::read_to_string(folder.join("case.json")).unwrap();
    let case: serde_json::Value = serde_json::from_str(&text).unwrap();
    let number = |name: &str| case[name].as_f64().unwrap();
    let settings = OptimizerSettings {
        betas: (case["betas"][0].as_f64().unwrap(), case["betas"][1].as_f64().unwrap()),
        epsilon: number("eps"),
        weight_decay: number("weight_decay"),
        clip_norm: None,
    };
    // Micro-batches of one image: accumulation is exact.
    for micro_batch in [1, 8] {
        let model = MaeForPreTraining::from_pretrained(&folder, Cpu::<f32>::new()).unwrap();
        let mut trainer = Trainer::new(model, settings, micro_batch).unwrap();
        for step in 0..5 {
            adamw_step(&mut trainer, &input, step).unwrap();
            let report = trainer.update(number("learning_rate")).unwrap();
            let loss = expected["losses"].values[step];
            let error = (report.loss - loss).abs() / loss;
            assert!(error <= 1e-4, "step {step}: loss {} instead of {loss}", report.loss);
        }
        let model = trainer.model();
        for spec in model.parameters().layout().specs() {
            if let Some(expected) = expected.get(&format!("param.{}", spec.name)) {
                // Where a gradient is zero but for rounding, AdamW still steps by the learning rate, in either direction.
                if !spec.name.ends_with("key.bias") {
                    let found = model.parameter(&spec.name).unwrap();
                    assert_close("adamw", &spec.name, &found, expected, 1e-3);
                }
            }
        }
    }
}
