//! The build script itself, run on copies of the kernels: what it says and when it fails.

use std::path::Path;
use std::process::Command;

use super::emulated::{embedded_kernels, kernels_folder, required};
use super::nvrtc;

/// A run of the build script.
struct Run {
    ok: bool,
    output: String,
    manifest: String,
}

impl Run {
    /// The lines that cargo would show with this label.
    fn lines(&self, label: &str) -> Vec<&str> {
        self.output
            .lines()
            .filter_map(|line| line.strip_prefix("cargo::")?.strip_prefix(label)?.strip_prefix('='))
            .collect()
    }
}

/// Runs it on a copy of the kernels with one more file.
fn run(extra_kernel: &str, environment: &[(&str, &Path)]) -> Option<Run> {
    let script = env!("VITMAE_BUILD_SCRIPT");
    if !Path::new(script).is_file() {
        assert!(!required("VITMAE_REQUIRE_NVRTC"), "the build script is no longer at {script}");
        println!("skipped: the build script is no longer at {script}");
        return None;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (kernels, out) = (folder.path().join("kernels"), folder.path().join("out"));
    std::fs::create_dir_all(kernels.join("emulator")).expect("created");
    std::fs::create_dir_all(&out).expect("created");
    for from in [kernels_folder(), kernels_folder().join("emulator")] {
        for entry in std::fs::read_dir(&from).expect("readable").flatten().filter(|entry| entry.path().is_file()) {
            let to = kernels.join(entry.path().strip_prefix(kernels_folder()).expect("inside"));
            std::fs::copy(entry.path(), to).expect("copied");
        }
    }
    std::fs::write(kernels.join("extra.cu"), extra_kernel).expect("written");
    let mut command = Command::new(script);
    command.current_dir(folder.path()).env("CARGO_MANIFEST_DIR", folder.path()).env("OUT_DIR", &out);
    command.env("VITMAE_CUDA_ARCHS", "sm_90a").env_remove("VITMAE_REQUIRE_NVRTC");
    // For the C++ compiler of the feature `emulator`.
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    command.env("TARGET", &host).env("HOST", &host).env("OPT_LEVEL", "1");
    command.envs(environment.iter().copied());
    let output = command.output().expect("it runs");
    Some(Run {
        ok: output.status.success(),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        manifest: std::fs::read_to_string(out.join("manifest.rs")).unwrap_or_default(),
    })
}

const RIGHT: &str = "#include \"device.cuh\"\n\nKERNEL(32)\nextra(float* out) { out[thread_index()] = 1.0f; }\n";
const WRONG: &str = "#include \"device.cuh\"\n\nKERNEL(32)\nextra(float* out) { out[0] = not_declared; }\n";

#[test]
fn without_nvrtc_the_build_warns_once_and_embeds_sources() {
    let nowhere = Path::new("/nonexistent");
    let Some(run) = run(RIGHT, &[("VITMAE_NVRTC", nowhere)]) else { return };
    assert!(run.ok, "{}", run.output);
    let warnings = run.lines("warning");
    assert!(warnings.len() == 1 && warnings[0].contains("VITMAE_NVRTC"), "{warnings:?}");
    assert!(run.manifest.contains("nvrtc: None") && run.manifest.contains("\"extra.cu\""), "{}", run.manifest);
    assert!(!run.manifest.contains("Image"), "{}", run.manifest);
}

#[test]
fn without_nvrtc_the_build_fails_where_it_is_required() {
    let environment = [("VITMAE_NVRTC", Path::new("/nonexistent")), ("VITMAE_REQUIRE_NVRTC", Path::new("1"))];
    let Some(run) = run(RIGHT, &environment) else { return };
    assert!(!run.ok);
    assert!(run.lines("error").concat().contains("searched /nonexistent"), "{}", run.output);
}

#[test]
fn a_kernel_that_does_not_compile_fails_the_build_with_the_log() {
    if nvrtc().is_none() {
        return;
    }
    let Some(broken) = run(WRONG, &[]) else { return };
    assert!(!broken.ok);
    let errors = broken.lines("error").join("\n");
    assert!(errors.contains("extra.cu") && errors.contains("sm_90a") && errors.contains("not_declared"), "{errors}");
    let right = run(RIGHT, &[]).expect("as before");
    assert!(right.ok && right.lines("warning").is_empty(), "{}", right.output);
    assert!(right.manifest.contains("extra.compute_90"), "{}", right.manifest);
    assert_eq!(
        right.manifest.matches("Image {").count(),
        2 * (embedded_kernels().files.len() + 1),
        "{}",
        right.manifest
    );
}

#[test]
fn an_architecture_that_is_none_fails_the_build() {
    let Some(run) = run(RIGHT, &[("VITMAE_CUDA_ARCHS", Path::new("sm_80,turing"))]) else { return };
    assert!(!run.ok && run.lines("error").concat().contains("\"turing\" is not an architecture"), "{}", run.output);
}
