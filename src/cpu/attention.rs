//! Self-attention, one head of one sequence at a time.
//!
//! A head's queries, keys and values are copied next to each other, where they stay in the first caches; scores exist for a
//! tile of queries and all keys.

use crate::cpu::gemm::Matrix;
use crate::cpu::kernel::{self, Block, Left, Right};
use crate::cpu::math::{LANES, add_up, sum_over, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{Attention, AttentionShape, Write};
use crate::{Error, Result};

/// Queries of a tile, at most.
const QUERIES: usize = 72;

impl<F: Float> Attention for Cpu<F> {
    fn attention_forward(
        &self,
        shape: AttentionShape,
        out: &mut CpuBuffer<F>,
        log_sum_exp: &mut CpuBuffer<F>,
        qkv: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "attention_forward";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let out = Shared::new(check::output(op, "out", out, &[batch, tokens, heads, head_dim])?);
        let log_sum_exp = Shared::new(check::output(op, "log_sum_exp", log_sum_exp, &[batch, heads, tokens])?);
        let qkv = check::input(op, "qkv", qkv, &[batch, tokens, 3, heads, head_dim])?;
        let sizes = HeadSizes::new::<F>(op, shape)?;
        let scale = F::from_f64(shape.scale());
        let room = sizes.panels() + sizes.columns() + sizes.rows() + 2 * sizes.scores();
        scratch::with(parallel::workers(batch * heads) * room, |scratch: &mut [F]| {
            let scratch = Shared::new(scratch);
            parallel::blocks(batch * heads, |head, worker| {
                // SAFETY: each worker has its own part.
                let room = unsafe { scratch.part(worker * room, (worker + 1) * room) };
                let (query, room) = room.split_at_mut(sizes.panels());
                let (key_columns, room) = room.split_at_mut(sizes.columns());
                let (value, room) = room.split_at_mut(sizes.rows());
                let (scores, score_panels) = room.split_at_mut(sizes.scores());
                let [q, k, v] = head_of(shape, qkv.as_ptr(), head);
                let out = out_of(shape, out.pointer(), head);
                // SAFETY: the head is inside `qkv`.
                unsafe {
                    sizes.copy_panels(query, q);
                    sizes.copy_columns(key_columns, k);
                    sizes.copy_rows(value, v, F::ONE);
                }
                for from in (0..tokens).step_by(sizes.tile) {
                    let queries = sizes.tile.min(tokens - from);
                    let first = head * tokens + from;
                    // SAFETY: this head's log-sum-exp is this block's alone.
                    let log_sum_exp = unsafe { log_sum_exp.part(first, first + queries) };
                    let mut factors = [F::ZERO; QUERIES + 12];
                    let out = out.skip(from, 0);
                    // SAFETY: the factors are as large as their sizes say, and this head's output is this block's alone.
                    unsafe {
                        sizes.scores_of(queries, scores, &query[from * head_dim..], key_columns);
                        softmax(&sizes, &mut *scores, log_sum_exp, &mut factors[..queries], scale);
                        let left = sizes.by_query(queries, score_panels, scores);
                        sizes.out_of(queries, tokens, left, value, out, Write::Assign);
                        for (row, &factor) in factors[..queries].iter().enumerate() {
                            let out = out.start.add(row * out.row).cast_mut();
                            multiply(std::slice::from_raw_parts_mut(out, head_dim), factor);
                        }
                    }
                }
            });
        })
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        dqkv: &mut CpuBuffer<F>,
        dout: &CpuBuffer<F>,
        qkv: &CpuBuffer<F>,
        log_sum_exp: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "attention_backward";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let dqkv = Shared::new(check::output(op, "dqkv", dqkv, &[batch, tokens, 3, heads, head_dim])?);
        let dout = check::input(op, "dout", dout, &[batch, tokens, heads, head_dim])?;
        let qkv = check::input(op, "qkv", qkv, &[batch, tokens, 3, heads, head_dim])?;
        let log_sum_exp = check::input(op, "log_sum_exp", log_sum_exp, &[batch, heads, tokens])?;
        let scale = F::from_f64(shape.scale());
        let sizes = HeadSizes::new::<F>(op, shape)?;
        let room = 2 * sizes.panels() + 3 * sizes.rows() + 2 * sizes.columns() + 3 * sizes.scores();
        scratch::with(parallel::workers(batch * heads) * room, |scratch: &mut [F]| {
            let scratch = Shared::new(scratch);
            parallel::blocks(batch * heads, |head, worker| {
                // SAFETY: each worker has its own part.
                let room = unsafe { scratch.part(worker * room, (worker + 1) * room) };
                let (query_panels, room) = room.split_at_mut(sizes.panels());
                let (gradient_panels, room) = room.split_at_mut(sizes.panels());
                let (query, room) = room.split_at_mut(sizes.rows());
                let (key, room) = room.split_at_mut(sizes.rows());
                let (gradient, room) = room.split_at_mut(sizes.rows());
                let (key_columns, room) = room.split_at_mut(sizes.columns());
                let (value_columns, room) = room.split_at_mut(sizes.columns());
                let (p, room) = room.split_at_mut(sizes.scores());
                let (ds, ds_panels) = room.split_at_mut(sizes.scores());
                let [q, k, v] = head_of(shape, qkv.as_ptr(), head);
                let [dq, dk, dv] = head_of(shape, dqkv.pointer(), head);
                let dout = out_of(shape, dout.as_ptr(), head);
                // SAFETY: the head is inside `qkv` and `dout`. With scaled queries and keys, the gradients of scores need no scaling.
                unsafe {
                    sizes.copy_panels(query_panels, q);
                    sizes.copy_panels(gradient_panels, dout);
                    sizes.copy_rows(query, q, scale);
                    sizes.copy_rows(key, k, scale);
                    sizes.copy_rows(gradient, dout, F::ONE);
                    sizes.copy_columns(key_columns, k);
                    sizes.copy_columns(value_columns, v);
                }
                for from in (0..tokens).step_by(sizes.tile) {
                    let queries = sizes.tile.min(tokens - from);
                    let log_sum_exp = &log_sum_exp[head * tokens + from..][..queries];
                    let (query, gradient) = (&query[from * sizes.width..], &gradient[from * sizes.width..]);
                    let later = if from == 0 { Write::Assign } else { Write::Accumulate };
                    // SAFETY: the factors are as large as their sizes say, and this head's gradients are this block's alone.
                    unsafe {
                        sizes.scores_of(queries, p, &query_panels[from * head_dim..], key_columns);
                        sizes.scores_of(queries, ds, &gradient_panels[from * head_dim..], value_columns);
                        probabilities(&sizes, &mut *p, log_sum_exp, scale);
                        score_gradients(&sizes, &mut *ds, &*p, queries);
                        let left = sizes.by_query(queries, ds_panels, ds);
                        sizes.out_of(queries, tokens, left, key, dq.skip(from, 0), Write::Assign);
                        sizes.out_of(tokens, queries, sizes.by_key(ds), query, dk, later);
                        sizes.out_of(tokens, queries, sizes.by_key(p), gradient, dv, later);
                    }
                }
            });
        })
    }

    fn attention_probabilities(
        &self,
        shape: AttentionShape,
        probabilities: &mut CpuBuffer<F>,
        qkv: &CpuBuffer<F>,
        log_sum_exp: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "attention_probabilities";
        let AttentionShape { batch, tokens, heads, head_dim } = shape;
        let out = check::output(op, "probabilities", probabilities, &[batch, heads, tokens, tokens])?;
        let out = Shared::new(out);
        let qkv = check::input(op, "qkv", qkv, &[batch, tokens, 3, heads, head_dim])?;
        let log_sum_exp = check::input(op, "log_sum_exp", log_sum_exp, &[batch, heads, tokens])?;
        let scale = F::from_f64(shape.scale());
        let sizes = HeadSizes::new::<F>(op, shape)?;
        let room = sizes.panels() + sizes.columns();
        scratch::with(parallel::workers(batch * heads) * room, |scratch: &mut [F]| {
            let scratch = Shared::new(scratch);
            parallel::blocks(batch * heads, |head, worker| {
                // SAFETY: each worker has its own part, and each block its own head.
                let (room, out) = unsafe {
                    (
                        scratch.part(worker * room, (worker + 1) * room),
                        out.part(head * tokens * tokens, (head + 1) * tokens * tokens),
                    )
                };
                let (query, key_columns) = room.split_at_mut(sizes.panels());
                let [q, k, _] = head_of(shape, qkv.as_ptr(), head);
                let sizes = HeadSizes { stride: tokens, ..sizes };
                // SAFETY: the head is inside `qkv`.
                unsafe {
                    sizes.copy_panels(query, q);
                    sizes.copy_columns(key_columns, k);
                }
                // SAFETY: the factors are as large as their sizes say.
                unsafe { sizes.scores_of(tokens, out, query, key_columns) };
                self::probabilities(&sizes, out, &log_sum_exp[head * tokens..][..tokens], scale);
            });
        })
    }
}

/// Sizes of one head's working memory.
#[derive(Clone, Copy, Debug)]
struct HeadSizes {
    tokens: usize,
    head_dim: usize,
    /// Rows and columns of a tile of the products.
    panel: (usize, usize),
    /// Features, filled up to whole panels.
    width: usize,
    /// Keys, filled up to whole panels: from one query's scores to the next one's.
    stride: usize,
    /// Queries of a tile.
    tile: usize,
}

impl HeadSizes {
    fn new<F: Float>(op: &'static str, shape: AttentionShape) -> Result<Self> {
        let AttentionShape { tokens, head_dim, .. } = shape;
        if head_dim == 0 {
            return Err(Error::shape(op, "head_dim", "at least 1", 0));
        }
        let panel = kernel::panels::<F>();
        let tiles = tokens.div_ceil(QUERIES).max(1);
        Ok(Self {
            tokens,
            head_dim,
            panel,
            width: head_dim.next_multiple_of(panel.1),
            stride: tokens.next_multiple_of(panel.1),
            tile: tokens.div_ceil(tiles).next_multiple_of(panel.0).max(1),
        })
    }

    /// Elements of `[tokens, width]`.
    fn rows(&self) -> usize {
        self.tokens * self.width
    }

    /// Elements of `[tokens / panel, head_dim, panel]`, the last panel filled up.
    fn panels(&self) -> usize {
        self.tokens.next_multiple_of(self.panel.0) * self.head_dim
    }

    /// Elements of `[stride / panel, head_dim, panel]`.
    fn columns(&self) -> usize {
        self.stride * self.head_dim
    }

    /// Elements of a tile's scores.
    fn scores(&self) -> usize {
        self.tile * self.stride
    }

    /// Copies rows, scaled, to rows of `width` elements.
    unsafe fn copy_rows<F: Float>(&self, to: &mut [F], from: Matrix<F>, scale: F) {
        for (row, to) in to.chunks_exact_mut(self.width).enumerate() {
            // SAFETY: the caller's promise that `from` has all rows of the head.
            let from = unsafe { std::slice::from_raw_parts(from.start.add(row * from.row), self.head_dim) };
            copy_scaled(to, from, scale);
        }
    }

    /// Copies rows to panels of a left factor.
    unsafe fn copy_panels<F: Float>(&self, to: &mut [F], from: Matrix<F>) {
        // SAFETY: the caller's promise that `from` has all rows of the head.
        unsafe { pack_all(self.panel.0, self.tokens, self.head_dim, to, from) }
    }

    /// Copies rows to panels of columns.
    unsafe fn copy_columns<F: Float>(&self, to: &mut [F], from: Matrix<F>) {
        // SAFETY: the caller's promise that `from` has all rows of the head.
        unsafe { pack_all(self.panel.1, self.tokens, self.head_dim, to, from) }
    }

    /// A tile's scores as a left factor, a query to a row: copied to `panels`.
    fn by_query<F: Float>(&self, queries: usize, panels: &mut [F], scores: &[F]) -> Left<F> {
        let scores = Matrix::rows(scores.as_ptr(), self.stride);
        // SAFETY: a tile's scores have `queries` rows of `stride` elements.
        unsafe { pack_all(self.panel.0, queries, self.tokens, panels, scores) }
        Left { start: panels.as_ptr(), panel: self.panel.0 * self.tokens, step: self.panel.0 }
    }

    /// A tile's scores as a left factor, a key to a row.
    fn by_key<F>(&self, scores: &[F]) -> Left<F> {
        Left { start: scores.as_ptr(), panel: self.panel.0, step: self.stride }
    }

    /// `scores = rows columnsᵀ` for the first `queries` rows; both in panels.
    unsafe fn scores_of<F: Float>(&self, queries: usize, scores: &mut [F], rows: &[F], columns: &[F]) {
        let block = Block {
            rows: queries,
            columns: self.tokens,
            depth: self.head_dim,
            left: Left { start: rows.as_ptr(), panel: self.panel.0 * self.head_dim, step: self.panel.0 },
            right: Right { start: columns.as_ptr(), panel: self.panel.1 * self.head_dim, step: self.panel.1 },
            out: scores.as_mut_ptr(),
            stride: self.stride,
            write: Write::Assign,
        };
        // SAFETY: the caller's promise.
        unsafe { block.multiply() }
    }

    /// `out (+)= left right`, where `right` has rows of `width` elements.
    unsafe fn out_of<F: Float>(
        &self,
        rows: usize,
        depth: usize,
        left: Left<F>,
        right: &[F],
        out: Matrix<F>,
        write: Write,
    ) {
        let block = Block {
            rows,
            columns: self.head_dim,
            depth,
            left,
            right: Right { start: right.as_ptr(), panel: self.panel.1, step: self.width },
            out: out.start.cast_mut(),
            stride: out.row,
            write,
        };
        // SAFETY: the caller's promise.
        unsafe { block.multiply() }
    }
}

/// Copies `count` rows of `depth` elements to panels of `width` rows.
///
/// # Safety
/// That much of `from` can be read.
unsafe fn pack_all<F: Float>(width: usize, count: usize, depth: usize, to: &mut [F], from: Matrix<F>) {
    let panels = to.chunks_exact_mut(width * depth).take(count.div_ceil(width));
    for (panel, to) in panels.enumerate() {
        let rows = width.min(count - panel * width);
        // SAFETY: the panel has room for it; the rest is the caller's promise.
        unsafe { kernel::pack(to.as_mut_ptr(), width, rows, depth, from.skip(panel * width, 0)) };
    }
}

/// Queries, keys and values `[N, D]` of a head (counted through the batch).
fn head_of<F>(shape: AttentionShape, qkv: *const F, head: usize) -> [Matrix<F>; 3] {
    let (width, stride) = (shape.width(), 3 * shape.width());
    let first = head / shape.heads * shape.tokens * stride + head % shape.heads * shape.head_dim;
    [0, width, 2 * width].map(|part| Matrix::rows(qkv.wrapping_add(first + part), stride))
}

/// The output `[N, D]` of a head (counted through the batch).
fn out_of<F>(shape: AttentionShape, out: *const F, head: usize) -> Matrix<F> {
    let first = head / shape.heads * shape.tokens * shape.width() + head % shape.heads * shape.head_dim;
    Matrix::rows(out.wrapping_add(first), shape.width())
}

vectorized! {
    /// Copies a row, scaled; what is beyond its end becomes zero.
    fn copy_scaled<'a, F: Float>(to: &'a mut [F], from: &'a [F], scale: F) {
        let (to, rest) = to.split_at_mut(from.len());
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from * scale;
        }
        rest.fill(F::ZERO);
    }
}

vectorized! {
    fn multiply<'a, F: Float>(values: &'a mut [F], factor: F) {
        for value in values {
            *value *= factor;
        }
    }
}

vectorized! {
    /// A tile's scores to probabilities times a number; each row's natural log-sum-exp, and 1 / that number.
    fn softmax<'a, F: Float>(sizes: &'a HeadSizes, scores: &'a mut [F], log_sum_exp: &'a mut [F], factors: &'a mut [F], scale: F) {
        for (row, (log_sum_exp, factor)) in log_sum_exp.iter_mut().zip(factors).enumerate() {
            let scores = &mut scores[row * sizes.stride..][..sizes.tokens];
            let largest = largest(scores) * scale;
            let sum = exp_all(scores, scale, largest);
            *log_sum_exp = largest + F::from_f64(sum.to_f64().ln());
            *factor = F::ONE / sum;
        }
    }
}

vectorized! {
    /// A tile's scores to probabilities, from their log-sum-exp.
    fn probabilities<'a, F: Float>(sizes: &'a HeadSizes, scores: &'a mut [F], log_sum_exp: &'a [F], scale: F) {
        for (row, &log_sum_exp) in log_sum_exp.iter().enumerate() {
            for score in &mut scores[row * sizes.stride..][..sizes.tokens] {
                *score = Float::mul_add(*score, scale, -log_sum_exp).exp_bounded();
            }
        }
    }
}

vectorized! {
    /// The gradient of a tile's scores from that of the probabilities: `p (dp - sum(p dp))`.
    fn score_gradients<'a, F: Float>(sizes: &'a HeadSizes, dp: &'a mut [F], p: &'a [F], queries: usize) {
        for row in 0..queries {
            let dp = &mut dp[row * sizes.stride..][..sizes.tokens];
            let p = &p[row * sizes.stride..][..sizes.tokens];
            let delta = sum_over(dp, p, |dp, p| dp * p);
            for (dp, &p) in dp.iter_mut().zip(p) {
                *dp = (*dp - delta) * p;
            }
        }
    }
}

/// Replaces scores by the exponentials of what they are scaled, less the largest one; their sum.
#[inline(always)]
fn exp_all<F: Float>(scores: &mut [F], scale: F, largest: F) -> F {
    let mut lanes = [F::ZERO; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (score, sum) in chunk.iter_mut().zip(&mut lanes) {
            *score = Float::mul_add(*score, scale, -largest).exp_bounded();
            *sum += *score;
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut lanes) {
        *score = Float::mul_add(*score, scale, -largest).exp_bounded();
        *sum += *score;
    }
    add_up(lanes)
}

/// The largest number.
#[inline(always)]
fn largest<F: Float>(values: &[F]) -> F {
    let mut lanes = [F::from_f64(f64::NEG_INFINITY); LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = lane.larger(value);
    }
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.larger(value);
        }
    }
    lanes.into_iter().reduce(F::larger).unwrap_or(F::ZERO)
}
