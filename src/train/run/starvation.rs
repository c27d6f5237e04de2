//! Whether the loader keeps up with the device.

use std::time::{Duration, Instant};

/// A share of the time spent waiting for pictures that is worth a line in the log.
const SHARE: f64 = 0.1;
/// Steps that are looked at together, at least: one that waits for a slow file is no rule.
const STEPS: u64 = 20;
/// Seconds that they take together, at least. What a shorter run loses, or one whose steps take no time, nobody misses; and the
/// first steps, which wait for the first pictures, do not weigh.
const SECONDS: f64 = 30.0;
/// How long a warning stands before it is repeated.
const QUIET: Duration = Duration::from_secs(300);

/// Sums up steps, and says when they waited for pictures for too much of their time.
#[derive(Debug, Default)]
pub(in crate::train) struct Starvation {
    steps: u64,
    waited: f64,
    seconds: f64,
    told: Option<Instant>,
}

/// Steps that waited too long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::train) struct Starved {
    pub steps: u64,
    /// What they took.
    pub seconds: f64,
    /// What they waited of it.
    pub waited: f64,
}

impl Starvation {
    /// Takes down a step of so many seconds, of which so many were spent waiting. Gives the last steps together where they waited
    /// so long that it is worth saying.
    pub fn see(&mut self, waited: f64, seconds: f64, now: Instant) -> Option<Starved> {
        self.steps += 1;
        self.waited += waited;
        self.seconds += seconds;
        if self.steps < STEPS || self.seconds < SECONDS {
            return None;
        }
        let Self { steps, waited, seconds, told } = *self;
        *self = Self { told, ..Self::default() };
        let lately = told.is_some_and(|told| now.saturating_duration_since(told) < QUIET);
        if waited < SHARE * seconds || lately {
            return None;
        }
        self.told = Some(now);
        Some(Starved { steps, seconds, waited })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of steps of `seconds` each, the waited share of which is given for each window of so many steps; windows lie
    /// `apart`.
    fn told(shares: &[f64], steps: u64, seconds: f64, apart: Duration) -> Vec<Option<Starved>> {
        let (mut starvation, mut now) = (Starvation::default(), Instant::now());
        let mut told = Vec::new();
        for &share in shares {
            let said: Vec<_> = (0..steps).filter_map(|_| starvation.see(share * seconds, seconds, now)).collect();
            assert!(said.len() <= 1);
            told.push(said.first().copied());
            now += apart;
        }
        told
    }

    fn percent(told: &[Option<Starved>]) -> Vec<Option<f64>> {
        told.iter().map(|told| told.map(|told| (100.0 * told.waited / told.seconds).round())).collect()
    }

    #[test]
    fn a_starving_device_is_told_of_now_and_then() {
        let of = |shares: &[f64], apart| percent(&told(shares, 20, 2.0, apart));
        assert_eq!(of(&[0.0, 0.09, 0.0], QUIET), [None, None, None]);
        assert_eq!(of(&[0.0, 0.5, 0.25], QUIET), [None, Some(50.0), Some(25.0)]);
        assert_eq!(of(&[0.5, 0.5, 0.5], QUIET / 2), [Some(50.0), None, Some(50.0)]);
    }

    /// A tiny model on generated scenes: steps of ten milliseconds that wait for half of them.
    #[test]
    fn a_short_run_is_not_told() {
        assert_eq!(told(&[0.5], 2000, 0.01, QUIET), [None]);
        // Half a minute of the same is worth a line, with what it is about.
        let line = told(&[0.5], 3001, 0.01, QUIET)[0].expect("a line");
        assert!((3000..=3001).contains(&line.steps), "{line:?}");
        assert!((line.seconds - 30.0).abs() < 0.02 && (line.waited - 15.0).abs() < 0.01, "{line:?}");
        // Nor does one step that waits long make a rule.
        assert_eq!(told(&[1.0], 19, 60.0, QUIET), [None]);
    }

    #[test]
    fn steps_that_took_no_time_did_not_wait() {
        let mut starvation = Starvation::default();
        assert!((0..1000).all(|_| starvation.see(0.0, 0.0, Instant::now()).is_none()));
    }
}
