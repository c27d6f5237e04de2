//! A fresh model's weights against what the original draws: formulas and statistics worked out here.

mod common;

use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::MaeForPreTraining;

const ENCODER_POSITIONS: &str = "vit.embeddings.position_embeddings";
const DECODER_POSITIONS: &str = "decoder.decoder_pos_embed";
const TOKENS: [&str; 2] = ["vit.embeddings.cls_token", "decoder.mask_token"];

/// Encoder and decoder of other widths, and an image of `height x width` pixels.
fn config(height: usize, width: usize) -> MaeConfig {
    common::config((height, width), [48, 80, 2, 4], [32, 56, 1, 2])
}

fn fresh(config: &MaeConfig, seed: u64) -> MaeForPreTraining<Cpu> {
    MaeForPreTraining::new(config.clone(), Cpu::new(), seed).unwrap()
}

/// Row 0 is zero; row `1 + h * columns + w` is sin and cos of w, then of h, at the frequencies `10000^(-i / (width / 4))`.
fn sin_cos(rows: usize, columns: usize, width: usize) -> Vec<f64> {
    let mut table = vec![0.0; width];
    for patch in 0..rows * columns {
        for feature in 0..width {
            let (part, i) = (feature / (width / 4), feature % (width / 4));
            let place = [patch % columns, patch / columns][part / 2] as f64;
            let angle = place * (-(10_000f64.ln()) * i as f64 / (width / 4) as f64).exp();
            table.push(if part % 2 == 0 { angle.sin() } else { angle.cos() });
        }
    }
    table
}

#[test]
fn position_tables_are_sines_and_cosines() {
    for (height, width) in [(32, 32), (24, 40), (40, 24)] {
        let model = fresh(&config(height, width), 3);
        for (name, features) in [(ENCODER_POSITIONS, 48), (DECODER_POSITIONS, 32)] {
            let (found, expected) = (model.parameter(name).unwrap(), sin_cos(height / 8, width / 8, features));
            assert_eq!(found.len(), expected.len(), "{name}");
            assert!(found[..features].iter().all(|&value| value == 0.0), "{name}: the class token has a position");
            for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
                // An f32 below 1 is rounded by at most 3e-8.
                assert!((f64::from(*found) - expected).abs() < 1e-7, "{name}[{place}]: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn matrices_are_xavier_uniform_and_the_rest_is_constant() {
    let config = config(24, 40);
    let model = fresh(&config, 7);
    let mut matrices = 0;
    for spec in model.parameters().layout().specs() {
        let name = spec.name.as_str();
        let values: Vec<f64> = model.parameter(name).unwrap().into_iter().map(f64::from).collect();
        if TOKENS.contains(&name) || [ENCODER_POSITIONS, DECODER_POSITIONS].contains(&name) {
            continue;
        }
        if name.ends_with(".bias") {
            assert!(values.iter().all(|&value| value == 0.0), "{name} is not zero");
            continue;
        }
        assert!(name.ends_with(".weight"), "{name} is of no known kind");
        let [outputs, ref inputs @ ..] = spec.shape[..] else { panic!("{name} has no shape") };
        if inputs.is_empty() {
            assert!(name.contains("norm"), "{name} is a vector");
            assert!(values.iter().all(|&value| value == 1.0), "{name} is not one");
            continue;
        }
        // The original has one layer for query, key and value, and sees the patches' convolution as a linear layer.
        let inputs: usize = inputs.iter().product();
        let fused = ["query", "key", "value"].iter().any(|part| name.contains(part));
        let fan_out = if fused { 3 * outputs } else { outputs };
        let bound = (6.0 / (inputs + fan_out) as f64).sqrt();
        let count = values.len() as f64;
        let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        // As f32, which may round up.
        assert!(largest <= bound * (1.0 + 1e-7) && largest > 0.98 * bound, "{name}: up to {largest}, bound {bound}");
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        // Five standard errors of mean and variance of a uniform distribution.
        assert!(mean.abs() < 5.0 * bound / (3.0 * count).sqrt(), "{name}: mean {mean}");
        let share = variance / (bound * bound / 3.0);
        assert!((share - 1.0).abs() < 5.0 * (0.8 / count).sqrt(), "{name}: {share} of the variance");
        matrices += 1;
    }
    // Three blocks of six, the patches' embedding, the decoder's, and the prediction.
    assert_eq!(matrices, 3 * 6 + 3);
}

#[test]
fn class_and_mask_token_are_normal_and_seeds_differ() {
    let config = config(32, 32);
    for name in TOKENS {
        let draws: Vec<Vec<f32>> = (0..40).map(|seed| fresh(&config, seed).parameter(name).unwrap()).collect();
        assert_ne!(draws[0], draws[1], "{name} does not depend on the seed");
        assert_eq!(draws[0], fresh(&config, 0).parameter(name).unwrap(), "{name} is not drawn from the seed alone");
        let values: Vec<f64> = draws.into_iter().flatten().map(f64::from).collect();
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let std = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
        assert!(mean.abs() < 5.0 * 0.02 / count.sqrt(), "{name}: mean {mean}");
        assert!((std / 0.02 - 1.0).abs() < 5.0 / (2.0 * count).sqrt(), "{name}: std {std}");
        // A uniform distribution of this standard deviation ends at 1.73 of it; 4.6 % of a normal one lie beyond 2.
        let beyond = values.iter().filter(|value| value.abs() > 0.04).count() as f64 / count;
        assert!(beyond > 0.02 && beyond < 0.08, "{name}: {beyond} beyond two deviations");
    }
}
