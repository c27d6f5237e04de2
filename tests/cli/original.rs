//! The flags of the original's `main_pretrain.py` (facebookresearch/mae), as its command lines have them.

use std::fs;
use std::path::Path;

use crate::pretraining::{model, values};
use crate::{Place, run};

fn recipe(run: &Path) -> String {
    fs::read_to_string(run.join("recipe.json")).unwrap()
}

/// Every flag that decides what is learned, in both spellings that argparse and people use.
#[test]
fn the_originals_flags_are_understood() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, line: &str| {
        let out = place.path(name);
        run(&format!("pretrain --data synthetic:20 --device cpu {line}"), &[&out, &model]).succeeded();
        (values(&out, "loss"), recipe(&out))
    };
    let ours = train(
        "ours",
        "--out {} --model {} --batch-size 4 --accumulate 2 --epochs 2 --image-size 16 --mask-ratio 0.5 --norm-pix-loss \
         --weight-decay 0.1 --min-lr 0.001 --warmup-epochs 1 --blr 0.01 --num-workers 1 --seed 3",
    );
    assert!(ours.1.contains("\"peak\": 0.0003125"), "blr 0.01 with 8 pictures in a step: {}", ours.1);
    let theirs = "--output_dir {} --model {} --batch_size 4 --accum_iter 2 --epochs 2 --input_size 16 --mask_ratio 0.5 \
                  --norm_pix_loss --weight_decay 0.1 --min_lr 0.001 --warmup_epochs 1 --blr 0.01 --num_workers 1 --seed 3";
    assert_eq!(train("theirs", theirs), ours);
    assert_eq!(train("dashes", &theirs.replace('_', "-")), ours);
    // The absolute learning rate, under the same name in both.
    let lr = train("lr", "--output_dir {} --model {} --batch_size 4 --epochs 1 --lr 0.002");
    assert!(lr.1.contains("\"peak\": 0.002"), "{}", lr.1);
}

#[test]
fn the_originals_models_are_known() {
    for (name, size) in [
        ("mae_vit_base_patch16", "base"),
        ("mae_vit_large_patch16", "large"),
        ("mae_vit_huge_patch14", "huge"),
        ("mae_vit_base_patch16_dec512d8b", "base"),
        ("mae_vit_large_patch16_dec512d8b", "large"),
        ("mae_vit_huge_patch14_dec512d8b", "huge"),
    ] {
        let shown = |name: &str| run(&format!("info {name}"), &[]).succeeded().out.replacen(name, "", 1);
        let cost = |text: &str| text.lines().filter(|line| !line.starts_with("model")).collect::<Vec<_>>().join("\n");
        assert_eq!(cost(&shown(name)), cost(&shown(size)), "{name}");
    }
    // `--model` itself: its name is understood, and the first thing that is wrong is something else.
    let place = Place::new();
    run("pretrain --data /no/such/data --out {} --model mae_vit_large_patch16", &[&place.path("run")])
        .failed(1, &["/no/such/data"]);
}

/// `--data_path` is a folder with `train` in it; one without is taken as it is.
#[test]
fn data_path_means_its_sub_folder_train() {
    let place = Place::new();
    let (model, pictures) = (model(&place), place.pictures(6));
    let set = place.path("set");
    fs::create_dir_all(set.join("val/class")).unwrap();
    fs::create_dir_all(set.join("train")).unwrap();
    fs::copy(pictures.join("picture 00.png"), set.join("val/class/x.png")).unwrap();
    fs::rename(&pictures, set.join("train/class")).unwrap();
    let train = |name: &str, flag: &str, data: &Path| {
        let out = place.path(name);
        let line = format!("pretrain {flag} {{}} --out {{}} --model {{}} --batch-size 4 --steps 2 --threads 1");
        let ran = run(&line, &[data, &out, &model]).succeeded();
        (values(&out, "loss"), recipe(&out), ran.err)
    };
    let expected = train("ours", "--data", &set.join("train"));
    assert!(expected.1.contains("\"pictures\": 6"), "{}", expected.1);
    for (name, flag) in [("underscore", "--data_path"), ("dash", "--data-path")] {
        let found = train(name, flag, &set);
        assert_eq!((&found.0, &found.1), (&expected.0, &expected.1));
        assert!(found.2.contains("set/train"), "{}", found.2);
    }
    let found = train("itself", "--data_path", &set.join("train"));
    assert_eq!((&found.0, &found.1), (&expected.0, &expected.1));
    // What `--data` names is taken as it is.
    assert!(train("all", "--data", &set).1.contains("\"pictures\": 7"));
    run("pretrain --data {} --data_path {} --out {}", &[&set, &set, &place.path("x")]).failed(2, &["--data"]);
}

/// `--log_dir` is where TensorBoard looks; everything else stays in `--output_dir`.
#[test]
fn events_go_to_log_dir() {
    let place = Place::new();
    let model = model(&place);
    let events = |folder: &Path| {
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("events.out.tfevents.")).count()
    };
    for flag in ["--log_dir", "--log-dir"] {
        let (out, logs) = (place.path(&format!("run{flag}")), place.path(&format!("logs{flag}/deep")));
        let line = format!("pretrain --data synthetic:8 --out {{}} --model {{}} --batch-size 4 --steps 2 {flag} {{}}");
        run(&line, &[&out, &model, &logs]).succeeded();
        assert_eq!((events(&out), events(&logs)), (0, 1));
        assert!(out.join("metrics.jsonl").is_file() && out.join("checkpoint-2").is_dir());
        assert_eq!(fs::read_dir(&logs).unwrap().count(), 1);
    }
    // A place that takes no files is told before there is any work, and leaves nothing.
    let file = place.path("file");
    fs::write(&file, "kept").unwrap();
    let line = "pretrain --data synthetic:8 --out {} --model {} --batch-size 4 --steps 2 --log_dir {}";
    run(line, &[&place.path("none"), &model, &file.join("logs")]).failed(1, &["file/logs"]);
    assert!(!place.path("none").exists());
}

/// What means nothing here is taken and said in one line each; what would be another run is an error.
#[test]
fn flags_without_a_meaning_are_said_to_have_none() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, more: &str| {
        let line = format!("pretrain --data synthetic:8 --out {{}} --model {{}} --batch-size 4 --steps 2 {more}");
        run(&line, &[&place.path(name), &model])
    };
    let plain = train("plain", "").succeeded();
    assert!(!plain.err.contains("no effect"), "{}", plain.err);
    let expected = values(&place.path("plain"), "loss");
    let all = "--pin_mem --no_pin_mem --start_epoch 0 --world_size 1 --local_rank -1 --dist_on_itp --dist_url env://";
    for (name, line) in [("underscores", all.to_owned()), ("dashes", all.replace('_', "-"))] {
        let ran = train(name, &line).succeeded();
        for flag in ["pin_mem", "no_pin_mem", "start_epoch", "world_size", "local_rank", "dist_on_itp", "dist_url"] {
            let said = ran.err.lines().filter(|line| line.contains(&format!("--{flag} has no effect"))).count();
            assert_eq!(said, 1, "{flag}: {}", ran.err);
        }
        assert_eq!(values(&place.path(name), "loss"), expected);
    }
    for flag in ["--start_epoch 3", "--start-epoch 3", "--start_epoch 3 --start_epoch 0 --start_epoch 5"] {
        train("other", flag).failed(2, &["--start_epoch", "--resume"]);
    }
    // Where it goes on, the checkpoint decides, as there.
    let resumed = train("plain", "--start_epoch 3 --resume").succeeded();
    assert!(
        resumed.err.contains("--start_epoch has no effect") && resumed.err.contains("checkpoint"),
        "{}",
        resumed.err
    );
    train("other", "--world_size 4").failed(1, &["--world_size 4", "torchrun"]);
    assert!(!place.path("other").exists());
}

/// The original's `--resume` wants the checkpoint; here it may be named, and must be the one that a run goes on from.
#[test]
fn resume_may_name_the_checkpoint() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    let line = "pretrain --data synthetic:8 --out {} --model {} --batch-size 4 --checkpoint-every 2 --steps";
    // As the original's default, it is none.
    let start: Vec<_> = format!("{line} 4 --resume").replace("{}", "\u{0}").split(' ').map(str::to_owned).collect();
    let mut paths = [&out, &model].into_iter();
    let mut words: Vec<std::ffi::OsString> = start
        .into_iter()
        .map(|word| if word == "\u{0}" { paths.next().unwrap().into() } else { word.into() })
        .collect();
    words.push("".into());
    crate::vitmae(&words).succeeded();
    crate::vitmae(&words).failed(1, &["already holds a run"]);

    let resume =
        |steps: u32, checkpoint: &Path| run(&format!("{line} {steps} --resume {{}}"), &[&out, &model, checkpoint]);
    resume(6, &out.join("checkpoint-4")).succeeded();
    resume(8, &out).succeeded();
    assert_eq!(values(&out, "loss").len(), 8);
    resume(10, &out.join("checkpoint-4")).failed(1, &["its last checkpoint", "checkpoint-8"]);
    resume(10, &out.join("checkpoint-5")).failed(1, &["checkpoint-5", "no such checkpoint"]);
    // What is no checkpoint, as a folder that somebody made, is none here as elsewhere.
    let stray = out.join("checkpoint-77");
    fs::create_dir(&stray).unwrap();
    resume(10, &stray).failed(1, &["checkpoint-77", "no checkpoint of a run"]);
    resume(10, &out.join("checkpoint-8")).succeeded();
    // A damaged one is an error where it is named, and passed over where it is not.
    let weights = out.join("checkpoint-10/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    resume(12, &out.join("checkpoint-10")).failed(1, &["--resume", "checkpoint-10", "checksum"]);
    assert_eq!(values(&out, "loss").len(), 10);
    resume(12, &out.join("checkpoint-6")).failed(1, &["its last checkpoint", "checkpoint-8"]);
    resume(12, &out.join("checkpoint-8")).succeeded();
    assert_eq!(values(&out, "loss").len(), 12);
    let other = place.checkpoint();
    resume(14, &other).failed(1, &["--from"]);
    assert_eq!(values(&out, "loss").len(), 12);
}

/// As argparse does it: scripts add flags behind those that they were given.
#[test]
fn the_last_of_a_flag_given_twice_counts() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, line: &str| {
        let out = place.path(name);
        run(&format!("pretrain --data synthetic:20 --output_dir {{}} --model {{}} --steps 2 {line}"), &[&out, &model])
            .succeeded();
        (values(&out, "loss"), recipe(&out))
    };
    let once = train("once", "--batch_size 4 --blr 0.02 --norm_pix_loss --device cpu --seed 5");
    let twice = train(
        "twice",
        "--batch_size 8 --blr 1 --norm_pix_loss --device cuda --seed 1 --batch-size 4 --blr 0.02 --norm-pix-loss --device cpu \
         --seed 5 --output_dir {}"
            .replace("{}", place.path("twice").to_str().unwrap())
            .as_str(),
    );
    assert_eq!(twice, once);
}

/// `--lr` wins over `--blr`, and no workers are the fewest that there are.
#[test]
fn flags_that_the_original_takes_together_are_taken() {
    let place = Place::new();
    let model = model(&place);
    let train = |name: &str, line: &str| {
        let out = place.path(name);
        let line = format!("pretrain --data synthetic:20 --out {{}} --model {{}} --batch-size 4 --steps 2 {line}");
        run(&line, &[&out, &model]).succeeded();
        (values(&out, "loss"), recipe(&out))
    };
    let alone = train("alone", "--lr 0.002");
    assert!(alone.1.contains("\"peak\": 0.002"), "{}", alone.1);
    assert_eq!(train("both", "--lr 0.002 --blr 0.5"), alone);
    assert_eq!(train("workers", "--lr 0.002 --num_workers 0"), alone);
}
