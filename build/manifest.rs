//! Compiles the kernels and writes the manifest that `src/cuda/embedded.rs` includes.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::hash::hash;
use crate::kernels::Kernels;
use crate::nvrtc::{Nvrtc, NvrtcError, OPTIONS, SEARCH_VARIABLES, Source, Target};

/// Architectures that are compiled for unless `VITMAE_CUDA_ARCHS` says otherwise.
const DEFAULT_TARGETS: &str = "sm_80,sm_90a";

/// Compiles the kernels where NVRTC is found, and writes the manifest.
pub fn embed(kernels: &Kernels) -> Result<(), String> {
    for variable in SEARCH_VARIABLES.iter().chain(&["VITMAE_CUDA_ARCHS", "VITMAE_REQUIRE_NVRTC"]) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let names = std::env::var("VITMAE_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_TARGETS.to_string());
    let targets = Target::parse_list(&names).map_err(|error| error.to_string())?;
    let required = std::env::var("VITMAE_REQUIRE_NVRTC").is_ok_and(|value| value == "1");
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) if required => return Err(format!("VITMAE_REQUIRE_NVRTC=1: {error}")),
        Err(error) => {
            println!("cargo::warning=CUDA kernels are not compiled now but at run time, on first use: {error}");
            None
        }
    };
    let manifest = write_manifest(kernels, nvrtc.as_ref(), &targets, &out)?;
    let path = out.join("manifest.rs");
    std::fs::write(&path, manifest).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Compiles each file for each target into `out`, and returns the manifest's Rust source.
fn write_manifest(kernels: &Kernels, nvrtc: Option<&Nvrtc>, targets: &[Target], out: &Path) -> Result<String, String> {
    let headers: Vec<Source> = kernels.headers.iter().map(|(name, text)| Source { name, text }).collect();
    let mut parts: Vec<&[u8]> = OPTIONS.iter().map(|option| option.as_bytes()).collect();
    for (name, text) in kernels.files.iter().chain(&kernels.headers) {
        parts.extend([name.as_bytes(), text.as_bytes()]);
    }
    let mut rust = String::new();
    let mut line = |text: String| {
        rust.push_str(&text);
        rust.push('\n');
    };
    line("Manifest {".into());
    line(format!("    nvrtc: {:?},", nvrtc.map(|nvrtc| nvrtc.version)));
    line(format!("    options: &{OPTIONS:?},"));
    line(format!("    source_hash: {:#034x},", hash(&parts)));
    line("    headers: &[".into());
    for (name, _) in &kernels.headers {
        line(format!("        Header {{ name: {name:?}, text: {} }},", include_source(kernels, name)));
    }
    line("    ],".into());
    line("    files: &[".into());
    for (name, text) in &kernels.files {
        let source = Source { name, text };
        line(format!("        KernelFile {{ name: {name:?}, text: {},", include_source(kernels, name)));
        line("            images: &[".into());
        for &target in targets.iter().filter(|_| nvrtc.is_some()) {
            let image = compile(nvrtc, source, &headers, target)?;
            let path = out.join(format!("{}.{target}", name.trim_end_matches(".cu")));
            write_compressed(&path, &image).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            line(format!(
                "                Image {{ target: {}, len: {}, compressed: include_bytes!({path:?}) }},",
                rust_target(target),
                image.len()
            ));
        }
        line("            ],".into());
        line("        },".into());
    }
    line("    ],".into());
    line("}".into());
    Ok(rust)
}

/// As zlib streams, which end with a checksum: the images are mostly zeros, tables and text, and shrink to a fifth.
fn write_compressed(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let mut encoder = ZlibEncoder::new(std::fs::File::create(path)?, Compression::best());
    encoder.write_all(image)?;
    encoder.finish()?.sync_data()
}

fn compile(nvrtc: Option<&Nvrtc>, source: Source, headers: &[Source], target: Target) -> Result<Vec<u8>, String> {
    let nvrtc = nvrtc.ok_or_else(|| NvrtcError::NotFound { searched: Vec::new() }.to_string())?;
    let compiled = nvrtc.compile(source, headers, target).map_err(|error| error.to_string())?;
    for line in compiled.log.lines() {
        println!("cargo::warning={} for {target}: {line}", source.name);
    }
    Ok(compiled.image)
}

fn include_source(kernels: &Kernels, name: &str) -> String {
    format!("include_str!({:?})", kernels.folder.join(name))
}

fn rust_target(target: Target) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "Target {{ capability: {}, suffix: {:?}, ptx: {} }}",
        target.capability, target.suffix, target.ptx
    );
    text
}
