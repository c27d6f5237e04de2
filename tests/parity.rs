//! The model against transformers and PyTorch, on the committed golden values (`tests/golden/README.md`).

mod goldens;

use std::collections::BTreeMap;
use std::fs;

use goldens::{Case, Tensor, assert_close, cases, read};
use vitmae::cpu::Cpu;
use vitmae::model::{Extras, ImageValues, Images, MaeEncoder, MaeForPreTraining, Masking};
use vitmae::ops::{Linear, LinearShape, Memory, Patchify, Pixels};
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
    // In training only hidden patches are predicted, in micro-batches.
    for case in Case::all().iter().filter(|case| case.interpolation.is_none()) {
        let open = || MaeForPreTraining::from_pretrained(&case.folder, Cpu::<f64>::new()).unwrap();
        let model = open();
        let pixels = case.pixels.f32();
        let images = case.images(&pixels);
        let masking = Masking::Noise { ratio: model.config().mask_ratio, noise: &case.noise };
        let (result, gradients) = model.forward_backward(&images, &masking, None, Extras::default()).unwrap();
        let layout = model.parameters().layout();
        let expected = gradients.download(model.backend(), layout).unwrap();
        let norm = expected.iter().map(|value| value * value).sum::<f64>().sqrt();
        let largest = |values: &[f64]| values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        for micro_batch in [1, 2, 16] {
            let mut trainer = Trainer::new(open(), OptimizerSettings::default(), micro_batch).unwrap();
            trainer.accumulate(&images, &masking, images.batch).unwrap();
            let found = trainer.gradients().download(model.backend(), layout).unwrap();
            for (index, spec) in layout.specs().iter().enumerate() {
                let range = layout.range(index);
                if range.end > layout.trained() {
                    continue;
                }
                // A key's bias has no gradient but rounding: its scale is that of the query's.
                let scale = layout.index(&spec.name.replace("key.bias", "query.bias")).unwrap();
                let scale = largest(&expected[layout.range(scale)]);
                let differences: Vec<f64> = found[range.clone()]
                    .iter()
                    .zip(&expected[range])
                    .map(|(found, expected)| found - expected)
                    .collect();
                let error = largest(&differences);
                assert!(error <= 1e-10 * scale, "{}: {}: {error:.1e} of {scale:.1e}", case.name, spec.name);
            }
            let report = trainer.update(0.0).unwrap();
            assert!((report.loss - result.loss).abs() <= 1e-12 * result.loss.abs(), "{}: loss", case.name);
            let difference = (report.gradient_norm - norm).abs();
            assert!(difference <= 1e-10 * norm, "{}: norm {} and {norm}", case.name, report.gradient_norm);
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

#[test]
fn features_of_visible_patches_are_those_of_transformers() {
    let everything = Extras { hidden_states: true, attentions: true };
    let mut inside = 0;
    for case in Case::all() {
        let pixels = case.pixels.f32();
        let encoder = MaeEncoder::from_pretrained(&case.folder, Cpu::<f32>::new()).unwrap();
        let masking = Masking::Noise { ratio: encoder.config().mask_ratio, noise: &case.noise };
        let result =
            encoder.view().encode_masked(&case.images(&pixels), &masking, case.interpolation, everything).unwrap();
        let close = |name: &str, found: &[f32]| {
            let expected = case.expected.get(name).unwrap_or_else(|| panic!("{}: no {name}", case.name));
            assert_close(&case.name, name, found, expected, OUTPUT_BOUND);
        };
        close("last_hidden_state", &result.last_hidden_state);
        for (layer, state) in result.hidden_states.iter().enumerate() {
            close(&format!("hidden_states.{layer}"), state);
        }
        for (layer, attention) in result.attentions.iter().enumerate() {
            close(&format!("attentions.{layer}"), attention);
        }
        for (name, found) in [("hidden_states.", result.hidden_states.len()), ("attentions.", result.attentions.len())]
        {
            let expected = case.expected.keys().filter(|key| key.starts_with(name)).count();
            assert_eq!(found, expected, "{}: {name}", case.name);
            inside += found;
        }
        let mask: Vec<f64> = result.mask.iter().map(|&value| f64::from(value)).collect();
        assert_eq!(mask, case.expected["mask"].values, "{}: mask", case.name);
        let ids: Vec<f64> = result.ids_restore.iter().map(|&id| f64::from(id)).collect();
        assert_eq!(ids, case.expected["ids_restore"].values, "{}: ids_restore", case.name);
        assert_eq!(case.expected["last_hidden_state"].shape, [result.batch, result.tokens, result.width]);
    }
    assert!(inside > 20, "only {inside} hidden states and attention maps compared");
}

#[test]
fn a_workspace_encodes_as_many_visible_patches_as_it_was_made_for() {
    let case = Case::all().into_iter().find(|case| case.name == "plain").unwrap();
    let pixels = case.pixels.f32();
    let images = case.images(&pixels);
    let encoder = MaeEncoder::from_pretrained(&case.folder, Cpu::<f32>::new()).unwrap();
    let (view, masking) = (encoder.view(), Masking::random(0.5, 3));
    let mut workspace = view.workspace_masked(&images, &masking, None).unwrap();
    let again = view.encode_in(&mut workspace, &images, &masking, Extras::default()).unwrap();
    assert_eq!(again, view.encode_masked(&images, &masking, None, Extras::default()).unwrap());
    let hidden = again.mask.iter().filter(|&&hidden| hidden == 1.0).count();
    assert_eq!(hidden, again.mask.len() - images.batch * (again.tokens - 1));
    assert!(hidden > 0);
    let error = view.encode_in(&mut workspace, &images, &Masking::None, Extras::default()).unwrap_err().to_string();
    assert!(error.contains("patches visible"), "{error}");
    // Without masking every patch is visible, in its own place.
    let whole = view.encode(&images).unwrap();
    let patches = whole.tokens - 1;
    assert!(whole.mask.iter().all(|&hidden| hidden == 0.0));
    assert!(whole.ids_restore.iter().enumerate().all(|(place, &id)| id as usize == place % patches));
}

#[test]
fn visible_patches_embedded_alone_are_those_of_all_patches_embedded() {
    let cpu = Cpu::<f64>::new();
    for case in Case::all().iter().filter(|case| case.interpolation.is_none()) {
        let model = MaeForPreTraining::from_pretrained(&case.folder, Cpu::<f64>::new()).unwrap();
        let (image, width) = (model.config().image(), model.config().hidden_size);
        let (batch, patches, inputs) = (case.pixels.shape[0], image.patches(), image.patch_length());
        let keep = case.expected["last_hidden_state"].shape[1] - 1;
        // The visible patches of each image, in their shuffled order.
        let mut ids_keep = vec![0u32; batch * keep];
        for (place, &rank) in case.expected["ids_restore"].values.iter().enumerate() {
            if (rank as usize) < keep {
                ids_keep[place / patches * keep + rank as usize] = (place % patches) as u32;
            }
        }
        let upload = |values: &[f64]| {
            let mut buffer = cpu.buffer(values.len()).unwrap();
            cpu.upload(&mut buffer, values).unwrap();
            buffer
        };
        let parameter = |name: &str| -> Vec<f64> {
            let name = format!("vit.embeddings.patch_embeddings.projection.{name}");
            model.parameter(&name).unwrap().into_iter().map(f64::from).collect()
        };
        let (weight, bias) = (upload(&parameter("weight")), upload(&parameter("bias")));
        let values = case.pixels.f32();
        let mut pixels = cpu.buffer(values.len()).unwrap();
        cpu.upload(&mut pixels, &values).unwrap();
        let embed = |selected: usize, ids: &[u32]| {
            let mut buffer = cpu.buffer(ids.len()).unwrap();
            cpu.upload(&mut buffer, ids).unwrap();
            let mut rows = cpu.buffer(batch * selected * inputs).unwrap();
            cpu.patchify_visible_forward(image, batch, selected, &mut rows, Pixels::Normalized(&pixels), &buffer)
                .unwrap();
            let shape = LinearShape { rows: batch * selected, inputs, outputs: width };
            let mut embedded = cpu.buffer(batch * selected * width).unwrap();
            cpu.linear_forward(shape, &mut embedded, &rows, &weight, Some(&bias)).unwrap();
            let mut found = vec![0.0f64; batch * selected * width];
            cpu.download(&mut found, &embedded).unwrap();
            found
        };
        let all_ids: Vec<u32> = (0..batch * patches).map(|place| (place % patches) as u32).collect();
        let (all, visible) = (embed(patches, &all_ids), embed(keep, &ids_keep));
        for (row, (&id, found)) in ids_keep.iter().zip(visible.chunks_exact(width)).enumerate() {
            let place = row / keep * patches + id as usize;
            for (found, expected) in found.iter().zip(&all[place * width..]) {
                assert!((found - expected).abs() <= 1e-13 * (1.0 + expected.abs()), "{}: row {row}", case.name);
            }
        }
    }
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
