//! The command line as a person meets it: what it prints, which files it leaves, and its exit status.

mod bad_input;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod measures;
mod memory;
mod original;
mod outputs;
mod pretraining;
mod survival;
mod validation;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;
use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::MaeForPreTraining;

/// A small model: 32x32 pixels, 16 patches of 8x8, width 32.
fn small_config() -> MaeConfig {
    common::config((32, 32), [32, 64, 2, 4], [16, 32, 1, 2])
}

/// A folder to work in.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A fresh checkpoint of [`small_config`].
    fn checkpoint(&self) -> PathBuf {
        let folder = self.path("checkpoint");
        MaeForPreTraining::new(small_config(), Cpu::<f32>::new(), 1).unwrap().save_pretrained(&folder).unwrap();
        folder
    }

    /// A folder of `count` small PNGs with different contents.
    fn pictures(&self, count: u32) -> PathBuf {
        let folder = self.path("pictures");
        fs::create_dir_all(&folder).unwrap();
        for index in 0..count {
            let picture = image::RgbImage::from_fn(40, 36, |x, y| {
                image::Rgb([(x * 6) as u8, (y * 7) as u8, (index * 37 + x * y / 4) as u8])
            });
            picture.save(folder.join(format!("picture {index:02}.png"))).unwrap();
        }
        folder
    }

    /// Writes a safetensors file of f32 tensors.
    fn tensors(&self, name: &str, tensors: &[(&str, &[usize], &[f32])]) -> PathBuf {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
            .collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()));
        let path = self.path(name);
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        path
    }

    /// Names in a folder, sorted.
    fn list(&self, name: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(name))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// Every file of a folder with its bytes.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap())).collect()
}

/// What a command did.
struct Ran {
    status: i32,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.status, 0, "{}\n{}", self.out, self.err);
        self
    }

    /// Failed with this exit status and a message with all of these words.
    #[track_caller]
    fn failed(self, status: i32, words: &[&str]) -> Self {
        assert_eq!(self.status, status, "{}\n{}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }
}

fn vitmae<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    Command::new(env!("CARGO_BIN_EXE_vitmae")).args(arguments).output().unwrap().into()
}

/// Splits a line of words and puts paths in the place of `{}`.
fn run(line: &str, paths: &[&Path]) -> Ran {
    let mut paths = paths.iter();
    let words: Vec<_> = line
        .split_whitespace()
        .map(|word| if word == "{}" { paths.next().unwrap().as_os_str().to_owned() } else { word.into() })
        .collect();
    assert!(paths.next().is_none(), "more paths than places");
    vitmae(words)
}

/// The f32 tensor called `name` of a file, with its shape.
fn tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F32);
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}
