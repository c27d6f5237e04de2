//! LayerNorm: a block of rows at a time, each row in cache from its first read to its write.

use crate::Result;
use crate::cpu::math::{reduce, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{LayerNorm, LayerNormShape, Write};

/// Rows of a block. In backward, each block has its own partial sums of `dgamma` and `dbeta`.
const ROWS: usize = 32;
/// Columns of a piece when partial sums are added up.
const COLUMNS: usize = 64;

impl<F: Float> LayerNorm for Cpu<F> {
    fn layernorm_forward(
        &self,
        shape: LayerNormShape,
        y: &mut CpuBuffer<F>,
        mean: &mut CpuBuffer<F>,
        rstd: &mut CpuBuffer<F>,
        x: &CpuBuffer<F>,
        gamma: &CpuBuffer<F>,
        beta: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "layernorm_forward";
        let LayerNormShape { rows, width, epsilon } = shape;
        let y = Shared::new(check::output(op, "y", y, &[rows, width])?);
        let mean = Shared::new(check::output(op, "mean", mean, &[rows])?);
        let rstd = Shared::new(check::output(op, "rstd", rstd, &[rows])?);
        let x = check::input(op, "x", x, &[rows, width])?;
        let gamma = check::input(op, "gamma", gamma, &[width])?;
        let beta = check::input(op, "beta", beta, &[width])?;
        parallel::pieces(rows, ROWS, |from, to| {
            // SAFETY: pieces are disjoint and inside the rows.
            let (y, mean, rstd) =
                unsafe { (y.part(from * width, to * width), mean.part(from, to), rstd.part(from, to)) };
            vectorized(|| {
                for row in 0..to - from {
                    let x = &x[(from + row) * width..][..width];
                    (mean[row], rstd[row]) = statistics(x, epsilon);
                    normalize(&mut y[row * width..][..width], x, mean[row], rstd[row], gamma, beta);
                }
            });
        });
        Ok(())
    }

    fn layernorm_backward(
        &self,
        shape: LayerNormShape,
        write: Write,
        dx: &mut CpuBuffer<F>,
        dgamma: &mut CpuBuffer<F>,
        dbeta: &mut CpuBuffer<F>,
        dy: &CpuBuffer<F>,
        x: &CpuBuffer<F>,
        mean: &CpuBuffer<F>,
        rstd: &CpuBuffer<F>,
        gamma: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "layernorm_backward";
        let LayerNormShape { rows, width, .. } = shape;
        let dx = Shared::new(check::output(op, "dx", dx, &[rows, width])?);
        let dgamma = Shared::new(check::output(op, "dgamma", dgamma, &[width])?);
        let dbeta = Shared::new(check::output(op, "dbeta", dbeta, &[width])?);
        let dy = check::input(op, "dy", dy, &[rows, width])?;
        let x = check::input(op, "x", x, &[rows, width])?;
        let mean = check::input(op, "mean", mean, &[rows])?;
        let rstd = check::input(op, "rstd", rstd, &[rows])?;
        let gamma = check::input(op, "gamma", gamma, &[width])?;
        let blocks = rows.div_ceil(ROWS);
        scratch::with(check::product(op, "partial sums", &[blocks, 2, width])?, |partial: &mut [F]| {
            let sums = Shared::new(partial);
            parallel::blocks(blocks, |block, _| {
                let (from, to) = (block * ROWS, rows.min((block + 1) * ROWS));
                // SAFETY: blocks are disjoint.
                let (dx, sums) = unsafe {
                    (dx.part(from * width, to * width), sums.part(block * 2 * width, (block + 1) * 2 * width))
                };
                vectorized(|| {
                    sums.fill(F::ZERO);
                    let (dgamma, dbeta) = sums.split_at_mut(width);
                    for row in from..to {
                        let dx = &mut dx[(row - from) * width..][..width];
                        let (dy, x) = (&dy[row * width..][..width], &x[row * width..][..width]);
                        row_backward(write, dx, dgamma, dbeta, dy, x, mean[row], rstd[row], gamma);
                    }
                });
            });
            parallel::pieces(width, COLUMNS, |from, to| {
                // SAFETY: pieces are disjoint; the sums are complete and only read from here on.
                let (dgamma, dbeta, sums) =
                    unsafe { (dgamma.part(from, to), dbeta.part(from, to), &*sums.part(0, blocks * 2 * width)) };
                vectorized(|| {
                    for block in 0..blocks {
                        let sums = &sums[block * 2 * width..][..2 * width];
                        add(dgamma, &sums[from..to]);
                        add(dbeta, &sums[width + from..width + to]);
                    }
                });
            });
        })
    }
}

/// Mean, and reciprocal of the standard deviation.
#[inline(always)]
fn statistics<F: Float>(x: &[F], epsilon: f64) -> (F, F) {
    let count = F::from_f64(x.len() as f64);
    let mean = reduce([x], |[x]| x) / count;
    let variance = reduce([x], |[x]| (x - mean) * (x - mean)) / count;
    (mean, F::ONE / (variance + F::from_f64(epsilon)).sqrt())
}

#[inline(always)]
fn normalize<F: Float>(y: &mut [F], x: &[F], mean: F, rstd: F, gamma: &[F], beta: &[F]) {
    for (((y, &x), &gamma), &beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
        *y = ((x - mean) * rstd).mul_add(gamma, beta);
    }
}

/// With `n = (x - mean) rstd` and `g = dy gamma`: `dx = rstd (g - mean(g) - n mean(g n))`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one row of everything")]
fn row_backward<F: Float>(
    write: Write,
    dx: &mut [F],
    dgamma: &mut [F],
    dbeta: &mut [F],
    dy: &[F],
    x: &[F],
    mean: F,
    rstd: F,
    gamma: &[F],
) {
    let count = F::from_f64(x.len() as f64);
    let mean_g = reduce([dy, gamma], |[dy, gamma]| dy * gamma) / count;
    let mean_gn = reduce([dy, gamma, x], |[dy, gamma, x]| dy * gamma * (x - mean)) * rstd / count;
    let inputs = dy.iter().zip(x).zip(gamma);
    let outputs = dx.iter_mut().zip(dgamma).zip(dbeta);
    let accumulate = write == Write::Accumulate;
    for (((dx, dgamma), dbeta), ((&dy, &x), &gamma)) in outputs.zip(inputs) {
        let n = (x - mean) * rstd;
        *dgamma = dy.mul_add(n, *dgamma);
        *dbeta += dy;
        let gradient = rstd * (dy * gamma - mean_g - n * mean_gn);
        *dx = if accumulate { *dx + gradient } else { gradient };
    }
}

#[inline(always)]
fn add<F: Float>(sums: &mut [F], values: &[F]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}
