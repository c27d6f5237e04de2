//! Running an op of the contract on any backend, and judging what it wrote against the CPU in f64.

use vitmae::ops::Memory;
use vitmae::ops::philox::RandomStream;

/// Elements behind what a shape needs, which no op may touch.
const GUARDS: usize = 19;
const GUARD: f64 = 768.0;

/// Odd multiples of 1/64 in (-1, 1): bf16 and f32 hold them exactly, also with a quarter added.
pub fn random(seed: u64, length: usize) -> Vec<f64> {
    let words = RandomStream::new(seed, 0, length as u64, 200);
    words.take(length).map(|word| (f64::from(word >> 26) + 0.5) / 32.0 - 1.0).collect()
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

/// A backend, and how many elements after an aligned address its buffers start.
pub struct Bench<'a, B> {
    pub backend: &'a B,
    pub shift: usize,
}

impl<B: Memory> Bench<'_, B> {
    fn buffer<T: vitmae::ops::Element>(&self, values: impl Iterator<Item = T>) -> B::Buffer<T> {
        let values: Vec<T> = values.collect();
        let whole = self.backend.buffer::<T>(self.shift + values.len()).expect("reserved");
        // SAFETY: `whole` is not used again.
        let mut part = unsafe { self.backend.alias(&whole, self.shift, values.len()) }.expect("inside");
        self.backend.upload(&mut part, &values).expect("uploaded");
        part
    }

    /// Activations, with guards behind them.
    pub fn elements(&self, values: &[f64]) -> B::Buffer<B::Element> {
        self.buffer(values.iter().chain(&[GUARD; GUARDS]).map(|&value| B::element(value)))
    }

    /// Vectors, statistics or parameter gradients, with guards behind them.
    pub fn masters(&self, values: &[f64]) -> B::Buffer<B::Master> {
        self.buffer(values.iter().chain(&[GUARD; GUARDS]).map(|&value| B::master(value)))
    }

    /// An output full of NaN.
    pub fn poisoned(&self, length: usize) -> B::Buffer<B::Element> {
        self.elements(&vec![f64::NAN; length])
    }

    /// Inputs of any other type.
    pub fn plain<T: vitmae::ops::Element>(&self, values: &[T]) -> B::Buffer<T> {
        self.buffer(values.iter().copied())
    }

    /// Indices.
    pub fn ids(&self, ids: &[u32]) -> B::Buffer<u32> {
        self.buffer(ids.iter().copied())
    }

    /// What an op wrote into activations.
    pub fn read(&self, buffer: &B::Buffer<B::Element>) -> Vec<f64> {
        let mut values = vec![B::element(0.0); self.backend.length(buffer)];
        self.backend.download(&mut values, buffer).expect("downloaded");
        without_guards(values.into_iter().map(B::element_f64).collect())
    }

    /// What an op wrote into masters.
    pub fn read_masters(&self, buffer: &B::Buffer<B::Master>) -> Vec<f64> {
        let mut values = vec![B::master(0.0); self.backend.length(buffer)];
        self.backend.download(&mut values, buffer).expect("downloaded");
        without_guards(values.into_iter().map(B::master_f64).collect())
    }
}

fn without_guards(mut values: Vec<f64>) -> Vec<f64> {
    let guards = values.split_off(values.len() - GUARDS);
    assert!(guards.iter().all(|&guard| guard == GUARD), "written behind the end");
    values
}

/// Asserts that `found` is no further from `expected` than `factor` times what rounding `expected` to an element costs, and
/// 1e-5 of the largest number for arithmetic in f32.
#[track_caller]
pub fn close<B: Memory>(what: &str, found: &[f64], expected: &[f64], factor: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let rounding = largest(&mut expected.iter().map(|&value| (B::element_f64(B::element(value)) - value).abs()));
    let allowed = factor * rounding + 1e-5 * largest(&mut expected.iter().map(|value| value.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        // Written so that a NaN fails.
        let within = (found - expected).abs() <= allowed;
        assert!(within, "{what}[{index}]: {found} instead of {expected}, more than {allowed} off");
    }
}

/// Asserts that `found` is `expected` but for arithmetic in f32.
#[track_caller]
pub fn close_masters(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let within = (found - expected).abs() <= 1e-5 * largest;
        assert!(within, "{what}[{index}]: {found} instead of {expected}");
    }
}
