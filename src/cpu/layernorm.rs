//! LayerNorm: a block of rows at a time, each row in cache from its first read to its write.

use crate::Result;
use crate::cpu::math::{add, sum_over, vectorized};
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
            rows_forward(y, mean, rstd, &x[from * width..to * width], gamma, beta, epsilon);
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
        scratch::with(check::product(op, "partial sums", &[blocks, 3, width])?, |partial: &mut [F]| {
            let sums = Shared::new(partial);
            parallel::blocks(blocks, |block, _| {
                let (from, to) = (block * ROWS, rows.min((block + 1) * ROWS));
                // SAFETY: blocks are disjoint.
                let (dx, sums) = unsafe {
                    (dx.part(from * width, to * width), sums.part(block * 3 * width, (block + 1) * 3 * width))
                };
                sums.fill(F::ZERO);
                let (dgamma, rest) = sums.split_at_mut(width);
                let (dbeta, room) = rest.split_at_mut(width);
                for row in from..to {
                    let dx = &mut dx[(row - from) * width..][..width];
                    let (dy, x) = (&dy[row * width..][..width], &x[row * width..][..width]);
                    row_backward(write, dx, &mut *dgamma, &mut *dbeta, &mut *room, dy, x, mean[row], rstd[row], gamma);
                }
            });
            parallel::pieces(width, COLUMNS, |from, to| {
                // SAFETY: pieces are disjoint; the sums are complete and only read from here on.
                let (dgamma, dbeta, sums) =
                    unsafe { (dgamma.part(from, to), dbeta.part(from, to), &*sums.part(0, blocks * 3 * width)) };
                for sums in sums.chunks_exact(3 * width.max(1)) {
                    add(&mut *dgamma, &sums[from..to]);
                    add(&mut *dbeta, &sums[width + from..width + to]);
                }
            });
        })
    }
}

vectorized! {
    fn rows_forward<'a, F: Float>(y: &'a mut [F], mean: &'a mut [F], rstd: &'a mut [F], x: &'a [F], gamma: &'a [F], beta: &'a [F], epsilon: f64) {
        let width = gamma.len();
        for (row, (mean, rstd)) in mean.iter_mut().zip(rstd).enumerate() {
            let x = &x[row * width..][..width];
            (*mean, *rstd) = statistics(x, epsilon);
            normalize(&mut y[row * width..][..width], x, *mean, *rstd, gamma, beta);
        }
    }
}

/// Mean, and reciprocal of the standard deviation.
#[inline(always)]
fn statistics<F: Float>(x: &[F], epsilon: f64) -> (F, F) {
    let count = F::from_f64(x.len() as f64);
    let mean = sum_over(x, x, |x, _| x) / count;
    let variance = sum_over(x, x, |x, _| (x - mean) * (x - mean)) / count;
    (mean, F::ONE / (variance + F::from_f64(epsilon)).sqrt())
}

#[inline(always)]
fn normalize<F: Float>(y: &mut [F], x: &[F], mean: F, rstd: F, gamma: &[F], beta: &[F]) {
    for (((y, &x), &gamma), &beta) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
        *y = ((x - mean) * rstd).mul_add(gamma, beta);
    }
}

vectorized! {
    /// With `n = (x - mean) rstd` and `g = dy gamma`: `dx = rstd (g - mean(g) - n mean(g n))`.
    fn row_backward<'a, F: Float>(write: Write, dx: &'a mut [F], dgamma: &'a mut [F], dbeta: &'a mut [F], room: &'a mut [F], dy: &'a [F], x: &'a [F], mean: F, rstd: F, gamma: &'a [F]) {
        let count = F::from_f64(x.len() as f64);
        // `room` is for `g`.
        for ((((&dy, &x), &gamma), g), (dgamma, dbeta)) in
            dy.iter().zip(x).zip(gamma).zip(&mut *room).zip(dgamma.iter_mut().zip(dbeta))
        {
            *g = dy * gamma;
            *dgamma = Float::mul_add(dy, (x - mean) * rstd, *dgamma);
            *dbeta += dy;
        }
        let mean_g = sum_over(room, room, |g, _| g) / count;
        let mean_gn = sum_over(room, x, |g, x| g * (x - mean)) * rstd / count;
        let accumulate = write == Write::Accumulate;
        for ((dx, &g), &x) in dx.iter_mut().zip(&*room).zip(x) {
            let gradient = rstd * (g - mean_g - (x - mean) * rstd * mean_gn);
            *dx = if accumulate { *dx + gradient } else { gradient };
        }
    }
}
