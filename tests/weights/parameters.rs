//! The table of parameters.

use vitmae::config::MaeConfig;
use vitmae::weights::{Group, Init, Parts, parameters};

use crate::small_config;

#[test]
fn matrices_come_first_and_position_tables_last() {
    for parts in [Parts::EncoderOnly, Parts::All] {
        let specs = parameters(&small_config(), parts);
        let order: Vec<usize> = specs.iter().map(|spec| spec.group as usize).collect();
        assert!(order.is_sorted());
        assert_eq!(specs[0].name, "vit.embeddings.patch_embeddings.projection.weight");
        assert_eq!(specs[0].shape, [8, 3, 4, 4]);
        let positions: Vec<_> = specs.iter().filter(|spec| spec.group == Group::Table).collect();
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
fn groups_and_initial_values_follow_from_names() {
    for spec in parameters(&small_config(), Parts::All) {
        let is = |part: &str| spec.name.contains(part);
        let (group, init) = if is("position_embeddings") || is("pos_embed") {
            (Group::Table, Init::SinCos)
        } else if is("_token") {
            (Group::Vector, Init::Normal { std: 0.02 })
        } else if is("norm") && is(".weight") {
            (Group::Vector, Init::Constant(1.0))
        } else if is(".bias") {
            (Group::Vector, Init::Constant(0.0))
        } else {
            let stacked = if ["query", "key", "value"].iter().any(|part| is(part)) { 3 } else { 1 };
            (Group::Matrix, Init::Xavier { fan_out: stacked * spec.shape[0] })
        };
        assert_eq!((spec.group, spec.init), (group, init), "{}", spec.name);
    }
}
