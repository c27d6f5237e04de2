//! Learning rates: linear warm-up, then half a cosine, per step (Loshchilov and Hutter, arXiv 1608.03983).

use std::f64::consts::PI;

/// A learning rate for every step of a run.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// The highest learning rate, reached when the warm-up ends.
    pub peak: f64,
    /// What the cosine ends at.
    pub minimum: f64,
    /// Steps until the peak; need not be whole.
    pub warmup_steps: f64,
    /// Steps of the run.
    pub total_steps: u64,
}

impl Schedule {
    /// `peak = base * images / 256`, the linear scaling rule (Goyal et al., arXiv 1706.02677), with `images` per step.
    #[must_use]
    pub fn peak(base: f64, images: usize) -> f64 {
        base * images as f64 / 256.0
    }

    /// The learning rate of step `step`, from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let step = step as f64;
        if step < self.warmup_steps {
            return self.peak * step / self.warmup_steps;
        }
        let rest = (self.total_steps as f64 - self.warmup_steps).max(1.0);
        let progress = ((step - self.warmup_steps) / rest).min(1.0);
        self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_in_a_line_and_falls_as_a_cosine() {
        let schedule = Schedule { peak: 2.0, minimum: 0.0, warmup_steps: 10.0, total_steps: 30 };
        assert_eq!(schedule.at(0), 0.0);
        assert_eq!(schedule.at(5), 1.0);
        assert_eq!(schedule.at(10), 2.0);
        assert!((schedule.at(20) - 1.0).abs() < 1e-12);
        assert!(schedule.at(30).abs() < 1e-12);
        assert!(schedule.at(31).abs() < 1e-12);
    }

    #[test]
    fn a_run_that_is_all_warm_up_never_divides_by_zero() {
        let schedule = Schedule { peak: 1.0, minimum: 0.0, warmup_steps: 4.0, total_steps: 4 };
        assert!((0..6).all(|step| schedule.at(step).is_finite()));
        let none = Schedule { peak: 1.0, minimum: 0.5, warmup_steps: 0.0, total_steps: 0 };
        assert!(none.at(0).is_finite());
    }
}
