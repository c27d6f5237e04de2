//! `pretrain`: what it learns and what it leaves.

use std::fs;
use std::path::Path;

use serde_json::Value;
use vitmae::cpu::Cpu;
use vitmae::data::{ImageProcessor, Source, SourceOptions};
use vitmae::model::{Extras, ImageValues, Images, MaeForPreTraining, Masking};

use crate::{Place, run, small_config};

pub(crate) fn losses(folder: &Path) -> Vec<f64> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

pub(crate) fn model(place: &Place) -> std::path::PathBuf {
    let path = place.path("model.json");
    fs::write(&path, small_config().to_json()).unwrap();
    path
}

#[test]
fn a_run_learns_and_leaves_its_files() {
    let place = Place::new();
    let out = place.path("run");
    let ran = run(
        "pretrain --data synthetic:200 --out {} --model {} --batch-size 16 --steps 60 --blr 0.02 --checkpoint-every 30",
        &[&out, &model(&place)],
    )
    .succeeded();
    let losses = losses(&out);
    assert_eq!(losses.len(), 60);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..5]), "{losses:?}");

    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(text.lines().nth(9).unwrap()).unwrap();
    for key in ["step", "epoch", "loss", "learning_rate", "images_per_second", "gradient_norm", "data_wait"] {
        assert!(line[key].is_number(), "{key} is missing in {line}");
    }
    for file in ["loss.svg", "recipe.json", "reconstruction-0.png", "reconstruction-60.png"] {
        assert!(out.join(file).exists(), "{file} is missing in {:?}", place.list("run"));
    }
    assert!(ran.out.contains("reconstruction-60.png") && ran.out.contains("loss.svg"), "{}", ran.out);
    for file in ["config.json", "model.safetensors", "preprocessor_config.json", "trainer_state.json"] {
        assert!(out.join("checkpoint-60").join(file).exists(), "{file} is missing");
    }
    assert!(out.join("checkpoint-30").exists());
    // What it saved can be gone on with by the other commands.
    let features = place.path("f.npy");
    run("embed --from {} --data synthetic:4 --out {}", &[&out.join("checkpoint-60"), &features]).succeeded();
    run(
        "pretrain --data synthetic:20 --out {} --from {} --batch-size 4 --steps 2",
        &[&place.path("second"), &out.join("checkpoint-60")],
    )
    .succeeded();
}

/// How well a checkpoint predicts the hidden patches of pictures that it is shown whole.
struct Skill {
    /// Its mean squared error over the variance of what is hidden: 1 for the best that is the same everywhere.
    error: f64,
    /// The variance of the predictions between the patches of a picture, over that of what is hidden.
    between: f64,
}

fn skill(checkpoint: &Path, data: &str) -> Skill {
    let model = MaeForPreTraining::from_pretrained(checkpoint, Cpu::<f32>::new()).unwrap();
    let image = model.config().image();
    let processor = ImageProcessor::open(checkpoint.join("preprocessor_config.json")).unwrap();
    let (mean, std) = processor.normalization();
    let options = SourceOptions::new(image.channels, image.height, image.width).unwrap();
    let source = Source::parse(data, &options).unwrap();
    let mut values = Vec::new();
    for index in 0..source.len() {
        values.extend(processor.process(&source.read(index).unwrap()).unwrap().pixels);
    }
    let images = Images {
        batch: source.len(),
        channels: image.channels,
        height: image.height,
        width: image.width,
        values: ImageValues::Bytes { values: &values, mean: &mean, std: &std },
    };
    let masking = Masking::random(model.config().mask_ratio, 5);
    let result = model.forward_with(&images, &masking, None, Extras::default()).unwrap();
    let (patches, columns, length) = (image.patches(), image.grid().1, image.patch_length());
    let (mut hidden, mut between, mut features) = (Vec::new(), 0.0, 0.0);
    for batch in 0..source.len() {
        let places: Vec<usize> =
            (batch * patches..(batch + 1) * patches).filter(|&place| result.mask[place] == 1.0).collect();
        for feature in 0..length {
            let found: Vec<f64> =
                places.iter().map(|place| f64::from(result.logits[place * length + feature])).collect();
            between += variance(&found);
            features += 1.0;
        }
        for place in places.iter().map(|place| place % patches) {
            let (top, left) = (place / columns * image.patch_height, place % columns * image.patch_width);
            for y in top..top + image.patch_height {
                let start = ((batch * image.height + y) * image.width + left) * image.channels;
                for (at, &value) in values[start..start + image.patch_width * image.channels].iter().enumerate() {
                    let channel = at % image.channels;
                    hidden.push((f64::from(value) / 255.0 - f64::from(mean[channel])) / f64::from(std[channel]));
                }
            }
        }
    }
    let target = variance(&hidden);
    Skill { error: result.loss / target, between: between / features / target }
}

fn variance(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64
}

/// Trains a small model on pictures of 64 x 64 pixels; how its loss fell, from the first step to the mean of the last ten,
/// and how well it predicts `held_out`.
fn train_at_64(place: &Place, data: &str, steps: usize, held_out: &str) -> (f64, Skill) {
    let mut config = small_config();
    config.image_size = (64, 64).into();
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.decoder_hidden_size = 48;
    config.decoder_intermediate_size = 96;
    let (model, out) = (place.path("model.json"), place.path("run"));
    fs::write(&model, config.to_json()).unwrap();
    let line = format!(
        "pretrain --data {data} --out {{}} --model {{}} --batch-size 32 --steps {steps} --blr 0.02 --warmup-epochs 0.5"
    );
    run(&line, &[&out, &model]).succeeded();
    let losses = losses(&out);
    let last = losses[steps - 10..].iter().sum::<f64>() / 10.0;
    let skill = skill(&out.join(format!("checkpoint-{steps}")), held_out);
    println!("{data}: loss {:.3} to {last:.3}; error {:.3}, between {:.3}", losses[0], skill.error, skill.between);
    (last / losses[0], skill)
}

#[test]
fn a_run_learns_to_predict_pictures_that_it_has_not_seen() {
    let (fall, skill) = train_at_64(&Place::new(), "synthetic:400", 150, "synthetic:32:77");
    assert!(fall < 0.5, "the loss fell to {fall}");
    assert!(skill.error < 0.6, "{} of the variance of what is hidden is left", skill.error);
    // One answer for all places would have none.
    assert!(skill.between > 0.04, "predictions vary by {} of the variance of what is hidden", skill.between);
}

#[test]
fn a_run_learns_photographs() {
    let folder = std::env::var_os("VITMAE_DATA").map(|folder| Path::new(&folder).join("imagenet-samples"));
    let Some(folder) = folder.filter(|folder| folder.is_dir()) else {
        println!("skipped: no real pictures in VITMAE_DATA");
        return;
    };
    let data = folder.to_str().unwrap();
    let (fall, skill) = train_at_64(&Place::new(), data, 120, data);
    assert!(fall < 0.8, "the loss fell to {fall}");
    assert!(skill.error < 0.8, "{} of the variance of what is hidden is left", skill.error);
    assert!(skill.between > 0.01, "predictions vary by {} of the variance of what is hidden", skill.between);
}

/// The records of an event file, checked as TensorFlow's record reader checks them.
pub(crate) fn records(path: &Path) -> Vec<Vec<u8>> {
    // CRC-32C bit by bit, from its polynomial.
    let checksum = |bytes: &[u8]| {
        let crc = bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
        });
        (!crc).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    let bytes = fs::read(path).unwrap();
    let (mut rest, mut records) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(rest[8..12], checksum(&rest[..8]));
        let (record, after) = rest[12..].split_at(length);
        assert_eq!(after[..4], checksum(record));
        records.push(record.to_vec());
        rest = &after[4..];
    }
    records
}

#[test]
fn a_run_can_be_watched_in_tensorboard() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --steps";
    run(&format!("{line} 3 --picture-every 10"), &[&out, &model]).succeeded();
    run(&format!("{line} 4 --picture-every 10 --resume"), &[&out, &model]).succeeded();
    let mut names = place.list("run");
    names.retain(|name| name.starts_with("events.out.tfevents."));
    // Not by name: process numbers start over, and both may be of one second.
    names.sort_by_key(|name| fs::metadata(out.join(name)).unwrap().modified().unwrap());
    let [first, second] = &names[..] else { panic!("{names:?}") };
    // Version, pictures of steps 0 and 3, three steps; version, start, one step and its picture.
    for (name, count) in [(first, 6), (second, 4)] {
        let records = records(&out.join(name));
        assert_eq!(records.len(), count, "{name}");
        // Time as a double, step as a number; then field 3 with the version.
        assert_eq!((records[0][0], records[0][9], records[0][10]), (0o11, 0o20, 0));
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
    }
    let steps: Vec<u8> = records(&out.join(second)).iter().map(|record| record[10]).collect();
    assert_eq!(steps, [0, 4, 4, 4]);
    // The loss of the last step as `tag: "loss", simple_value`.
    let record = &records(&out.join(second))[2];
    let at = record.windows(6).position(|window| window == b"\x0a\x04loss").unwrap();
    assert_eq!(record[at + 6], 2 << 3 | 5);
    let loss = f32::from_le_bytes(record[at + 7..at + 11].try_into().unwrap());
    assert_eq!(loss, losses(&out)[3] as f32);
}

/// The values of a key of `metrics.jsonl`, with their steps.
pub(crate) fn values(folder: &Path, key: &str) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| Some((line["step"].as_u64().unwrap(), line.get(key)?.as_f64().unwrap()))).collect()
}

#[test]
fn the_checkpoint_that_does_best_on_other_pictures_is_kept() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    // The learning rate rises until the model gets worse.
    let line = "pretrain --data synthetic:40 --val synthetic:30:7 --out {} --model {} --batch-size 8 --steps 24 \
                --checkpoint-every 4 --keep 1 --lr 0.7 --warmup-epochs 12";
    let ran = run(line, &[&out, &model]).succeeded();
    let losses = values(&out, "validation_loss");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [4, 8, 12, 16, 20, 24]);
    let (best, lowest) = losses.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(best < 24, "it should have got worse: {losses:?}");
    let mut kept = place.list("run");
    kept.retain(|name| name.starts_with("checkpoint-"));
    kept.sort();
    let mut expected = [format!("checkpoint-{best}"), "checkpoint-24".to_owned()];
    expected.sort();
    assert_eq!(kept, expected, "{losses:?}");
    assert!(ran.out.contains(&format!("checkpoint-{best}, validation loss {lowest:.4}")), "{}", ran.out);
    // Looking at other pictures changes nothing of what is learned.
    let without = place.path("without");
    run(&line.replace("--val synthetic:30:7 ", ""), &[&without, &model]).succeeded();
    assert_eq!(values(&without, "loss"), values(&out, "loss"));
    assert!(values(&without, "validation_loss").is_empty());
}

#[test]
fn an_average_of_the_weights_is_kept_across_a_resume() {
    let place = Place::new();
    let model = model(&place);
    let line = "pretrain --data synthetic:40 --out {} --model {} --batch-size 8 --checkpoint-every 3 --lr 0.01 \
                --warmup-epochs 0 --ema 0.8 --steps 6";
    let (whole, parts) = (place.path("whole"), place.path("parts"));
    run(line, &[&whole, &model]).succeeded();
    run(line, &[&parts, &model]).succeeded();
    fs::remove_dir_all(parts.join("checkpoint-6")).unwrap();
    run(&format!("{line} --resume"), &[&parts, &model]).succeeded();
    let weights = |folder: &Path, name: &str| fs::read(folder.join(name).join("model.safetensors")).unwrap();
    assert_eq!(weights(&whole, "checkpoint-6"), weights(&parts, "checkpoint-6"));
    assert_eq!(weights(&whole, "checkpoint-6/ema"), weights(&parts, "checkpoint-6/ema"));
    assert_ne!(weights(&whole, "checkpoint-6/ema"), weights(&whole, "checkpoint-6"));
    // It is a checkpoint like any other.
    run("embed --from {} --data synthetic:4 --out {}", &[&whole.join("checkpoint-6/ema"), &place.path("f.npy")])
        .succeeded();
    run(&format!("{} --resume", line.replace("0.8", "0.9")), &[&parts, &model]).failed(1, &["ema was 0.8 and is 0.9"]);
}

#[test]
fn a_recipe_gives_the_same_run_once_more() {
    let place = Place::new();
    let model = model(&place);
    let (first, second, pictures) = (place.path("first"), place.path("second"), place.pictures(12));
    run(
        "pretrain --data {} --out {} --model {} --batch-size 4 --accumulate 2 --steps 5 --lr 0.01 --min-lr 0.001 --ema 0.9 \
         --warmup-epochs 0.5 --clip-grad 1 --weight-decay 0.1 --seed 3 --val synthetic:5 --checkpoint-every 2 --keep 1 \
         --mask-ratio 0.6 --norm-pix-loss --picture-every 5 --micro-batch 3 --recompute",
        &[&pictures, &first, &model],
    )
    .succeeded();
    fs::remove_file(&model).unwrap();
    let recipe = first.join("recipe.json");
    let ran = run("pretrain --recipe {} --out {}", &[&recipe, &second]).succeeded();
    assert!(!ran.err.contains("WARN"), "{}", ran.err);
    let left = |name: &str| {
        let mut left = place.list(name);
        // Their names have the time in them.
        left.retain(|name| !name.starts_with("events."));
        left
    };
    assert_eq!(left("first"), left("second"));
    for file in ["model.safetensors", "optimizer.safetensors", "ema/model.safetensors", "trainer_state.json"] {
        let bytes = |run: &Path| fs::read(run.join("checkpoint-5").join(file)).unwrap();
        assert!(bytes(&first) == bytes(&second), "{file}");
    }
    assert_eq!(fs::read_to_string(second.join("recipe.json")).unwrap(), fs::read_to_string(&recipe).unwrap());

    let third = place.path("third");
    run("pretrain --recipe {} --out {} --seed 4", &[&recipe, &third]).failed(2, &["cannot be used with"]);
    run("pretrain --out {}", &[&third]).failed(2, &["--data"]);
    fs::remove_file(pictures.join("picture 03.png")).unwrap();
    run("pretrain --recipe {} --out {}", &[&recipe, &third]).failed(1, &["not the pictures of the recipe"]);
    run("pretrain --recipe {} --out {}", &[&first.join("loss.svg"), &third]).failed(1, &["not a recipe"]);
    assert!(!third.exists());
}

#[test]
fn neither_micro_batches_nor_accumulation_change_what_is_learned() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, more: &str| {
        let out = place.path(name);
        let line = format!("pretrain --data synthetic:64 --out {{}} --model {{}} --steps 6 {more}");
        run(&line, &[&out, &model]).succeeded();
        losses(&out)
    };
    let whole = train("a", "--batch-size 16");
    for (name, more) in [("b", "--batch-size 16 --micro-batch 3"), ("c", "--batch-size 4 --accumulate 4")] {
        for (a, b) in whole.iter().zip(train(name, more)) {
            assert!((a - b).abs() < 1e-5 * a, "{a} and {b} with {more}");
        }
    }
}

/// Crops, masks and losses do not depend on the device.
#[cfg(feature = "emulator")]
#[test]
fn the_emulator_learns_what_the_cpu_learns() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, device: &str| {
        let out = place.path(name);
        let line = "pretrain --data synthetic:8 --out {} --model {} --batch-size 4 --steps 2 --seed 5 --threads 1";
        run(&format!("--device {device} --precision f32 {line}"), &[&out, &model]).succeeded();
        losses(&out)
    };
    let (expected, found) = (train("cpu", "cpu"), train("emulator", "emulator"));
    assert_eq!((expected.len(), found.len()), (2, 2));
    for (expected, found) in expected.iter().zip(found) {
        assert!((found - expected).abs() <= 1e-5 * expected, "{found} instead of {expected}");
    }
}
