//! The reconstruction loss: target, error and gradient of a patch while it is in cache.

use crate::Result;
use crate::cpu::math::{sum_over, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::patchify::Pictures;
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{Loss, LossShape, Pixels};

/// Patches of a block.
const ROWS: usize = 8;
/// Added to the variance of a patch.
const EPSILON: f64 = 1e-6;

impl<F: Float> Loss for Cpu<F> {
    fn loss_forward_backward(
        &self,
        shape: LossShape,
        loss: &mut CpuBuffer<F>,
        patch_loss: &mut CpuBuffer<F>,
        dprediction: &mut CpuBuffer<F>,
        prediction: &CpuBuffer<F>,
        pixels: Pixels<'_, Self>,
        ids: &CpuBuffer<u32>,
        mask: &CpuBuffer<f32>,
    ) -> Result<()> {
        let op = "loss_forward_backward";
        let LossShape { image, batch, predicted, norm_pix_loss, scale } = shape;
        let pictures = Pictures::new(op, image, batch, pixels)?;
        let (length, patches) = (image.patch_length(), image.patches());
        let loss = check::output(op, "loss", loss, &[1])?;
        let patch_loss = check::output(op, "patch_loss", patch_loss, &[batch, predicted])?;
        let dprediction = Shared::new(check::output(op, "dprediction", dprediction, &[batch, predicted, length])?);
        let prediction = check::input(op, "prediction", prediction, &[batch, predicted, length])?;
        let ids = check::input(op, "ids", ids, &[batch, predicted])?;
        let mask = check::input(op, "mask", mask, &[batch, patches])?;
        check::ids(op, "ids", ids, patches)?;
        let blocks = (batch * predicted).div_ceil(ROWS);
        let factor = F::from_f64(2.0 * scale / length as f64);
        scratch::with(parallel::workers(blocks) * length, |targets: &mut [F]| {
            let targets = Shared::new(targets);
            let losses = Shared::new(&mut *patch_loss);
            parallel::blocks(blocks, |block, worker| {
                for row in block * ROWS..(batch * predicted).min((block + 1) * ROWS) {
                    // SAFETY: each row is one block's alone, and each worker has its own target.
                    let (target, gradient, loss) = unsafe {
                        (
                            targets.part(worker * length, (worker + 1) * length),
                            dprediction.part(row * length, (row + 1) * length),
                            losses.part(row, row + 1),
                        )
                    };
                    let (sample, patch) = (row / predicted, ids[row] as usize);
                    if mask[sample * patches + patch] == 0.0 {
                        gradient.fill(F::ZERO);
                        loss.fill(F::ZERO);
                        continue;
                    }
                    pictures.patch_by_pixel(sample, patch, target);
                    let prediction = &prediction[row * length..][..length];
                    if norm_pix_loss {
                        normalize(target);
                    }
                    loss.fill(compare(gradient, prediction, target, factor));
                }
            });
        })?;
        let sum: f64 = patch_loss.iter().map(|loss| loss.to_f64()).sum();
        loss[0] += F::from_f64(scale * sum);
        Ok(())
    }
}

vectorized! {
    /// To mean 0 and (unbiased) variance 1.
    fn normalize<'a, F: Float>(target: &'a mut [F]) {
        let count = target.len();
        let mean = sum_over(target, target, |t, _| t) / F::from_f64(count as f64);
        let squares = sum_over(target, target, |t, _| (t - mean) * (t - mean));
        let variance = squares / F::from_f64(count.saturating_sub(1).max(1) as f64);
        let factor = F::ONE / (variance + F::from_f64(EPSILON)).sqrt();
        for target in target {
            *target = (*target - mean) * factor;
        }
    }
}

vectorized! {
    /// Writes the gradient; the mean squared error.
    fn compare<'a, F: Float>(gradient: &'a mut [F], prediction: &'a [F], target: &'a [F], factor: F) -> F {
        for ((gradient, &prediction), &target) in gradient.iter_mut().zip(prediction).zip(target) {
            *gradient = (prediction - target) * factor;
        }
        let squares = sum_over(prediction, target, |p, t| (p - t) * (p - t));
        squares / F::from_f64(target.len() as f64)
    }
}
