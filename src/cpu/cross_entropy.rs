//! Softmax cross-entropy: loss and gradient of a row while it is in cache.

use crate::Result;
use crate::cpu::math::{sum_over, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check};
use crate::ops::{CrossEntropy, CrossEntropyShape};

/// Rows of a piece.
const ROWS: usize = 8;

impl<F: Float> CrossEntropy for Cpu<F> {
    fn cross_entropy_forward_backward(
        &self,
        shape: CrossEntropyShape,
        loss: &mut CpuBuffer<F>,
        row_loss: &mut CpuBuffer<F>,
        dlogits: &mut CpuBuffer<F>,
        logits: &CpuBuffer<F>,
        labels: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "cross_entropy_forward_backward";
        let CrossEntropyShape { rows, classes, smoothing, scale } = shape;
        let loss = check::output(op, "loss", loss, &[1])?;
        let row_loss = check::output(op, "row_loss", row_loss, &[rows])?;
        let dlogits = Shared::new(check::output(op, "dlogits", dlogits, &[rows, classes])?);
        let logits = check::input(op, "logits", logits, &[rows, classes])?;
        let labels = check::input(op, "labels", labels, &[rows])?;
        check::ids(op, "labels", labels, classes)?;
        let losses = Shared::new(&mut *row_loss);
        parallel::pieces(rows, ROWS, |from, to| {
            for row in from..to {
                // SAFETY: each row is one piece's alone.
                let (gradient, loss) =
                    unsafe { (dlogits.part(row * classes, (row + 1) * classes), losses.part(row, row + 1)) };
                let logits = &logits[row * classes..][..classes];
                loss.fill(one_row(gradient, logits, labels[row] as usize, smoothing, F::from_f64(scale)));
            }
        });
        let sum: f64 = row_loss.iter().map(|loss| loss.to_f64()).sum();
        loss[0] += F::from_f64(scale * sum);
        Ok(())
    }
}

vectorized! {
    /// Writes the gradient; the loss. All logits are taken relative to the largest.
    fn one_row<'a, F: Float>(gradient: &'a mut [F], logits: &'a [F], label: usize, smoothing: f64, scale: F) -> F {
        let largest = logits.iter().fold(logits[0], |largest, &logit| largest.larger(logit));
        for (gradient, &logit) in gradient.iter_mut().zip(logits) {
            *gradient = (logit - largest).exp_bounded();
        }
        let sum = sum_over(gradient, gradient, |p, _| p);
        let mut expected = (1.0 - smoothing) * (logits[label] - largest).to_f64();
        // Only then: an infinite logit costs nothing where the target has no share of it.
        if smoothing != 0.0 {
            expected += smoothing * sum_over(logits, logits, |x, _| x - largest).to_f64() / logits.len() as f64;
        }
        let loss = sum.to_f64().ln() - expected;
        let (factor, spread) = (scale / sum, scale * F::from_f64(smoothing / logits.len() as f64));
        for gradient in gradient.iter_mut() {
            *gradient = gradient.mul_add(factor, -spread);
        }
        gradient[label] += -(scale * F::from_f64(1.0 - smoothing));
        F::from_f64(loss)
    }
}
