//! What goes wrong in one process, and what becomes of the run.

use crate::{Place, Way};

const LINE: &str = "--data synthetic:44 --batch-size 8 --blr 0.02";

/// MPI where it is, else sockets, which a build without MPI has been tested with.
fn way() -> Way {
    Way::mpi().unwrap_or(Way::Sockets(2))
}

/// Two more steps by one process: the checkpoint can be read.
fn goes_on(place: &Place, out: &str, from: u64) {
    let ran =
        place.run(Way::Alone, out, &format!("{LINE} --checkpoint-every 4 --resume --steps {}", from + 2)).succeeded();
    assert_eq!(ran.metrics().len() as u64, from + 2);
    assert_eq!(ran.checkpoints().last(), Some(&(from + 2)));
}

#[test]
fn a_killed_process_ends_the_run_and_leaves_a_whole_checkpoint() {
    let way = way();
    let place = Place::new();
    let running = place.start(way, "run", &format!("{LINE} --checkpoint-every 4 --steps 1000000"));
    running.wait_for_steps(10);
    // Meanwhile nobody else gets the folder.
    place.run(way, "run", &format!("{LINE} --steps 5 --resume")).failed(&["another run is writing to"]);
    place.run(way, "run", &format!("{LINE} --steps 5")).failed(&["already holds a run"]);
    running.signal(1, "-KILL");
    let name = if way == Way::Sockets(2) { "process 1 is gone" } else { "process rank 1" };
    let ran = running.wait().failed(&[name]);
    let last = *ran.checkpoints().last().unwrap();
    assert!(last >= 8, "{last}");
    goes_on(&place, "run", last);
}

#[test]
fn a_signal_to_any_process_ends_all_at_the_same_step() {
    let way = way();
    for signal in ["-TERM", "-INT"] {
        let place = Place::new();
        let running = place.start(way, "run", &format!("{LINE} --checkpoint-every 1000000 --steps 1000000"));
        running.wait_for_steps(3);
        running.signal(1, signal);
        let ran = running.wait().failed(&["stopped after step", "--resume"]);
        let steps = ran.metrics().len() as u64;
        assert_eq!(ran.checkpoints(), [steps], "{way:?}: {}", ran.err);
        assert_eq!(ran.err.matches("stopped after step").count(), 1, "{}", ran.err);
        let place_steps = steps + 2;
        let line = format!("{LINE} --checkpoint-every 1000000 --resume --steps {place_steps}");
        assert_eq!(place.run(Way::Alone, "run", &line).succeeded().metrics().len() as u64, place_steps);
    }
}

#[test]
fn what_all_processes_refuse_one_says() {
    let way = way();
    let place = Place::new();
    let ran = place.run(way, "run", "--data synthetic:44 --batch-size 7 --steps 2").failed(&[
        "7 pictures",
        "2 processes",
        "6 or 8",
    ]);
    assert_eq!(ran.err.matches("error: ").count(), 1, "{}", ran.err);
    assert!(!place.path("run").exists());
}

/// Pictures go in the middle of a run: it ends, and what was trained is saved.
fn pictures_go(flags: &str) {
    let place = Place::new();
    let pictures = place.path("pictures");
    std::fs::create_dir(&pictures).unwrap();
    for index in 0..8_u8 {
        let picture = image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([x as u8 * 6, y as u8 * 6, index * 30]));
        picture.save(pictures.join(format!("{index}.png"))).unwrap();
    }
    let data = pictures.to_str().unwrap();
    let line = format!("--data {data} --batch-size 8 --checkpoint-every 1000000 --steps 1000000 {flags}");
    let running = place.start(Way::Sockets(2), "run", &line);
    running.wait_for_steps(5);
    for entry in std::fs::read_dir(&pictures).unwrap() {
        std::fs::write(entry.unwrap().path(), "no picture").unwrap();
    }
    let ran = running.wait().failed(&["cannot be"]);
    let steps = ran.metrics().len() as u64;
    assert_eq!(ran.checkpoints(), [steps], "{}", ran.err);
}

#[test]
fn what_fails_in_one_process_ends_all_and_saves_what_was_trained() {
    pictures_go("");
    pictures_go("--shard-optimizer");
}

/// Process 0 alone fails where the others would still save what there is, which takes it: all end.
#[test]
fn a_checkpoint_that_cannot_be_written_ends_all_with_a_shared_optimizer() {
    for way in [Some(Way::Sockets(3)), Way::mpi()].into_iter().flatten() {
        let place = Place::new();
        let line =
            "--data synthetic:48 --batch-size 12 --blr 0.02 --checkpoint-every 500 --steps 1000 --shard-optimizer";
        let running = place.start(way, "run", line);
        running.wait_for_steps(1);
        std::fs::create_dir(place.path("run").join("checkpoint-500")).unwrap();
        let ran = running.wait().failed(&["no checkpoint of a run", "no checkpoint had been written yet"]);
        assert_eq!(ran.metrics().len(), 500, "{}", ran.err);
        assert!(!ran.err.contains("do not do the same"), "{}", ran.err);
    }
}

#[test]
fn a_finished_run_with_a_shared_optimizer_is_resumed_and_ends() {
    let place = Place::new();
    let line = format!("{LINE} --steps 4 --shard-optimizer");
    place.run(Way::Sockets(2), "run", &line).succeeded();
    let again = place.run(Way::Sockets(2), "run", &format!("{line} --resume")).succeeded();
    assert_eq!(again.checkpoints(), [4]);
}

/// The validation pictures of one process go: all leave the loss out at the same steps, and train on.
#[test]
fn a_validation_that_fails_in_one_process_is_left_out_by_all() {
    // Process 0 has the first half of the pictures. With few of them a process cannot say that its share is bad, and all together
    // can.
    for (half, words) in [
        (8_u8, &["val (--val): only 8 of its 16 pictures can be read"][..]),
        (32, &["another process cannot read its pictures", "process 1 of 2: ", "val (--val): "]),
    ] {
        let place = Place::new();
        let pictures = place.path("val");
        std::fs::create_dir(&pictures).unwrap();
        let name = |index: u8| pictures.join(format!("{index:02}.png"));
        for index in 0..2 * half {
            let picture = image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([x as u8 * 6, y as u8 * 6, index * 3]));
            picture.save(name(index)).unwrap();
        }
        let val = pictures.to_str().unwrap();
        let line = format!(
            "--data synthetic:128 --batch-size 64 --micro-batch {half} --checkpoint-every 10 --steps 100 --val {val}"
        );
        let running = place.start(Way::Sockets(2), "run", &line);
        running.wait_for_steps(11);
        for index in half..2 * half {
            std::fs::remove_file(name(index)).unwrap();
        }
        let ran = running.wait().succeeded();
        let metrics = ran.metrics();
        let taken = metrics.iter().filter(|step| step["validation_loss"].is_number()).count();
        assert_eq!(metrics.len(), 100);
        assert!((1..10).contains(&taken), "{taken}: {}", ran.err);
        let left_out = format!("{} validation losses were left out", 10 - taken);
        for words in words.iter().chain(&["the validation loss is left out, and the run goes on", left_out.as_str()]) {
            assert!(ran.err.contains(words), "{words}: {}", ran.err);
        }
        assert!(ran.out.contains("best checkpoint"), "{}", ran.out);
    }
}

/// Whether a validation set is good enough does not depend on how many look at it: one bad file of 30 is, though it is one of the
/// five of a process; four are not, though a process may have none of them.
#[test]
#[cfg(unix)]
fn a_validation_set_is_judged_as_a_whole() {
    let place = Place::new();
    let pictures = place.path("val");
    std::fs::create_dir(&pictures).unwrap();
    let name = |index: u8| pictures.join(format!("{index:02}.png"));
    for index in 0..30 {
        image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([x as u8 * 6, y as u8 * 6, index]))
            .save(name(index))
            .unwrap();
    }
    let val = pictures.to_str().unwrap();
    let line = format!("--data synthetic:30 --batch-size 30 --micro-batch 30 --steps 1 --val {val}");
    let ways = [Way::Alone, Way::Sockets(3), Way::Sockets(6)];
    let away = |indices: &[u8]| {
        for &index in indices {
            std::fs::remove_file(name(index)).unwrap();
            std::os::unix::fs::symlink("/no/such/file.png", name(index)).unwrap();
        }
    };
    away(&[29]);
    for (number, way) in ways.into_iter().enumerate() {
        let ran = place.run(way, &format!("good {number}"), &line).succeeded();
        assert!(ran.metrics()[0]["validation_loss"].is_number(), "{way:?}");
    }
    away(&[5, 11, 17]);
    for way in ways {
        let ran =
            place.run(way, "gone", &line).failed(&["(--val): 4 of 30 files cannot be opened", "05.png", "17.png"]);
        assert_eq!(ran.err.matches("error: ").count(), 1, "{way:?}: {}", ran.err);
    }
    for index in [5, 11, 17, 29] {
        std::fs::remove_file(name(index)).unwrap();
        std::fs::write(name(index), "no picture").unwrap();
    }
    for way in ways {
        place.run(way, "bad", &line).failed(&["(--val): ", "4 of 30 ", "cannot be"]);
    }
    assert!(!place.path("gone").exists() && !place.path("bad").exists());
}

/// What differs is named by its flag, with both values in words.
#[test]
fn processes_with_different_settings_do_not_start() {
    let place = Place::new();
    for (first, second, words) in [
        ("--steps 50", "--steps 51", "the number of steps (--steps, --epochs) is 51 here and 50 on process 0"),
        ("", "--clip-grad 2", "--clip-grad is 2 here and not given on process 0"),
        ("--clip-grad 2", "--clip-grad 3", "--clip-grad is 3 here and 2 on process 0"),
        ("--ema 0.5", "", "--ema is not given here and 0.5 on process 0"),
        ("--weight-decay 0.5", "", "--weight-decay is 0.05 here and 0.5 on process 0"),
        ("--shard-optimizer", "", "--shard-optimizer is not given here and given on process 0"),
        ("--checkpoint-every 3", "", "--checkpoint-every is not given here and 3 on process 0"),
        ("--val synthetic:9", "", "--val is not given here and a set with the fingerprint "),
        ("", "--val synthetic:9", " here and not given on process 0"),
    ] {
        let settings = |rank| format!("--data synthetic:8 --batch-size 8 {}", [first, second][rank]);
        let ran = place.start_each(Way::Sockets(2), "run", &settings).wait();
        let ran = ran.failed(&[
            "process 1 of 2: error",
            "different settings",
            words,
            "process 0 of 2: error",
            "process 1 of 2 has failed",
        ]);
        for debug in ["None", "Some(", " {"] {
            assert!(!ran.err.contains(debug), "{}", ran.err);
        }
        assert!(!place.path("run").join("metrics.jsonl").exists());
    }
}

#[test]
fn a_process_that_nobody_joins_says_so() {
    let place = Place::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_vitmae"))
        .args(["pretrain", "--data", "synthetic:8", "--out"])
        .arg(place.path("run"))
        .env("RANK", "0")
        .env("WORLD_SIZE", "3")
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .env("VITMAE_RENDEZVOUS_SECONDS", "0")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{text}");
    assert!(text.contains("no word from process 1, 2"), "{text}");
}

/// Without the feature, `mpirun` must not start as many runs as there are processes.
#[test]
fn a_build_without_mpi_says_so_under_mpirun() {
    if cfg!(feature = "mpi") {
        println!("skipped: this build has the feature `mpi`");
        return;
    }
    let place = Place::new();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_vitmae"))
        .args(["pretrain", "--data", "synthetic:8", "--out"])
        .arg(place.path("run"))
        .env("OMPI_COMM_WORLD_RANK", "0")
        .env("OMPI_COMM_WORLD_SIZE", "2")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{text}");
    assert!(text.contains("--features mpi"), "{text}");
}
