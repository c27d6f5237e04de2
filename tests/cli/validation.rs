//! `pretrain --val`: what is wrong with its pictures at the start ends the run, and later does not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::pretraining::{model, values};
use crate::{Place, Ran, run};

/// A folder of pictures that are not those of [`Place::pictures`].
fn others(place: &Place, count: u32) -> PathBuf {
    let folder = place.path("others");
    fs::create_dir(&folder).unwrap();
    for index in 0..count {
        let picture = image::RgbImage::from_fn(36, 40, |x, y| image::Rgb([(y * 6) as u8, (index * 20) as u8, x as u8]));
        picture.save(folder.join(format!("{index:02}.png"))).unwrap();
    }
    folder
}

/// Nothing was trained, and nothing is left.
fn refused(place: &Place, val: &Path, words: &[&str]) {
    let line = "pretrain --data synthetic:20 --val {} --out {} --model {} --batch-size 4 --steps 2";
    run(line, &[val, &place.path("run"), &model(place)]).failed(1, words);
    assert!(!place.path("run").exists());
}

#[test]
fn a_validation_set_is_looked_at_before_anything_is_trained() {
    let place = Place::new();
    refused(&place, Path::new("/no/such/set"), &["/no/such/set"]);
    let others = others(&place, 12);
    // One picture in ten may be bad.
    fs::write(others.join("00.png"), "no picture").unwrap();
    let line = "pretrain --data synthetic:20 --val {} --out {} --model {} --batch-size 4 --steps 2";
    let ran = run(line, &[&others, &place.path("good"), &model(&place)]).succeeded();
    // It is met at the start and at both checkpoints, and named once.
    assert_eq!(ran.err.matches("00.png").count(), 1, "{}", ran.err);
    assert_eq!(values(&place.path("good"), "validation_loss").len(), 2);
    for index in 1..12 {
        fs::write(others.join(format!("{index:02}.png")), "no picture").unwrap();
    }
    refused(&place, &others, &["others (--val)", "cannot be"]);
}

/// Files of which only the names are there, behind a first batch that is good.
#[test]
#[cfg(unix)]
fn every_file_of_a_validation_set_is_opened_at_the_start() {
    let place = Place::new();
    let others = others(&place, 80);
    for index in 70..80 {
        let path = others.join(format!("{index}.png"));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/no/such/file.png", &path).unwrap();
    }
    refused(&place, &others, &["(--val)", "10 of 80 files cannot be opened", "70.png"]);
}

/// Trains with the pictures of `val`, which are taken away when the run has its first validation loss.
fn train_without_losing(place: &Place, val: &Path, take_away: impl FnOnce()) -> (Ran, PathBuf) {
    let out = place.path("run");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitmae"));
    command.args(["pretrain", "--data", "synthetic:40", "--batch-size", "4", "--steps", "600", "--checkpoint-every"]);
    command.args(["30", "--keep", "1", "--picture-every", "1000000", "--blr", "0.01", "--threads", "1", "--val"]);
    command.arg(val).arg("--out").arg(&out).arg("--model").arg(model(place));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while !fs::read_to_string(out.join("metrics.jsonl")).is_ok_and(|text| text.contains("validation_loss")) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
        std::thread::sleep(Duration::from_millis(1));
    }
    take_away();
    (Ran::from(child.wait_with_output().unwrap()).succeeded(), out)
}

/// A validation that cannot be done any more is left out, and the best checkpoint stays the best of those that were done.
#[test]
fn a_validation_set_that_goes_away_does_not_end_the_run() {
    let place = Place::new();
    let (others, away) = (others(&place, 20), place.path("away"));
    let (ran, out) = train_without_losing(&place, &others, || fs::rename(&others, &away).unwrap());
    let losses = values(&out, "validation_loss");
    let left_out = 600 / 30 - losses.len();
    assert!(left_out > 0 && !losses.is_empty(), "{losses:?}");
    for words in [
        "the validation loss is left out, and the run goes on",
        "others (--val)",
        &format!("{left_out} validation losses were left out"),
    ] {
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
    }
    assert_eq!(values(&out, "loss").len(), 600);
    let best = |losses: &[(u64, f64)]| losses.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let (step, lowest) = best(&losses);
    assert!(ran.out.contains(&format!("checkpoint-{step}, validation loss {lowest:.4}")), "{}", ran.out);
    for step in [step, 600] {
        assert!(out.join(format!("checkpoint-{step}/model.safetensors")).is_file(), "{:?}", place.list("run"));
    }

    // The run goes on with what it knows, once the pictures are there again.
    let line = "pretrain --data synthetic:40 --val {} --out {} --model {} --batch-size 4 --steps 630 --checkpoint-every 30 --keep 1 \
                --blr 0.01 --threads 1 --resume";
    let paths: [&Path; 3] = [&others, &out, &model(&place)];
    run(line, &paths).failed(1, &["others"]);
    fs::rename(&away, &others).unwrap();
    let ran = run(line, &paths).succeeded();
    let losses = values(&out, "validation_loss");
    assert_eq!(losses.last().unwrap().0, 630);
    let (step, lowest) = best(&losses);
    assert!(ran.out.contains(&format!("checkpoint-{step}, validation loss {lowest:.4}")), "{}", ran.out);
}

/// One file of many is left out of the mean, which is then of other pictures.
#[test]
fn a_validation_loss_of_fewer_pictures_is_said_to_be_one() {
    let place = Place::new();
    let others = others(&place, 20);
    let (ran, out) = train_without_losing(&place, &others, || fs::remove_file(others.join("07.png")).unwrap());
    assert_eq!(values(&out, "validation_loss").len(), 20);
    assert_eq!(ran.err.matches("now of 19 pictures, and was of 20").count(), 1, "{}", ran.err);
    assert!(!ran.err.contains("validation losses were left out"), "{}", ran.err);
}

/// The losses of two sets do not compare: another set at the same place is refused, the same one at another is not.
#[test]
fn a_run_keeps_its_validation_set() {
    let place = Place::new();
    let (model, others, out) = (model(&place), others(&place, 9), place.path("run"));
    let line = "pretrain --data synthetic:20 --val {} --out {} --model {} --batch-size 4 --threads 1 --keep 1 --steps";
    run(&format!("{line} 4"), &[&others, &out, &model]).succeeded();
    let resume = |steps: u32, val: &Path| run(&format!("{line} {steps} --resume"), &[val, &out, &model]);
    let (recipe, again) = (out.join("recipe.json"), place.path("again"));
    let repeat = || run("pretrain --recipe {} --out {}", &[&recipe, &again]);

    let more = others.join("more.png");
    fs::copy(others.join("00.png"), &more).unwrap();
    resume(6, &others).failed(1, &["cannot resume", "val (fingerprint", "sizes"]);
    repeat().failed(1, &["others (--val)", "not the pictures of the recipe", "sizes"]);
    assert!(!again.exists());
    fs::remove_file(&more).unwrap();

    // Other spellings of the path, and another path.
    let mut steps = 4;
    let mut goes_on = |val: &Path| {
        steps += 2;
        resume(steps, val).succeeded();
    };
    goes_on(&others);
    goes_on(&others.join("."));
    goes_on(&others.join(""));
    goes_on(&others.join("../others/"));
    let moved = place.path("moved");
    fs::rename(&others, &moved).unwrap();
    goes_on(&moved);
    repeat().succeeded();

    // Checkpoints from before the fingerprint have the path alone.
    let state = out.join("checkpoint-14/trainer_state.json");
    let mut edited: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    edited.as_object_mut().unwrap().remove("validation_fingerprint").expect("it was there");
    fs::write(&state, edited.to_string()).unwrap();
    fs::rename(&moved, &others).unwrap();
    resume(16, &others).failed(1, &["cannot resume", "val was", "moved"]);
    fs::rename(&others, &moved).unwrap();
    fs::copy(moved.join("00.png"), moved.join("more.png")).unwrap();
    resume(16, &moved).succeeded();
}
