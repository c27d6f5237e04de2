//! What a run outlives: being killed, stopped and resumed, damage, and other runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use vitmae::cpu::Cpu;
use vitmae::train::{PretrainSettings, RunLength, pretrain};

use crate::pretraining::{losses, model, values};
use crate::{Place, run};

#[test]
fn a_resumed_run_ends_where_an_undisturbed_one_does() {
    let place = Place::new();
    let model = model(&place);
    let (whole, halves) = (place.path("whole"), place.path("halves"));
    let line = "pretrain --data synthetic:50 --out {} --model {} --batch-size 8 --accumulate 2 --steps 12 --checkpoint-every 5";
    run(line, &[&whole, &model]).succeeded();
    run(line, &[&halves, &model]).succeeded();
    // As if the run had been killed after step 5.
    fs::remove_dir_all(halves.join("checkpoint-12")).unwrap();
    fs::remove_dir_all(halves.join("checkpoint-10")).unwrap();
    run(&format!("{line} --resume"), &[&halves, &model]).succeeded();
    let weights = |folder: &Path| fs::read(folder.join("checkpoint-12/model.safetensors")).unwrap();
    assert_eq!(weights(&whole), weights(&halves));
    assert_eq!(losses(&whole), losses(&halves));
}

#[test]
fn the_newest_checkpoints_are_kept() {
    let place = Place::new();
    let model = model(&place);
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --checkpoint-every 2 --keep 2 --steps";
    let kept = |steps: &str, more: &str| {
        run(&format!("{line} {steps}{more}"), &[&place.path("run"), &model]).succeeded();
        let mut kept = place.list("run");
        kept.retain(|name| name.starts_with("checkpoint-"));
        kept.sort();
        kept
    };
    assert_eq!(kept("7", ""), ["checkpoint-6", "checkpoint-7"]);
    // What was kept before goes too.
    assert_eq!(kept("8", " --resume"), ["checkpoint-7", "checkpoint-8"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let place = Place::new();
    let model = model(&place);
    let (whole, damaged) = (place.path("whole"), place.path("damaged"));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --steps 6 --checkpoint-every 2";
    run(line, &[&whole, &model]).succeeded();
    run(line, &[&damaged, &model]).succeeded();
    let cut = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    cut(&damaged.join("checkpoint-6/model.safetensors"));
    cut(&damaged.join("checkpoint-4/trainer_state.json"));
    let resumed = run(&format!("{line} --resume"), &[&damaged, &model]).succeeded();
    for name in ["checkpoint-6 is damaged", "checkpoint-4 is damaged"] {
        assert!(resumed.err.contains(name), "{}", resumed.err);
    }
    let weights = |folder: &Path| fs::read(folder.join("checkpoint-6/model.safetensors")).unwrap();
    assert_eq!(weights(&whole), weights(&damaged));
    assert_eq!(losses(&whole), losses(&damaged));

    // Nothing whole is left: what is wrong with the newest is said, and nothing starts over.
    for step in [2, 4, 6] {
        cut(&damaged.join(format!("checkpoint-{step}/optimizer.safetensors")));
    }
    run(&format!("{line} --resume"), &[&damaged, &model]).failed(1, &["checkpoint-6", "optimizer.safetensors"]);
    assert_eq!(losses(&whole), losses(&damaged));
}

/// Bytes that change on the disk leave a file as long as it was.
#[test]
fn a_checkpoint_with_other_bytes_is_passed_over_too() {
    for file in ["model.safetensors", "optimizer.safetensors", "ema/model.safetensors"] {
        let place = Place::new();
        let (out, model) = (place.path("run"), model(&place));
        let line =
            "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --steps 4 --checkpoint-every 2 --ema 0.9";
        run(line, &[&out, &model]).succeeded();
        let path = out.join("checkpoint-4").join(file);
        let whole = fs::read(&path).unwrap();
        let mut changed = whole.clone();
        let middle = whole.len() - whole.len() / 3;
        changed[middle] ^= 1;
        fs::write(&path, changed).unwrap();
        let ran = run(&format!("{line} --resume"), &[&out, &model]).succeeded();
        assert!(ran.err.contains("checkpoint-4 is damaged") && ran.err.contains("checksum"), "{file}: {}", ran.err);
        // What was done again is what was there.
        assert!(fs::read(&path).unwrap() == whole, "{file}");
    }
}

/// Another length means other learning rates, which is said.
#[test]
fn a_resumed_run_says_that_its_length_is_another() {
    let place = Place::new();
    let (out, model) = (place.path("run"), model(&place));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 8 --checkpoint-every 2 --steps";
    run(&format!("{line} 6"), &[&out, &model]).succeeded();
    for step in [4, 6] {
        fs::remove_dir_all(out.join(format!("checkpoint-{step}"))).unwrap();
    }
    let ran = run(&format!("{line} 5 --resume"), &[&out, &model]).succeeded();
    assert!(ran.err.contains("was to have 6 steps: its learning rates now follow from 5"), "{}", ran.err);
    let ran = run(&format!("{line} 8 --resume"), &[&out, &model]).succeeded();
    assert!(ran.err.contains("was to have 5 steps: its learning rates now follow from 8"), "{}", ran.err);
    let ran = run(&format!("{line} 8 --resume"), &[&out, &model]).succeeded();
    assert!(!ran.err.contains("was to have"), "{}", ran.err);
}

/// A run killed without warning again and again, during the writing of checkpoints too, and an undisturbed one.
#[cfg(unix)]
struct Killed {
    place: Place,
    whole: PathBuf,
    killed: PathBuf,
    steps: usize,
}

#[cfg(unix)]
impl Killed {
    fn new(steps: usize, kills: usize, more: &[&str]) -> Self {
        let place = Place::new();
        let model = model(&place);
        let (whole, killed) = (place.path("whole"), place.path("killed"));
        let train = |out: &Path| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vitmae"));
            command.args(["pretrain", "--data", "synthetic:50", "--batch-size", "4", "--picture-every", "1000"]);
            command.args(["--resume", "--steps", &steps.to_string(), "--model"]).arg(&model).arg("--out").arg(out);
            command.args(more).stderr(Stdio::null()).stdout(Stdio::null());
            command
        };
        assert!(train(&whole).status().unwrap().success());
        let done =
            || fs::read(killed.join("metrics.jsonl")).map_or(0, |text| text.iter().filter(|&&b| b == b'\n').count());
        let mut state = 0x9e37_79b9_u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((u64::from(state) * u64::from(below)) >> 32) as u32
        };
        for _ in 0..kills {
            // Some steps on (none at times), and then somewhere in a step or in the writing of its checkpoint.
            let goal = done() + random(10) as usize;
            let mut child = train(&killed).spawn().unwrap();
            while done() < goal && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(300));
            }
            std::thread::sleep(Duration::from_micros(u64::from(random(8000))));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // It had something to resume from, and something left to do.
        let before = done();
        assert!((kills..steps).contains(&before), "killed after step {before}");
        assert!(train(&killed).status().unwrap().success());
        Self { place, whole, killed, steps }
    }

    /// The last checkpoints have the same bytes in these files, and the metrics the same values.
    fn check(&self, files: &[&str], keys: &[&str]) {
        for file in files {
            let bytes = |run: &Path| fs::read(run.join(format!("checkpoint-{}", self.steps)).join(file)).unwrap();
            assert!(bytes(&self.whole) == bytes(&self.killed), "{file} differs");
        }
        for key in keys {
            assert_eq!(values(&self.whole, key), values(&self.killed, key), "{key}");
        }
        let left = self.place.list("killed");
        assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{left:?}");
    }
}

#[test]
#[cfg(unix)]
#[ignore = "second tier: a long run"]
fn a_run_killed_at_any_moment_continues_as_if_nothing_had_happened() {
    let run = Killed::new(600, 50, &["--checkpoint-every", "1"]);
    run.check(&["model.safetensors", "optimizer.safetensors"], &["loss"]);
}

/// The same with everything that lies beside the weights: averages, validation losses, and checkpoints that are removed.
#[test]
#[cfg(unix)]
#[ignore = "second tier: a long run"]
fn a_killed_run_keeps_its_average_its_best_and_its_newest() {
    let more = ["--checkpoint-every", "3", "--keep", "2", "--ema", "0.9", "--val", "synthetic:6:7", "--blr", "0.02"];
    let run = Killed::new(300, 15, &more);
    let files = ["model.safetensors", "optimizer.safetensors", "ema/model.safetensors", "trainer_state.json"];
    run.check(&files, &["loss", "validation_loss"]);
    let losses = values(&run.whole, "validation_loss");
    assert_eq!(losses.len(), 100);
    let best = losses.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    let mut expected = vec!["checkpoint-297".to_owned(), "checkpoint-300".to_owned(), format!("checkpoint-{best}")];
    expected.sort();
    expected.dedup();
    for name in ["whole", "killed"] {
        let mut kept = run.place.list(name);
        kept.retain(|name| name.starts_with("checkpoint-"));
        assert_eq!(kept, expected, "{name}");
    }
}

#[test]
fn ctrl_c_and_its_like_save_a_checkpoint() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        let place = Place::new();
        let out = place.path("run");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vitmae"))
            .args(["pretrain", "--data", "synthetic:500", "--batch-size", "8", "--steps", "100000", "--out"])
            .arg(&out)
            .arg("--model")
            .arg(model(&place))
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = out.join("metrics.jsonl");
        let far = || fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() > 3);
        while !far() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let killed = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let ran = crate::Ran::from(child.wait_with_output().unwrap()).failed(1, &["as asked", "--resume"]);
        let steps = losses(&out).len();
        assert!(steps > 3);
        let weights = out.join(format!("checkpoint-{steps}/model.safetensors"));
        assert!(weights.exists(), "{:?}\n{}", place.list("run"), ran.err);
    }
}

/// Standard error and output that cannot be written, as a full log disk: the run goes on and leaves its checkpoint.
#[test]
#[cfg(target_os = "linux")]
fn a_full_log_does_not_end_a_run() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vitmae"));
    command.args(["pretrain", "--data", "synthetic:8", "--batch-size", "4", "--steps", "2", "--threads", "1"]);
    command.arg("--model").arg(&model).arg("--out").arg(&out);
    let logless = command.stderr(full()).output().unwrap();
    assert_eq!(logless.status.code(), Some(0));
    assert!(out.join("checkpoint-2").join("model.safetensors").is_file());

    // A result that cannot be printed is a failure, and no panic; of a run, what matters is where its checkpoint is.
    let again = place.path("again");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vitmae"));
    command.args(["pretrain", "--data", "synthetic:8", "--batch-size", "4", "--steps", "2", "--threads", "1"]);
    command.arg("--model").arg(&model).arg("--out").arg(&again);
    let silent: crate::Ran = command.stdout(full()).stderr(std::process::Stdio::piped()).output().unwrap().into();
    silent.failed(1, &["standard output", "No space left", "the run is done", "again/checkpoint-2"]);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vitmae"));
    command.arg("embed").arg("--from").arg(out.join("checkpoint-2"));
    command.args(["--data", "synthetic:3", "--out"]).arg(place.path("features.npy"));
    let silent: crate::Ran = command.stdout(full()).stderr(std::process::Stdio::piped()).output().unwrap().into();
    silent.failed(1, &["No space left"]);
    assert!(place.path("features.npy").is_file());
}

/// Settings that would make it another run are refused by name, and the recipe stays as it was.
#[test]
fn a_resumed_run_keeps_its_settings() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1";
    run(&format!("{line} --steps 4"), &[&out, &model]).succeeded();
    let recipe = fs::read_to_string(out.join("recipe.json")).unwrap();
    for (flag, name) in [
        ("--mask-ratio 0.5", "mask_ratio"),
        ("--norm-pix-loss", "norm_pix_loss"),
        ("--patch-size 4", "patch_size"),
        ("--blr 0.5", "blr"),
        ("--weight-decay 0.5", "weight-decay"),
        ("--clip-grad 0.5", "clip-grad"),
        ("--seed 7", "seed"),
    ] {
        run(&format!("{line} --steps 8 --resume {flag}"), &[&out, &model]).failed(1, &["cannot resume", name]);
    }
    run(&format!("{line} --steps 2 --resume"), &[&out, &model]).failed(1, &["has done 4 steps", "ask for more"]);
    run(&format!("{line} --steps 4 --val synthetic:9 --resume"), &[&out, &model])
        .failed(1, &["val was not given and is synthetic:9"]);
    assert_eq!(fs::read_to_string(out.join("recipe.json")).unwrap(), recipe);
    // Without --model it continues with the model that it has.
    run("pretrain --data synthetic:20 --out {} --batch-size 4 --threads 1 --steps 6 --resume", &[&out]).succeeded();
    assert_eq!(losses(&out).len(), 6);
}

/// Pictures that were replaced under their names are seen by their sizes; a run that loses one on the way keeps its fingerprint.
#[test]
fn pictures_of_other_sizes_are_another_set() {
    let place = Place::new();
    let (model, pictures, out) = (model(&place), place.pictures(12), place.path("run"));
    let line = "pretrain --data {} --out {} --model {} --batch-size 4 --checkpoint-every 2 --steps";
    run(&format!("{line} 4"), &[&pictures, &out, &model]).succeeded();
    let picture = pictures.join("picture 05.png");
    let before = fs::read(&picture).unwrap();
    image::RgbImage::new(50, 50).save(&picture).unwrap();
    assert_ne!(fs::read(&picture).unwrap().len(), before.len());
    let resume = || run(&format!("{line} 6 --resume"), &[&pictures, &out, &model]);
    resume().failed(1, &["cannot resume", "fingerprint", "sizes"]);
    let (recipe, again) = (out.join("recipe.json"), place.path("again"));
    let repeat = || run("pretrain --recipe {} --out {}", &[&recipe, &again]);
    repeat().failed(1, &["not the pictures of the recipe", "sizes"]);
    assert!(!again.exists());
    fs::write(&picture, before).unwrap();
    resume().succeeded();
    repeat().succeeded();
    // Every checkpoint has what the recipe has.
    let json = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let state = json(&out.join("checkpoint-6/trainer_state.json"));
    assert_eq!(state["data_fingerprint"], json(&recipe)["data_fingerprint"]);
}

/// Metrics that lost a line keep the others; without metrics, checkpoints still say that there is a run.
#[test]
fn what_a_run_left_is_not_lost() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1";
    run(&format!("{line} --steps 4"), &[&out, &model]).succeeded();
    let metrics = out.join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, format!("junk\n{text}")).unwrap();
    run(&format!("{line} --steps 5 --resume"), &[&out, &model]).succeeded();
    assert_eq!(losses(&out).len(), 5);

    fs::remove_file(&metrics).unwrap();
    run(&format!("{line} --steps 4"), &[&out, &model]).failed(1, &["already holds a run"]);
    assert!(out.join("checkpoint-5").join("model.safetensors").is_file());

    // A folder of somebody else's is not taken for an old checkpoint.
    let other = place.path("other");
    fs::create_dir_all(other.join("checkpoint-2")).unwrap();
    fs::write(other.join("checkpoint-2").join("notes.txt"), "mine").unwrap();
    run(&format!("{line} --steps 2"), &[&other, &model]).failed(1, &["checkpoint-2", "no checkpoint of a run"]);
    assert_eq!(fs::read_to_string(other.join("checkpoint-2").join("notes.txt")).unwrap(), "mine");
}

/// A second run on the same folder is refused while the first is at work.
#[test]
fn a_folder_has_one_run_at_a_time() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    fs::create_dir_all(&out).unwrap();
    let lock = fs::File::create(out.join(".lock")).unwrap();
    lock.lock().unwrap();
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1 --steps 2";
    run(line, &[&out, &model]).failed(1, &["another run is writing"]);
    drop(lock);
    run(line, &[&out, &model]).succeeded();
}

/// Without --checkpoint-every there is one on the way, and the last alone is left.
#[test]
fn one_checkpoint_is_left_by_default() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1 --steps 20";
    let ran = run(&format!("{line} -v"), &[&out, &model]).succeeded();
    let left: Vec<_> = place.list("run").into_iter().filter(|name| name.starts_with("checkpoint-")).collect();
    assert_eq!(left, ["checkpoint-20"], "{}", ran.err);
    // Weights that ran away are not saved on the way.
    let wild = place.path("wild");
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1 --steps 40 --blr 1e30 --checkpoint-every 2";
    run(line, &[&wild, &model]).failed(1, &["not finite"]);
    let steps: Vec<u64> = fs::read_dir(&wild)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok())
        .collect();
    let text = fs::read_to_string(wild.join("metrics.jsonl")).unwrap();
    for line in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let skipped = line["skipped"] == true;
        assert!(!(skipped && steps.contains(&line["step"].as_u64().unwrap())), "{line}");
    }
}

/// The optimiser's constants have no flags, so only a program that uses the library can change them.
#[test]
fn a_resumed_run_keeps_its_betas_and_its_epsilon() {
    let place = Place::new();
    let (model, out) = (model(&place), place.path("run"));
    let line = "pretrain --data synthetic:20 --out {} --model {} --batch-size 4 --threads 1 --steps 2";
    run(line, &[&out, &model]).succeeded();
    let resume = |change: &dyn Fn(&mut PretrainSettings)| {
        let mut settings = PretrainSettings::from_recipe(out.join("recipe.json"), &out).unwrap();
        (settings.resume, settings.length, settings.workers) = (true, RunLength::Steps(4), 1);
        change(&mut settings);
        pretrain(Cpu::<f32>::new(), &settings, &mut |_| true)
            .map(|report| report.steps)
            .map_err(|error| error.to_string())
    };
    let betas = resume(&|settings| settings.optimizer.betas = (0.5, 0.5)).unwrap_err();
    assert!(betas.contains("cannot resume: the run's betas was 0.9, 0.95 and is 0.5, 0.5 now"), "{betas}");
    let epsilon = resume(&|settings| settings.optimizer.epsilon = 1e-2).unwrap_err();
    assert!(epsilon.contains("cannot resume: the run's epsilon was 0.00000001 and is 0.01 now"), "{epsilon}");
    // A checkpoint of an older version has neither.
    let path = out.join("checkpoint-2/trainer_state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for name in ["betas", "epsilon"] {
        assert!(state.as_object_mut().unwrap().remove(name).is_some());
    }
    fs::write(&path, state.to_string()).unwrap();
    assert_eq!(resume(&|_| ()), Ok(4));
}

/// Pictures are prepared as the checkpoint says that a run starts from: one in a folder, and one that is a file.
#[test]
fn a_run_keeps_the_preprocessing_that_it_started_with() {
    let place = Place::new();
    let (from, out) = (place.checkpoint(), place.path("run"));
    let preprocessing = |mean: f64| {
        let text = json!({ "image_mean": [mean, mean, mean], "image_std": [0.25, 0.25, 0.25] }).to_string();
        fs::write(from.join("preprocessor_config.json"), text).unwrap();
    };
    preprocessing(0.5);
    let line = "pretrain --data synthetic:20 --out {} --from {} --batch-size 4 --threads 1 --steps";
    for (out, from) in [(&out, &from), (&place.path("of a file"), &from.join("model.safetensors"))] {
        run(&format!("{line} 2"), &[out, from]).succeeded();
        let written = fs::read(out.join("checkpoint-2/preprocessor_config.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&written).unwrap()["image_mean"], json!([0.5, 0.5, 0.5]));
    }
    preprocessing(0.4);
    run(&format!("{line} 4 --resume"), &[&out, &from]).failed(1, &["cannot resume", "preprocessing", "0.5", "0.4"]);
    preprocessing(0.5);
    run(&format!("{line} 4 --resume"), &[&out, &from]).succeeded();
}
