//! The two floating-point types of the CPU backend.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use crate::Result;
use crate::cpu::math;
use crate::cpu::simd::Lanes;
use crate::ops::{Communicator, Real};

/// f32 or f64, and nothing else.
pub trait Float:
    Real
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
    + Lanes
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Rounds to this type: exact for f64.
    fn from_f32(value: f32) -> Self;
    /// `self * factor + term`, rounded once.
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
    /// The exponential, to about one unit in the last place; 0 where it would be below the smallest normal number.
    fn exp(self) -> Self;
    /// The exponential of a number that is not above 88, or NaN.
    fn exp_bounded(self) -> Self;
    /// The error function, to about one unit in the last place of 1.
    fn erf(self) -> Self;
    /// Adds `values` up over all processes, in place.
    ///
    /// # Errors
    /// As [`Communicator::sum`].
    fn all_reduce(values: &mut [Self], processes: &dyn Communicator) -> Result<()>;
    /// The larger of two numbers; `other` where either is NaN.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

impl Float for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    fn all_reduce(values: &mut [Self], processes: &dyn Communicator) -> Result<()> {
        processes.sum(values)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn exp(self) -> Self {
        math::exp(self)
    }

    #[inline(always)]
    fn exp_bounded(self) -> Self {
        math::exp_bounded(self)
    }

    #[inline(always)]
    fn erf(self) -> Self {
        math::erf(self)
    }
}

impl Float for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;

    fn all_reduce(values: &mut [Self], processes: &dyn Communicator) -> Result<()> {
        processes.sum_f64(values)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul_add(factor, term)
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn exp(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn exp_bounded(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
}
