//! Names for stretches of a step, which NVIDIA's Nsight Systems shows as NVTX ranges above the kernels in them.
//!
//! With the feature `nvtx` a range opens when it is made and closes when it is dropped; without it nothing is left in the
//! program. Outside a profiler an NVTX call costs a few nanoseconds.

#[cfg(not(feature = "nvtx"))]
mod disabled;
#[cfg(feature = "nvtx")]
mod enabled;

#[cfg(not(feature = "nvtx"))]
pub(crate) use disabled::range;
#[cfg(feature = "nvtx")]
pub(crate) use enabled::range;

#[cfg(test)]
mod tests {
    #[test]
    fn ranges_nest() {
        let outer = super::range(format_args!("outer"));
        let inner = super::range(format_args!("inner {}", 1));
        drop(inner);
        drop(outer);
    }
}
