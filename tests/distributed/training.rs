//! The numbers: several processes make the steps of one.

use std::fs;
use std::path::Path;

use crate::{Place, Ran, Way, difference};

/// 40 pictures in batches of 8, two to a step: epochs end in the middle of a step and leave nothing over; with 44, four are left out.
const LINE: &str = "--data synthetic:44 --batch-size 8 --accumulate 2 --blr 0.02 --seed 3";

fn follows_one(way: Way) {
    let place = Place::new();
    let line = format!("{LINE} --steps 50 --micro-batch 3");
    let alone = place.run(Way::Alone, "alone", &line).succeeded();
    let together = place.run(way, "together", &line).succeeded();
    let (one, many) = (alone.metrics(), together.metrics());
    assert_eq!(one.len(), 50);
    let (loss, norm) = (difference(&one, &many, "loss"), difference(&one, &many, "gradient_norm"));
    println!("{way:?}: loss within {loss:.1e}, gradient norm within {norm:.1e}");
    assert!(loss < 1e-5, "{loss}");
    assert!(norm < 1e-4, "{norm}");
    assert_eq!(difference(&one, &many, "learning_rate"), 0.0);
    assert_eq!(difference(&one, &many, "epoch"), 0.0);
    // The runs were worth comparing: pictures, crops and masks of another seed make another run, and weights moved.
    let other = place.run(Way::Alone, "other", &line.replace("--seed 3", "--seed 4")).succeeded().metrics();
    assert!(difference(&one, &other, "loss") > 1e-2);
    let moved = place.run(Way::Alone, "still", &line.replace("--blr 0.02", "--blr 0")).succeeded().metrics();
    assert!(difference(&one[40..], &moved[40..], "loss") > 1e-2);

    // One process wrote the files of a run, and one spoke.
    let names = |folder: &str| {
        let mut names: Vec<String> = fs::read_dir(place.path(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| if name.starts_with("events.") { "events".into() } else { name })
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("alone"), names("together"));
    assert_eq!(together.out.matches("trained 50 steps").count(), 1, "{}", together.out);
    assert_eq!(together.err.matches("pictures,").count(), 1, "{}", together.err);
}

#[test]
fn processes_over_sockets_follow_one_process() {
    follows_one(Way::Sockets(2));
}

#[test]
fn processes_under_mpi_follow_one_process() {
    if let Some(way) = Way::mpi() {
        follows_one(way);
    }
}

#[test]
fn four_processes_follow_one_process() {
    let place = Place::new();
    let line = format!("{LINE} --steps 10");
    let one = place.run(Way::Alone, "alone", &line).succeeded().metrics();
    let four = place.run(Way::Sockets(4), "four", &line).succeeded().metrics();
    assert!(difference(&one, &four, "loss") < 1e-5);
}

/// All weights of a model.
fn weights(folder: &Path) -> Vec<f64> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file.tensors();
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    let numbers = tensors.iter().flat_map(|(_, tensor)| tensor.data().chunks_exact(4));
    numbers.map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()))).collect()
}

/// A run of 12 steps that was cut behind step 5 and gone on with by another number of processes.
fn resumes(first: Way, second: Way) {
    let place = Place::new();
    let line = format!("{LINE} --steps 12 --checkpoint-every 5 --val synthetic:13:9 --ema 0.9");
    let whole = place.run(Way::Alone, "whole", &line).succeeded();
    let cut = place.run(first, "cut", &line).succeeded();
    for step in [10, 12] {
        fs::remove_dir_all(cut.folder.join(format!("checkpoint-{step}"))).unwrap();
    }
    let resumed = place.run(second, "cut", &format!("{line} --resume")).succeeded();
    assert_eq!(resumed.checkpoints(), [5, 10, 12]);
    let difference = difference(&whole.metrics(), &resumed.metrics(), "loss");
    assert!(difference < 1e-5, "{first:?}, then {second:?}: {difference}");
    // 13 pictures that nobody learns from, shared out, and the average of the weights.
    let validation =
        |ran: &Ran| -> Vec<f64> { ran.metrics().iter().filter_map(|step| step["validation_loss"].as_f64()).collect() };
    let (expected, found) = (validation(&whole), validation(&resumed));
    assert_eq!((expected.len(), found.len()), (3, 3));
    assert!(expected.iter().zip(&found).all(|(one, other)| (one - other).abs() < 1e-5 * one), "{expected:?} {found:?}");
    for model in ["checkpoint-12", "checkpoint-12/ema"] {
        let (one, other) = (weights(&whole.folder.join(model)), weights(&resumed.folder.join(model)));
        assert_eq!(one.len(), other.len());
        let norm = one.iter().map(|value| value * value).sum::<f64>().sqrt();
        let apart = one.iter().zip(&other).map(|(one, other)| (one - other).powi(2)).sum::<f64>().sqrt();
        assert!(apart < 1e-4 * norm, "{model}: {apart} of {norm}");
    }
    // Where it goes on is not the beginning.
    let text = fs::read_to_string(resumed.folder.join("checkpoint-12/trainer_state.json")).unwrap();
    assert!(text.contains("\"updates\": 12"), "{text}");
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() {
    let way = Way::mpi().unwrap_or(Way::Sockets(2));
    resumes(Way::Alone, way);
    resumes(way, Way::Alone);
}

/// Processes with a share of the moments each leave the same files as processes that have all of them, and can take turns with them.
fn shares(way: Way) {
    let place = Place::new();
    let line = format!("{LINE} --steps 12 --checkpoint-every 5 --val synthetic:13:9 --ema 0.9 --clip-grad 0.5");
    let whole = place.run(way, "whole", &line).succeeded();
    let shared = place.run(way, "shared", &format!("{line} --shard-optimizer")).succeeded();
    let same = |other: &Ran| {
        for what in ["loss", "gradient_norm", "validation_loss"] {
            let numbers = |ran: &Ran| ran.metrics().iter().map(|step| step[what].clone()).collect::<Vec<_>>();
            assert_eq!(numbers(&whole), numbers(other), "{what}");
        }
        for file in ["model.safetensors", "optimizer.safetensors", "ema/model.safetensors"] {
            let bytes = |ran: &Ran, step: u64| fs::read(ran.folder.join(format!("checkpoint-{step}/{file}"))).unwrap();
            for step in [5, 10, 12] {
                assert!(bytes(&whole, step) == bytes(other, step), "{file} of step {step}");
            }
        }
    };
    same(&shared);
    for (first, second) in [(" --shard-optimizer", ""), ("", " --shard-optimizer")] {
        let out = if first.is_empty() { "to" } else { "from" };
        let cut = place.run(way, out, &format!("{line}{first}")).succeeded();
        for step in [10, 12] {
            fs::remove_dir_all(cut.folder.join(format!("checkpoint-{step}"))).unwrap();
        }
        same(&place.run(way, out, &format!("{line} --resume{second}")).succeeded());
    }
}

#[test]
fn a_shared_optimizer_changes_no_bit_over_sockets() {
    shares(Way::Sockets(4));
}

#[test]
fn a_shared_optimizer_changes_no_bit_under_mpi() {
    if let Some(way) = Way::mpi() {
        shares(way);
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_by_all() {
    let place = Place::new();
    // The first update throws the weights beyond what f32 holds.
    let line = "--data synthetic:44 --batch-size 8 --blr 1e38 --warmup-epochs 0 --steps 6 --checkpoint-every 1";
    let skipped = |way, out| {
        let metrics = place.run(way, out, line).succeeded().metrics();
        metrics.iter().map(|step| step["skipped"].as_bool().unwrap_or(false)).collect::<Vec<_>>()
    };
    let alone = skipped(Way::Alone, "alone");
    assert!(alone.iter().any(|skipped| *skipped) && !alone[0], "{alone:?}");
    assert_eq!(alone, skipped(Way::Sockets(2), "together"));
}
