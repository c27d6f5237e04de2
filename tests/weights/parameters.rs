//! The table of parameters.

use vitmae::config::MaeConfig;
use vitmae::weights::{ParameterKind, Parts, parameters};

use crate::small_config;

#[test]
fn matrices_come_first_and_position_tables_last() {
    for parts in [Parts::EncoderOnly, Parts::All] {
        let specs = parameters(&small_config(), parts);
        let order: Vec<usize> = specs
            .iter()
            .map(|spec| match spec.kind {
                ParameterKind::Matrix => 0,
                ParameterKind::Position => 2,
                _ => 1,
            })
            .collect();
        assert!(order.is_sorted());
        assert_eq!(specs[0].name, "vit.embeddings.patch_embeddings.projection.weight");
        assert_eq!(specs[0].shape, [8, 3, 4, 4]);
        let positions: Vec<_> = specs.iter().filter(|spec| spec.kind == ParameterKind::Position).collect();
        assert_eq!(positions[0].name, "vit.embeddings.position_embeddings");
        assert_eq!(positions[0].shape, [1, 7, 8]);
        assert_eq!(positions.len(), if parts == Parts::All { 2 } else { 1 });
    }
}

#[test]
fn query_key_and_value_lie_side_by_side() {
    let specs = parameters(&small_config(), Parts::All);
    for what in ["weight", "bias"] {
        let blocks: Vec<usize> = specs
            .iter()
            .enumerate()
            .filter(|(_, spec)| spec.name.ends_with(&format!("query.{what}")))
            .map(|(place, _)| place)
            .collect();
        assert_eq!(blocks.len(), 3);
        for place in blocks {
            for (offset, part) in ["query", "key", "value"].iter().enumerate() {
                let expected = specs[place].name.replace("query", part);
                assert_eq!(specs[place + offset].name, expected);
            }
        }
    }
    let config = MaeConfig { qkv_bias: false, ..small_config() };
    assert!(!parameters(&config, Parts::All).iter().any(|spec| spec.name.ends_with("query.bias")));
}

#[test]
fn an_encoder_is_the_autoencoder_without_its_decoder() {
    let all = parameters(&small_config(), Parts::All);
    let encoder: Vec<_> = all.into_iter().filter(|spec| !spec.name.starts_with("decoder.")).collect();
    assert_eq!(parameters(&small_config(), Parts::EncoderOnly), encoder);
}

#[test]
fn kinds_follow_from_names() {
    for spec in parameters(&small_config(), Parts::All) {
        let is = |part: &str| spec.name.contains(part);
        let expected = if is("position_embeddings") || is("pos_embed") {
            ParameterKind::Position
        } else if is("_token") {
            ParameterKind::Token
        } else if is("norm") {
            if is(".weight") { ParameterKind::NormScale } else { ParameterKind::NormShift }
        } else if is(".bias") {
            ParameterKind::Bias
        } else {
            ParameterKind::Matrix
        };
        assert_eq!(spec.kind, expected, "{}", spec.name);
    }
}
