//! Random words of the data pipeline: Philox4x32-10, addressed by what they are for and by nothing else.

use rand_philox::philox4x32_10;

/// What a draw is for. Streams never share a word; masks are stream 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Crops and flips.
    Augment = 2,
    /// The order of an epoch.
    Order = 3,
    /// Procedural scenes.
    Scene = 4,
}

/// Four words. Key: the seed's low and high words. Counter: (block, epoch, the sample's low word, the low 24 bits of its
/// high word with the stream in the top byte).
pub(crate) fn words(stream: Stream, seed: u64, epoch: u32, sample: u64, block: u32) -> [u32; 4] {
    let high = ((sample >> 32) as u32 & 0x00ff_ffff) | ((stream as u32) << 24);
    philox4x32_10([block, epoch, sample as u32, high], [seed as u32, (seed >> 32) as u32])
}

/// A word as a number in `[0, 1)`, exact in f64.
pub(crate) fn unit(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

/// A word as an integer in `0..bound`; `bound` is at least 1. The bias is below `bound / 2^32`.
pub(crate) fn below(word: u32, bound: u32) -> u32 {
    ((u64::from(word) * u64::from(bound)) >> 32) as u32
}

/// Draws one after the other from one sample's stream.
#[derive(Clone, Debug)]
pub(crate) struct Draws {
    stream: Stream,
    seed: u64,
    sample: u64,
    block: u32,
    buffer: [u32; 4],
    used: usize,
}

impl Draws {
    pub(crate) fn new(stream: Stream, seed: u64, sample: u64) -> Self {
        Self { stream, seed, sample, block: 0, buffer: [0; 4], used: 4 }
    }

    pub(crate) fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = words(self.stream, self.seed, 0, self.sample, self.block);
            self.block = self.block.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// Uniform in `[low, high)`.
    pub(crate) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * unit(self.word()) as f32
    }

    /// Uniform in `0..bound`.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        below(self.word(), bound)
    }

    /// True with the given probability.
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        unit(self.word()) < probability
    }
}
