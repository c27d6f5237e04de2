//! Philox4x32-10 (Salmon et al. 2011): random words that depend on nothing but what they are for.
//!
//! Key: the seed's low and high words. Counter: (block, epoch, the sample's low word, the low 24 bits of its high word with
//! the stream in the top byte). The CUDA kernels draw the same words.

use std::convert::Infallible;

use rand::TryRng;
use rand_philox::philox4x32_10;

/// The noise that shuffles patches.
pub const MASKING_STREAM: u8 = 1;
/// Crops, flips and other augmentation of pictures.
pub const AUGMENTATION_STREAM: u8 = 2;
/// The weights of a fresh model; the sample is the parameter's number.
pub const INITIALIZATION_STREAM: u8 = 3;
/// The order of the samples of an epoch.
pub const ORDER_STREAM: u8 = 4;
/// Procedural pictures; the seed is that of the set.
pub const SCENE_STREAM: u8 = 5;

/// The block function: four words for a counter and a key.
#[must_use]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox4x32_10(counter, key)
}

/// A word as a number in `[0, 1)`, exact in f64.
pub(crate) fn unit(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

/// A word as an integer in `0..bound`; `bound` is at least 1. The bias is below `bound / 2^32`.
pub(crate) fn below(word: u32, bound: u32) -> u32 {
    ((u64::from(word) * u64::from(bound)) >> 32) as u32
}

/// The words of one sample in one epoch and stream, one after the other; they never end.
///
/// It is a [`rand::Rng`], so shuffles and distributions of rand and its relatives draw from it.
#[derive(Clone, Debug)]
pub struct RandomStream {
    key: [u32; 2],
    counter: [u32; 4],
    words: [u32; 4],
    used: usize,
}

impl RandomStream {
    /// The stream `stream` of `sample` (of which 56 bits count) in `epoch`, from its start.
    #[must_use]
    pub fn new(seed: u64, epoch: u32, sample: u64, stream: u8) -> Self {
        let high = (sample >> 32) as u32 & 0x00ff_ffff | u32::from(stream) << 24;
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, epoch, sample as u32, high],
            words: [0; 4],
            used: 4,
        }
    }

    /// The four words of block `number`, whatever has been drawn.
    pub(crate) fn block(&self, number: u32) -> [u32; 4] {
        let [_, epoch, low, high] = self.counter;
        philox4x32([number, epoch, low, high], self.key)
    }

    /// The next word.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = self.block(self.counter[0]);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        let word = self.words[self.used];
        self.used += 1;
        word
    }

    /// The 24 high bits of the next word as a number in `[0, 1)`, exact in f32.
    #[inline]
    pub fn next_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }
}

impl TryRng for RandomStream {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.next_u32())
    }

    /// The first word is the low half.
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let low = u64::from(self.next_u32());
        Ok(u64::from(self.next_u32()) << 32 | low)
    }

    /// Words in little-endian order; what is left of the last one is dropped.
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for bytes in bytes.chunks_mut(4) {
            let word = self.next_u32().to_le_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
        }
        Ok(())
    }
}

impl Iterator for RandomStream {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        Some(self.next_u32())
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn all_ways_to_draw_take_the_same_words() {
        let stream = || RandomStream::new(7, 1, 2, ORDER_STREAM);
        let words: Vec<u32> = stream().take(5).collect();
        assert_eq!(Rng::next_u64(&mut stream()), u64::from(words[1]) << 32 | u64::from(words[0]));
        let mut bytes = [0; 18];
        Rng::fill_bytes(&mut stream(), &mut bytes);
        let expected: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take(18).collect();
        assert_eq!(bytes[..], expected);
        assert_eq!(stream().block(0), words[..4]);
        assert_eq!(stream().block(1)[0], words[4]);
    }
}
