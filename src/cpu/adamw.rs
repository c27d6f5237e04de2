//! AdamW: one pass over parameters, moments and gradients.

use crate::Result;
use crate::cpu::math::{sum_over, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{AdamW, AdamWSettings, AdamWState, power};

/// Parameters of a piece.
const PIECE: usize = 1 << 14;

impl<F: Float> AdamW for Cpu<F> {
    fn gradient_norm(&self, length: usize, norm: &mut CpuBuffer<F>, gradient: &CpuBuffer<F>) -> Result<()> {
        let norm = check::output("gradient_norm", "norm", norm, &[1])?;
        let gradient = check::input("gradient_norm", "gradient", gradient, &[length])?;
        scratch::with(length.div_ceil(PIECE), |sums: &mut [f64]| {
            let shared = Shared::new(&mut *sums);
            parallel::pieces(length, PIECE, |from, to| {
                let gradient = &gradient[from..to];
                let sum = sum_of_squares(gradient);
                // SAFETY: each piece has its own sum.
                unsafe { shared.part(from / PIECE, from / PIECE + 1) }.fill(sum);
            });
            norm[0] = F::from_f64(sums.iter().sum::<f64>().sqrt());
        })
    }

    fn adamw_step(
        &self,
        settings: AdamWSettings,
        state: &mut CpuBuffer<AdamWState>,
        master: &mut CpuBuffer<F>,
        _working: &mut CpuBuffer<F>,
        first_moment: &mut CpuBuffer<F>,
        second_moment: &mut CpuBuffer<F>,
        gradient: &CpuBuffer<F>,
        norm: &CpuBuffer<F>,
        loss: Option<&CpuBuffer<F>>,
        learning_rate: &CpuBuffer<f64>,
    ) -> Result<()> {
        // The working copy is an alias of the master weights, which are borrowed: it must not be touched.
        let op = "adamw_step";
        let length = settings.length;
        let state = &mut check::output(op, "state", state, &[1])?[0];
        let master = Shared::new(check::output(op, "master", master, &[length])?);
        let first = Shared::new(check::output(op, "first_moment", first_moment, &[length])?);
        let second = Shared::new(check::output(op, "second_moment", second_moment, &[length])?);
        let gradient = check::input(op, "gradient", gradient, &[length])?;
        let norm = check::input(op, "norm", norm, &[1])?[0].to_f64();
        let loss = match loss {
            Some(loss) => check::input(op, "loss", loss, &[1])?[0].to_f64(),
            None => 0.0,
        };
        let learning_rate = check::input(op, "learning_rate", learning_rate, &[1])?[0];
        state.gradient_norm = norm;
        state.loss = loss;
        if !(norm.is_finite() && loss.is_finite()) {
            state.skipped += 1;
            state.skipped_in_a_row += 1;
            return Ok(());
        }
        state.updates += 1;
        state.skipped_in_a_row = 0;
        let factors = Factors::new(&settings, learning_rate, norm, state.updates);
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

    fn weights_average(
        &self,
        length: usize,
        decay: f64,
        average: &mut CpuBuffer<F>,
        master: &CpuBuffer<F>,
    ) -> Result<()> {
        let average = Shared::new(check::output("weights_average", "average", average, &[length])?);
        let master = check::input("weights_average", "master", master, &[length])?;
        let share = F::from_f64(1.0 - decay);
        parallel::pieces(length, PIECE, |from, to| {
            // SAFETY: pieces are disjoint and inside `length`.
            let average = unsafe { average.part(from, to) };
            approach(share, average, &master[from..to]);
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
    /// Of update number `updates`, from 1.
    fn new(settings: &AdamWSettings, learning_rate: f64, norm: f64, updates: u64) -> Self {
        let &AdamWSettings { beta1, beta2, epsilon, weight_decay, clip_norm, .. } = settings;
        let gradient_scale = match clip_norm {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        Self {
            gradient_scale: F::from_f64(gradient_scale),
            decay: F::from_f64(1.0 - learning_rate * weight_decay),
            first: F::from_f64(1.0 - beta1),
            second: F::from_f64(beta2),
            second_rest: F::from_f64(1.0 - beta2),
            root_correction: F::from_f64((1.0 - power(beta2, updates)).sqrt()),
            epsilon: F::from_f64(epsilon),
            step_size: F::from_f64(-learning_rate / (1.0 - power(beta1, updates))),
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
    fn approach<'a, F: Float>(share: F, average: &'a mut [F], master: &'a [F]) {
        for (average, &master) in average.iter_mut().zip(master) {
            *average = share.mul_add(master - *average, *average);
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
