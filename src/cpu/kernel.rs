//! The inner loops of matrix products: a tile of the output stays in registers while it is summed up.
//!
//! Rows of the left factor are broadcast, columns of the right one are loaded as vectors. Both come in panels: as many rows or
//! columns as a tile has, next to each other for every step along the depth.

use crate::cpu::Float;
use crate::cpu::gemm::Matrix;
use crate::cpu::simd::Vector;
use crate::ops::Write;

/// Vectors of a tile's row.
pub(super) const VECTORS: usize = 2;

/// Rows and columns of a tile on this machine.
pub(super) fn panels<F: Float>() -> (usize, usize) {
    let lanes = F::lanes();
    // 24 sums in 32 registers with AVX-512, 12 in 16 elsewhere.
    (if lanes * size_of::<F>() == 64 { 12 } else { 6 }, VECTORS * lanes)
}

/// The left factor: row `i` at depth `k` is `i / tile rows * panel + i % tile rows + k * step` after the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left<F> {
    pub(super) start: *const F,
    pub(super) panel: usize,
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
pub struct Block<F> {
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
    pub(super) unsafe fn multiply(&self) {
        // SAFETY: the caller's promise.
        unsafe { F::multiply_block(self) }
    }

    /// [`Block::multiply`] with vectors `V` and tiles of up to `ROWS` rows. A caller that has the vectors' instructions
    /// enabled inlines all of it.
    ///
    /// # Safety
    /// As there; the machine has the instructions, and [`panels`] says `ROWS` rows and two vectors.
    #[inline(always)]
    pub(super) unsafe fn multiply_with<V: Vector<F>, const ROWS: usize>(&self) {
        for column in (0..self.columns).step_by(VECTORS * V::LANES) {
            // SAFETY: whoever made the block promised that all of it is there.
            unsafe {
                let mut row = self.tiles::<V, ROWS>(0, column, ROWS);
                if ROWS > 6 {
                    row = self.tiles::<V, 6>(row, column, ROWS);
                }
                row = self.tiles::<V, 2>(row, column, ROWS);
                self.tiles::<V, 1>(row, column, ROWS);
            }
        }
    }

    /// All tiles with `R` rows that fit below `row`; the row that comes next.
    #[inline(always)]
    unsafe fn tiles<V: Vector<F>, const R: usize>(&self, mut row: usize, column: usize, tile_rows: usize) -> usize {
        let tile_columns = VECTORS * V::LANES;
        let columns = tile_columns.min(self.columns - column);
        while row + R <= self.rows {
            // SAFETY: the tile is inside the block.
            unsafe {
                let left = self.left.start.add(row / tile_rows * self.left.panel + row % tile_rows);
                let right = self.right.start.add(column / tile_columns * self.right.panel);
                let out = self.out.add(row * self.stride + column);
                let sums = self.tile::<V, R>(left, right);
                if columns == tile_columns {
                    self.store(&sums, out);
                } else {
                    self.store_some(&sums, out, columns);
                }
            }
            row += R;
        }
        row
    }

    /// The sums of a tile. They stay in registers: nothing here takes their address.
    #[inline(always)]
    unsafe fn tile<V: Vector<F>, const R: usize>(&self, mut left: *const F, mut right: *const F) -> [[V; VECTORS]; R] {
        // SAFETY: the caller's promise: `R` rows and a whole panel of columns can be read at every depth.
        unsafe {
            let mut sums = [[V::splat(F::ZERO); VECTORS]; R];
            for _ in 0..self.depth {
                let columns: [V; VECTORS] = [V::load(right), V::load(right.add(V::LANES))];
                let mut row = 0;
                while row < R {
                    let value = V::splat(*left.add(row));
                    sums[row][0] = value.multiply_add(columns[0], sums[row][0]);
                    sums[row][1] = value.multiply_add(columns[1], sums[row][1]);
                    row += 1;
                }
                left = left.add(self.left.step);
                right = right.add(self.right.step);
            }
            sums
        }
    }

    /// Stores a whole tile.
    #[inline(always)]
    unsafe fn store<V: Vector<F>, const R: usize>(&self, sums: &[[V; VECTORS]; R], out: *mut F) {
        for (row, sums) in sums.iter().enumerate() {
            for (vector, &sum) in sums.iter().enumerate() {
                // SAFETY: the tile is inside the output.
                unsafe {
                    let out = out.add(row * self.stride + vector * V::LANES);
                    let sum = match self.write {
                        Write::Assign => sum,
                        Write::Accumulate => V::load(out).plus(sum),
                    };
                    sum.store(out);
                }
            }
        }
    }

    /// Stores the first columns of a tile, by way of memory.
    #[inline(always)]
    unsafe fn store_some<V: Vector<F>, const R: usize>(&self, sums: &[[V; VECTORS]; R], out: *mut F, columns: usize) {
        let mut room = [F::ZERO; MOST_COLUMNS];
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: the room holds the widest tile's row; `columns` of the row are inside the output.
            unsafe {
                for (vector, &sum) in sums.iter().enumerate() {
                    sum.store(room.as_mut_ptr().add(vector * V::LANES));
                }
                let out = std::slice::from_raw_parts_mut(out.add(row * self.stride), columns);
                for (out, &sum) in out.iter_mut().zip(&room) {
                    *out = match self.write {
                        Write::Assign => sum,
                        Write::Accumulate => *out + sum,
                    };
                }
            }
        }
    }
}

/// Columns of the widest tile: two vectors of AVX-512.
const MOST_COLUMNS: usize = 32;

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
