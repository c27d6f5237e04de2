//! Checkpoints that transformers wrote (`tests/golden/README.md`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use vitmae::config::MaeConfig;
use vitmae::weights::{Checkpoint, Parts, TensorFile, parameters, save_pretrained};

use crate::refused;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases").join(name)
}

/// Every parameter by its published name.
fn read(path: &Path, parts: Parts) -> BTreeMap<String, Vec<f32>> {
    let mut checkpoint = Checkpoint::open(path).unwrap();
    let specs = parameters(checkpoint.require_config().unwrap(), parts);
    let mut read = BTreeMap::new();
    checkpoint
        .read_into(&specs, |index, values| {
            read.insert(specs[index].name.clone(), values.to_vec());
            Ok(())
        })
        .unwrap();
    assert_eq!(read.len(), specs.len());
    read
}

#[test]
fn configurations_are_written_as_transformers_writes_them() {
    let mut count = 0;
    for entry in fs::read_dir(case("")).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if !text.contains("\"model_type\": \"vit_mae\"") {
            continue;
        }
        assert_eq!(MaeConfig::from_file(&path).unwrap().to_json(), text, "{}", path.display());
        count += 1;
    }
    assert!(count >= 20, "only {count} configurations found");
}

/// Names and shapes against the file, and the bytes against the safetensors crate's own reader.
#[test]
fn whole_checkpoints_have_exactly_the_parameters_of_the_table() {
    for name in ["plain", "no_qkv_bias", "four_channels", "rectangular_tall", "patch_16"] {
        let read = read(&case(name), Parts::All);
        let bytes = fs::read(case(name).join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.len(), file.len(), "{name}");
        for (tensor, values) in read {
            let expected = file.tensor(&tensor).unwrap();
            let found: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(found, expected.data(), "{name}: {tensor}");
        }
    }
}

#[test]
fn shards_and_the_names_of_transformers_5_hold_the_same_weights() {
    let plain = read(&case("plain"), Parts::All);
    assert_eq!(read(&case("sharded"), Parts::All), plain);
    assert_eq!(read(&case("sharded").join("model.safetensors.index.json"), Parts::All), plain);
    for file in ["saved", "in_memory"] {
        assert_eq!(read(&case("names_v5").join(format!("{file}.safetensors")), Parts::All), plain, "{file}");
    }
}

#[test]
fn an_encoder_reads_as_part_of_its_autoencoder() {
    let encoder = read(&case("encoder_only"), Parts::EncoderOnly);
    assert_eq!(read(&case("plain"), Parts::EncoderOnly), encoder);
    let mut checkpoint = Checkpoint::open(case("encoder_only")).unwrap();
    let specs = parameters(checkpoint.require_config().unwrap(), Parts::All);
    refused(checkpoint.read_into(&specs, |_, _| Ok(())), &["encoder without the decoder", "embed", "reconstruction"]);
}

/// The script that wrote the file has checked that timm's encoder computes the same from it.
#[test]
fn the_names_of_timm_hold_the_same_encoder() {
    let expected = read(&case("head_64"), Parts::EncoderOnly);
    let config = MaeConfig::from_file(case("head_64").join("config.json")).unwrap();
    let specs = parameters(&config, Parts::EncoderOnly);
    let mut checkpoint = Checkpoint::open(case("names_timm").join("model.safetensors")).unwrap();
    assert!(!checkpoint.has_decoder());
    let mut count = 0;
    checkpoint
        .read_into(&specs, |index, values| {
            assert_eq!(values, expected[&specs[index].name], "{}", specs[index].name);
            count += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(count, expected.len());
}

#[test]
fn other_formats_say_what_to_do() {
    refused(Checkpoint::open(case("pytorch_bin")), &["pytorch_model.bin", "pickle", "safe_serialization"]);
    refused(Checkpoint::open(case("pytorch_bin").join("pytorch_model.bin")), &["pickle", "safe_serialization"]);
    refused(Checkpoint::open(case("names_original").join("encoder.pth")), &["pickle", "safe_serialization"]);
    refused(
        Checkpoint::open(case("names_timm").join("model.safetensors")).unwrap().require_config(),
        &["no config.json"],
    );
    refused(Checkpoint::open(case("classifier_cls")), &["config.json", "\"vit\""]);
}

#[test]
fn checkpoints_survive_being_written() {
    let folder = tempfile::tempdir().unwrap();
    let plain = read(&case("plain"), Parts::All);
    let config = MaeConfig::from_file(case("plain").join("config.json")).unwrap();
    let specs = parameters(&config, Parts::All);
    save_pretrained(folder.path(), &config, &specs, |index| Ok(&plain[&specs[index].name])).unwrap();
    assert_eq!(read(folder.path(), Parts::All), plain);
    let config = fs::read(folder.path().join("config.json")).unwrap();
    assert_eq!(config, fs::read(case("plain").join("config.json")).unwrap());
}

#[test]
fn tensor_files_of_torch_are_read() {
    let mut file = TensorFile::open(case("plain").join("expected.safetensors")).unwrap();
    let logits = file.read("logits").unwrap();
    assert_eq!(logits.shape.iter().product::<usize>(), logits.values.len());
    assert!(matches!(logits.values, vitmae::weights::Values::F64(_)));
    assert!(matches!(file.read("ids_restore").unwrap().values, vitmae::weights::Values::I64(_)));
    assert!(matches!(file.read("mask").unwrap().values, vitmae::weights::Values::F32(_)));
}
