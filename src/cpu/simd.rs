//! Vector registers: what the inner loops of matrix products need of each instruction set, and which of them a number type uses.

use std::fmt::Debug;

use crate::cpu::Float;
use crate::cpu::kernel::Block;
use crate::isa::{Isa, dispatch};

/// A register full of numbers, in the order of memory.
///
/// # Safety
/// Every method needs the instructions of its register, which the caller has looked for.
pub(super) trait Vector<F>: Copy {
    /// How many numbers it holds.
    const LANES: usize;
    /// The same number everywhere.
    unsafe fn splat(value: F) -> Self;
    /// From memory, at any alignment.
    unsafe fn load(from: *const F) -> Self;
    /// To memory, at any alignment.
    unsafe fn store(self, to: *mut F);
    /// `self + other`.
    unsafe fn plus(self, other: Self) -> Self;
    /// `self * factor + term`.
    unsafe fn multiply_add(self, factor: Self, term: Self) -> Self;
}

/// Numbers that compilers put into whatever registers there are.
#[derive(Clone, Copy)]
struct Plain<F>([F; 4]);

impl<F: Float> Vector<F> for Plain<F> {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: F) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const F) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { from.cast::<[F; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut F) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[F; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    /// Rounded twice: where there is no instruction for it, rounding once costs a call.
    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, term: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * factor.0[lane] + term.0[lane]))
    }
}

/// The registers and instructions that a number type uses on this machine.
pub trait Lanes: Copy + Debug {
    /// Numbers in a vector.
    #[doc(hidden)]
    fn lanes() -> usize;
    /// Multiplies a block with the widest vectors.
    ///
    /// # Safety
    /// As for [`Block::multiply`].
    #[doc(hidden)]
    unsafe fn multiply_block(block: &Block<Self>);
    /// Does the first steps of [`pack`](crate::cpu::kernel::pack) for a source with contiguous rows; how many it did.
    ///
    /// # Safety
    /// As there.
    #[doc(hidden)]
    unsafe fn transpose(
        panel: *mut Self,
        width: usize,
        count: usize,
        depth: usize,
        source: *const Self,
        row: usize,
    ) -> usize;
    /// Runs a job compiled for the widest vectors.
    #[doc(hidden)]
    fn dispatch<J: pulp::WithSimd>(job: J) -> J::Output;
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    Isa::used() >= Isa::Avx512
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    Isa::used() >= Isa::Avx2
}

impl Lanes for f32 {
    fn lanes() -> usize {
        match Isa::used() {
            Isa::Avx512 => 16,
            Isa::Avx2 => 8,
            Isa::Plain => 4,
        }
    }

    unsafe fn multiply_block(block: &Block<f32>) {
        // SAFETY: the instructions were looked for; the rest is the caller's promise.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            {
                if has_avx512() {
                    return x86::multiply_f32_avx512(block);
                }
                if has_avx2() {
                    return x86::multiply_f32_avx2(block);
                }
            }
            block.multiply_with::<Plain<f32>, 6>();
        }
    }

    unsafe fn transpose(
        panel: *mut f32,
        width: usize,
        count: usize,
        depth: usize,
        source: *const f32,
        row: usize,
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if width.is_multiple_of(2) && has_avx2() {
            // SAFETY: the instructions are there; the rest is the caller's promise.
            return unsafe { x86::transpose(panel, width, count, depth, source, row) };
        }
        let _ = (panel, width, count, depth, source, row);
        0
    }

    #[inline(always)]
    fn dispatch<J: pulp::WithSimd>(job: J) -> J::Output {
        dispatch(job, Isa::used())
    }
}

/// For references and gradient checks: fast enough with AVX2, and half the time to compile.
impl Lanes for f64 {
    fn lanes() -> usize {
        4
    }

    unsafe fn multiply_block(block: &Block<f64>) {
        // SAFETY: the instructions were looked for; the rest is the caller's promise.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if has_avx2() {
                return x86::multiply_f64_avx2(block);
            }
            block.multiply_with::<Plain<f64>, 6>();
        }
    }

    unsafe fn transpose(_: *mut f64, _: usize, _: usize, _: usize, _: *const f64, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn dispatch<J: pulp::WithSimd>(job: J) -> J::Output {
        dispatch(job, Isa::used().min(Isa::Avx2))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;
    use crate::cpu::kernel::Block;

    impl Vector<f32> for __m512 {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller has the instructions and the memory.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm512_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm512_fmadd_ps(self, factor, term) }
        }
    }

    impl Vector<f32> for __m256 {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller has the instructions and the memory.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(to, self) }
        }

        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_fmadd_ps(self, factor, term) }
        }
    }

    impl Vector<f64> for __m256d {
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn splat(value: f64) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_set1_pd(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f64) -> Self {
            // SAFETY: the caller has the instructions and the memory.
            unsafe { _mm256_loadu_pd(from) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f64) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_pd(to, self) }
        }

        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_add_pd(self, other) }
        }

        #[inline(always)]
        unsafe fn multiply_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: the caller has the instructions.
            unsafe { _mm256_fmadd_pd(self, factor, term) }
        }
    }

    /// [`Block::multiply_with`] AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply_f32_avx512(block: &Block<f32>) {
        // SAFETY: the caller's promise.
        unsafe { block.multiply_with::<__m512, 12>() }
    }

    /// [`Block::multiply_with`] AVX2.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply_f32_avx2(block: &Block<f32>) {
        // SAFETY: the caller's promise.
        unsafe { block.multiply_with::<__m256, 6>() }
    }

    /// [`Block::multiply_with`] AVX2.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply_f64_avx2(block: &Block<f64>) {
        // SAFETY: the caller's promise.
        unsafe { block.multiply_with::<__m256d, 6>() }
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::Matrix;
    use crate::cpu::kernel::{Left, Right, pack};
    use crate::ops::Write;

    /// What a set of registers multiplies with: its name, rows and columns of a tile, and the function.
    type Set<F> = (&'static str, (usize, usize), unsafe fn(&Block<F>));

    unsafe fn plain<F: Float>(block: &Block<F>) {
        // SAFETY: the caller's promise.
        unsafe { block.multiply_with::<Plain<F>, 6>() }
    }

    /// Every set of registers that this machine has, not just the widest.
    #[test]
    fn blocks_multiply_with_all_registers() {
        let mut f32_sets: Vec<Set<f32>> = vec![("plain f32", (6, 8), plain)];
        let mut f64_sets: Vec<Set<f64>> = vec![("plain f64", (6, 8), plain)];
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx2() {
                f32_sets.push(("AVX2 f32", (6, 16), x86::multiply_f32_avx2));
                f64_sets.push(("AVX2 f64", (6, 8), x86::multiply_f64_avx2));
            }
            if has_avx512() {
                f32_sets.push(("AVX-512 f32", (12, 32), x86::multiply_f32_avx512));
            }
        }
        f32_sets.into_iter().for_each(check);
        f64_sets.into_iter().for_each(check);
    }

    fn check<F: Float>((name, (tile_rows, tile_columns), multiply): Set<F>) {
        for (rows, columns, depth) in [(1, 1, 1), (12, 32, 8), (25, 70, 9), (35, 33, 30), (11, 95, 17), (24, 64, 64)] {
            for contiguous in [false, true] {
                // Whole numbers: sums are exact in any order.
                let number = |index: usize| F::from_f64((index * 7 % 13) as f64 - 6.0);
                let left: Vec<F> = (0..rows * depth).map(number).collect();
                let right: Vec<F> = (0..depth * columns).map(number).collect();
                // Either the rows or the steps of the source lie next to each other.
                let of = |values: &[F], count: usize| match contiguous {
                    false => Matrix { start: values.as_ptr(), row: depth, column: 1 },
                    true => Matrix { start: values.as_ptr(), row: 1, column: count },
                };
                // SAFETY: inside the vectors above.
                let at = |matrix: Matrix<F>, i: usize, k: usize| unsafe {
                    *matrix.start.add(i * matrix.row + k * matrix.column)
                };
                let panels = |source: Matrix<F>, count: usize, width: usize| {
                    let mut panels = vec![F::from_f64(f64::NAN); count.div_ceil(width) * width * depth];
                    for (panel, to) in panels.chunks_exact_mut(width * depth).enumerate() {
                        let first = panel * width;
                        // SAFETY: the panel has room for it, and the source that many rows.
                        unsafe {
                            pack(to.as_mut_ptr(), width, width.min(count - first), depth, source.skip(first, 0));
                        }
                    }
                    panels
                };
                let (a, b) = (of(&left, rows), of(&right, columns));
                let (packed_a, packed_b) = (panels(a, rows, tile_rows), panels(b, columns, tile_columns));
                for (packed, source, count, width) in
                    [(&packed_a, a, rows, tile_rows), (&packed_b, b, columns, tile_columns)]
                {
                    for (index, &value) in packed.iter().enumerate() {
                        let (i, k) = (index / (width * depth) * width + index % width, index / width % depth);
                        let expected = if i < count { at(source, i, k) } else { F::ZERO };
                        assert!(value == expected, "{name}: row {i} at depth {k}: {value:?}, not {expected:?}");
                    }
                }
                let mut out = vec![F::ONE; rows * columns];
                let block = Block {
                    rows,
                    columns,
                    depth,
                    left: Left { start: packed_a.as_ptr(), panel: tile_rows * depth, step: tile_rows },
                    right: Right { start: packed_b.as_ptr(), panel: tile_columns * depth, step: tile_columns },
                    out: out.as_mut_ptr(),
                    stride: columns,
                    write: Write::Accumulate,
                };
                // SAFETY: the panels are as large as the block says, and the registers are there.
                unsafe { multiply(&block) };
                for i in 0..rows {
                    for j in 0..columns {
                        let expected = F::ONE + (0..depth).map(|k| at(a, i, k) * at(b, j, k)).sum::<F>();
                        let found = out[i * columns + j];
                        assert!(found == expected, "{name}: ({i}, {j}) of {rows} x {columns} x {depth}: {found:?}");
                    }
                }
            }
        }
    }
}
