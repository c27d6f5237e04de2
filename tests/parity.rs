//! The model against transformers and PyTorch, on the committed golden values (`tests/golden/README.md`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeEncoder, MaeForPreTraining, Masking, PositionInterpolation};
use vitmae::train::{OptimizerSettings, Trainer};

/// Of loss, predictions, hidden states and attention.
const OUTPUT_BOUND: f64 = 1e-5;
/// Of every gradient.
const GRADIENT_BOUND: f64 = 1e-4;

struct Tensor {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Tensor {
    fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|&value| value as f32).collect()
    }
}

fn read(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
                }
                Dtype::F64 => data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::I64 => data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
                other => panic!("{name} has type {other:?}"),
            };
            (name, Tensor { shape: view.shape().to_vec(), values })
        })
        .collect()
}

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases")
}

/// The largest difference over the largest expected value, and the same of the Euclidean norms; the greater of the two.
fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let differences = || found.iter().zip(expected).map(|(&found, &expected)| (f64::from(found) - expected).abs());
    let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    if largest == 0.0 {
        return differences().fold(0.0, f64::max);
    }
    let norm = expected.iter().map(|value| value * value).sum::<f64>().sqrt();
    let by_norm = differences().map(|difference| difference * difference).sum::<f64>().sqrt() / norm;
    assert!(by_norm.is_finite(), "a value is not finite");
    by_norm.max(differences().fold(0.0, f64::max) / largest)
}

fn assert_close(case: &str, name: &str, found: &[f32], expected: &Tensor, bound: f64) -> f64 {
    assert_eq!(found.len(), expected.values.len(), "{case}: {name} should have shape {:?}", expected.shape);
    let error = relative_error(found, &expected.values);
    assert!(error <= bound, "{case}: {name}: relative error {error:.2e} > {bound:.0e}");
    error
}

struct Case {
    name: String,
    folder: PathBuf,
    expected: BTreeMap<String, Tensor>,
    pixels: Tensor,
    noise: Vec<f32>,
    interpolation: Option<PositionInterpolation>,
}

impl Case {
    /// Every folder that has a whole model, an input and outputs to compare.
    fn all() -> Vec<Self> {
        let mut cases: Vec<Self> = fs::read_dir(cases())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|folder| folder.join("model.safetensors").exists() && folder.join("expected.safetensors").exists())
            .filter_map(|folder| Self::open(&folder))
            .collect();
        cases.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(cases.len() >= 20, "only {} golden cases found", cases.len());
        cases
    }

    fn open(folder: &Path) -> Option<Self> {
        let expected = read(&folder.join("expected.safetensors"));
        if !expected.contains_key("logits") || !expected.contains_key("ids_restore") {
            return None;
        }
        let mut input = read(&folder.join("input.safetensors"));
        let text = fs::read_to_string(folder.join("case.json")).unwrap();
        let case: serde_json::Value = serde_json::from_str(&text).unwrap();
        Some(Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            folder: folder.to_owned(),
            expected,
            pixels: input.remove("pixel_values").unwrap(),
            noise: input["noise"].f32(),
            interpolation: match case["interpolate_pos_encoding"].as_str() {
                None => None,
                Some("2d") => Some(PositionInterpolation::Grid),
                Some("transformers") => Some(PositionInterpolation::Transformers),
                Some(other) => panic!("unknown interpolation {other}"),
            },
        })
    }

    fn images<'a>(&self, values: &'a [f32]) -> Images<'a> {
        let [batch, channels, height, width] = self.pixels.shape[..] else { panic!("pixels have four dimensions") };
        Images { batch, channels, height, width, values: ImageValues::Normalized(values) }
    }
}

#[test]
fn outputs_and_gradients_are_those_of_transformers() {
    let everything = Extras { hidden_states: true, attentions: true };
    for case in Case::all() {
        let model = MaeForPreTraining::from_pretrained(&case.folder, Cpu::<f32>::new()).unwrap();
        let pixels = case.pixels.f32();
        let images = case.images(&pixels);
        let masking = Masking::Noise { ratio: model.config().mask_ratio, noise: &case.noise };
        let (result, gradients) = model.forward_backward(&images, &masking, case.interpolation, everything).unwrap();

        let expected = |name: &str| &case.expected[name];
        let ids: Vec<f64> = result.ids_restore.iter().map(|&id| f64::from(id)).collect();
        assert_eq!(ids, expected("ids_restore").values, "{}: ids_restore", case.name);
        let mask: Vec<f64> = result.mask.iter().map(|&value| f64::from(value)).collect();
        assert_eq!(mask, expected("mask").values, "{}: mask", case.name);

        let mut worst = 0.0f64;
        let mut close = |name: &str, found: &[f32], bound: f64| {
            worst = worst.max(assert_close(&case.name, name, found, expected(name), bound));
        };
        close("loss", &[result.loss as f32], OUTPUT_BOUND);
        close("logits", &result.logits, OUTPUT_BOUND);
        close("last_hidden_state", &result.last_hidden_state, OUTPUT_BOUND);
        for (layer, state) in result.hidden_states.iter().enumerate() {
            close(&format!("hidden_states.{layer}"), state, OUTPUT_BOUND);
        }
        for (layer, attention) in result.attentions.iter().enumerate() {
            close(&format!("attentions.{layer}"), attention, OUTPUT_BOUND);
        }
        let states = case.expected.keys().filter(|name| name.starts_with("hidden_states.")).count();
        assert_eq!(result.hidden_states.len(), states, "{}: hidden states", case.name);
        let attentions = case.expected.keys().filter(|name| name.starts_with("attentions.")).count();
        assert_eq!(result.attentions.len(), attentions, "{}: attentions", case.name);

        let layout = model.parameters().layout();
        let expects_gradients = case.expected.keys().any(|name| name.starts_with("grad."));
        let mut worst_gradient = 0.0f64;
        for (index, spec) in layout.specs().iter().enumerate() {
            let name = format!("grad.{}", spec.name);
            let Some(found) = gradients.get(model.backend(), layout, index).unwrap() else {
                assert!(!case.expected.contains_key(&name), "{}: {name} is missing", case.name);
                continue;
            };
            let Some(expected) = case.expected.get(&name) else {
                assert!(!expects_gradients, "{}: {name} should not be trained", case.name);
                // Nothing is hidden, so nothing is learned.
                assert!(found.iter().all(|&value| value == 0.0), "{}: {name} should be zero", case.name);
                continue;
            };
            if spec.name.ends_with("key.bias") {
                // Zero in exact arithmetic: adding the same to every key changes no softmax. What is left is rounding, to be
                // compared with the gradient of the query's bias beside it.
                let query = &case.expected[&name.replace("key", "query")];
                let scale = query.values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
                let largest = found.iter().fold(0.0f64, |largest, &value| largest.max(f64::from(value).abs()));
                assert!(largest <= GRADIENT_BOUND * scale.max(1e-6), "{}: {name}: {largest:.2e}", case.name);
                continue;
            }
            worst_gradient = worst_gradient.max(assert_close(&case.name, &name, &found, expected, GRADIENT_BOUND));
        }
        println!("{:32} outputs {worst:.1e}  gradients {worst_gradient:.1e}", case.name);
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
