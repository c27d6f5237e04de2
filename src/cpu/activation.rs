//! Activation functions and their derivatives, number by number.

use crate::cpu::Float;
use crate::cpu::math::vectorized;
use crate::ops::Activation;

/// `y = activation(x)`.
pub(super) fn activate<F: Float>(activation: Activation, y: &mut [F], x: &[F]) {
    match activation {
        Activation::Gelu => map::<F, Gelu>(y, x),
        Activation::GeluTanh => map::<F, GeluTanh>(y, x),
        Activation::Relu => map::<F, Relu>(y, x),
        Activation::Silu => map::<F, Silu>(y, x),
        Activation::QuickGelu => map::<F, QuickGelu>(y, x),
    }
}

/// `y *= activation'(x)`.
pub(super) fn multiply_by_slope<F: Float>(activation: Activation, y: &mut [F], x: &[F]) {
    match activation {
        Activation::Gelu => scale::<F, Gelu>(y, x),
        Activation::GeluTanh => scale::<F, GeluTanh>(y, x),
        Activation::Relu => scale::<F, Relu>(y, x),
        Activation::Silu => scale::<F, Silu>(y, x),
        Activation::QuickGelu => scale::<F, QuickGelu>(y, x),
    }
}

/// A function of one number. (Not a closure: those are not always inlined.)
trait Function {
    fn value<F: Float>(x: F) -> F;
    fn slope<F: Float>(x: F) -> F;
}

vectorized! {
    fn map<'a, F: Float, T: Function>(y: &'a mut [F], x: &'a [F]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = T::value(x);
        }
    }
}

vectorized! {
    fn scale<'a, F: Float, T: Function>(y: &'a mut [F], x: &'a [F]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y *= T::slope(x);
        }
    }
}

/// With the normal distribution's cumulative function.
struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn value<F: Float>(x: F) -> F {
        x * normal_distribution(x)
    }

    #[inline(always)]
    fn slope<F: Float>(x: F) -> F {
        let density = (x * x * F::from_f64(-0.5)).exp_bounded() * F::from_f64(0.398_942_280_401_432_7);
        Float::mul_add(x, density, normal_distribution(x))
    }
}

#[inline(always)]
fn normal_distribution<F: Float>(x: F) -> F {
    let half = F::from_f64(0.5);
    Float::mul_add((x * F::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf(), half, half)
}

/// `x (1 + tanh u) / 2`, which is `x sigmoid(2 u)`.
struct GeluTanh;

impl GeluTanh {
    /// `sqrt(2 / pi)`.
    const FACTOR: f64 = 0.797_884_560_802_865_4;
    /// The coefficient of the cube.
    const CUBE: f64 = 0.044_715;

    /// `sigmoid(2 u)`.
    #[inline(always)]
    fn share<F: Float>(x: F) -> F {
        let factor =
            Float::mul_add(x * x, F::from_f64(2.0 * Self::FACTOR * Self::CUBE), F::from_f64(2.0 * Self::FACTOR));
        sigmoid(x * factor)
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value<F: Float>(x: F) -> F {
        x * Self::share(x)
    }

    #[inline(always)]
    fn slope<F: Float>(x: F) -> F {
        // Far out the slope is 0 or 1, and the square must not overflow.
        let bound = F::from_f64(20.0);
        let x = if x > bound { bound } else { x };
        let x = if x < -bound { -bound } else { x };
        let s = Self::share(x);
        let inner =
            Float::mul_add(x * x, F::from_f64(6.0 * Self::FACTOR * Self::CUBE), F::from_f64(2.0 * Self::FACTOR));
        Float::mul_add(x * s * (F::ONE - s), inner, s)
    }
}

struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn value<F: Float>(x: F) -> F {
        if x < F::ZERO { F::ZERO } else { x }
    }

    #[inline(always)]
    fn slope<F: Float>(x: F) -> F {
        if x > F::ZERO { F::ONE } else { F::ZERO }
    }
}

struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn value<F: Float>(x: F) -> F {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn slope<F: Float>(x: F) -> F {
        let s = sigmoid(x);
        Float::mul_add(x * s, F::ONE - s, s)
    }
}

struct QuickGelu;

impl QuickGelu {
    const FACTOR: f64 = 1.702;
}

impl Function for QuickGelu {
    #[inline(always)]
    fn value<F: Float>(x: F) -> F {
        x * sigmoid(F::from_f64(Self::FACTOR) * x)
    }

    #[inline(always)]
    fn slope<F: Float>(x: F) -> F {
        let scaled = F::from_f64(Self::FACTOR) * x;
        let s = sigmoid(scaled);
        Float::mul_add(scaled * s, F::ONE - s, s)
    }
}

#[inline(always)]
fn sigmoid<F: Float>(x: F) -> F {
    F::ONE / (F::ONE + (-x).exp())
}
