//! Functions without branches and sums in a fixed order, written so that compilers turn loops over them into vector code.

use pulp::Arch;

use crate::cpu::Float;

/// Partial sums of [`reduce`].
const LANES: usize = 32;

/// Runs `work`, compiled for the widest vectors that the machine has.
///
/// What `work` calls must be inlined into it.
#[inline(always)]
pub(super) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(work)
}

/// The sum of `term([parts[0][i], …])` over `i`, in an order that depends on the length alone. The parts are equally long.
#[inline(always)]
pub(super) fn reduce<T: Copy, F: Float, const N: usize>(parts: [&[T]; N], term: impl Fn([T; N]) -> F) -> F {
    let length = parts[0].len();
    let parts = parts.map(|part| &part[..length]);
    let mut lanes = [F::ZERO; LANES];
    let whole = length / LANES * LANES;
    let mut start = 0;
    while start < whole {
        let chunk = parts.map(|part| &part[start..start + LANES]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(chunk.map(|part| part[lane]));
        }
        start += LANES;
    }
    for (lane, index) in (whole..length).enumerate() {
        lanes[lane] += term(parts.map(|part| part[index]));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x`, to 2e-7 of itself; 0 below the logarithm of the smallest normal number. (Range reduction and polynomial: Cephes.)
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const SMALLEST: f32 = -87.336_54;
    const LARGEST: f32 = 88.722_83;
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let inside = if x < SMALLEST { SMALLEST } else { x };
    let inside = if inside > LARGEST { LARGEST } else { inside };
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    let shifted = inside.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, inside));
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 0.166_666_66)
        .mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, for n = 128.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    let scaled = p * power_of_two(half) * power_of_two(exponent - half);
    let scaled = if x < SMALLEST { 0.0 } else { scaled };
    if x > LARGEST { f32::INFINITY } else { scaled }
}

/// `2^n` for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The error function, to 1e-7. Polynomials fitted to `erf(x) / x - 1` in `x²` below 1, and to `ln(1 - erf(x))` above.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let small = 7.647_168e-5_f32
        .mul_add(square, -7.942_373_6e-4)
        .mul_add(square, 5.179_752e-3)
        .mul_add(square, -0.026_848_594)
        .mul_add(square, 0.112_834_3)
        .mul_add(square, -0.376_126_06)
        .mul_add(square, 0.128_379_16);
    let small = small.mul_add(x, x);
    // From 4 on, 1 - erf is below half a unit in the last place of 1.
    let t = if magnitude > 4.0 { 4.0 } else { magnitude };
    let logarithm = (-2.168_699_4e-5_f32)
        .mul_add(t, 4.413_380_8e-4)
        .mul_add(t, -4.204_570_2e-3)
        .mul_add(t, 0.025_208_28)
        .mul_add(t, -0.108_418_61)
        .mul_add(t, -0.633_219_86)
        .mul_add(t, -1.129_578_4)
        .mul_add(t, 1.880_431e-4);
    let large = (1.0 - exp(logarithm)).copysign(x);
    if magnitude < 1.0 { small } else { large }
}
