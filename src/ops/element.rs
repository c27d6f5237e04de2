//! Numbers that buffers hold.

use std::fmt::Debug;

use half::bf16;

/// A number type that buffers hold.
pub trait Element: bytemuck::Pod + Default + Debug + Send + Sync + 'static {}

impl<T: bytemuck::Pod + Default + Debug + Send + Sync + 'static> Element for T {}

/// A floating-point number.
pub trait Real: Element {
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Widens to f64.
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as Self
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

impl Real for bf16 {
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }

    fn to_f64(self) -> f64 {
        self.to_f64()
    }
}
