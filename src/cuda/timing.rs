//! Time on a device: marks in a stream's work, and how long it took from one to the next.

use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;

use super::error::{CudaError, Result};
use super::gpu::call;
use super::launch::Stream;

/// A moment in the work of a stream.
#[derive(Debug)]
pub struct Mark(Moment);

#[derive(Debug)]
enum Moment {
    /// The host's clock, read when the work before was done.
    Host(Instant),
    /// A CUDA event among the work.
    Event(CudaEvent),
}

impl Mark {
    /// The host's clock now. The work before must be done.
    #[must_use]
    pub fn now() -> Self {
        Self(Moment::Host(Instant::now()))
    }

    /// An event that was recorded with timing.
    pub(super) fn event(event: CudaEvent) -> Self {
        Self(Moment::Event(event))
    }

    /// The time from an earlier mark of the same stream to this one. Waits until this one is reached.
    ///
    /// # Errors
    /// A failed driver call, which may be that of earlier work; marks of different devices.
    pub fn since(&self, earlier: &Self) -> Result<Duration> {
        match (&earlier.0, &self.0) {
            (Moment::Host(start), Moment::Host(end)) => Ok(end.saturating_duration_since(*start)),
            (Moment::Event(start), Moment::Event(end)) => {
                let milliseconds = start.elapsed_ms(end).map_err(|error| call("reading the time of events", error))?;
                Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
            }
            _ => Err(CudaError::WrongDevice { op: "time between two marks", argument: 0 }),
        }
    }
}

impl Stream {
    /// Marks this moment in the work that was given so far: on a GPU with an event, which costs next to nothing.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn mark(&self) -> Result<Mark> {
        self.driver().mark()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_between_marks() {
        let start = Mark::now();
        std::thread::sleep(Duration::from_millis(2));
        let end = Mark::now();
        assert!(end.since(&start).expect("host times") >= Duration::from_millis(2));
        assert_eq!(start.since(&end).expect("host times"), Duration::ZERO);
    }
}
