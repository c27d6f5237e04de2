//! The inner loops of matrix products: a tile of the output stays in registers while it is summed up.
//!
//! Rows of the left factor are broadcast, columns of the right one are loaded as vectors. Both come in panels: as many rows or
//! columns as a tile has, next to each other for every step along the depth.

use pulp::{Arch, Simd, WithSimd};

use crate::cpu::Float;
use crate::cpu::gemm::Matrix;
use crate::ops::Write;

/// Vectors of a tile's row.
const VECTORS: usize = 2;

/// Rows and columns of a tile in registers of the instruction set `S`.
#[inline(always)]
const fn tile_sizes<S: Simd, F: Float>() -> (usize, usize) {
    let vector = size_of::<F::Vector<S>>();
    // 24 sums in 32 registers with AVX-512, 12 in 16 elsewhere.
    (if vector == 64 { 12 } else { 6 }, VECTORS * vector / size_of::<F>())
}

/// Rows and columns of a tile on this machine.
pub(super) fn panels<F: Float>() -> (usize, usize) {
    struct Ask<F>(std::marker::PhantomData<F>);
    impl<F: Float> WithSimd for Ask<F> {
        type Output = (usize, usize);

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            tile_sizes::<S, F>()
        }
    }
    Arch::new().dispatch(Ask::<F>(std::marker::PhantomData))
}

/// The left factor: row `i` at depth `k` is `i / tile rows * panel + i % tile rows * row + k * step` after the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left<F> {
    pub(super) start: *const F,
    pub(super) panel: usize,
    pub(super) row: usize,
    pub(super) step: usize,
}

/// The right factor: column `j` at depth `k` is `j / tile columns * panel + j % tile columns + k * step` after the start, and
/// the last panel is readable to its full width.
#[derive(Clone, Copy, Debug)]
pub(super) struct Right<F> {
    pub(super) start: *const F,
    pub(super) panel: usize,
    pub(super) step: usize,
}

/// A block of the output: `out (+)= left right`, with rows of `stride` elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<F> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) left: Left<F>,
    pub(super) right: Right<F>,
    pub(super) out: *mut F,
    pub(super) stride: usize,
    pub(super) write: Write,
}

impl<F: Float> Block<F> {
    /// Computes it on this thread.
    ///
    /// # Safety
    /// What the factors and the output say can be read and written, and nobody else uses the output.
    #[inline(always)]
    pub(super) unsafe fn multiply(self) {
        Arch::new().dispatch(self);
    }

    /// All tiles with `R` rows that fit below `row`; the row that comes next.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const R: usize>(&self, simd: S, row: usize, column: usize) -> usize {
        let (tile_rows, tile_columns) = tile_sizes::<S, F>();
        let columns = tile_columns.min(self.columns - column);
        let mut row = row;
        while row + R <= self.rows {
            // SAFETY: the tile is inside the block.
            unsafe {
                let left = self.left.start.add(row / tile_rows * self.left.panel + row % tile_rows * self.left.row);
                let right = self.right.start.add(column / tile_columns * self.right.panel);
                let out = self.out.add(row * self.stride + column);
                self.tile::<S, R>(simd, left, right, out, columns);
            }
            row += R;
        }
        row
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(
        &self,
        simd: S,
        mut left: *const F,
        mut right: *const F,
        out: *mut F,
        columns: usize,
    ) {
        let (_, tile_columns) = tile_sizes::<S, F>();
        let lanes = tile_columns / VECTORS;
        let zero = F::splat(simd, F::ZERO);
        let mut sums = [[zero; VECTORS]; R];
        // SAFETY: the caller's promise: `R` rows and a whole panel of columns can be read at every depth, and `columns` of
        // `R` rows written.
        unsafe {
            for _ in 0..self.depth {
                let columns: [F::Vector<S>; VECTORS] =
                    std::array::from_fn(|vector| right.add(vector * lanes).cast::<F::Vector<S>>().read_unaligned());
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = F::splat(simd, *left.add(row * self.left.row));
                    for (sum, &column) in sums.iter_mut().zip(&columns) {
                        *sum = F::multiply_add(simd, value, column, *sum);
                    }
                }
                left = left.add(self.left.step);
                right = right.add(self.right.step);
            }
            for (row, sums) in sums.iter().enumerate() {
                let out = out.add(row * self.stride);
                if columns == tile_columns {
                    for (vector, &sum) in sums.iter().enumerate() {
                        let out = out.add(vector * lanes).cast::<F::Vector<S>>();
                        let sum = match self.write {
                            Write::Assign => sum,
                            Write::Accumulate => F::plus(simd, out.read_unaligned(), sum),
                        };
                        out.write_unaligned(sum);
                    }
                } else {
                    let sums = sums.as_ptr().cast::<F>();
                    for column in 0..columns {
                        let sum = *sums.add(column);
                        *out.add(column) = match self.write {
                            Write::Assign => sum,
                            Write::Accumulate => *out.add(column) + sum,
                        };
                    }
                }
            }
        }
    }
}

impl<F: Float> WithSimd for Block<F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (tile_rows, tile_columns) = tile_sizes::<S, F>();
        let mut column = 0;
        while column < self.columns {
            // SAFETY: whoever made the block promised that all of it is there.
            unsafe {
                let mut row = 0;
                if tile_rows == 12 {
                    row = self.tiles::<S, 12>(simd, row, column);
                }
                row = self.tiles::<S, 6>(simd, row, column);
                row = self.tiles::<S, 5>(simd, row, column);
                row = self.tiles::<S, 4>(simd, row, column);
                row = self.tiles::<S, 3>(simd, row, column);
                row = self.tiles::<S, 2>(simd, row, column);
                self.tiles::<S, 1>(simd, row, column);
            }
            column += tile_columns;
        }
    }
}

/// Copies `count` rows of `source`, to a depth of `depth`, to a panel of `width` rows: `[depth, width]`; the rows that are
/// missing become zero.
///
/// # Safety
/// That much of `source` can be read, and `depth * width` elements of `panel` written.
pub(super) unsafe fn pack<F: Float>(panel: *mut F, width: usize, count: usize, depth: usize, source: Matrix<F>) {
    // SAFETY: the caller's promise.
    unsafe {
        if source.row == 1 && count == width {
            match width {
                6 => copy_steps::<F, 6>(panel, depth, source),
                8 => copy_steps::<F, 8>(panel, depth, source),
                12 => copy_steps::<F, 12>(panel, depth, source),
                16 => copy_steps::<F, 16>(panel, depth, source),
                32 => copy_steps::<F, 32>(panel, depth, source),
                _ => copy_elements(panel, width, count, 0, depth, source),
            }
        } else {
            let transposed =
                if source.column == 1 { F::transpose(panel, width, count, depth, source.start, source.row) } else { 0 };
            copy_elements(panel, width, count, transposed, depth, source);
        }
    }
}

/// [`pack`] for steps whose `W` elements are next to each other.
#[inline(always)]
unsafe fn copy_steps<F: Float, const W: usize>(panel: *mut F, depth: usize, source: Matrix<F>) {
    for k in 0..depth {
        // SAFETY: as for `pack`.
        unsafe {
            let step = source.start.add(k * source.column).cast::<[F; W]>().read_unaligned();
            panel.add(k * W).cast::<[F; W]>().write_unaligned(step);
        }
    }
}

/// [`pack`] for the steps from `from` on, element by element.
#[inline(always)]
unsafe fn copy_elements<F: Float>(
    panel: *mut F,
    width: usize,
    count: usize,
    from: usize,
    depth: usize,
    source: Matrix<F>,
) {
    for k in from..depth {
        for row in 0..width {
            // SAFETY: as for `pack`.
            unsafe {
                let value = if row < count { *source.start.add(row * source.row + k * source.column) } else { F::ZERO };
                *panel.add(k * width + row) = value;
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use pulp::x86::{V3, V3_512b};

    use super::*;

    /// Passes on its own instruction set.
    struct Wide(V3_512b, Block<f32>);

    impl WithSimd for Wide {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            self.1.with_simd(self.0);
        }
    }

    /// Tiles for AVX-512, on registers that two of AVX each stand in for.
    #[test]
    fn wide_tiles_multiply() {
        let Some(simd) = V3::try_new().map(V3_512b) else {
            println!("skipped: no AVX2");
            return;
        };
        let (tile_rows, tile_columns) = tile_sizes::<V3_512b, f32>();
        assert_eq!((tile_rows, tile_columns), (12, 32));
        for (rows, columns, depth) in [(1, 1, 1), (12, 32, 8), (25, 70, 9), (35, 33, 30), (11, 95, 17), (24, 64, 64)] {
            for contiguous in [false, true] {
                // Whole numbers: sums are exact in any order.
                let number = |index: usize| (index * 7 % 13) as f32 - 6.0;
                let left: Vec<f32> = (0..rows * depth).map(number).collect();
                let right: Vec<f32> = (0..depth * columns).map(number).collect();
                // Either the rows or the steps of the source lie next to each other.
                let of = |values: &[f32], count: usize| match contiguous {
                    false => Matrix { start: values.as_ptr(), row: depth, column: 1 },
                    true => Matrix { start: values.as_ptr(), row: 1, column: count },
                };
                let at = |matrix: Matrix<f32>, i: usize, k: usize| {
                    // SAFETY: inside the vectors above.
                    unsafe { *matrix.start.add(i * matrix.row + k * matrix.column) }
                };
                let panels = |source: Matrix<f32>, count: usize, width: usize| {
                    let mut panels = vec![f32::NAN; count.div_ceil(width) * width * depth];
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
                        assert_eq!(value, if i < count { at(source, i, k) } else { 0.0 }, "row {i} at depth {k}");
                    }
                }
                let mut out = vec![1.0; rows * columns];
                let block = Block {
                    rows,
                    columns,
                    depth,
                    left: Left { start: packed_a.as_ptr(), panel: tile_rows * depth, row: 1, step: tile_rows },
                    right: Right { start: packed_b.as_ptr(), panel: tile_columns * depth, step: tile_columns },
                    out: out.as_mut_ptr(),
                    stride: columns,
                    write: Write::Accumulate,
                };
                Simd::vectorize(simd.0, Wide(simd, block));
                for i in 0..rows {
                    for j in 0..columns {
                        let expected = 1.0 + (0..depth).map(|k| at(a, i, k) * at(b, j, k)).sum::<f32>();
                        assert_eq!(out[i * columns + j], expected, "({i}, {j}) of {rows} x {columns} x {depth}");
                    }
                }
            }
        }
    }
}
