//! The random numbers of a scene.

use crate::random::{RandomStream, SCENE_STREAM, below};

/// The draws that make one scene.
#[derive(Clone, Debug)]
pub(crate) struct Draws(RandomStream);

impl Draws {
    pub(crate) fn new(seed: u64, sample: u64) -> Self {
        Self(RandomStream::new(seed, 0, sample, SCENE_STREAM))
    }

    pub(crate) fn word(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Uniform in `[low, high)`.
    pub(crate) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.0.next_f32()
    }

    /// Uniform in `0..bound`.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        below(self.word(), bound)
    }

    /// True with the given probability.
    pub(crate) fn chance(&mut self, probability: f32) -> bool {
        self.0.next_f32() < probability
    }
}
