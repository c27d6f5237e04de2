//! What the tests of all ops share.

use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};
use vitmae::cpu::{Cpu, CpuBuffer, Float};
use vitmae::ops::{Element, Memory};
use vitmae::random::RandomStream;

pub use crate::common::dot;

/// Elements after what a shape needs, which no op may touch.
const GUARDS: usize = 37;

/// Numbers in (-1, 1), never 0, with every bit of an f32.
pub fn random(seed: u64, length: usize) -> Vec<f64> {
    crate::common::random(32, seed, length)
}

/// A shuffle of `0..length` for each of `batch` samples, one after the other.
pub fn shuffles(seed: u64, batch: usize, length: usize) -> Vec<u32> {
    crate::common::shuffles(seed, batch, length).concat()
}

/// An input, or an output with content.
pub fn buffer<F: Float>(values: &[f64]) -> CpuBuffer<F> {
    let mut buffer = Cpu::<F>::new().buffer(values.len() + GUARDS).unwrap();
    buffer.fill(F::from_f64(777.0));
    for (to, &from) in buffer.iter_mut().zip(values) {
        *to = F::from_f64(from);
    }
    buffer
}

/// An output full of NaN.
pub fn poisoned<F: Float>(length: usize) -> CpuBuffer<F> {
    buffer(&vec![f64::NAN; length])
}

/// A buffer of other types than `F`, with guards of `guard`.
pub fn plain<T: Element>(values: &[T], guard: T) -> CpuBuffer<T> {
    let mut buffer = Cpu::<f32>::new().buffer(values.len() + GUARDS).unwrap();
    buffer.fill(guard);
    buffer[..values.len()].copy_from_slice(values);
    buffer
}

/// What an op wrote: everything, and nothing else.
pub fn read<F: Float>(buffer: &CpuBuffer<F>) -> Vec<f64> {
    let length = buffer.len() - GUARDS;
    assert!(buffer[length..].iter().all(|guard| guard.to_f64() == 777.0), "written after the end");
    let values: Vec<f64> = buffer[..length].iter().map(|value| value.to_f64()).collect();
    assert!(values.iter().all(|value| !value.is_nan()), "not everything was written");
    values
}

/// What an op wrote into a buffer of [`plain`].
pub fn read_plain<T: Element + PartialEq>(buffer: &CpuBuffer<T>, guard: T) -> Vec<T> {
    let length = buffer.len() - GUARDS;
    assert!(buffer[length..].iter().all(|value| *value == guard), "written after the end");
    buffer[..length].to_vec()
}

/// Asserts that `found` is within `tolerance * (1 + |expected|)` of `expected`.
#[track_caller]
pub fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= tolerance * (1.0 + expected.abs()), "{what}[{index}]: {found} instead of {expected}");
    }
}

/// A tolerance for sums of about `terms` products of numbers around 1.
pub fn tolerance<F: Float>(terms: usize) -> f64 {
    let unit = if size_of::<F>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON };
    unit * (8.0 + 4.0 * (terms as f64).sqrt() + 0.25 * terms as f64)
}

/// Holds `gradient` against central differences of `function` at `x`, at up to 24 places.
#[track_caller]
pub fn check_gradient(what: &str, x: &[f64], gradient: &[f64], mut function: impl FnMut(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(x.len(), gradient.len(), "{what}");
    let mut x = x.to_vec();
    let mut words = RandomStream::new(9, 9, x.len() as u64, 202);
    let places: Vec<usize> = match x.len() {
        length @ 0..=24 => (0..length).collect(),
        length => (0..24).map(|_| words.next_u32() as usize % length).collect(),
    };
    for place in places {
        let middle = x[place];
        x[place] = middle + STEP;
        let above = function(&x);
        x[place] = middle - STEP;
        let below = function(&x);
        x[place] = middle;
        let difference = (above - below) / (2.0 * STEP);
        let error = (difference - gradient[place]).abs();
        assert!(error < 2e-7 * (1.0 + difference.abs()), "{what}[{place}]: {} but {difference}", gradient[place]);
    }
}

/// Runs `work` with 1, 2, 3 and again 2 threads, asserts that all give the same bits, and returns them.
#[track_caller]
pub fn same_on_any_threads<R: PartialEq + Send>(work: impl Fn() -> R + Sync) -> R {
    static POOLS: OnceLock<Vec<ThreadPool>> = OnceLock::new();
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let pools = POOLS.get_or_init(|| vec![pool(1), pool(2), pool(3)]);
    let first = pools[0].install(&work);
    for index in [1, 2, 1] {
        assert!(pools[index].install(&work) == first, "other results on {} threads", index + 1);
    }
    first
}
