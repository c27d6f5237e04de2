//! Matrix products: a thin seam over the `gemm` crate.

use gemm::Parallelism;

use crate::Result;
use crate::cpu::Float;
use crate::cpu::parallel::{self, Shared};
use crate::ops::Write;

/// Rows of an output block.
const BLOCK_ROWS: usize = 256;
/// Columns of an output block.
const BLOCK_COLUMNS: usize = 256;

/// Sizes of a product `[rows, depth] x [depth, columns]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
}

/// A matrix in memory; element `(i, j)` is `i * row + j * column` after the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix<F> {
    pub(super) start: *const F,
    pub(super) row: usize,
    pub(super) column: usize,
}

// SAFETY: it only says where numbers are; reading them is unsafe.
unsafe impl<F: Sync> Sync for Matrix<F> {}
// SAFETY: as above.
unsafe impl<F: Sync> Send for Matrix<F> {}

impl<F> Matrix<F> {
    /// Rows of `stride` elements.
    pub(super) fn rows(start: *const F, stride: usize) -> Self {
        Self { start, row: stride, column: 1 }
    }

    /// Without its first rows.
    pub(super) fn skip_rows(self, row: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.row), ..self }
    }

    /// Its transpose.
    pub(super) fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }
}

/// `out (+)= left right`, in rows of `stride` elements, on this thread.
///
/// # Safety
/// All elements of the three matrices can be read, those of `out` written, and nobody else uses them.
pub(super) unsafe fn multiply_here<F: Float>(
    sizes: Sizes,
    write: Write,
    out: *mut F,
    stride: usize,
    left: Matrix<F>,
    right: Matrix<F>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            sizes.rows,
            sizes.columns,
            sizes.depth,
            out,
            1,
            stride as isize,
            write == Write::Accumulate,
            left.start,
            left.column as isize,
            left.row as isize,
            right.start,
            right.column as isize,
            right.row as isize,
            F::ONE,
            F::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `out (+)= left right`, with `out` dense; `finish(rows, columns)` follows once for every block, as `(from, to)`.
///
/// # Safety
/// All elements of the matrices can be read, and `out` has `rows * columns` elements that nobody else uses.
pub(super) unsafe fn multiply<F: Float>(
    sizes: Sizes,
    write: Write,
    out: &Shared<'_, F>,
    left: Matrix<F>,
    right: Matrix<F>,
    finish: impl Fn((usize, usize), (usize, usize)) + Sync,
) -> Result<()> {
    let Sizes { rows, columns, depth } = sizes;
    let across = columns.div_ceil(BLOCK_COLUMNS);
    parallel::blocks(rows.div_ceil(BLOCK_ROWS) * across, |block, _| {
        let (row, column) = (block / across * BLOCK_ROWS, block % across * BLOCK_COLUMNS);
        let to = (rows.min(row + BLOCK_ROWS), columns.min(column + BLOCK_COLUMNS));
        // SAFETY: the block is inside the matrices.
        unsafe {
            multiply_here(
                Sizes { rows: to.0 - row, columns: to.1 - column, depth },
                write,
                out.pointer().add(row * columns + column),
                columns,
                left.skip_rows(row),
                right.transposed().skip_rows(column).transposed(),
            );
        }
        finish((row, to.0), (column, to.1));
    });
    Ok(())
}
