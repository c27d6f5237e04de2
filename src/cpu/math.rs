//! Functions without branches and sums in a fixed order, written so that compilers turn loops over them into vector code.

use crate::cpu::Float;

/// Partial sums of a sum.
pub(super) const LANES: usize = 16;

/// Makes a function that is compiled for the widest vectors that the machine has.
///
/// What it calls must be `#[inline(always)]`, and closures in it small: what is not inlined is compiled for the narrowest
/// vectors, and multiply-adds become calls. (That is why this is a macro: closures cannot be told to be inlined.)
macro_rules! vectorized {
    (@output) => { () };
    (@output $output:ty) => { $output };
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident<$life:lifetime, $float:ident: Float $(, $generic:ident: $bound:path)*>($($argument:ident: $type:ty),* $(,)?)
        $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "a row of everything")]
        $visibility fn $name<$life, $float: Float $(, $generic: $bound)*>($($argument: $type),*) $(-> $output)? {
            struct Job<$life, $float: Float $(, $generic: $bound)*>(
                $($type,)* std::marker::PhantomData<(&$life (), $float, $($generic),*)>
            );
            impl<$life, $float: Float $(, $generic: $bound)*> pulp::WithSimd for Job<$life, $float $(, $generic)*> {
                type Output = vectorized!(@output $($output)?);

                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
                    let Self($($argument,)* _) = self;
                    $body
                }
            }
            $float::dispatch(Job::<$life, $float $(, $generic)*>($($argument,)* std::marker::PhantomData))
        }
    };
}

pub(super) use vectorized;

vectorized! {
    /// `sums += values`.
    pub(super) fn add<'a, F: Float>(sums: &'a mut [F], values: &'a [F]) {
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
}

/// The sum of `term(x[i], y[i])` over all of `x`, in an order that depends on the length alone. `y` is at least as long.
#[inline(always)]
pub(super) fn sum_over<T: Copy, F: Float>(x: &[T], y: &[T], term: impl Fn(T, T) -> F) -> F {
    let mut lanes = [F::ZERO; LANES];
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (x.as_chunks::<LANES>(), y[..x.len()].as_chunks::<LANES>());
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for lane in 0..LANES {
            lanes[lane] += term(x[lane], y[lane]);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane += term(x, y);
    }
    add_up(lanes)
}

/// The sum of partial sums, by halves.
#[inline(always)]
pub(super) fn add_up<F: Float>(mut lanes: [F; LANES]) -> F {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Below the logarithm of the smallest normal number, [`exp`] is 0.
const SMALLEST: f32 = -87.336_54;

/// `e^x`, to 2e-7 of itself; 0 where it would be below the smallest normal number.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LARGEST: f32 = 88.722_83;
    let inside = if x > LARGEST { LARGEST } else { x };
    let (p, n) = exp_parts(inside);
    // 2^n in two factors, for n = 128.
    let half = n >> 1;
    let result = p * power_of_two(half) * power_of_two(n - half);
    let result = if x < SMALLEST { 0.0 } else { result };
    if x > LARGEST { f32::INFINITY } else { result }
}

/// [`exp`] of a number that is not above 88, or NaN.
#[inline(always)]
pub(super) fn exp_bounded(x: f32) -> f32 {
    let (p, n) = exp_parts(x);
    let result = p * power_of_two(n);
    if x < SMALLEST { 0.0 } else { result }
}

/// `e^x = p 2^n`. (Range reduction and polynomial: Cephes.)
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let inside = if x < SMALLEST { SMALLEST } else { x };
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    let shifted = inside.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, inside));
    let p = polynomial(r, [0.5, 0.166_666_66, 4.166_579_6e-2, 8.333_452e-3, 1.398_199_9e-3, 1.987_569_1e-4, 0.0, 0.0]);
    (p.mul_add(r * r, r) + 1.0, (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32))
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
    let small = polynomial(
        square,
        [0.128_379_16, -0.376_126_06, 0.112_834_3, -0.026_848_594, 5.179_752e-3, -7.942_373_6e-4, 7.647_168e-5, 0.0],
    );
    let small = small.mul_add(x, x);
    // From 4 on, 1 - erf is below half a unit in the last place of 1.
    let t = if magnitude > 4.0 { 4.0 } else { magnitude };
    let logarithm = polynomial(
        t,
        [
            1.880_431e-4,
            -1.129_578_4,
            -0.633_219_86,
            -0.108_418_61,
            0.025_208_28,
            -4.204_570_2e-3,
            4.413_380_8e-4,
            -2.168_699_4e-5,
        ],
    );
    let large = (1.0 - exp_bounded(logarithm)).copysign(x);
    if magnitude < 1.0 { small } else { large }
}

/// `c[0] + c[1] x + …`, in pairs (Estrin's scheme): few operations wait for each other. Zeros at the end cost nothing.
#[inline(always)]
fn polynomial(x: f32, c: [f32; 8]) -> f32 {
    let pair = |i: usize| if c[i + 1] == 0.0 { c[i] } else { c[i + 1].mul_add(x, c[i]) };
    let x2 = x * x;
    let low = pair(2).mul_add(x2, pair(0));
    let high = if c[6] == 0.0 { pair(4) } else { pair(6).mul_add(x2, pair(4)) };
    high.mul_add(x2 * x2, low)
}
