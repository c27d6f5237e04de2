//! No profiler.

use std::fmt::Arguments;

/// Nothing.
#[must_use]
pub(crate) struct Range;

impl Drop for Range {
    fn drop(&mut self) {}
}

/// Names the work until the result is dropped; here it does nothing, and the name is never put together.
#[inline(always)]
pub(crate) fn range(_name: Arguments<'_>) -> Range {
    Range
}
