//! Whether the loader keeps up with the device.

use std::time::{Duration, Instant};

/// A share of the time spent waiting for pictures that is worth a line in the log.
const SHARE: f64 = 0.1;
/// Steps that are looked at together; the first ones of a run fill the queue.
const STEPS: u32 = 20;
/// How long a warning stands before it is repeated.
const QUIET: Duration = Duration::from_secs(300);

/// Sums up steps, and says when they waited for pictures for too much of their time.
#[derive(Debug, Default)]
pub(super) struct Starvation {
    steps: u32,
    waited: f64,
    seconds: f64,
    told: Option<Instant>,
}

impl Starvation {
    /// Takes down a step of so many seconds, of which so many were spent waiting. Gives the share that the last steps waited,
    /// where that is worth saying.
    pub fn see(&mut self, waited: f64, seconds: f64, now: Instant) -> Option<f64> {
        self.steps += 1;
        self.waited += waited;
        self.seconds += seconds;
        if self.steps < STEPS {
            return None;
        }
        let share = if self.seconds > 0.0 { self.waited / self.seconds } else { 0.0 };
        *self = Self { told: self.told, ..Self::default() };
        let lately = self.told.is_some_and(|told| now.saturating_duration_since(told) < QUIET);
        if share < SHARE || lately {
            return None;
        }
        self.told = Some(now);
        Some(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps of this many windows, each with what it waited of a second.
    fn told(windows: &[f64], apart: Duration) -> Vec<Option<u32>> {
        let (mut starvation, mut now) = (Starvation::default(), Instant::now());
        let mut told = Vec::new();
        for &waited in windows {
            let shares: Vec<_> = (0..STEPS).filter_map(|_| starvation.see(waited, 1.0, now)).collect();
            assert!(shares.len() <= 1);
            told.push(shares.first().map(|share| (share * 100.0).round() as u32));
            now += apart;
        }
        told
    }

    #[test]
    fn a_starving_device_is_told_of_now_and_then() {
        assert_eq!(told(&[0.0, 0.09, 0.0], QUIET), [None, None, None]);
        assert_eq!(told(&[0.0, 0.5, 0.25], QUIET), [None, Some(50), Some(25)]);
        assert_eq!(told(&[0.5, 0.5, 0.5], QUIET / 2), [Some(50), None, Some(50)]);
    }

    #[test]
    fn steps_that_took_no_time_did_not_wait() {
        let mut starvation = Starvation::default();
        assert!((0..2 * STEPS).all(|_| starvation.see(0.0, 0.0, Instant::now()).is_none()));
    }
}
