//! What several processes must have in common before they train together, in words for the message about what differs.

use crate::data::ImageProcessor;
use crate::ops::Backend;
use crate::train::run::checkpoint::Fingerprints;
use crate::train::{PretrainSettings, Schedule, Sharding};

const NOT_GIVEN: &str = "not given";

/// Everything that decides what a run does, by the flag that it is given with where there is one.
pub(super) fn settings<B: Backend>(
    settings: &PretrainSettings,
    processor: &ImageProcessor,
    fingerprints: &Fingerprints,
    schedule: &Schedule,
) -> Vec<(&'static str, String)> {
    let set = |fingerprint: &String| format!("a set with the fingerprint {fingerprint}");
    let (optimizer, sharded) = (&settings.optimizer, settings.sharding == Sharding::Optimizer);
    vec![
        ("the program's version", env!("CARGO_PKG_VERSION").to_owned()),
        ("the kind of device", kind(std::any::type_name::<B>())),
        ("the model", settings.config.to_json()),
        ("--data", set(&fingerprints.data)),
        ("--val", shown(fingerprints.validation.as_ref().map(set))),
        ("preprocessing", processor.to_json().to_string()),
        ("--batch-size", settings.batch_size.to_string()),
        ("--accumulate", settings.accumulate.to_string()),
        ("--seed", settings.seed.to_string()),
        ("the number of steps (--steps, --epochs)", schedule.total_steps.to_string()),
        ("the highest learning rate (--lr, --blr)", schedule.peak.to_string()),
        ("--min-lr", schedule.minimum.to_string()),
        ("the number of warm-up steps (--warmup-epochs)", schedule.warmup_steps.to_string()),
        ("the first beta", optimizer.betas.0.to_string()),
        ("the second beta", optimizer.betas.1.to_string()),
        ("the optimiser's epsilon", optimizer.epsilon.to_string()),
        ("--weight-decay", optimizer.weight_decay.to_string()),
        ("--clip-grad", shown(optimizer.clip_norm)),
        ("--ema", shown(settings.average_decay)),
        ("--shard-optimizer", if sharded { "given" } else { NOT_GIVEN }.to_owned()),
        ("--checkpoint-every", shown(settings.checkpoint_every)),
    ]
}

fn shown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NOT_GIVEN.to_owned(), |value| value.to_string())
}

/// A backend by its type: `Cpu with f32`.
fn kind(backend: &str) -> String {
    let names = backend.split(['<', '>', ',']).map(str::trim).filter(|part| !part.is_empty());
    names.map(|part| part.rsplit("::").next().unwrap_or(part)).collect::<Vec<_>>().join(" with ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_named_without_its_modules() {
        assert_eq!(kind("vitmae::cpu::backend::Cpu<f32>"), "Cpu with f32");
        assert_eq!(kind("a::Cuda<b::Driver, half::bf16>"), "Cuda with Driver with bf16");
        assert_eq!(kind("Cpu"), "Cpu");
    }
}
