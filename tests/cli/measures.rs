//! What a run says of its own speed, and when it gives up.

use std::fs;

use serde_json::Value;
use vitmae::config::MaeConfig;

use crate::pretraining::{model, records, values};
use crate::{Place, files, run, small_config};

/// Multiply-adds of a stack of blocks in its linear layers, and in attention, as a textbook counts them: four products with a
/// `width x width` matrix for each token, two with the MLP's, and two of all tokens with all tokens.
fn blocks(tokens: usize, width: usize, mlp: usize, layers: usize) -> (usize, usize) {
    (layers * tokens * (4 * width * width + 2 * width * mlp), layers * 2 * tokens * tokens * width)
}

/// Floating-point operations of the original implementation for one picture in a training step: two a multiply-add, and backward
/// twice what forward is, but for the patch embedding, which hands no gradient on.
fn flops(config: &MaeConfig, patches: usize, keep: usize) -> f64 {
    let patch = config.patch_size.height * config.patch_size.width * config.num_channels;
    let (width, narrow) = (config.hidden_size, config.decoder_hidden_size);
    let encoder = blocks(1 + keep, width, config.intermediate_size, config.num_hidden_layers);
    let decoder = blocks(1 + patches, narrow, config.decoder_intermediate_size, config.decoder_num_hidden_layers);
    let between = (1 + keep) * width * narrow + (1 + patches) * narrow * patch;
    let embedding = patches * patch * width;
    let rest = encoder.0 + encoder.1 + decoder.0 + decoder.1 + between;
    2.0 * (3 * rest + 2 * embedding) as f64
}

/// torchvision gives the multiply-adds of its models at 224 pixels as 17.56, 4.41, 61.55 and 15.38 thousand million: products of
/// linear layers and of attention, the classifier of 1000 classes among them.
#[test]
fn blocks_are_counted_as_published() {
    for (width, layers, patch, published) in
        [(768, 12, 16, 17.56), (768, 12, 32, 4.41), (1024, 24, 16, 61.55), (1024, 24, 32, 15.38)]
    {
        let patches = (224 / patch) * (224 / patch);
        let (linear, attention) = blocks(1 + patches, width, 4 * width, layers);
        let ends = patches * 3 * patch * patch * width + 1000 * width;
        let counted = (linear + attention + ends) as f64 / 1e9;
        assert!((counted - published).abs() <= 0.0051, "{counted}, published {published}");
    }
}

/// MFU is images per second times the reference's operations for one, over the peak that was given.
#[test]
fn mfu_is_the_share_of_the_peak_that_was_given() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --steps 3 --picture-every 10";
    run(&format!("{line} --peak-tflops 0.125"), &[&out, &model]).succeeded();
    // 32 x 32 pixels in patches of 8 x 8, of which a quarter is seen.
    let operations = flops(&small_config(), 16, 4);
    let (speeds, found) = (values(&out, "images_per_second"), values(&out, "mfu"));
    assert_eq!(found.len(), 3);
    for ((step, speed), (_, mfu)) in speeds.iter().zip(&found) {
        let expected = speed * operations / 0.125e12;
        assert!((mfu - expected).abs() < 1e-9 * expected, "step {step}: {mfu} instead of {expected}");
    }
    // TensorBoard has the same as `tag: "mfu", simple_value`.
    let name = place.list("run").into_iter().find(|name| name.starts_with("events.out.tfevents.")).unwrap();
    let shown: Vec<f32> = records(&out.join(name))
        .iter()
        .filter_map(|record| {
            let at = record.windows(5).position(|window| window == b"\x0a\x03mfu")?;
            assert_eq!(record[at + 5], 2 << 3 | 5);
            Some(f32::from_le_bytes(record[at + 6..at + 10].try_into().unwrap()))
        })
        .collect();
    assert_eq!(shown, found.iter().map(|(_, mfu)| *mfu as f32).collect::<Vec<_>>());

    // Nobody knows a CPU's peak.
    let without = place.path("without");
    run(line, &[&without, &model]).succeeded();
    assert!(values(&without, "mfu").is_empty());
}

/// A learning rate that no weights survive: the run stops after ten steps that were not finite, and what it saved before is whole.
#[test]
fn ten_steps_that_are_not_finite_end_a_run() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --steps 100 --lr 1e30 --warmup-epochs 0 \
                --checkpoint-every 1 --keep 1 --device cpu";
    let ran =
        run(line, &[&out, &model]).failed(1, &["not finite for 10 steps in a row", "lower learning rate", "is whole"]);
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let good = lines.iter().take_while(|line| line["skipped"] != true).count();
    // The tenth is told as the error.
    assert_eq!(lines.len(), good + 9, "{text}");
    assert!(good >= 1 && lines[good..].iter().all(|line| line["skipped"] == true && line["loss"].is_null()), "{text}");
    assert!(!out.join("checkpoint-100").exists());

    // The last step that was finite is saved, and no step behind it.
    let kept: Vec<String> = place.list("run").into_iter().filter(|name| name.starts_with("checkpoint-")).collect();
    assert_eq!(kept, [format!("checkpoint-{good}")]);
    let checkpoint = out.join(&kept[0]);
    assert!(
        ran.err.contains(&format!("the checkpoint of step {good} is whole: {}", checkpoint.display())),
        "{}",
        ran.err
    );
    run("info {}", &[&checkpoint]).succeeded();
    // A resume checks its checksums and goes on from it: to the same end, as the learning rate is the same.
    let before = files(&checkpoint);
    let again = run(&format!("{line} --resume"), &[&out, &model]);
    let again = again.failed(1, &["not finite for 10 steps in a row", &format!("checkpoint of step {good} is whole")]);
    assert!(!again.err.contains("is damaged"), "{}", again.err);
    assert!(files(&checkpoint) == before);
    assert_eq!(fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().count(), good + 9);
}
