//! Golden values of transformers and PyTorch (`tests/golden/README.md`), for the tests that compare with them.

// A test binary uses some of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking, PositionInterpolation};
use vitmae::ops::Backend;

pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Tensor {
    pub fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|&value| value as f32).collect()
    }
}

pub fn read(path: &Path) -> BTreeMap<String, Tensor> {
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

pub fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases")
}

/// The largest difference over the largest expected value, and the same of the Euclidean norms; the greater of the two.
pub fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
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

pub fn assert_close(case: &str, name: &str, found: &[f32], expected: &Tensor, bound: f64) -> f64 {
    assert_eq!(found.len(), expected.values.len(), "{case}: {name} should have shape {:?}", expected.shape);
    let error = relative_error(found, &expected.values);
    assert!(error <= bound, "{case}: {name}: relative error {error:.2e} > {bound:.0e}");
    error
}

pub struct Case {
    pub name: String,
    pub folder: PathBuf,
    pub expected: BTreeMap<String, Tensor>,
    pub pixels: Tensor,
    pub noise: Vec<f32>,
    pub interpolation: Option<PositionInterpolation>,
}

impl Case {
    /// Every folder that has a whole model, an input and outputs to compare.
    pub fn all() -> Vec<Self> {
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

    pub fn open(folder: &Path) -> Option<Self> {
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

    pub fn images<'a>(&self, values: &'a [f32]) -> Images<'a> {
        let [batch, channels, height, width] = self.pixels.shape[..] else { panic!("pixels have four dimensions") };
        Images { batch, channels, height, width, values: ImageValues::Normalized(values) }
    }

    /// Relative errors of everything that transformers gave, by name, of a device that rounds more than f32. A key's bias has
    /// no gradient but rounding and is left out; so are gradients where nothing is learned.
    pub fn errors<B: Backend>(&self, backend: B) -> Vec<(String, f64)> {
        let everything = Extras { hidden_states: true, attentions: true };
        let model = MaeForPreTraining::from_pretrained(&self.folder, backend).unwrap();
        let pixels = self.pixels.f32();
        let images = self.images(&pixels);
        let masking = Masking::Noise { ratio: model.config().mask_ratio, noise: &self.noise };
        let (result, gradients) = model.forward_backward(&images, &masking, self.interpolation, everything).unwrap();
        let ids: Vec<f64> = result.ids_restore.iter().map(|&id| f64::from(id)).collect();
        assert_eq!(ids, self.expected["ids_restore"].values, "{}: ids_restore", self.name);

        let mut found = vec![
            ("loss".to_string(), vec![result.loss as f32]),
            ("logits".to_string(), result.logits),
            ("last_hidden_state".to_string(), result.last_hidden_state),
        ];
        let numbered = |name: &str, all: Vec<Vec<f32>>| {
            all.into_iter().enumerate().map(|(layer, values)| (format!("{name}.{layer}"), values)).collect::<Vec<_>>()
        };
        found.extend(numbered("hidden_states", result.hidden_states));
        found.extend(numbered("attentions", result.attentions));
        let layout = model.parameters().layout();
        for (index, spec) in layout.specs().iter().enumerate() {
            let name = format!("grad.{}", spec.name);
            if !self.expected.contains_key(&name) || name.ends_with("key.bias") {
                continue;
            }
            let gradient = gradients.get(model.backend(), layout, index).unwrap().expect("transformers trains it");
            found.push((name, gradient));
        }
        let error = |(name, values): (String, Vec<f32>)| {
            let error = relative_error(&values, &self.expected[&name].values);
            (name, error)
        };
        found.into_iter().map(error).collect()
    }

    /// Runs the model forward and backward on a device, checks everything that transformers gave, and returns the greatest
    /// relative errors of outputs and of gradients.
    pub fn check<B: Backend>(&self, backend: B, output_bound: f64, gradient_bound: f64) -> (f64, f64) {
        let everything = Extras { hidden_states: true, attentions: true };
        let model = MaeForPreTraining::from_pretrained(&self.folder, backend).unwrap();
        let pixels = self.pixels.f32();
        let images = self.images(&pixels);
        let masking = Masking::Noise { ratio: model.config().mask_ratio, noise: &self.noise };
        let (result, gradients) = model.forward_backward(&images, &masking, self.interpolation, everything).unwrap();

        let expected = |name: &str| &self.expected[name];
        let ids: Vec<f64> = result.ids_restore.iter().map(|&id| f64::from(id)).collect();
        assert_eq!(ids, expected("ids_restore").values, "{}: ids_restore", self.name);
        let mask: Vec<f64> = result.mask.iter().map(|&value| f64::from(value)).collect();
        assert_eq!(mask, expected("mask").values, "{}: mask", self.name);

        let mut worst = 0.0f64;
        let mut close = |name: &str, found: &[f32]| {
            worst = worst.max(assert_close(&self.name, name, found, expected(name), output_bound));
        };
        close("loss", &[result.loss as f32]);
        close("logits", &result.logits);
        close("last_hidden_state", &result.last_hidden_state);
        for (layer, state) in result.hidden_states.iter().enumerate() {
            close(&format!("hidden_states.{layer}"), state);
        }
        for (layer, attention) in result.attentions.iter().enumerate() {
            close(&format!("attentions.{layer}"), attention);
        }
        let states = self.expected.keys().filter(|name| name.starts_with("hidden_states.")).count();
        assert_eq!(result.hidden_states.len(), states, "{}: hidden states", self.name);
        let attentions = self.expected.keys().filter(|name| name.starts_with("attentions.")).count();
        assert_eq!(result.attentions.len(), attentions, "{}: attentions", self.name);

        let layout = model.parameters().layout();
        let expects_gradients = self.expected.keys().any(|name| name.starts_with("grad."));
        let mut worst_gradient = 0.0f64;
        for (index, spec) in layout.specs().iter().enumerate() {
            let name = format!("grad.{}", spec.name);
            let Some(found) = gradients.get(model.backend(), layout, index).unwrap() else {
                assert!(!self.expected.contains_key(&name), "{}: {name} is missing", self.name);
                continue;
            };
            let Some(expected) = self.expected.get(&name) else {
                assert!(!expects_gradients, "{}: {name} should not be trained", self.name);
                // Nothing is hidden, so nothing is learned.
                assert!(found.iter().all(|&value| value == 0.0), "{}: {name} should be zero", self.name);
                continue;
            };
            if spec.name.ends_with("key.bias") {
                // Zero in exact arithmetic: adding the same to every key changes no softmax. What is left is rounding, to be
                // compared with the gradient of the query's bias beside it.
                // Where that is zero too, because a token attends to itself alone, an f32's rounding of the value's is left.
                let largest_of = |what: &str| {
                    let values = &self.expected[&name.replace("key", what)].values;
                    values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()))
                };
                let query = largest_of("query");
                let bound = if query == 0.0 { 1e-6 * largest_of("value") } else { gradient_bound * query.max(1e-6) };
                let largest = found.iter().fold(0.0f64, |largest, &value| largest.max(f64::from(value).abs()));
                assert!(largest <= bound, "{}: {name}: {largest:.2e}", self.name);
                continue;
            }
            worst_gradient = worst_gradient.max(assert_close(&self.name, &name, &found, expected, gradient_bound));
        }
        (worst, worst_gradient)
    }
}
