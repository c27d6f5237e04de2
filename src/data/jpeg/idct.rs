//! The inverse cosine transform of a block: the integer arithmetic of the JPEG group's library (Loeffler, Ligtenberg and
//! Moschytz, 11 multiplications, 13 bits behind the point), so that pixels are those of everybody who uses it.

/// Bits behind the point of the constants, and of what lies between the two passes.
const BITS: u32 = 13;
const BETWEEN: u32 = 2;

/// `round(x * 2^13)`.
const fn fixed(x: f64) -> i32 {
    (x * 8192.0 + 0.5) as i32
}

/// Eight numbers, transformed in one direction, times `2^13`.
#[inline(always)]
fn line(x: [i32; 8]) -> [i32; 8] {
    let z = (x[2] + x[6]) * const { fixed(0.541_196_100) };
    let even2 = z - x[6] * const { fixed(1.847_759_065) };
    let even3 = z + x[2] * const { fixed(0.765_366_865) };
    let (even0, even1) = ((x[0] + x[4]) << BITS, (x[0] - x[4]) << BITS);
    let (a, d, b, c) = (even0 + even3, even0 - even3, even1 + even2, even1 - even2);

    let z5 = (x[7] + x[3] + x[5] + x[1]) * const { fixed(1.175_875_602) };
    let z1 = (x[7] + x[1]) * -const { fixed(0.899_976_223) };
    let z2 = (x[5] + x[3]) * -const { fixed(2.562_915_447) };
    let z3 = (x[7] + x[3]) * -const { fixed(1.961_570_560) } + z5;
    let z4 = (x[5] + x[1]) * -const { fixed(0.390_180_644) } + z5;
    let odd0 = x[7] * const { fixed(0.298_631_336) } + z1 + z3;
    let odd1 = x[5] * const { fixed(2.053_119_869) } + z2 + z4;
    let odd2 = x[3] * const { fixed(3.072_711_026) } + z2 + z3;
    let odd3 = x[1] * const { fixed(1.501_321_110) } + z1 + z4;
    [a + odd3, b + odd2, c + odd1, d + odd0, d - odd0, c - odd1, b - odd2, a - odd3]
}

/// Both directions, rounded to bytes. `out` are eight rows, `stride` apart.
#[inline(always)]
pub(super) fn block(coefficients: &[i16; 64], out: &mut [u8], stride: usize) {
    let mut columns = [0_i16; 64];
    for x in 0..8 {
        let mut column = [0; 8];
        for (y, value) in column.iter_mut().enumerate() {
            *value = i32::from(coefficients[y * 8 + x]);
        }
        for (y, value) in line(column).into_iter().enumerate() {
            let shift = const { BITS - BETWEEN };
            columns[y * 8 + x] = ((value + (1 << (shift - 1))) >> shift) as i16;
        }
    }
    let rows = transposed(&columns);
    let mut levels = [0_u8; 64];
    for y in 0..8 {
        let mut row = [0; 8];
        for (x, value) in row.iter_mut().enumerate() {
            *value = i32::from(rows[x * 8 + y]);
        }
        for (x, value) in line(row).into_iter().enumerate() {
            let shift = const { BITS + BETWEEN + 3 };
            levels[x * 8 + y] = (((value + (1 << (shift - 1))) >> shift) + 128).clamp(0, 255) as u8;
        }
    }
    let levels = transposed_bytes(&levels);
    for (y, row) in levels.as_chunks::<8>().0.iter().enumerate() {
        if let Some(to) = out.get_mut(y * stride..).and_then(|out| out.first_chunk_mut()) {
            *to = *row;
        }
    }
}

/// A block of which only the mean is not zero.
#[inline(always)]
pub(super) fn flat(mean: i16, out: &mut [u8], stride: usize) {
    let level = (((i32::from(mean) + 4) >> 3) + 128).clamp(0, 255) as u8;
    for y in 0..8 {
        if let Some(to) = out.get_mut(y * stride..).and_then(|out| out.first_chunk_mut()) {
            *to = [level; 8];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transposed(block: &[i16; 64]) -> [i16; 64] {
    use std::arch::x86_64::*;
    let [r0, r1, r2, r3, r4, r5, r6, r7]: [__m128i; 8] = bytemuck::cast(*block);
    // SAFETY: these instructions (SSE2) are in every x86-64 processor.
    let result = unsafe {
        let (a0, a1) = (_mm_unpacklo_epi16(r0, r1), _mm_unpackhi_epi16(r0, r1));
        let (a2, a3) = (_mm_unpacklo_epi16(r2, r3), _mm_unpackhi_epi16(r2, r3));
        let (a4, a5) = (_mm_unpacklo_epi16(r4, r5), _mm_unpackhi_epi16(r4, r5));
        let (a6, a7) = (_mm_unpacklo_epi16(r6, r7), _mm_unpackhi_epi16(r6, r7));
        let (b0, b1) = (_mm_unpacklo_epi32(a0, a2), _mm_unpackhi_epi32(a0, a2));
        let (b2, b3) = (_mm_unpacklo_epi32(a1, a3), _mm_unpackhi_epi32(a1, a3));
        let (b4, b5) = (_mm_unpacklo_epi32(a4, a6), _mm_unpackhi_epi32(a4, a6));
        let (b6, b7) = (_mm_unpacklo_epi32(a5, a7), _mm_unpackhi_epi32(a5, a7));
        [
            _mm_unpacklo_epi64(b0, b4),
            _mm_unpackhi_epi64(b0, b4),
            _mm_unpacklo_epi64(b1, b5),
            _mm_unpackhi_epi64(b1, b5),
            _mm_unpacklo_epi64(b2, b6),
            _mm_unpackhi_epi64(b2, b6),
            _mm_unpacklo_epi64(b3, b7),
            _mm_unpackhi_epi64(b3, b7),
        ]
    };
    bytemuck::cast(result)
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transposed_bytes(block: &[u8; 64]) -> [u8; 64] {
    use std::arch::x86_64::*;
    // Rows 0 and 1, 2 and 3, and so on.
    let [r0, r1, r2, r3]: [__m128i; 4] = bytemuck::cast(*block);
    // SAFETY: as above.
    unsafe {
        let (a0, a1) = (_mm_unpacklo_epi8(r0, r2), _mm_unpackhi_epi8(r0, r2));
        let (a2, a3) = (_mm_unpacklo_epi8(r1, r3), _mm_unpackhi_epi8(r1, r3));
        let (b0, b1) = (_mm_unpacklo_epi8(a0, a2), _mm_unpackhi_epi8(a0, a2));
        let (b2, b3) = (_mm_unpacklo_epi8(a1, a3), _mm_unpackhi_epi8(a1, a3));
        bytemuck::cast([
            _mm_unpacklo_epi8(b0, b2),
            _mm_unpackhi_epi8(b0, b2),
            _mm_unpacklo_epi8(b1, b3),
            _mm_unpackhi_epi8(b1, b3),
        ])
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn transposed(block: &[i16; 64]) -> [i16; 64] {
    std::array::from_fn(|at| block[at % 8 * 8 + at / 8])
}

#[cfg(not(target_arch = "x86_64"))]
fn transposed_bytes(block: &[u8; 64]) -> [u8; 64] {
    std::array::from_fn(|at| block[at % 8 * 8 + at / 8])
}
