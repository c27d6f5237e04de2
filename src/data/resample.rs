//! Pillow's resampling of bytes: the same filters, the same fixed-point arithmetic, the same bytes.
//!
//! Rows are filtered first and rounded to bytes, then columns. A result is the sum of `byte * weight` over the pixels that
//! the filter covers, which grows with the scale when a picture shrinks (antialiasing); weights are computed in f64,
//! normalised to a sum of 1, and rounded to 22 fractional bits.

use std::f64::consts::PI;

use crate::data::image::{CropBox, Resample};
use crate::isa::{Isa, dispatch};

/// Fractional bits of a weight: with a byte, a sign and a bit of overshoot they make 32.
const BITS: u32 = 22;
const HALF: i32 = 1 << (BITS - 1);
/// Rows that are filtered together.
const ROWS: usize = 8;
/// Bytes of a row that are filtered together in the second pass.
const COLUMNS: usize = 32;

/// The weights of one direction: `to` times `taps`.
#[derive(Clone, Debug, Default)]
struct Table {
    taps: usize,
    /// The first source pixel of each result.
    first: Vec<usize>,
    weights: Vec<i32>,
    /// Of one result, before they are rounded.
    exact: Vec<f64>,
}

impl Table {
    /// `mirrored` turns the results around.
    fn fill(&mut self, from: usize, to: usize, resample: Resample, mirrored: bool) {
        let (support, filter) = kernel(resample);
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = support * stretch;
        // Truncated towards zero as a cast does, which also takes what is below it.
        let covered = |center: f64| {
            let low = (center - support + 0.5) as usize;
            (low, ((center + support + 0.5) as usize).clamp(low + 1, from.max(low + 1)))
        };
        let center = |place: usize| (place as f64 + 0.5) * scale;
        let counts = (0..to).map(|place| covered(center(place))).map(|(low, high)| high - low);
        self.taps = counts.max().unwrap_or(1).min(from);
        self.first.clear();
        self.first.resize(to, 0);
        self.weights.clear();
        self.weights.resize(to * self.taps, 0);
        for place in 0..to {
            let center = center(place);
            let (low, high) = covered(center);
            self.exact.clear();
            self.exact.extend((low..high).map(|x| filter((x as f64 - center + 0.5) * (1.0 / stretch))));
            let sum: f64 = self.exact.iter().sum();
            let sum = if sum == 0.0 { 1.0 } else { sum };
            // All results read `taps` pixels: at the far end the first ones count nothing.
            let first = low.min(from - self.taps);
            let at = if mirrored { to - 1 - place } else { place };
            self.first[at] = first;
            let weights = self.weights[at * self.taps..][..self.taps].iter_mut().skip(low - first);
            for (weight, exact) in weights.zip(&self.exact) {
                let scaled = exact / sum * f64::from(1_u32 << BITS);
                *weight = (scaled + 0.5_f64.copysign(scaled)) as i32;
            }
        }
    }

    /// First pixel and weights of each result.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.first.iter().copied().zip(self.weights.chunks_exact(self.taps.max(1)))
    }
}

/// Half the width of a filter at scale 1, and its values.
fn kernel(resample: Resample) -> (f64, fn(f64) -> f64) {
    fn sinc(x: f64) -> f64 {
        if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
    }
    match resample {
        Resample::Nearest | Resample::Box => (0.5, |x| if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }),
        Resample::Bilinear => (1.0, |x| (1.0 - x.abs()).max(0.0)),
        Resample::Hamming => (1.0, |x| {
            let x = x.abs();
            if x < 1.0 { sinc(x) * (0.54 + 0.46 * (x * PI).cos()) } else { 0.0 }
        }),
        Resample::Bicubic => (2.0, |x| {
            let x = x.abs();
            if x < 1.0 {
                (1.5 * x - 2.5) * x * x + 1.0
            } else if x < 2.0 {
                (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            } else {
                0.0
            }
        }),
        Resample::Lanczos => (3.0, |x| if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }),
    }
}

/// A box of interleaved pixels in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pixels<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
    height: usize,
    width: usize,
}

impl<'a> Pixels<'a> {
    /// What `crop`, which must lie inside, shows of a picture of rows of `width` pixels of `channels`.
    pub(crate) fn new(bytes: &'a [u8], width: usize, channels: usize, crop: CropBox) -> Self {
        let start = (crop.top * width + crop.left) * channels;
        Self { bytes: &bytes[start..], stride: width * channels, height: crop.height, width: crop.width }
    }

    /// As they are.
    pub(crate) fn copy_to(self, out: &mut [u8], channels: usize) {
        let length = self.width * channels;
        for (to, from) in out.chunks_exact_mut(length).zip(self.bytes.chunks(self.stride)) {
            to.copy_from_slice(&from[..length]);
        }
    }
}

/// Tables and the picture between the two passes, kept from one picture to the next.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resampler {
    rows: Table,
    columns: Table,
    interleaved: Vec<[u8; 4 * ROWS]>,
    results: Vec<[u8; 4 * ROWS]>,
    between: Vec<u8>,
}

impl Resampler {
    /// Resizes to `out` `[height, width, C]`, mirrored if asked for. Sizes are at least 1.
    pub(crate) fn resize<const C: usize>(
        &mut self,
        out: &mut [u8],
        (height, width): (usize, usize),
        source: Pixels<'_>,
        resample: Resample,
        mirrored: bool,
    ) {
        if resample == Resample::Nearest {
            return nearest::<C>(out, (height, width), source, mirrored);
        }
        let (narrow, low) = (source.width != width, source.height != height);
        let between = if narrow || mirrored {
            self.rows.fill(source.width, width, if narrow { resample } else { Resample::Box }, mirrored);
            // Pixels are written four bytes at a time, rows eight at a time.
            let stride = width * C + 4 - C;
            self.between.resize(stride * source.height.next_multiple_of(ROWS), 0);
            let Self { rows, interleaved, results, between, .. } = self;
            interleaved.resize(source.width, [0; 4 * ROWS]);
            results.resize(width, [0; 4 * ROWS]);
            let pass = RowPass::<C> { out: between, stride, source, table: rows, interleaved, results };
            dispatch(pass, Isa::used());
            Pixels { bytes: &self.between, stride, height: source.height, width }
        } else {
            source
        };
        if low {
            self.columns.fill(source.height, height, resample, false);
            let pass = ColumnPass { out, length: width * C, source: between, table: &self.columns };
            dispatch(pass, Isa::used());
        } else {
            between.copy_to(out, C);
        }
    }
}

fn nearest<const C: usize>(out: &mut [u8], (height, width): (usize, usize), source: Pixels<'_>, mirrored: bool) {
    let middle = |place: usize, from: usize, to: usize| (2 * place + 1) * from / (2 * to);
    for (y, to) in out.chunks_exact_mut(width * C).enumerate() {
        let row = &source.bytes[middle(y, source.height, height) * source.stride..];
        for (x, pixel) in to.as_chunks_mut::<C>().0.iter_mut().enumerate() {
            let x = if mirrored { width - 1 - x } else { x };
            pixel.copy_from_slice(&row[middle(x, source.width, width) * C..][..C]);
        }
    }
}

/// The sum in whole levels.
#[inline(always)]
fn level(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// The same of many. (A closure given to `map` would be compiled for narrow vectors.)
#[inline(always)]
fn levels<const N: usize>(sums: &[i32; N]) -> [u8; N] {
    let mut levels = [0; N];
    for (to, sum) in levels.iter_mut().zip(sums) {
        *to = level(*sum);
    }
    levels
}

/// Filters rows. Eight of them are first laid side by side, a pixel of each in four bytes, so that a weight meets 32
/// bytes that follow each other.
struct RowPass<'a, const C: usize> {
    out: &'a mut [u8],
    stride: usize,
    source: Pixels<'a>,
    table: &'a Table,
    interleaved: &'a mut [[u8; 4 * ROWS]],
    results: &'a mut [[u8; 4 * ROWS]],
}

impl<const C: usize> pulp::WithSimd for RowPass<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { out, stride, source, table, interleaved, results } = self;
        for (group, out) in out.chunks_exact_mut(stride * ROWS).enumerate() {
            // Where there are fewer than eight rows left, the last one is repeated.
            let mut rows = [&source.bytes[..0]; ROWS];
            for (row, bytes) in rows.iter_mut().enumerate() {
                let y = (group * ROWS + row).min(source.height - 1);
                *bytes = &source.bytes[y * source.stride..][..source.width * C];
            }
            interleave::<C>(interleaved, rows);
            // Taken apart in a loop of its own: small stores would break the sums into small vectors.
            for ((first, weights), result) in table.iter().zip(results.iter_mut()) {
                let mut sums = [HALF; 4 * ROWS];
                for (pixels, weight) in interleaved[first..].iter().zip(weights) {
                    for (sum, byte) in sums.iter_mut().zip(pixels) {
                        *sum += i32::from(*byte) * weight;
                    }
                }
                *result = levels(&sums);
            }
            for (row, out) in out.chunks_exact_mut(stride).enumerate() {
                for (place, result) in results.iter().enumerate() {
                    let Some(to) = out.get_mut(place * C..).and_then(<[u8]>::first_chunk_mut) else { return };
                    *to = result.as_chunks::<4>().0[row];
                }
            }
        }
    }
}

#[inline(always)]
fn interleave<const C: usize>(interleaved: &mut [[u8; 4 * ROWS]], rows: [&[u8]; ROWS]) {
    // Of each pixel four bytes are read, but not of the last ones: the memory may end after them.
    let whole = interleaved.len().saturating_sub(4);
    for (x, to) in interleaved[..whole].iter_mut().enumerate() {
        // Put together in registers: small stores that a large load follows at once would make it wait.
        let mut pixels = [0_u64; ROWS / 2];
        for (pair, rows) in pixels.iter_mut().zip(rows.as_chunks::<2>().0) {
            for (half, row) in rows.iter().enumerate() {
                // Never taken, and it keeps compilers from gathering, which is slower.
                let Some(bytes) = row.get(x * C..).and_then(<[u8]>::first_chunk) else { return };
                *pair |= u64::from(u32::from_le_bytes(*bytes)) << (32 * half);
            }
        }
        for (to, pair) in to.as_chunks_mut::<8>().0.iter_mut().zip(pixels) {
            *to = pair.to_le_bytes();
        }
    }
    for (x, to) in interleaved.iter_mut().enumerate().skip(whole) {
        for (to, row) in to.as_chunks_mut::<4>().0.iter_mut().zip(rows) {
            to[..C].copy_from_slice(&row[x * C..x * C + C]);
        }
    }
}

/// Filters columns: a weight meets a row of bytes.
struct ColumnPass<'a> {
    out: &'a mut [u8],
    length: usize,
    source: Pixels<'a>,
    table: &'a Table,
}

impl pulp::WithSimd for ColumnPass<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { out, length, source: Pixels { bytes, stride, .. }, table } = self;
        for (out, (first, weights)) in out.chunks_exact_mut(length).zip(table.iter()) {
            let rows = &bytes[first * stride..];
            let mut done = 0;
            while done < length {
                // The last block begins before the end of the one before it.
                let at = done.min(length.saturating_sub(COLUMNS));
                match out[at..].first_chunk_mut::<COLUMNS>() {
                    Some(to) => {
                        let mut sums = [HALF; COLUMNS];
                        for (row, weight) in rows.chunks(stride).zip(weights) {
                            let Some(bytes) = row[at..].first_chunk::<COLUMNS>() else { break };
                            for (sum, byte) in sums.iter_mut().zip(bytes) {
                                *sum += i32::from(*byte) * weight;
                            }
                        }
                        *to = levels(&sums);
                    }
                    None => {
                        for (x, to) in out.iter_mut().enumerate() {
                            let column = rows.chunks(stride).zip(weights);
                            *to = level(HALF + column.map(|(row, w)| i32::from(row[x]) * w).sum::<i32>());
                        }
                    }
                }
                done = at + COLUMNS;
            }
        }
    }
}

/// Pillow's premultiplication with alpha, RGBA.
pub(crate) fn multiply_alpha(pixels: &mut [u8]) {
    for [red, green, blue, alpha] in pixels.as_chunks_mut::<4>().0 {
        for colour in [red, green, blue] {
            let product = u32::from(*colour) * u32::from(*alpha) + 128;
            *colour = (((product >> 8) + product) >> 8) as u8;
        }
    }
}

/// And back; where nothing shows, the colour stays.
pub(crate) fn divide_alpha(pixels: &mut [u8]) {
    for [red, green, blue, alpha] in pixels.as_chunks_mut::<4>().0 {
        if !matches!(*alpha, 0 | 255) {
            for colour in [red, green, blue] {
                *colour = (255 * u32::from(*colour) / u32::from(*alpha)).min(255) as u8;
            }
        }
    }
}
