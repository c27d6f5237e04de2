//! Random numbers of the data pipeline.

use crate::random::{RandomStream, SCENE_STREAM, philox4x32};

/// The four words of block `block` of a sample's stream in an epoch; see [`crate::random`].
pub(crate) fn words(stream: u8, seed: u64, epoch: u32, sample: u64, block: u32) -> [u32; 4] {
    let high = ((sample >> 32) as u32 & 0x00ff_ffff) | (u32::from(stream) << 24);
    philox4x32([block, epoch, sample as u32, high], [seed as u32, (seed >> 32) as u32])
}

/// A word as a number in `[0, 1)`, exact in f64.
pub(crate) fn unit(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

/// A word as an integer in `0..bound`; `bound` is at least 1. The bias is below `bound / 2^32`.
pub(crate) fn below(word: u32, bound: u32) -> u32 {
    ((u64::from(word) * u64::from(bound)) >> 32) as u32
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_of_the_stream() {
        let mut stream = RandomStream::new(0x1234_5678_9abc, 7, 0x0011_2233_4455_6677, 2);
        for block in 0..5 {
            let expected: Vec<u32> = stream.by_ref().take(4).collect();
            assert_eq!(words(2, 0x1234_5678_9abc, 7, 0x0011_2233_4455_6677, block), expected[..]);
        }
    }
}
