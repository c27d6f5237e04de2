//! Vector registers for the two floating-point types.

use std::fmt::Debug;

use pulp::Simd;

/// What the inner loop of a matrix product does with vector registers of the instruction set `S`.
pub trait Lanes: Copy + Debug {
    /// A register full of numbers, in the order of memory.
    type Vector<S: Simd>: Copy;
    /// The same number everywhere.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    /// Does the first steps of [`pack`](crate::cpu::kernel::pack) for a source with contiguous rows; how many it did.
    ///
    /// # Safety
    /// As there.
    unsafe fn transpose(
        panel: *mut Self,
        width: usize,
        count: usize,
        depth: usize,
        source: *const Self,
        row: usize,
    ) -> usize;
    /// `a + b`.
    fn plus<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a * b + c`.
    fn multiply_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
}

impl Lanes for f32 {
    type Vector<S: Simd> = S::f32s;

    unsafe fn transpose(
        panel: *mut f32,
        width: usize,
        count: usize,
        depth: usize,
        source: *const f32,
        row: usize,
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if width.is_multiple_of(2) && std::arch::is_x86_feature_detected!("avx") {
            // SAFETY: the instructions are there; the rest is the caller's promise.
            return unsafe { x86::transpose(panel, width, count, depth, source, row) };
        }
        let _ = (panel, width, count, depth, source, row);
        0
    }

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f32s {
        simd.splat_f32s(value)
    }

    #[inline(always)]
    fn plus<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }

    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_f32s(a, b, c)
    }
}

impl Lanes for f64 {
    type Vector<S: Simd> = S::f64s;

    unsafe fn transpose(_: *mut f64, _: usize, _: usize, _: usize, _: *const f64, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f64s {
        simd.splat_f64s(value)
    }

    #[inline(always)]
    fn plus<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.add_f64s(a, b)
    }

    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_f64s(a, b, c)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// [`Lanes::transpose`](super::Lanes::transpose) in blocks of 8 by 8; `width` is even.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn transpose(
        panel: *mut f32,
        width: usize,
        count: usize,
        depth: usize,
        source: *const f32,
        row: usize,
    ) -> usize {
        let whole = depth / 8 * 8;
        for k in (0..whole).step_by(8) {
            for first in (0..width).step_by(8) {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (index, to) in rows.iter_mut().enumerate().take(count.saturating_sub(first)) {
                    // SAFETY: the row and eight of its steps are inside the source.
                    *to = unsafe { _mm256_loadu_ps(source.add((first + index) * row + k)) };
                }
                for (step, values) in transposed(rows).into_iter().enumerate() {
                    // SAFETY: only what is inside the panel's step is written.
                    unsafe { store(panel.add((k + step) * width + first), values, width - first) };
                }
            }
        }
        whole
    }

    /// Stores the first elements: `most`, which is even, or all.
    #[inline(always)]
    unsafe fn store(to: *mut f32, values: __m256, most: usize) {
        // SAFETY: the caller's promise that `most` elements can be written, and that AVX is there.
        unsafe {
            if most >= 8 {
                _mm256_storeu_ps(to, values);
                return;
            }
            let mut half = _mm256_castps256_ps128(values);
            let mut to = to;
            if most >= 4 {
                _mm_storeu_ps(to, half);
                half = _mm256_extractf128_ps(values, 1);
                to = to.add(4);
            }
            if most % 4 >= 2 {
                to.cast::<f64>().write_unaligned(_mm_cvtsd_f64(_mm_castps_pd(half)));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn transposed(r: [__m256; 8]) -> [__m256; 8] {
        let pairs: [__m256; 8] = std::array::from_fn(|i| {
            let (a, b) = (r[i / 4 * 4 + i / 2 % 2 * 2], r[i / 4 * 4 + i / 2 % 2 * 2 + 1]);
            if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
        });
        let fours: [__m256; 8] = std::array::from_fn(|i| {
            let (a, b) = (pairs[i / 4 * 4 + i / 2 % 2], pairs[i / 4 * 4 + i / 2 % 2 + 2]);
            if i % 2 == 0 { _mm256_shuffle_ps(a, b, 0x44) } else { _mm256_shuffle_ps(a, b, 0xee) }
        });
        std::array::from_fn(|i| {
            let (a, b) = (fours[i % 4], fours[i % 4 + 4]);
            if i < 4 { _mm256_permute2f128_ps(a, b, 0x20) } else { _mm256_permute2f128_ps(a, b, 0x31) }
        })
    }
}
