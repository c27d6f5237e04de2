//! Running an op of the contract on any backend, and judging what it wrote against the CPU in f64.

use vitmae::ops::{Memory, Real};

pub use super::common::shuffles;

/// Elements after what a shape needs, which no op may touch.
const GUARDS: usize = 19;
const GUARD: f64 = 768.0;

/// Odd multiples of 1/64 in (-1, 1): bf16 and f32 hold them exactly, also with a quarter added.
pub fn random(seed: u64, length: usize) -> Vec<f64> {
    super::common::random(6, seed, length)
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

    /// Activations, with guards after them.
    pub fn elements(&self, values: &[f64]) -> B::Buffer<B::Element> {
        self.buffer(values.iter().chain(&[GUARD; GUARDS]).map(|&value| B::Element::from_f64(value)))
    }

    /// Vectors, statistics or parameter gradients, with guards after them.
    pub fn masters(&self, values: &[f64]) -> B::Buffer<B::Master> {
        self.buffer(values.iter().chain(&[GUARD; GUARDS]).map(|&value| B::Master::from_f64(value)))
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
        let mut values = vec![B::Element::from_f64(0.0); self.backend.length(buffer)];
        self.backend.download(&mut values, buffer).expect("downloaded");
        without_guards(values.into_iter().map(B::Element::to_f64).collect())
    }

    /// What an op wrote into masters.
    pub fn read_masters(&self, buffer: &B::Buffer<B::Master>) -> Vec<f64> {
        let mut values = vec![B::Master::from_f64(0.0); self.backend.length(buffer)];
        self.backend.download(&mut values, buffer).expect("downloaded");
        without_guards(values.into_iter().map(B::Master::to_f64).collect())
    }
}

fn without_guards(mut values: Vec<f64>) -> Vec<f64> {
    let guards = values.split_off(values.len() - GUARDS);
    assert!(guards.iter().all(|&guard| guard == GUARD), "written after the end");
    values
}

/// What arithmetic in f32 may cost, as a share of the largest number: sums of up to a few thousand numbers. The most that was seen
/// on the emulator is 5.2e-7, of a patch's loss.
pub const ARITHMETIC: f64 = 2e-6;

/// Asserts that `found` is as near to `exact` as a `naive` computation in the same precision, but for a `factor` and `slack`.
/// Each number is held to the naive computation's largest error, and all of them to its Euclidean norm, so that small numbers count
/// beside large ones. `slack` is a share of the largest number, and of the norm; numbers are taken to be at least as large as
/// `size`.
#[track_caller]
pub fn as_close_as_naive(what: &str, [found, naive, exact]: [&[f64]; 3], factor: f64, slack: f64, size: f64) {
    assert_eq!((found.len(), naive.len()), (exact.len(), exact.len()), "{what}");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |most: f64, value| most.max(value.abs()));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let errors =
        |values: &[f64]| -> Vec<f64> { values.iter().zip(exact).map(|(value, exact)| value - exact).collect() };
    let (found_errors, naive_errors) = (errors(found), errors(naive));
    let scale = largest(&mut exact.iter().copied()).max(size);
    let allowed = factor * largest(&mut naive_errors.iter().copied()) + slack * scale;
    for (index, error) in found_errors.iter().enumerate() {
        // Written so that a NaN fails; so below.
        let within = error.abs() <= allowed;
        assert!(within, "{what}[{index}]: {} instead of {}, more than {allowed} off", found[index], exact[index]);
    }
    let scale = norm(&mut exact.iter().copied()).max(size * (exact.len() as f64).sqrt());
    let allowed = factor * norm(&mut naive_errors.iter().copied()) + slack * scale;
    let error = norm(&mut found_errors.iter().copied());
    assert!(error <= allowed, "{what}: the error's norm is {error}, more than {allowed}");
}

/// Asserts that `found` is `expected` but for `factor` times what rounding to an element costs, and arithmetic in f32: the naive
/// computation of an op that computes in f32 and rounds once.
#[track_caller]
pub fn close<B: Memory>(what: &str, found: &[f64], expected: &[f64], factor: f64) {
    let naive: Vec<f64> = expected.iter().map(|&value| B::Element::from_f64(value).to_f64()).collect();
    as_close_as_naive(what, [found, &naive, expected], factor, ARITHMETIC, 0.0);
}

/// Asserts that `found` is `expected` but for arithmetic in f32.
#[track_caller]
pub fn close_masters(what: &str, found: &[f64], expected: &[f64]) {
    as_close_as_naive(what, [found, expected, expected], 1.0, ARITHMETIC, 0.0);
}
