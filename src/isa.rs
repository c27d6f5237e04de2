//! Which vector instructions code for the CPU uses.

use std::sync::OnceLock;

/// Sets of vector instructions, each of which includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of this architecture has.
    Plain,
    /// AVX2 and fused multiply-adds.
    Avx2,
    /// AVX-512.
    Avx512,
}

/// What the machine has is not to be used beyond this.
const VARIABLE: &str = "VITMAE_CPU_ISA";

impl Isa {
    /// What this process uses: what the machine has, up to what the variable `VITMAE_CPU_ISA` (`avx512`, `avx2` or `plain`) allows.
    #[must_use]
    #[inline]
    pub fn used() -> Self {
        static USED: OnceLock<Isa> = OnceLock::new();
        *USED.get_or_init(|| {
            let there = Self::there();
            match std::env::var(VARIABLE).as_deref() {
                Err(_) | Ok("" | "avx512") => there,
                Ok("avx2") => there.min(Self::Avx2),
                Ok("plain") => Self::Plain,
                Ok(other) => {
                    tracing::warn!(
                        "the variable {VARIABLE} is {other:?} and not avx512, avx2 or plain: it changes nothing"
                    );
                    there
                }
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn there() -> Self {
        use std::arch::is_x86_feature_detected;
        match (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), is_x86_feature_detected!("avx512f"))
        {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Plain,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn there() -> Self {
        Self::Plain
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "no vector instructions beyond the architecture's",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
        })
    }
}

/// Runs a job compiled for these instructions.
#[inline(always)]
pub(crate) fn dispatch<J: pulp::WithSimd>(job: J, instructions: Isa) -> J::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if instructions >= Isa::Avx512
            && let Some(simd) = pulp::x86::V4::try_new()
        {
            return pulp::Simd::vectorize(simd, job);
        }
        if instructions >= Isa::Avx2
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            return pulp::Simd::vectorize(simd, job);
        }
    }
    // What `pulp` takes elsewhere is of the architecture itself.
    if cfg!(target_arch = "x86_64") { job.with_simd(pulp::Scalar) } else { pulp::Arch::new().dispatch(job) }
}
