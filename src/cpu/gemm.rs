//! Matrix products over the threads of the current pool.
//!
//! Both factors are copied once into panels that the inner loops read from front to back; then the output's blocks are
//! computed one by one. Threads share both jobs, in pieces that do not depend on how many threads there are.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;
use crate::cpu::kernel::{self, Block, Left, Right};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Float, scratch};
use crate::ops::Write;

/// Bytes of a panel of columns between two uses of the output. It comes from the second-level cache, which is fast enough for
/// it; shorter panels mean more loads and stores of the output.
const PANEL_BYTES: usize = 64 << 10;
/// Steps along the depth that are in panels at the same time.
const PACKED_DEPTH: usize = 1024;
/// Rows of an output block, at most: they fit into the second-level cache.
const BLOCK_ROWS: usize = 192;
/// Columns of an output block, at most.
const BLOCK_COLUMNS: usize = 96;
/// Panels that one thread fills at a time.
const PANELS: usize = 8;
/// Steps of one panel that are filled before those of the next one.
const STEPS: usize = 32;

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

    /// Without its first rows and columns.
    pub(super) fn skip(self, rows: usize, columns: usize) -> Self {
        Self { start: self.start.wrapping_add(rows * self.row + columns * self.column), ..self }
    }

    /// Its transpose.
    pub(super) fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
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
    let plan = Plan::new::<F>(sizes);
    scratch::with(
        (plan.left_panels * plan.tile_rows + plan.right_panels * plan.tile_columns) * plan.packed,
        |room: &mut [F]| {
            let room = Shared::new(room);
            let packed_left = room.pointer();
            let packed_right = packed_left.wrapping_add(plan.left_panels * plan.tile_rows * plan.packed);
            let (packed_left, packed_right) = (Matrix::rows(packed_left, 0), Matrix::rows(packed_right, 0));
            let per_stage = plan.packs + plan.blocks;
            let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let workers = parallel::workers(plan.packs.max(plan.blocks));
            let work = |_| {
                loop {
                    // All packing of a stage, then all of its blocks, then the next stage.
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    if job >= plan.stages * per_stage {
                        break;
                    }
                    let (stage, piece) = (job / per_stage, job % per_stage);
                    let first = stage * per_stage + if piece < plan.packs { 0 } else { plan.packs };
                    // Whoever has one of the jobs before is at work on it: this ends.
                    wait_for(|| done.load(Ordering::Acquire) >= first);
                    let (from, to) = (stage * plan.packed, depth.min((stage + 1) * plan.packed));
                    let sizes = Sizes { depth: to - from, ..sizes };
                    if piece < plan.packs {
                        // SAFETY: each piece fills its own panels, which nobody reads until all are done.
                        unsafe {
                            plan.pack(sizes, piece, left.skip(0, from), right.skip(from, 0), packed_left, packed_right);
                        }
                    } else {
                        let write = if stage == 0 { write } else { Write::Accumulate };
                        let at = plan.block(sizes, piece - plan.packs);
                        // SAFETY: blocks are disjoint, and all panels of this stage are filled.
                        unsafe { plan.multiply(sizes, at, write, out.pointer(), packed_left, packed_right) };
                        if stage + 1 == plan.stages {
                            finish(at.0, at.1);
                        }
                    }
                    done.fetch_add(1, Ordering::Release);
                }
            };
            if rows > 0 && columns > 0 {
                parallel::fork(0, workers, &work);
            }
        },
    )
}

/// Waits for other threads, which are expected to be done soon.
fn wait_for(ready: impl Fn() -> bool) {
    let mut turns = 0_u32;
    while !ready() {
        turns = turns.saturating_add(1);
        if turns < 2000 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// From one index to another.
pub(super) type Range = (usize, usize);

/// How a product is cut into pieces.
#[derive(Clone, Copy, Debug)]
struct Plan {
    tile_rows: usize,
    tile_columns: usize,
    left_panels: usize,
    right_panels: usize,
    /// The depth of a stage; the last one may have less.
    packed: usize,
    stages: usize,
    /// Steps between two uses of the output, at most.
    depth: usize,
    /// Pieces of packing in a stage: first those of the left factor, then those of the right one.
    packs: usize,
    left_packs: usize,
    block_rows: usize,
    block_columns: usize,
    blocks: usize,
}

impl Plan {
    fn new<F: Float>(sizes: Sizes) -> Self {
        let Sizes { rows, columns, depth } = sizes;
        let (tile_rows, tile_columns) = kernel::panels::<F>();
        let (left_panels, right_panels) = (rows.div_ceil(tile_rows), columns.div_ceil(tile_columns));
        let stages = depth.div_ceil(PACKED_DEPTH).max(1);
        let (left_packs, right_packs) = (left_panels.div_ceil(PANELS), right_panels.div_ceil(PANELS));
        let even = |total: usize, most: usize, unit: usize| {
            let parts = total.div_ceil(most).max(1);
            total.div_ceil(parts).next_multiple_of(unit).max(unit)
        };
        let block_rows = even(rows, BLOCK_ROWS, tile_rows);
        let block_columns = even(columns, BLOCK_COLUMNS, tile_columns);
        Self {
            tile_rows,
            tile_columns,
            left_panels,
            right_panels,
            packed: depth.div_ceil(stages),
            stages,
            depth: PANEL_BYTES / (tile_columns * size_of::<F>()),
            packs: left_packs + right_packs,
            left_packs,
            block_rows,
            block_columns,
            blocks: rows.div_ceil(block_rows) * columns.div_ceil(block_columns),
        }
    }

    /// Rows and columns of a block. Neighbours share their columns, which stay in cache.
    fn block(&self, sizes: Sizes, block: usize) -> (Range, Range) {
        let down = sizes.rows.div_ceil(self.block_rows);
        let (row, column) = (block % down * self.block_rows, block / down * self.block_columns);
        ((row, sizes.rows.min(row + self.block_rows)), (column, sizes.columns.min(column + self.block_columns)))
    }

    /// Fills some panels from `depth` steps of the factors.
    ///
    /// # Safety
    /// That much of the factors can be read, and nobody else uses this piece's panels.
    unsafe fn pack<F: Float>(
        &self,
        sizes: Sizes,
        piece: usize,
        left: Matrix<F>,
        right: Matrix<F>,
        packed_left: Matrix<F>,
        packed_right: Matrix<F>,
    ) {
        let (piece, count, width, source, packed) = if piece < self.left_packs {
            (piece, sizes.rows, self.tile_rows, left, packed_left)
        } else {
            (piece - self.left_packs, sizes.columns, self.tile_columns, right.transposed(), packed_right)
        };
        let panels = piece * PANELS..count.div_ceil(width).min((piece + 1) * PANELS);
        // Where a step's elements are next to each other, several panels share what a page and a cache line have of it.
        let chunk = if source.row == 1 { STEPS } else { sizes.depth };
        let mut from = 0;
        while from < sizes.depth {
            let depth = chunk.min(sizes.depth - from);
            for panel in panels.clone() {
                let first = panel * width;
                let to = packed.start.wrapping_add(first * self.packed + from * width).cast_mut();
                // SAFETY: the panel is inside the packed factor, its source inside the factor.
                unsafe { kernel::pack(to, width, width.min(count - first), depth, source.skip(first, from)) };
            }
            from += depth;
        }
    }

    /// Computes a block from panels, `sizes.depth` deep.
    ///
    /// # Safety
    /// The panels are filled; nobody else uses this block of the output.
    unsafe fn multiply<F: Float>(
        &self,
        sizes: Sizes,
        (rows, columns): (Range, Range),
        write: Write,
        out: *mut F,
        packed_left: Matrix<F>,
        packed_right: Matrix<F>,
    ) {
        let (left_panel, right_panel) = (self.tile_rows * self.packed, self.tile_columns * self.packed);
        let parts = sizes.depth.div_ceil(self.depth).max(1);
        let step = sizes.depth.div_ceil(parts);
        for part in 0..parts {
            let (from, to) = (part * step, sizes.depth.min((part + 1) * step));
            let block = Block {
                rows: rows.1 - rows.0,
                columns: columns.1 - columns.0,
                depth: to - from,
                left: Left {
                    start: packed_left.start.wrapping_add(rows.0 * self.packed + from * self.tile_rows),
                    panel: left_panel,
                    step: self.tile_rows,
                },
                right: Right {
                    start: packed_right.start.wrapping_add(columns.0 * self.packed + from * self.tile_columns),
                    panel: right_panel,
                    step: self.tile_columns,
                },
                out: out.wrapping_add(rows.0 * sizes.columns + columns.0),
                stride: sizes.columns,
                write: if part == 0 { write } else { Write::Accumulate },
            };
            // SAFETY: the caller's promise.
            unsafe { block.multiply() };
        }
    }
}
