//! Small models and numbers that look random, for the tests of several binaries.

// A test binary uses some of this.
#![allow(dead_code)]

use vitmae::config::MaeConfig;
use vitmae::random::RandomStream;

/// A small model for images of `height x width` pixels in patches of 8 x 8. Encoder and decoder: width, width inside an MLP, layers
/// and heads.
pub fn config(image_size: (usize, usize), encoder: [usize; 4], decoder: [usize; 4]) -> MaeConfig {
    let mut config = MaeConfig::tiny();
    config.image_size = image_size.into();
    config.patch_size = (8, 8).into();
    [config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads] = encoder;
    config.decoder_hidden_size = decoder[0];
    config.decoder_intermediate_size = decoder[1];
    config.decoder_num_hidden_layers = decoder[2];
    config.decoder_num_attention_heads = decoder[3];
    config
}

/// Numbers in (-1, 1), never 0: odd multiples of `2^-bits`, to the nearest f32.
pub fn random(bits: u32, seed: u64, length: usize) -> Vec<f64> {
    let half = f64::from(1u32 << (bits - 1));
    let words = RandomStream::new(seed, 0, length as u64, 200);
    words.take(length).map(|word| f64::from(((f64::from(word >> (32 - bits)) + 0.5) / half - 1.0) as f32)).collect()
}

/// A shuffle of `0..length` for each of `batch` samples.
pub fn shuffles(seed: u64, batch: usize, length: usize) -> Vec<Vec<u32>> {
    let shuffle = |sample: usize| {
        let mut words = RandomStream::new(seed, 1, sample as u64, 201);
        let mut ids: Vec<u32> = (0..length as u32).collect();
        (1..length).rev().for_each(|last| ids.swap(last, words.next_u32() as usize % (last + 1)));
        ids
    };
    (0..batch).map(shuffle).collect()
}

/// The sum of products.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
