//! AdamW: one pass over parameters, moments and gradients.

use crate::Result;
use crate::cpu::math::{sum_over, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{AdamW, AdamWSettings};

/// Parameters of a piece.
const PIECE: usize = 1 << 14;

impl<F: Float> AdamW for Cpu<F> {
    fn gradient_norm(&self, length: usize, gradient: &CpuBuffer<F>) -> Result<f64> {
        let gradient = check::input("gradient_norm", "gradient", gradient, &[length])?;
        scratch::with(length.div_ceil(PIECE), |sums: &mut [f64]| {
            let shared = Shared::new(&mut *sums);
            parallel::pieces(length, PIECE, |from, to| {
                let gradient = &gradient[from..to];
                let sum = sum_of_squares(gradient);
                // SAFETY: each piece has its own sum.
                unsafe { shared.part(from / PIECE, from / PIECE + 1) }.fill(sum);
            });
            sums.iter().sum::<f64>().sqrt()
        })
    }

    fn adamw_step(
        &self,
        settings: AdamWSettings,
        master: &mut CpuBuffer<F>,
        _working: &mut CpuBuffer<F>,
        first_moment: &mut CpuBuffer<F>,
        second_moment: &mut CpuBuffer<F>,
        gradient: &CpuBuffer<F>,
    ) -> Result<()> {
        // The working copy is an alias of the master weights, which are borrowed: it must not be touched.
        let op = "adamw_step";
        let length = settings.length;
        let master = Shared::new(check::output(op, "master", master, &[length])?);
        let first = Shared::new(check::output(op, "first_moment", first_moment, &[length])?);
        let second = Shared::new(check::output(op, "second_moment", second_moment, &[length])?);
        let gradient = check::input(op, "gradient", gradient, &[length])?;
        let factors = Factors::new(&settings);
        parallel::pieces(length, PIECE, |from, to| {
            // SAFETY: pieces are disjoint and inside `length`.
            let (master, first, second) =
                unsafe { (master.part(from, to), first.part(from, to), second.part(from, to)) };
            let decayed = settings.decayed.clamp(from, to) - from;
            decay(&factors, &mut master[..decayed]);
            update(&factors, master, first, second, &gradient[from..to]);
        });
        Ok(())
    }
}

/// What every parameter is updated with, computed in f64 as PyTorch does.
struct Factors<F> {
    gradient_scale: F,
    decay: F,
    first: F,
    second: F,
    second_rest: F,
    root_correction: F,
    epsilon: F,
    step_size: F,
}

impl<F: Float> Factors<F> {
    fn new(settings: &AdamWSettings) -> Self {
        let &AdamWSettings { learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_scale, .. } = settings;
        let step = step as f64;
        Self {
            gradient_scale: F::from_f64(gradient_scale),
            decay: F::from_f64(1.0 - learning_rate * weight_decay),
            first: F::from_f64(1.0 - beta1),
            second: F::from_f64(beta2),
            second_rest: F::from_f64(1.0 - beta2),
            root_correction: F::from_f64((1.0 - beta2.powf(step)).sqrt()),
            epsilon: F::from_f64(epsilon),
            step_size: F::from_f64(-learning_rate / (1.0 - beta1.powf(step))),
        }
    }
}

vectorized! {
    fn sum_of_squares<'a, F: Float>(gradient: &'a [F]) -> f64 {
        sum_over(gradient, gradient, |g, _| g.to_f64() * g.to_f64())
    }
}

vectorized! {
    fn decay<'a, F: Float>(factors: &'a Factors<F>, master: &'a mut [F]) {
        for master in master {
            *master *= factors.decay;
        }
    }
}

vectorized! {
    fn update<'a, F: Float>(factors: &'a Factors<F>, master: &'a mut [F], first: &'a mut [F], second: &'a mut [F], gradient: &'a [F]) {
        let parameters = master.iter_mut().zip(first).zip(second).zip(gradient);
        for (((master, first), second), &gradient) in parameters {
            let gradient = gradient * factors.gradient_scale;
            *first = factors.first.mul_add(gradient - *first, *first);
            *second = (factors.second_rest * gradient).mul_add(gradient, *second * factors.second);
            let denominator = second.sqrt() / factors.root_correction + factors.epsilon;
            *master = factors.step_size.mul_add(*first / denominator, *master);
        }
    }
}
