//! What tests run kernels on: an emulator, or a GPU.
//!
//! The emulator is the one in the crate with the feature `emulator`, else one that is built here with the system's C++ compiler.
//! Tests are skipped, and say so, where there is none; with `VITMAE_REQUIRE_EMULATOR=1`, as in CI, they fail.
//! `VITMAE_TEST_DEVICE=cuda` (or `cuda:1`, ...) takes a GPU instead, with poisoned and guarded memory; `cuda-plain` leaves memory
//! as it is, for compute-sanitizer to look at.

// A test binary uses some of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use vitmae::cuda::*;

pub mod guarded;

#[cfg(not(feature = "emulator"))]
#[path = "../../../src/cuda/emulator/mod.rs"]
pub mod emulator;
#[cfg(not(feature = "emulator"))]
#[path = "../../../build/hash.rs"]
mod hash;
#[path = "../../../build/units.rs"]
pub mod units;

pub use emulator::{Emulator, Options};

/// A result whose error says why there is no emulator.
type Outcome<T> = std::result::Result<T, String>;

/// Seeds for the order of blocks and threads: in order, backwards, and two that are drawn.
pub const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// What a test runs kernels on, with memory that no other has.
pub struct TestDevice(Stream);

impl TestDevice {
    /// Its stream.
    pub fn stream(&self) -> Stream {
        self.0.clone()
    }
}

/// A device for a test of an op: an emulator with this seed, or the GPU that `VITMAE_TEST_DEVICE` names. Nothing, after saying
/// that the test is skipped, where there is no emulator; a GPU that was asked for and is not there is a failure.
pub fn device(seed: u64) -> Option<TestDevice> {
    device_with(Options { seed, ..Options::default() })
}

/// Multiprocessors of the emulator: few, so that small shapes take more than one turn of a kernel's loop.
pub const MULTIPROCESSORS: u32 = 4;

/// The same with other options, of which a GPU gets the limits.
pub fn device_with(options: Options) -> Option<TestDevice> {
    let limits = launch::Limits { shared_bytes: options.shared_bytes, multiprocessors: MULTIPROCESSORS };
    match test_gpu() {
        Some(name) => Some(TestDevice(guarded::stream(&name, limits))),
        None => start_or_skip(options).map(|emulator| TestDevice(emulator.stream())),
    }
}

/// The GPU that tests should use.
fn test_gpu() -> Option<String> {
    std::env::var("VITMAE_TEST_DEVICE").ok().filter(|name| name.starts_with("cuda"))
}

/// An emulator for a test of the emulator, or nothing after saying that the test is skipped.
pub fn emulator_itself(seed: u64) -> Option<Arc<Emulator>> {
    if test_gpu().is_some() {
        println!("skipped: the test is about the emulator, not a GPU");
        return None;
    }
    start_or_skip(Options { seed, ..Options::default() })
}

/// Whether a variable says that what it names must be there, so that its absence fails a test instead of skipping it.
pub fn required(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "1")
}

fn start_or_skip(options: Options) -> Option<Arc<Emulator>> {
    match start(options) {
        Ok(emulator) => Some(emulator),
        Err(reason) if required("VITMAE_REQUIRE_EMULATOR") => panic!("{reason}"),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

#[cfg(feature = "emulator")]
fn start(options: Options) -> Outcome<Arc<Emulator>> {
    Emulator::new(options).map_err(|error| error.to_string())
}

#[cfg(not(feature = "emulator"))]
fn start(options: Options) -> Outcome<Arc<Emulator>> {
    use std::sync::OnceLock;
    static LIBRARY: OnceLock<Outcome<PathBuf>> = OnceLock::new();
    let library = LIBRARY.get_or_init(build).clone()?;
    // SAFETY: it was built from these sources.
    unsafe { Emulator::load(&library, options) }.map_err(|error| error.to_string())
}

/// The kernels folder.
pub fn kernels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Name and text of each `.cu` file, in order.
pub fn kernel_files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(kernels_folder()).expect("kernels/ is readable") {
        let path = entry.expect("kernels/ is readable").path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            files.push((name, std::fs::read_to_string(&path).expect("a readable file")));
        }
    }
    files.sort();
    files
}

/// Builds the emulator as a shared library, or finds the one that an earlier test built from the same sources.
#[cfg(not(feature = "emulator"))]
fn build() -> Outcome<PathBuf> {
    use std::process::Command;
    let compiler = ["CXX", ""].iter().find_map(|name| std::env::var(name).ok()).unwrap_or_else(|| "c++".to_string());
    let version = Command::new(&compiler).arg("--version").output();
    let version = version.map_err(|error| format!("no C++ compiler ({compiler}: {error})"))?;

    let folder = kernels_folder();
    let files = kernel_files();
    let units = units::units(&folder, &files).map_err(|error| error.to_string())?;
    let mut parts = vec![version.stdout, units::FLAGS.join(" ").into_bytes()];
    // The kernels, their headers and the emulator.
    for folder in [&folder, &folder.join("emulator")] {
        let mut paths: Vec<_> = std::fs::read_dir(folder)
            .map_err(|error| error.to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file())
            .collect();
        paths.sort();
        for path in paths {
            parts.push(std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?);
        }
    }
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = target.join(format!("libvitmae_emulator-{:032x}.so", hash::hash(&parts)));
    if library.is_file() {
        return Ok(library);
    }

    let work = tempfile::tempdir_in(target).map_err(|error| error.to_string())?;
    let run = |command: &mut Command| -> Outcome<()> {
        let output = command.output().map_err(|error| error.to_string())?;
        if output.status.success() {
            return Ok(());
        }
        // A compiler that is there and does not compile the kernels is no reason to skip.
        panic!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let mut objects = Vec::new();
    for unit in &units {
        let source = work.path().join(format!("{}.cpp", unit.name));
        let object = source.with_extension("o");
        std::fs::write(&source, &unit.text).map_err(|error| error.to_string())?;
        let mut command = Command::new(&compiler);
        command.args(units::FLAGS).args(unit.checked.then_some(units::CHECKED));
        run(command.arg("-c").arg(&source).arg("-o").arg(&object))?;
        objects.push(object);
    }
    let unfinished = work.path().join("library");
    run(Command::new(&compiler).arg("-shared").args(&objects).arg("-o").arg(&unfinished))?;
    std::fs::rename(&unfinished, &library).map_err(|error| error.to_string())?;
    Ok(library)
}
