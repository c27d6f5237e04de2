//! Reading checkpoints: names, types, and exactly the tensors of the model.

use std::fs;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use vitmae::config::{MaeConfig, Size};
use vitmae::weights::{Checkpoint, ParameterSpec, Parts, parameters, save_pretrained};
use vitmae::{Error, Result};

use crate::{checkpoint, join, names_in, numbers, refused, rename, save, small_config, split, weights};

/// Opens a checkpoint of the small model and reads it; every number must be the one that was saved.
fn read(path: &std::path::Path, parts: Parts) -> Result<usize> {
    let specs = parameters(&small_config(), parts);
    let saved = parameters(&small_config(), Parts::All);
    let mut count = 0;
    Checkpoint::open(path)?.read_into(&specs, |index, values| {
        assert_eq!(index, count);
        count += 1;
        let place = saved.iter().position(|spec| *spec == specs[index]).unwrap();
        assert_eq!(values, numbers(place, &specs[index]), "{}", specs[index].name);
        Ok(())
    })?;
    assert_eq!(count, specs.len());
    Ok(count)
}

/// How transformers 5 names what transformers 4 calls `name`, in files or in memory.
fn version_5(name: &str, in_memory: bool) -> String {
    if !in_memory {
        return name.replace("decoder_layers.", "decoder_encoder.layer.");
    }
    let name = name.replace("encoder.layer.", "layers.");
    let parts = [
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ];
    parts.iter().fold(name, |name, (old, new)| name.replace(old, new))
}

#[test]
fn names_of_both_versions_of_transformers_are_read() {
    let folder = checkpoint(Parts::All);
    let other = folder.path().join("other.safetensors");
    for in_memory in [false, true] {
        rename(&weights(&folder), &other, |name| Some(version_5(name, in_memory)));
        assert_ne!(fs::read(&other).unwrap(), fs::read(weights(&folder)).unwrap());
        read(&other, Parts::All).unwrap();
        rename(&weights(&folder), &other, |name| Some(version_5(name, in_memory).strip_prefix("vit.")?.to_owned()));
        read(&other, Parts::EncoderOnly).unwrap();
    }
}

#[test]
fn an_encoder_may_come_with_what_other_models_put_on_it() {
    let folder = checkpoint(Parts::All);
    read(folder.path(), Parts::EncoderOnly).unwrap();
    let other = folder.path().join("other.safetensors");
    rename(&weights(&folder), &other, |name| {
        Some(match name.strip_prefix("decoder.decoder_pred.") {
            Some(part) => format!("classifier.{part}"),
            None => name.replace("decoder.decoder_norm.", "pooler.dense."),
        })
    });
    read(&other, Parts::EncoderOnly).unwrap();
    let message = refused(read(&other, Parts::All), &["unexpected: classifier.bias, classifier.weight, vit.pooler"]);
    assert!(message.contains("missing: decoder.decoder_norm.bias"), "{message}");
}

#[test]
fn missing_unexpected_and_misshaped_tensors_are_named_together() {
    let folder = checkpoint(Parts::All);
    let other = folder.path().join("other.safetensors");
    rename(&weights(&folder), &other, |name| match name {
        "vit.layernorm.weight" => Some("vit.extra".into()),
        "decoder.mask_token" => Some("vit.embeddings.cls_token".into()),
        "vit.embeddings.cls_token" => None,
        _ => Some(name.into()),
    });
    refused(
        read(&other, Parts::All),
        &[
            "other.safetensors",
            "missing: vit.layernorm.weight, decoder.mask_token",
            "unexpected: vit.extra",
            "of another shape: vit.embeddings.cls_token (expected [1, 1, 8], found [1, 1, 4])",
        ],
    );
    // Not one tensor is handed out of a checkpoint that does not fit, be it in the type of the last.
    let (header, data) = split(&weights(&folder));
    let place = header.find("\"decoder.decoder_pos_embed\"").unwrap();
    let retyped = header[..place].to_owned() + &header[place..].replacen("\"F32\"", "\"I32\"", 1);
    let wrong_type = folder.path().join("wrong type.safetensors");
    fs::write(&wrong_type, join(retyped.as_bytes(), &data)).unwrap();
    let specs = parameters(&small_config(), Parts::All);
    for path in [other, wrong_type] {
        let mut calls = 0;
        let result = Checkpoint::open(&path).unwrap().read_into(&specs, |_, _| {
            calls += 1;
            Ok(())
        });
        assert!(result.is_err() && calls == 0, "{}", path.display());
    }
}

#[test]
fn long_lists_are_cut_and_counted() {
    let folder = checkpoint(Parts::All);
    let other = folder.path().join("other.safetensors");
    rename(&weights(&folder), &other, |name| Some(name.replace("layer.1.", "layer.7.")));
    let message =
        refused(read(&other, Parts::All), &["missing: vit.encoder.layer.1", "unexpected: vit.encoder.layer.7"]);
    assert_eq!(message.matches("and 6 more").count(), 2, "{message}");
    assert!(message.len() < 2500, "{message}");
}

#[test]
fn an_encoder_where_the_decoder_is_needed_says_what_works() {
    let folder = checkpoint(Parts::EncoderOnly);
    let names = ["encoder without the decoder", "embed", "fine-tuned", "reconstruction", "pre-training"];
    refused(read(folder.path(), Parts::All), &names);
    assert!(!Checkpoint::open(folder.path()).unwrap().has_decoder());
    // With a tensor of the encoder missing too, that is what is said.
    let other = folder.path().join("other.safetensors");
    rename(&weights(&folder), &other, |name| (name != "vit.layernorm.bias").then(|| name.into()));
    refused(read(&other, Parts::All), &["missing: vit.layernorm.bias"]);
}

#[test]
fn position_tables_of_other_image_sizes_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &MaeConfig { image_size: Size::from(16), ..small_config() }, Parts::All);
    refused(read(folder.path(), Parts::All), &["found [1, 17, 8]", "image_size or patch_size"]);
}

#[test]
fn two_names_for_one_parameter_are_refused() {
    let folder = checkpoint(Parts::All);
    let other = folder.path().join("other.safetensors");
    rename(&weights(&folder), &other, |name| {
        Some(if name == "vit.layernorm.weight" { "layernorm.bias".into() } else { name.into() })
    });
    refused(Checkpoint::open(&other), &["layernorm.bias", "vit.layernorm.bias", "same parameter"]);
}

/// Rewrites a file with every tensor converted by `bytes`.
fn retyped(folder: &tempfile::TempDir, dtype: Dtype, bytes: impl Fn(f32) -> Vec<u8>) -> std::path::PathBuf {
    let old = fs::read(weights(folder)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&old).unwrap();
    let converted: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let values = tensor.data().chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().unwrap()));
            (name, tensor.shape().to_vec(), values.flat_map(&bytes).collect())
        })
        .collect();
    let views =
        converted.iter().map(|(name, shape, data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
    let path = folder.path().join("retyped.safetensors");
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    path
}

#[test]
fn other_floating_point_types_are_converted() {
    type Case = (Dtype, fn(f32) -> Vec<u8>, fn(f32) -> f32);
    let folder = checkpoint(Parts::All);
    let cases: [Case; 3] = [
        (Dtype::F16, |x| f16::from_f32(x / 16.0).to_le_bytes().to_vec(), |x| f16::from_f32(x / 16.0).to_f32()),
        (Dtype::BF16, |x| bf16::from_f32(x).to_le_bytes().to_vec(), |x| bf16::from_f32(x).to_f32()),
        (Dtype::F64, |x| f64::from(x).to_le_bytes().to_vec(), |x| x),
    ];
    let specs = parameters(&small_config(), Parts::All);
    for (dtype, bytes, expected) in cases {
        let mut checkpoint = Checkpoint::open(retyped(&folder, dtype, bytes)).unwrap();
        checkpoint
            .read_into(&specs, |index, values| {
                let saved = numbers(index, &specs[index]);
                assert!(values.iter().zip(saved).all(|(&found, saved)| found == expected(saved)), "{dtype}");
                Ok(())
            })
            .unwrap();
    }
    for (dtype, width) in [(Dtype::I32, 4), (Dtype::I64, 8), (Dtype::F8_E4M3, 1), (Dtype::BOOL, 1)] {
        let path = retyped(&folder, dtype, |_| vec![1; width]);
        let message =
            refused(read(&path, Parts::All), &["retyped.safetensors", "has the type", "F32, F16, BF16 and F64"]);
        assert!(message.contains(&dtype.to_string()), "{message}");
    }
}

#[test]
fn numbers_that_are_not_finite_name_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let specs = parameters(&small_config(), Parts::All);
    for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        save_pretrained(folder.path(), &small_config(), &specs, |index| {
            let mut values = numbers(index, &specs[index]);
            if specs[index].name.contains("layer.1.output.dense.weight") {
                values[5] = bad;
            }
            Ok(values)
        })
        .unwrap();
        refused(read(folder.path(), Parts::All), &["vit.encoder.layer.1.output.dense.weight", text, "element 5"]);
    }
    // Finite in f64, and too large for f32.
    let folder = checkpoint(Parts::All);
    let path = retyped(&folder, Dtype::F64, |_| 1e300_f64.to_le_bytes().to_vec());
    refused(read(&path, Parts::All), &["patch_embeddings.projection.weight", "inf"]);
}

#[test]
fn an_error_of_the_receiver_ends_the_reading() {
    let folder = checkpoint(Parts::All);
    let specs = parameters(&small_config(), Parts::All);
    let result = Checkpoint::open(folder.path())
        .unwrap()
        .read_into(&specs, |index, _| if index == 3 { Err(Error::Device("full".into())) } else { Ok(()) });
    assert!(matches!(result, Err(Error::Device(_))), "{result:?}");
}

/// Collects the messages of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message<'a>(&'a Warnings);
        impl tracing::field::Visit for Message<'_> {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0.0.lock().unwrap().push(format!("{value:?}"));
            }
        }
        event.record(&mut Message(self));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn position_tables_left_at_zero_are_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let specs = parameters(&small_config(), Parts::All);
    for zero in [false, true] {
        save_pretrained(folder.path(), &small_config(), &specs, |index| {
            let values = numbers(index, &specs[index]);
            Ok(if zero && specs[index].name == "decoder.decoder_pos_embed" { vec![0.0; values.len()] } else { values })
        })
        .unwrap();
        let warnings = Warnings::default();
        tracing::subscriber::with_default(warnings.clone(), || {
            Checkpoint::open(folder.path()).unwrap().read_into(&specs, |_, _| Ok(())).unwrap();
        });
        let warnings = warnings.0.lock().unwrap().clone();
        assert_eq!(warnings.len(), usize::from(zero), "{warnings:?}");
        assert!(warnings.iter().all(|warning| warning.contains("decoder.decoder_pos_embed")), "{warnings:?}");
    }
}

#[test]
fn folders_that_are_no_checkpoints_say_what_is_missing() {
    refused(Checkpoint::open("/no/such/folder"), &["/no/such/folder", "no such file or folder"]);
    let folder = checkpoint(Parts::All);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(Checkpoint::open(folder.path()), &["no config.json"]);
    // The weights alone are fine, until a configuration is asked for.
    let alone = Checkpoint::open(weights(&folder)).unwrap();
    assert!(alone.config().is_none() && alone.has_decoder());
    assert_eq!(alone.names().count(), parameters(&small_config(), Parts::All).len());
    assert_eq!(alone.shape("decoder.mask_token"), Some(&[1, 1, 4][..]));
    refused(alone.require_config(), &["no config.json beside"]);
    fs::write(folder.path().join("config.json"), small_config().to_json()).unwrap();
    read(&weights(&folder), Parts::All).unwrap();
    fs::remove_file(weights(&folder)).unwrap();
    refused(Checkpoint::open(folder.path()), &["neither model.safetensors nor model.safetensors.index.json"]);
    fs::write(folder.path().join("pytorch_model.bin"), "pickle").unwrap();
    refused(Checkpoint::open(folder.path()), &["pytorch_model.bin", "pickle", "safe_serialization=True"]);
}

/// Splits a checkpoint into a shard per part, as transformers' index describes it.
fn shard(folder: &std::path::Path, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    let mut map = serde_json::Map::new();
    for (place, start) in ["vit.e", "vit.l", "decoder."].iter().enumerate() {
        let shard = format!("model-{:05}-of-00003.safetensors", place + 1);
        rename(&folder.join("model.safetensors"), &folder.join(&shard), |name| {
            name.starts_with(start).then(|| name.into())
        });
        let file = Checkpoint::open(folder.join(&shard)).unwrap();
        map.extend(file.names().map(|name| (name.to_owned(), shard.clone().into())));
    }
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    change(&mut map);
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_read_as_one() {
    let folder = checkpoint(Parts::All);
    shard(folder.path(), |_| ());
    assert_eq!(names_in(folder.path()).len(), 5);
    read(folder.path(), Parts::All).unwrap();
    read(folder.path(), Parts::EncoderOnly).unwrap();
    fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    refused(read(folder.path(), Parts::All), &["model-00002-of-00003.safetensors", "missing"]);
}

#[test]
fn an_index_that_lies_is_refused() {
    let set = |name: &'static str, shard: &'static str| {
        move |map: &mut serde_json::Map<String, serde_json::Value>| {
            map.insert(name.into(), shard.into());
        }
    };
    for shard_name in
        ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "C:x", "a\0b"]
    {
        let folder = checkpoint(Parts::All);
        shard(folder.path(), set("vit.layernorm.bias", shard_name));
        refused(read(folder.path(), Parts::All), &["not the name of a file beside the index"]);
    }
    let folder = checkpoint(Parts::All);
    shard(folder.path(), set("decoder.mask_token", "model-00001-of-00003.safetensors"));
    refused(read(folder.path(), Parts::All), &["model-00001-of-00003.safetensors lacks", "decoder.mask_token"]);
    let folder = checkpoint(Parts::All);
    shard(folder.path(), |map| map.clear());
    refused(read(folder.path(), Parts::All), &["names no tensors"]);
    for text in ["", "[]", "{}", r#"{"weight_map": {"a": 1}}"#, "\u{1}"] {
        fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        refused(read(folder.path(), Parts::All), &["index cannot be read"]);
    }
    // The same tensor in two shards.
    let folder = checkpoint(Parts::All);
    let second = folder.path().join("second.safetensors");
    rename(&weights(&folder), &second, |name| (name == "vit.layernorm.bias").then(|| name.into()));
    fs::rename(weights(&folder), folder.path().join("first.safetensors")).unwrap();
    let map = r#"{"weight_map": {"vit.layernorm.bias": "first.safetensors", "x": "second.safetensors"}}"#;
    fs::write(folder.path().join("model.safetensors.index.json"), map).unwrap();
    refused(read(folder.path(), Parts::All), &["second.safetensors lacks"]);
    let map = map.replace("\"x\"", "\"vit.layernorm.weight\"").replace("second", "third");
    rename(&folder.path().join("first.safetensors"), &folder.path().join("third.safetensors"), |name| {
        name.starts_with("vit.layernorm").then(|| name.into())
    });
    fs::write(folder.path().join("model.safetensors.index.json"), map).unwrap();
    refused(read(folder.path(), Parts::All), &["same parameter", "first.safetensors", "third.safetensors"]);
}

#[test]
fn files_in_place_of_weights_are_recognised() {
    let folder = checkpoint(Parts::All);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 447725\n";
    for (bytes, parts) in [
        (pointer.as_bytes(), ["Git LFS pointer", "git lfs pull"]),
        (b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl", ["pickle", "safe_serialization"]),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00model", ["pickle", "safe_serialization"]),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", ["HDF5", "save"]),
        (b"<!DOCTYPE html><html>", ["web page", "fetch"]),
        (b"a line of text that is long enough", ["header", "not a safetensors file"]),
    ] {
        fs::write(weights(&folder), bytes).unwrap();
        refused(read(folder.path(), Parts::All), &["model.safetensors", parts[0], parts[1]]);
    }
    // A header whose length has the first bytes of a pickle is still a header.
    let good = checkpoint(Parts::All);
    let (header, data) = split(&weights(&good));
    for length in [0x10280_usize, 0x10380] {
        fs::write(weights(&good), join((header.clone() + &" ".repeat(length - header.len())).as_bytes(), &data))
            .unwrap();
        read(good.path(), Parts::All).unwrap();
    }
}

fn bits() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_map(|value| if value.is_finite() { value } else { 0.0 })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn every_checkpoint_survives_being_written_and_read(
        sizes in (1_usize..4, 1_usize..3, 1_usize..3, 1_usize..6),
        decoder in (1_usize..4, 1_usize..3, 1_usize..6),
        patches in (1_usize..4, 1_usize..4, 1_usize..4),
        qkv_bias in any::<bool>(),
        whole in any::<bool>(),
        style in 0..3_usize,
        pattern in prop::collection::vec(bits(), 1..50),
    ) {
        let config = MaeConfig {
            hidden_size: 4 * sizes.0 * sizes.1,
            num_attention_heads: 2 * sizes.1,
            num_hidden_layers: sizes.2,
            intermediate_size: sizes.3,
            decoder_hidden_size: 4 * decoder.0,
            decoder_num_attention_heads: 1,
            decoder_num_hidden_layers: decoder.1,
            decoder_intermediate_size: decoder.2,
            image_size: Size { height: 2 * patches.0, width: 3 * patches.1 },
            patch_size: Size { height: 2, width: 3 },
            num_channels: patches.2,
            qkv_bias,
            ..MaeConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let specs = parameters(&config, if whole { Parts::All } else { Parts::EncoderOnly });
        let values = |spec: &ParameterSpec| -> Vec<f32> {
            pattern.iter().copied().cycle().skip(spec.name.len() % pattern.len()).take(spec.length()).collect()
        };
        save_pretrained(folder.path(), &config, &specs, |index| Ok(values(&specs[index]))).unwrap();
        let mut path = folder.path().to_path_buf();
        if style > 0 {
            path = folder.path().join("renamed.safetensors");
            rename(&weights(&folder), &path, |name| Some(version_5(name, style == 1)));
        }
        let mut checkpoint = Checkpoint::open(&path).unwrap();
        let mut read = checkpoint.require_config().unwrap().clone();
        read.other.clear();
        prop_assert_eq!(read, config);
        prop_assert_eq!(checkpoint.has_decoder(), whole);
        checkpoint.read_into(&specs, |index, found| {
            let expected: Vec<u32> = values(&specs[index]).iter().map(|value| value.to_bits()).collect();
            assert_eq!(found.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected);
            Ok(())
        }).unwrap();
    }
}
