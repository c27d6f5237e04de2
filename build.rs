//! Lists the kernels of kernels/*.cu; with the feature `cuda`, compiles them through NVRTC where there is one and embeds them,
//! and embeds their sources in any case.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `VITMAE_NVRTC` | the NVRTC library or its folder; nothing else is tried |
//! | `VITMAE_CUDA_ARCHS` | architectures, default `sm_80,sm_90a`; PTX for the newest comes on top |
//! | `VITMAE_REQUIRE_NVRTC` | `1`: fail where there is no NVRTC |
//!
//! Nothing is downloaded and no program is run, except a C++ compiler with the feature `emulator`.

#[cfg(feature = "emulator")]
#[path = "build/emulator.rs"]
mod emulator;
#[cfg(feature = "cuda")]
#[path = "build/hash.rs"]
mod hash;
#[path = "build/kernels.rs"]
mod kernels;
#[cfg(feature = "cuda")]
#[path = "build/manifest.rs"]
mod manifest;
#[cfg(feature = "cuda")]
#[path = "build/nvrtc.rs"]
mod nvrtc;
#[path = "build/units.rs"]
#[cfg_attr(not(feature = "emulator"), allow(dead_code, reason = "only the emulator has units"))]
mod units;

fn main() {
    // Without this line cargo reruns the script when any file of the package changes.
    println!("cargo::rerun-if-changed=build.rs");
    // Tests run the script on kernels that do not compile.
    if let Ok(script) = std::env::current_exe() {
        println!("cargo::rustc-env=VITMAE_BUILD_SCRIPT={}", script.display());
    }
    if let Err(message) = run() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let kernels = kernels::read_kernels()?;
    kernels::list_symbols(&kernels)?;
    #[cfg(feature = "cuda")]
    manifest::embed(&kernels)?;
    #[cfg(feature = "emulator")]
    emulator::compile(&kernels)?;
    Ok(())
}
