//! `config.json`.

use proptest::prelude::*;
use vitmae::Error;
use vitmae::config::{MaeConfig, PRESETS, Size};
use vitmae::ops::Activation;

use crate::small_config;

fn problem(config: &MaeConfig) -> String {
    match config.validate() {
        Err(Error::Config(problem)) => problem,
        other => panic!("{other:?}"),
    }
}

fn json_problem(text: &str) -> String {
    match MaeConfig::from_json(text) {
        Err(Error::Config(problem)) => problem,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn absent_fields_get_the_defaults_of_transformers() {
    let config = MaeConfig::from_json("{}").unwrap();
    assert_eq!(config, MaeConfig::default());
    assert_eq!((config.hidden_size, config.layer_norm_eps, config.qkv_bias), (768, 1e-12, true));
}

#[test]
fn other_keys_are_written_back() {
    let text = r#"{"model_type": "vit_mae", "architectures": ["ViTMAEModel"], "torch_dtype": "bfloat16", "image_size": [32, 48],
        "transformers_version": "4.16.0.dev0", "id2label": {"0": "a", "10": "c", "2": "b"}, "nested": {"a": [1, 2.5e-7, []]}}"#;
    let config = MaeConfig::from_json(text).unwrap();
    assert_eq!(config.image_size, Size { height: 32, width: 48 });
    let written = config.to_json();
    assert_eq!(MaeConfig::from_json(&written).unwrap(), config);
    let read: serde_json::Value = serde_json::from_str(&written).unwrap();
    let given: serde_json::Value = serde_json::from_str(text).unwrap();
    for (key, value) in given.as_object().unwrap() {
        assert_eq!(read[key], *value, "{key}");
    }
    // As Python's json.dumps(indent=2, sort_keys=True) writes integer keys and numbers.
    assert!(
        written.contains("\"id2label\": {\n    \"0\": \"a\",\n    \"2\": \"b\",\n    \"10\": \"c\"\n  }"),
        "{written}"
    );
    assert!(written.contains("[\n      1,\n      2.5e-07,\n      []\n    ]"), "{written}");
}

#[test]
fn sizes_are_numbers_or_pairs() {
    for (json, size) in [("32", (32, 32)), ("[32, 32]", (32, 32)), ("[32, 64]", (32, 64))] {
        let config = MaeConfig::from_json(&format!(r#"{{"image_size": {json}}}"#)).unwrap();
        assert_eq!(config.image_size, Size::from(size));
    }
    assert!(MaeConfig::default().to_json().contains("\"image_size\": 224,"));
    for json in ["\"32\"", "[32]", "[32, 32, 32]", "-32", "32.5", "null", "true", "1e30", "[32, \"a\"]"] {
        let problem = json_problem(&format!(r#"{{"image_size": {json}}}"#));
        assert!(problem.contains("image_size must be a whole number or a pair"), "{problem}");
    }
}

#[test]
fn sizes_are_read_from_the_command_line() {
    assert_eq!("224".parse::<Size>().unwrap(), Size::from(224));
    let size: Size = "192x256".parse().unwrap();
    assert_eq!((size, size.to_string().as_str()), (Size { height: 192, width: 256 }, "192x256"));
    for text in ["", "x", "12x", "-3", "1.5", "1x2x3", "99999999999999999999"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
}

#[test]
fn wrong_types_name_the_key_and_what_was_found() {
    for (json, parts) in [
        (r#"{"hidden_size": "big"}"#, ["hidden_size", "whole number", "\"big\""]),
        (r#"{"mask_ratio": null}"#, ["mask_ratio", "a number", "null"]),
        (r#"{"norm_pix_loss": 1}"#, ["norm_pix_loss", "true or false", "1"]),
        (r#"{"hidden_act": 3}"#, ["hidden_act", "string", "3"]),
        (r#"{"model_type": []}"#, ["model_type", "string", "[]"]),
        ("[1, 2]", ["object", "found", "[1,2]"]),
        ("", ["JSON", "EOF", ""]),
        ("{\"hidden_size\": }", ["JSON", "line 1", ""]),
    ] {
        let problem = json_problem(json);
        assert!(parts.iter().all(|part| problem.contains(part)), "{json}: {problem}");
    }
    // Nesting without end is an error of the parser, not a stack overflow.
    json_problem(&format!("{{\"a\": {}", "[".repeat(1_000_000)));
}

#[test]
fn other_kinds_of_models_are_named() {
    for kind in ["vit", "bert"] {
        let problem = json_problem(&format!(r#"{{"model_type": "{kind}"}}"#));
        assert!(problem.contains(kind) && problem.contains("vit_mae"), "{problem}");
    }
}

#[test]
fn activations_have_the_names_of_transformers() {
    for (name, activation) in [
        ("gelu", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("quick_gelu", Activation::QuickGelu),
    ] {
        let config = MaeConfig { hidden_act: name.into(), ..small_config() };
        assert_eq!(config.activation().unwrap(), activation);
    }
    let problem = json_problem(r#"{"hidden_act": "mish"}"#);
    assert!(problem.contains("mish") && problem.contains("gelu_pytorch_tanh") && problem.contains("quick_gelu"));
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    type Change = fn(&mut MaeConfig);
    let changes: [(&str, Change); 22] = [
        ("hidden_size must be at least 1", |config| config.hidden_size = 0),
        ("num_hidden_layers must be at least 1", |config| config.num_hidden_layers = 0),
        ("num_attention_heads must be at least 1", |config| config.num_attention_heads = 0),
        ("decoder_intermediate_size must be at least 1", |config| config.decoder_intermediate_size = 0),
        ("hidden_size 8 is not a multiple of num_attention_heads 3", |config| config.num_attention_heads = 3),
        ("decoder_hidden_size 4 is not a multiple", |config| config.decoder_num_attention_heads = 3),
        ("decoder_hidden_size 6 is not a multiple of 4", |config| config.decoder_hidden_size = 6),
        ("hidden_size 10 is not a multiple of 4", |config| config.hidden_size = 10),
        ("do not divide", |config| config.image_size = Size::from(9)),
        ("smaller than a patch", |config| config.image_size = Size::from(2)),
        ("patch size must be at least 1", |config| config.patch_size = Size { height: 4, width: 0 }),
        ("smaller than a patch", |config| config.image_size = Size { height: 0, width: 8 }),
        ("num_channels must be at least 1", |config| config.num_channels = 0),
        ("mask_ratio 1 ", |config| config.mask_ratio = 1.0),
        ("mask_ratio -0.1 ", |config| config.mask_ratio = -0.1),
        ("mask_ratio NaN ", |config| config.mask_ratio = f64::NAN),
        ("layer_norm_eps must be positive", |config| config.layer_norm_eps = 0.0),
        ("layer_norm_eps must be positive", |config| config.layer_norm_eps = f64::INFINITY),
        ("hidden_dropout_prob 1.5 ", |config| config.hidden_dropout_prob = 1.5),
        ("initializer_range", |config| config.initializer_range = -1.0),
        ("num_hidden_layers must be at most", |config| config.num_hidden_layers = 1_000_000_000_000),
        ("hidden_act", |config| config.hidden_act = String::new()),
    ];
    small_config().validate().unwrap();
    for (expected, change) in changes {
        let mut config = small_config();
        change(&mut config);
        let problem = problem(&config);
        assert!(problem.contains(expected), "{expected:?} is not in {problem:?}");
    }
}

#[test]
fn absurd_sizes_are_errors_and_not_panics() {
    let keys = [
        "hidden_size",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
        "decoder_hidden_size",
        "decoder_intermediate_size",
    ];
    for size in [1_000_000_000_000_000_000, u64::MAX - 3, 1 << 62] {
        for key in keys {
            let text = format!(r#"{{"{key}": {size}, "num_attention_heads": 1, "decoder_num_attention_heads": 1}}"#);
            if let Ok(config) = MaeConfig::from_json(&text) {
                panic!("{text} was accepted with {} parameters", config.parameter_count());
            }
        }
        let text = format!(r#"{{"image_size": {size}, "patch_size": {size}, "num_channels": {size}}}"#);
        assert!(json_problem(&text).contains("so large"));
    }
    // Without validation nothing panics either.
    let side = Size::from(usize::MAX);
    let config = MaeConfig { image_size: side, patch_size: Size::from(1), hidden_size: usize::MAX, ..small_config() };
    assert_eq!((config.patches(), config.parameter_count()), (0, u64::MAX));
    assert!(config.flops(0.5).is_err());
    let config = MaeConfig { image_size: Size::from((usize::MAX, 1)), patch_size: Size::from(1), ..small_config() };
    assert!(config.flops(0.5).is_err() && config.validate().is_err());
    assert_eq!(MaeConfig { patch_size: Size::from(0), ..small_config() }.patches(), 0);
}

#[test]
fn dropout_is_refused_in_training_only() {
    let config = MaeConfig { attention_probs_dropout_prob: 0.1, ..small_config() };
    config.validate().unwrap();
    let error = config.check_trainable().unwrap_err().to_string();
    assert!(error.contains("attention_probs_dropout_prob") && error.contains("0.1"), "{error}");
    small_config().check_trainable().unwrap();
}

#[test]
fn keep_is_what_python_computes() {
    // int(L * (1 - ratio)) in Python 3.
    for (side, ratio, keep) in [(10, 0.9, 9), (10, 0.8, 19), (14, 0.75, 49), (16, 0.75, 64), (2, 0.0, 4), (1, 0.75, 0)]
    {
        let config = MaeConfig { image_size: Size::from(side * 4), mask_ratio: ratio, ..small_config() };
        assert_eq!(config.keep().unwrap(), keep);
    }
}

/// Costs of the models of the paper, derived by hand from the architecture for 224² pixels and a mask ratio of 0.75.
#[test]
fn costs_of_the_published_models() {
    for (config, forward, step, parameters) in [
        (MaeConfig::base(), 19.56, 58.46, 111.7),
        (MaeConfig::large(), 41.51, 124.23, 329.2),
        (MaeConfig::huge(), 97.12, 290.99, 656.6),
    ] {
        let flops = config.flops(0.75).unwrap();
        assert!((flops.forward as f64 / 1e9 - forward).abs() < 0.0051, "{flops:?}, expected {forward}");
        assert!((flops.step as f64 / 1e9 - step).abs() < 0.0051, "{flops:?}, expected {step}");
        assert!((config.parameter_count() as f64 / 1e6 - parameters).abs() < 0.051, "{}", config.parameter_count());
    }
}

#[test]
fn presets_are_the_models_of_the_paper() {
    for name in PRESETS {
        let config = MaeConfig::by_name(name).unwrap();
        config.validate().unwrap();
        config.check_trainable().unwrap();
        assert_eq!(config.layer_norm_eps, 1e-6);
    }
    let base = MaeConfig { layer_norm_eps: 1e-12, ..MaeConfig::base() };
    assert_eq!(base, MaeConfig::default());
    let huge = MaeConfig::huge();
    assert_eq!((huge.hidden_size, huge.num_hidden_layers, huge.num_attention_heads), (1280, 32, 16));
    assert_eq!((huge.patch_size, huge.patches(), huge.keep().unwrap()), (Size::from(14), 256, 64));
    // The original's names.
    assert_eq!(MaeConfig::by_name("mae_vit_base_patch16").unwrap(), MaeConfig::base());
    assert_eq!(MaeConfig::by_name("mae_vit_huge_patch14").unwrap(), huge);
    let error = MaeConfig::by_name("giant").unwrap_err().to_string();
    assert!(error.contains("giant") && error.contains("tiny, small, base, large, huge"), "{error}");
}

#[test]
fn files_that_are_no_configurations_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let refused = |parts: &[&str]| crate::refused(MaeConfig::from_file(&path), parts);
    refused(&["config.json", "reading"]);
    std::fs::write(&path, b"{\"hidden_size\": 7}").unwrap();
    refused(&["config.json", "hidden_size 7"]);
    std::fs::write(&path, b"\xff\xfe{}").unwrap();
    refused(&["config.json", "UTF-8"]);
    // 1 TB, and nothing of it on the disk.
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    refused(&["config.json", "bytes"]);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    refused(&["config.json", "not a regular file"]);
}

fn any_config() -> impl Strategy<Value = MaeConfig> {
    let stack = || (1_usize..5, 1_usize..4, 1_usize..3, 1_usize..20);
    let image = (1_usize..4, 1_usize..4, 1_usize..4, 1_usize..5, 1_usize..5);
    let rest = (0.0..0.999_f64, 1e-13..1e-3_f64, any::<(bool, bool)>(), 0.0..=1.0_f64, 0..7_usize);
    (stack(), stack(), image, rest).prop_map(|(encoder, decoder, image, rest)| {
        let activations = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "quick_gelu"];
        MaeConfig {
            hidden_size: 4 * encoder.0 * encoder.1,
            num_attention_heads: encoder.1,
            num_hidden_layers: encoder.2,
            intermediate_size: encoder.3,
            decoder_hidden_size: 4 * decoder.0 * decoder.1,
            decoder_num_attention_heads: decoder.1,
            decoder_num_hidden_layers: decoder.2,
            decoder_intermediate_size: decoder.3,
            num_channels: image.0,
            image_size: Size { height: image.1 * image.3, width: image.2 * image.4 },
            patch_size: Size { height: image.3, width: image.4 },
            mask_ratio: rest.0,
            layer_norm_eps: rest.1,
            qkv_bias: rest.2.0,
            norm_pix_loss: rest.2.1,
            hidden_dropout_prob: rest.3,
            hidden_act: activations[rest.4].into(),
            ..MaeConfig::default()
        }
    })
}

/// JSON values that a field may be given.
fn any_value() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        (0_u64..64).prop_map(serde_json::Value::from),
        (0_u32..64).prop_map(|bits| serde_json::Value::from(1_u64 << bits)),
        any::<i64>().prop_map(serde_json::Value::from),
        any::<f64>().prop_map(serde_json::Value::from),
        any::<bool>().prop_map(serde_json::Value::from),
        "\\PC{0,5}".prop_map(serde_json::Value::from),
        Just(serde_json::Value::Null),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| prop::collection::vec(inner, 0..4).prop_map(serde_json::Value::from))
}

proptest! {
    #[test]
    fn configurations_survive_being_written_and_read(config in any_config()) {
        config.validate().unwrap();
        let text = config.to_json();
        let mut read = MaeConfig::from_json(&text).unwrap();
        prop_assert_eq!(read.to_json(), text);
        read.other.clear();
        prop_assert_eq!(read, config);
    }

    #[test]
    fn the_count_of_parameters_is_that_of_the_table(config in any_config()) {
        use vitmae::weights::{Group, Parts, parameters};
        let specs = parameters(&config, Parts::All);
        let trained = specs.iter().filter(|spec| spec.group != Group::Table);
        prop_assert_eq!(trained.map(|spec| spec.length() as u64).sum::<u64>(), config.parameter_count());
    }

    #[test]
    fn no_configuration_panics(
        fields in prop::collection::vec((0..20_usize, any_value()), 0..6),
        heads in prop_oneof![Just(1), Just(2), any::<u64>()],
    ) {
        let known: serde_json::Value = serde_json::from_str(&MaeConfig::default().to_json()).unwrap();
        let keys: Vec<&String> = known.as_object().unwrap().keys().collect();
        let mut config = serde_json::Map::new();
        config.insert("num_attention_heads".into(), heads.into());
        for (key, value) in fields {
            config.insert(keys[key % keys.len()].clone(), value);
        }
        if let Ok(config) = MaeConfig::from_json(&serde_json::Value::Object(config).to_string()) {
            let _ = (config.patches(), config.keep(), config.flops(config.mask_ratio), config.activation());
            prop_assert!(config.parameter_count() < u64::MAX);
            let lengths = vitmae::weights::parameters(&config, vitmae::weights::Parts::All);
            let total: usize = lengths.iter().map(vitmae::weights::ParameterSpec::length).sum();
            prop_assert!(total as u64 >= config.parameter_count());
        }
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,40}") {
        let _ = MaeConfig::from_json(&text);
    }
}
