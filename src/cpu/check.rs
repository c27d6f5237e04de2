//! What every op checks before it touches memory.

use crate::{Error, Result};

/// The product of `sizes`.
pub(super) fn product(op: &'static str, what: &'static str, sizes: &[usize]) -> Result<usize> {
    sizes
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size))
        .ok_or_else(|| Error::shape(op, what, "a size that fits in memory", format!("{sizes:?}")))
}

/// The first `sizes` (multiplied) elements of an input.
pub(super) fn input<'a, T>(op: &'static str, what: &'static str, buffer: &'a [T], sizes: &[usize]) -> Result<&'a [T]> {
    let length = product(op, what, sizes)?;
    buffer.get(..length).ok_or_else(|| too_short(op, what, sizes, buffer.len()))
}

/// The first `sizes` (multiplied) elements of an output.
pub(super) fn output<'a, T>(
    op: &'static str,
    what: &'static str,
    buffer: &'a mut [T],
    sizes: &[usize],
) -> Result<&'a mut [T]> {
    let length = product(op, what, sizes)?;
    let found = buffer.len();
    buffer.get_mut(..length).ok_or_else(|| too_short(op, what, sizes, found))
}

/// Checks that all of `ids` are below `bound`.
pub(super) fn ids(op: &'static str, what: &'static str, ids: &[u32], bound: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= bound) {
        Some(id) => Err(Error::shape(op, what, format!("ids below {bound}"), id)),
        None => Ok(()),
    }
}

fn too_short(op: &'static str, what: &'static str, sizes: &[usize], found: usize) -> Error {
    Error::shape(op, what, format!("at least {sizes:?} elements"), found)
}
