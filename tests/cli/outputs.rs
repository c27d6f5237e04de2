//! What is written, what is left behind, and what is not lost.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::bad_input::{CHECKPOINT, TRAIN, config_file, pretrain};
use crate::{Place, Ran, files, run};

/// A run that does not come to its first file leaves nothing.
#[test]
fn weights_of_another_model_leave_no_folder() {
    let place = Place::new();
    let (checkpoint, pictures) = (place.checkpoint(), place.pictures(4));
    let model = config_file(&place, |config| config.hidden_size = 16);
    let out = place.path("deep/run");
    run("pretrain --data {} --from {} --model {} --out {} --steps 1", &[&pictures, &checkpoint, &model, &out])
        .failed(1, &["of another shape", "vit.embeddings.cls_token"]);
    assert!(!out.exists());
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let place = Place::new();
    let pictures = place.pictures(2);
    let file = place.path("a file");
    fs::write(&file, "kept").unwrap();
    let model = config_file(&place, |_| ());
    run(&format!("pretrain --data {{}} --out {{}} {TRAIN}"), &[&pictures, &file.join("run"), &model])
        .failed(1, &["a file"]);
    let checkpoint = place.checkpoint();
    run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &file.join("f.npy")]).failed(1, &["f.npy"]);
    let picture = pictures.join("picture 00.png");
    run("reconstruct --from {} {} --out {}", &[&checkpoint, &picture, &file.join("x.png")]).failed(1, &["x.png"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_whole() {
    let place = Place::new();
    let pictures = place.pictures(4);
    let model = config_file(&place, |_| ());
    let out = place.path("run");
    run(
        "pretrain --data {} --out {} --model {} --batch-size 4 --steps 4 --checkpoint-every 2 --threads 1",
        &[&pictures, &out, &model],
    )
    .succeeded();
    let before = files(&out.join("checkpoint-2"));
    assert_eq!(before.keys().collect::<Vec<_>>(), CHECKPOINT);
    let end = files(&out.join("checkpoint-4"));
    // Go on from step 2 where no file may grow beyond 16 KiB: a write fails in the middle as on a full disk.
    fs::remove_dir_all(out.join("checkpoint-4")).unwrap();
    let resume = |limit: &str| -> Ran {
        let line = format!("{limit} exec \"$0\" \"$@\"");
        Command::new("bash")
            .args(["-c", &line, env!("CARGO_BIN_EXE_vitmae"), "pretrain", "--resume", "--data"])
            .arg(&pictures)
            .arg("--out")
            .arg(&out)
            .arg("--model")
            .arg(&model)
            .args(["--batch-size", "4", "--steps", "4", "--checkpoint-every", "2", "--threads", "1"])
            .output()
            .unwrap()
            .into()
    };
    resume("ulimit -f 16; trap '' XFSZ;").failed(1, &["File too large", "the checkpoint of step 2 is whole"]);
    assert_eq!(files(&out.join("checkpoint-2")), before);
    assert!(!out.join("checkpoint-4").exists());
    let leftovers: Vec<String> = place.list("run").into_iter().filter(|name| name.contains("tmp")).collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
    // With room again, the run ends as it would have.
    resume("").succeeded();
    let again = files(&out.join("checkpoint-4"));
    assert_eq!(again.keys().collect::<Vec<_>>(), CHECKPOINT);
    assert_eq!(again["model.safetensors"], end["model.safetensors"]);
    assert_eq!(again["optimizer.safetensors"], end["optimizer.safetensors"]);
}

/// A file system in memory of so many bytes, as long as it lives.
#[cfg(target_os = "linux")]
struct SmallDisk(std::path::PathBuf);

#[cfg(target_os = "linux")]
impl SmallDisk {
    /// `None` where this user may not mount.
    fn new(folder: std::path::PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&folder).unwrap();
        let disk = Self(folder);
        disk.mount(&format!("size={size}")).then_some(disk)
    }

    fn mount(&self, options: &str) -> bool {
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&self.0).output();
        mount.is_ok_and(|mount| mount.status.success())
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

/// The real thing: a disk that fills up under a run that keeps every checkpoint.
#[cfg(target_os = "linux")]
#[test]
fn a_run_says_that_the_disk_is_full_and_goes_on_when_it_is_not() {
    let place = Place::new();
    let (pictures, model) = (place.pictures(4), config_file(&place, |_| ()));
    let Some(disk) = SmallDisk::new(place.path("disk"), "3m") else {
        println!("skipped: mounting a file system is not allowed here");
        return;
    };
    let out = disk.0.join("run");
    let line =
        "pretrain --data {} --out {} --model {} --batch-size 4 --steps 40 --checkpoint-every 2 --keep 20 --threads 1";
    let ran = run(line, &[&pictures, &out, &model]).failed(1, &["No space left", "is whole"]);
    let mut kept: Vec<u64> = place
        .list("disk/run")
        .into_iter()
        .inspect(|name| assert!(!name.contains("tmp"), "{name} is left"))
        .filter_map(|name| name.strip_prefix("checkpoint-")?.parse().ok())
        .collect();
    kept.sort_unstable();
    let last = kept.last().copied().unwrap();
    assert!(last < 40 && ran.err.contains(&format!("the checkpoint of step {last} is whole")), "{kept:?}: {}", ran.err);
    for step in kept {
        let checkpoint = out.join(format!("checkpoint-{step}"));
        assert_eq!(files(&checkpoint).keys().collect::<Vec<_>>(), CHECKPOINT, "step {step}");
        run("info {}", &[&checkpoint]).succeeded();
    }
    // With room again, the run ends as an undisturbed one does.
    assert!(disk.mount("remount,size=50m"));
    run(&format!("{line} --resume"), &[&pictures, &out, &model]).succeeded();
    let undisturbed = place.path("undisturbed");
    run(line, &[&pictures, &undisturbed, &model]).succeeded();
    let end = |run: &Path| fs::read(run.join("checkpoint-40/model.safetensors")).unwrap();
    assert!(end(&out) == end(&undisturbed));
}

#[test]
fn an_output_folder_with_a_run_in_it_is_not_overwritten() {
    let place = Place::new();
    let pictures = place.pictures(4);
    pretrain(&place, &pictures, "").succeeded();
    let metrics = fs::read(place.path("run/metrics.jsonl")).unwrap();
    pretrain(&place, &pictures, "").failed(1, &["--resume"]);
    assert_eq!(fs::read(place.path("run/metrics.jsonl")).unwrap(), metrics);
    pretrain(&place, &pictures, "--resume --seed 9").failed(1, &["seed"]);
}

/// What would be lost is refused before the work, and sizes that no machine has are no aborts.
#[test]
fn outputs_and_sizes_are_checked_first() {
    let place = Place::new();
    let (checkpoint, picture) = (place.checkpoint(), place.pictures(1).join("picture 00.png"));
    let before = fs::read(&picture).unwrap();
    run("reconstruct --from {} {} --out {}", &[&checkpoint, &picture, &picture]).failed(1, &["is the input"]);
    assert_eq!(fs::read(&picture).unwrap(), before);
    run("embed --from {} --data {} --out {}", &[&checkpoint, &picture, &place.path("none/f.npy")])
        .failed(1, &["none", "writing"]);
    // No checkpoint is even looked for where the result could not be written.
    let (absent, input) = (Path::new("/no/such/checkpoint"), Path::new("/no/such/input"));
    let mut unwritable = vec![place.path("none/out.png"), place.path("folder.png")];
    fs::create_dir(place.path("folder.png")).unwrap();
    if cfg!(target_os = "linux") {
        unwritable.push("/proc/x.png".into());
    }
    for out in &unwritable {
        let words = ["writing", &out.to_string_lossy()];
        run("forward --from {} --input {} --output {}", &[absent, input, out]).failed(1, &words);
        run("reconstruct --from {} {} --out {}", &[absent, &picture, out]).failed(1, &words);
    }
    assert!(!place.path("none").exists());
    run("embed --from {} --data {} --out {} --image-size 8000000", &[&checkpoint, &picture, &place.path("f.npy")])
        .failed(2, &["at most 32768"]);
    run("pretrain --data synthetic:20 --out {} --batch-size 16000000", &[&place.path("run")])
        .failed(1, &["does not fit in memory"]);

    #[cfg(unix)]
    {
        // A link stays a link, and what is no file is left alone.
        let (link, target) = (place.path("link.png"), place.path("target.png"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        run("reconstruct --from {} {} --out {}", &[&checkpoint, &picture, &link]).succeeded();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_ne!(fs::read(&target).unwrap(), b"old");
        let null = place.path("null.png");
        std::os::unix::fs::symlink("/dev/null", &null).unwrap();
        run("reconstruct --from {} {} --out {}", &[&checkpoint, &picture, &null]).failed(1, &["not a regular file"]);
    }
}

/// What fails when all is trained, as on a disk that is full at the very end, costs nothing and says so.
#[test]
fn a_last_picture_that_cannot_be_written_does_not_hide_the_checkpoint() {
    let place = Place::new();
    let (pictures, model) = (place.pictures(4), config_file(&place, |_| ()));
    let line = "pretrain --data {} --out {} --model {} --batch-size 4 --steps 4 --threads 1";
    let curve = place.path("curve");
    run(line, &[&pictures, &curve, &model]).succeeded();
    // The curve alone, as a run draws it that is resumed at its end.
    fs::remove_file(curve.join("loss.svg")).unwrap();
    fs::create_dir(curve.join("loss.svg")).unwrap();
    let folder = |run: &Path| run.join("checkpoint-4").display().to_string();
    let ran = run(&format!("{line} --resume"), &[&pictures, &curve, &model]);
    ran.failed(1, &["loss.svg", "the checkpoint of step 4 is whole", &folder(&curve)]);
    run("info {}", &[&curve.join("checkpoint-4")]).succeeded();
    // The last reconstruction.
    let last = place.path("last");
    fs::create_dir_all(last.join("reconstruction-4.png")).unwrap();
    let ran = run(line, &[&pictures, &last, &model]);
    ran.failed(1, &["reconstruction-4.png", "the checkpoint of step 4 is whole", &folder(&last)]);
    run("info {}", &[&last.join("checkpoint-4")]).succeeded();
}

/// A result never replaces the model that it was made with.
#[test]
fn a_checkpoint_is_not_written_over() {
    let place = Place::new();
    let (checkpoint, pictures) = (place.checkpoint(), place.pictures(2));
    let weights = checkpoint.join("model.safetensors");
    let before = files(&checkpoint);
    let input = place.tensors("in.safetensors", &[("pixel_values", &[1, 3, 32, 32], &vec![0.5; 3 * 32 * 32])]);
    for from in [&checkpoint, &weights] {
        run("embed --from {} --data {} --out {}", &[from, &pictures, &weights]).failed(1, &["which would be lost"]);
        run("forward --from {} --input {} --output {}", &[from, &input, &weights]).failed(1, &["which would be lost"]);
    }
    assert_eq!(files(&checkpoint), before);
    // A new file beside them is nobody's loss.
    run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &checkpoint.join("f.npy")]).succeeded();
}

/// What a run draws would become part of its own pictures, and no run could go on.
#[test]
fn a_run_does_not_write_among_its_pictures() {
    let place = Place::new();
    let (pictures, model) = (place.pictures(4), config_file(&place, |_| ()));
    let before = files(&pictures);
    for out in [pictures.clone(), pictures.join("runs/first"), place.path("pictures/../pictures/x")] {
        run(&format!("pretrain --data {{}} --out {{}} {TRAIN}"), &[&pictures, &out, &model])
            .failed(1, &["lies in the folder of pictures"]);
    }
    for (flag, data, log_dir) in [
        ("--data", pictures.clone(), pictures.join("logs")),
        ("--data synthetic:4 --val", pictures.clone(), pictures.clone()),
        ("--data", pictures.clone(), place.path("pictures/../pictures/deep/logs")),
    ] {
        let line = format!("pretrain {flag} {{}} --log-dir {{}} --out {{}} {TRAIN}");
        run(&line, &[&data, &log_dir, &place.path("logged"), &model])
            .failed(1, &["TensorBoard's events", "lies in the folder of pictures"]);
        assert!(!place.path("logged").exists());
    }
    assert_eq!(files(&pictures), before);
    run(&format!("pretrain --data {{}} --out {{}} {TRAIN}"), &[&pictures, &place.path("pictures2"), &model])
        .succeeded();
}

/// A run that did not come to its first step does not stand in the way of the next.
#[test]
fn a_folder_of_a_run_that_did_not_begin_can_be_used() {
    let place = Place::new();
    let pictures = place.pictures(3);
    fs::write(pictures.join("bad.png"), "none").unwrap();
    pretrain(&place, &pictures, "").failed(1, &["bad.png"]);
    fs::remove_file(pictures.join("bad.png")).unwrap();
    pretrain(&place, &pictures, "").succeeded();
}
