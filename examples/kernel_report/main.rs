//! Writes `kernels/REPORT.md`: what the compiler made of each kernel on each architecture.
//!
//!     eval "$(.ci/nvrtc)"; eval "$(.ci/cuda-tools)"
//!     cargo run --example kernel_report
//!
//! Needs NVRTC and NVIDIA's cuobjdump and nvdisasm, and no GPU.

mod launches;
pub(crate) mod report;
pub(crate) mod tools;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let nvrtc = vitmae::cuda::nvrtc::Nvrtc::find()?;
    let text = report::report(&nvrtc, &tools::Tools::find()?)?;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/REPORT.md");
    std::fs::write(path, text)?;
    println!("{path}");
    Ok(())
}
