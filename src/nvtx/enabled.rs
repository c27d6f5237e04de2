//! NVTX, through NVIDIA's crate.

use std::fmt::Arguments;

/// A range of this thread that closes when it is dropped.
#[must_use]
pub(crate) struct Range(#[allow(dead_code, reason = "held for its drop")] nvtx::LocalRange);

/// Names the work until the result is dropped.
pub(crate) fn range(name: Arguments<'_>) -> Range {
    Range(nvtx::LocalRange::new(nvtx::Str::from_str_lossy(&name.to_string())))
}
