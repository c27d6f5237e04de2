//! Self-attention, one head of one sequence at a time: scores exist for a tile of queries and all keys.

use crate::Result;
use crate::cpu::gemm::{Matrix, Sizes, multiply_here};
use crate::cpu::math::{reduce, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{Attention, AttentionShape, Write};

/// Queries of a tile.
const QUERIES: usize = 64;

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
        let scale = F::from_f64(shape.scale());
        let room = QUERIES * tokens;
        scratch::with(parallel::workers(batch * heads) * room, |scratch: &mut [F]| {
            let scratch = Shared::new(scratch);
            parallel::blocks(batch * heads, |head, worker| {
                // SAFETY: each worker has its own part.
                let scores = unsafe { scratch.part(worker * room, (worker + 1) * room) };
                let [query, key, value] = head_of(shape, qkv.as_ptr(), head);
                let out = out_of(shape, out.pointer(), head);
                for from in (0..tokens).step_by(QUERIES) {
                    let queries = QUERIES.min(tokens - from);
                    // SAFETY: only this block has this head's log-sum-exp.
                    let log_sum_exp = unsafe { log_sum_exp.part(head * tokens + from, head * tokens + from + queries) };
                    // SAFETY: the matrices are inside the buffers, and this head's output is this block's alone.
                    unsafe {
                        let sizes = Sizes { rows: queries, columns: tokens, depth: head_dim };
                        multiply_here(
                            sizes,
                            Write::Assign,
                            scores.as_mut_ptr(),
                            tokens,
                            query.skip_rows(from),
                            key.transposed(),
                        );
                        let out = out.start.add(from * out.row).cast_mut();
                        vectorized(|| {
                            for (row, log_sum_exp) in log_sum_exp.iter_mut().enumerate() {
                                *log_sum_exp = softmax(&mut scores[row * tokens..][..tokens], scale);
                            }
                        });
                        let sizes = Sizes { rows: queries, columns: head_dim, depth: tokens };
                        multiply_here(
                            sizes,
                            Write::Assign,
                            out,
                            shape.width(),
                            Matrix::rows(scores.as_ptr(), tokens),
                            value,
                        );
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
        let room = QUERIES * tokens;
        scratch::with(parallel::workers(batch * heads) * 2 * room, |scratch: &mut [F]| {
            let scratch = Shared::new(scratch);
            parallel::blocks(batch * heads, |head, worker| {
                // SAFETY: each worker has its own part.
                let (p, dp) = unsafe { scratch.part(worker * 2 * room, (worker + 1) * 2 * room) }.split_at_mut(room);
                let [query, key, value] = head_of(shape, qkv.as_ptr(), head);
                let [dquery, dkey, dvalue] = head_of(shape, dqkv.pointer(), head);
                let dout = out_of(shape, dout.as_ptr(), head);
                for from in (0..tokens).step_by(QUERIES) {
                    let queries = QUERIES.min(tokens - from);
                    let (query, dquery, dout) = (query.skip_rows(from), dquery.skip_rows(from), dout.skip_rows(from));
                    let log_sum_exp = &log_sum_exp[head * tokens + from..][..queries];
                    let (p, dp) = (&mut p[..queries * tokens], &mut dp[..queries * tokens]);
                    let later = if from == 0 { Write::Assign } else { Write::Accumulate };
                    // SAFETY: the matrices are inside the buffers, and this head's gradients are this block's alone.
                    unsafe {
                        let sizes = Sizes { rows: queries, columns: tokens, depth: head_dim };
                        multiply_here(sizes, Write::Assign, p.as_mut_ptr(), tokens, query, key.transposed());
                        multiply_here(sizes, Write::Assign, dp.as_mut_ptr(), tokens, dout, value.transposed());
                        vectorized(|| {
                            for (row, &log_sum_exp) in log_sum_exp.iter().enumerate() {
                                let p = &mut p[row * tokens..][..tokens];
                                probabilities(p, scale, log_sum_exp);
                                score_gradients(&mut dp[row * tokens..][..tokens], p, scale);
                            }
                        });
                        let (p, ds) = (Matrix::rows(p.as_ptr(), tokens), Matrix::rows(dp.as_ptr(), tokens));
                        let sizes = Sizes { rows: queries, columns: head_dim, depth: tokens };
                        multiply_here(sizes, Write::Assign, dquery.start.cast_mut(), dquery.row, ds, key);
                        let sizes = Sizes { rows: tokens, columns: head_dim, depth: queries };
                        multiply_here(sizes, later, dkey.start.cast_mut(), dkey.row, ds.transposed(), query);
                        multiply_here(sizes, later, dvalue.start.cast_mut(), dvalue.row, p.transposed(), dout);
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
        parallel::blocks(batch * heads, |head, _| {
            // SAFETY: each block has its own head.
            let out = unsafe { out.part(head * tokens * tokens, (head + 1) * tokens * tokens) };
            let [query, key, _] = head_of(shape, qkv.as_ptr(), head);
            let sizes = Sizes { rows: tokens, columns: tokens, depth: head_dim };
            // SAFETY: the matrices are inside the buffers.
            unsafe { multiply_here(sizes, Write::Assign, out.as_mut_ptr(), tokens, query, key.transposed()) };
            vectorized(|| {
                for row in 0..tokens {
                    let log_sum_exp = log_sum_exp[head * tokens + row];
                    self::probabilities(&mut out[row * tokens..][..tokens], scale, log_sum_exp);
                }
            });
        });
        Ok(())
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

/// Scores to probabilities; the natural log-sum-exp of the scaled scores.
#[inline(always)]
fn softmax<F: Float>(scores: &mut [F], scale: F) -> F {
    let largest = largest(scores) * scale;
    for score in scores.iter_mut() {
        *score = score.mul_add(scale, -largest).exp();
    }
    let sum = reduce([scores], |[p]| p);
    let factor = F::ONE / sum;
    for score in scores.iter_mut() {
        *score *= factor;
    }
    largest + F::from_f64(sum.to_f64().ln())
}

/// Scores to probabilities, from their log-sum-exp.
#[inline(always)]
fn probabilities<F: Float>(scores: &mut [F], scale: F, log_sum_exp: F) {
    for score in scores {
        *score = score.mul_add(scale, -log_sum_exp).exp();
    }
}

/// The gradient of the unscaled scores from that of the probabilities: `scale p (dp - sum(p dp))`.
#[inline(always)]
fn score_gradients<F: Float>(dp: &mut [F], p: &[F], scale: F) {
    let delta = reduce([&*dp, p], |[dp, p]| dp * p);
    for (dp, &p) in dp.iter_mut().zip(p) {
        *dp = (*dp - delta) * p * scale;
    }
}

/// The largest number.
#[inline(always)]
fn largest<F: Float>(values: &[F]) -> F {
    const LANES: usize = 32;
    let mut lanes = [F::from_f64(f64::NEG_INFINITY); LANES];
    let chunks = values.chunks_exact(LANES);
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = lane.larger(value);
    }
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.larger(value);
        }
    }
    lanes.into_iter().reduce(F::larger).unwrap_or(F::ZERO)
}
