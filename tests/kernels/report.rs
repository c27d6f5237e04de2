//! `kernels/REPORT.md` is what the compiler makes of the kernels, and the kernels keep what they promise.

#[path = "../../examples/kernel_report/main.rs"]
#[allow(dead_code, reason = "the example's `main` is not called")]
mod example;

use vitmae::ops::KERNELS;

use super::emulated::{embedded_kernels, kernels_folder, required};
use super::nvrtc;
pub(crate) use example::report as contents;
use example::report::ARCHITECTURES;
use example::tools::Tools;

/// Kernels that may use local memory, with the reason.
const MAY_SPILL: &[(&str, &str)] = &[];

/// NVIDIA's tools, or nothing after saying that the test is skipped. CI sets VITMAE_REQUIRE_CUDA_TOOLS=1.
fn tools() -> Option<Tools> {
    match Tools::find() {
        Ok(tools) => Some(tools),
        Err(error) if required("VITMAE_REQUIRE_CUDA_TOOLS") => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn the_report_on_the_kernels_is_up_to_date() {
    let (Some(nvrtc), Some(tools)) = (nvrtc(), tools()) else { return };
    let kept = std::fs::read_to_string(kernels_folder().join("REPORT.md")).expect("kernels/REPORT.md");
    let version = format!("NVRTC {}.{};", nvrtc.version.0, nvrtc.version.1);
    if !kept.contains(&version) {
        let both = required("VITMAE_REQUIRE_NVRTC") && required("VITMAE_REQUIRE_CUDA_TOOLS");
        assert!(!both, "the report was not made with {version} make it again with the pinned tools");
        println!("skipped: the report was not made with {version} which compiles differently");
        return;
    }
    let fresh = contents::report(&nvrtc, &tools).unwrap_or_else(|error| panic!("{error}"));
    let mut heading = "";
    let mut kept = kept.lines();
    for line in fresh.lines() {
        heading = if line.starts_with('#') { line } else { heading };
        assert_eq!(
            kept.next(),
            Some(line),
            "{heading}: run `cargo run --example kernel_report` and look at what changed"
        );
    }
    assert_eq!(kept.next(), None, "run `cargo run --example kernel_report`");
}

#[test]
fn kernels_do_not_spill() {
    let (Some(nvrtc), Some(tools)) = (nvrtc(), tools()) else { return };
    assert!(MAY_SPILL.iter().all(|(symbol, _)| KERNELS.iter().any(|kernel| kernel.symbol == *symbol)));
    let mut spilling = Vec::new();
    for architecture in ARCHITECTURES.into_iter().filter(|of| ["sm_80", "sm_90a"].contains(&of.name)) {
        for file in embedded_kernels().files {
            let usages = contents::usage(&nvrtc, &tools, file, architecture).unwrap_or_else(|error| panic!("{error}"));
            for (symbol, usage) in usages {
                let spills = usage.stack > 0 || usage.local > 0 || usage.spills > 0;
                if spills && !MAY_SPILL.iter().any(|&(allowed, _)| allowed == symbol) {
                    spilling.push(format!("{symbol} on {}: {usage:?}", architecture.name));
                }
            }
        }
    }
    assert!(spilling.is_empty(), "{}", spilling.join("\n"));
}
