//! Configurations and checkpoints: reading, writing, and what is refused.

mod config;
mod damaged;
mod dialects;
mod golden;
mod parameters;
mod reading;
mod writing;

use std::fs;
use std::path::{Path, PathBuf};

use vitmae::config::{MaeConfig, Size};
use vitmae::weights::{ParameterSpec, Parts, parameters, save_pretrained};
use vitmae::{Error, Result};

/// A model of a few thousand parameters.
fn small_config() -> MaeConfig {
    MaeConfig {
        hidden_size: 8,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        intermediate_size: 12,
        image_size: Size::from((8, 12)),
        patch_size: Size::from(4),
        decoder_hidden_size: 4,
        decoder_num_attention_heads: 1,
        decoder_num_hidden_layers: 1,
        decoder_intermediate_size: 6,
        ..MaeConfig::default()
    }
}

/// Numbers that tell every element of every parameter apart.
fn numbers(index: usize, spec: &ParameterSpec) -> Vec<f32> {
    (0..spec.length()).map(|place| (index * 10_000 + place + 1) as f32 * 0.5).collect()
}

fn save(folder: &Path, config: &MaeConfig, parts: Parts) -> Vec<ParameterSpec> {
    let specs = parameters(config, parts);
    save_pretrained(folder, config, &specs, |index| Ok(numbers(index, &specs[index]))).unwrap();
    specs
}

/// A folder with a small checkpoint.
fn checkpoint(parts: Parts) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &small_config(), parts);
    folder
}

/// A safetensors file's header and data.
fn split(path: &Path) -> (String, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (String::from_utf8(bytes[8..8 + length].to_vec()).unwrap(), bytes[8 + length..].to_vec())
}

/// The bytes of a safetensors file.
fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// Renames the tensors of a safetensors file, or drops them.
fn rename(path: &Path, to: &Path, name: impl Fn(&str) -> Option<String>) {
    let bytes = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors.tensors().into_iter().filter_map(|(old, tensor)| Some((name(&old)?, tensor)));
    fs::write(to, safetensors::serialize(renamed, None).unwrap()).unwrap();
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The message of an error of the right kind, which must have all of `parts`.
fn refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) -> String {
    let error = result.expect_err("this should be refused");
    assert!(matches!(error, Error::Checkpoint { .. } | Error::Config(_) | Error::Io { .. }), "{error:?}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    message
}

fn weights(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("model.safetensors")
}
