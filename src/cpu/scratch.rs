//! Memory for intermediate results, kept between calls: a call whose like has been made allocates nothing.

use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::cpu::memory::Allocation;
use crate::ops::Element;

/// Allocations that no call is using.
static FREE: Mutex<Vec<Allocation>> = Mutex::new(Vec::new());

/// Room for `length` numbers with arbitrary content, aligned for any vector.
pub(super) fn with<T: Element, R>(length: usize, work: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let bytes = length.saturating_mul(size_of::<T>());
    let memory = match take(bytes) {
        Some(memory) => memory,
        None => Allocation::zeroed(bytes)?,
    };
    // SAFETY: the allocation has at least `bytes` initialised bytes, its alignment is that of any `Element`, all bit patterns
    // of `Pod` are values, and nobody else holds it.
    let slice = unsafe { std::slice::from_raw_parts_mut(memory.start.cast().as_ptr(), length) };
    let result = work(slice);
    FREE.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    Ok(result)
}

/// The smallest free allocation that has room; where there is none, the largest goes, to be replaced by a larger one.
fn take(bytes: usize) -> Option<Allocation> {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = (0..free.len()).filter(|&index| free[index].bytes() >= bytes).min_by_key(|&index| free[index].bytes());
    match fits {
        Some(index) => Some(free.swap_remove(index)),
        None => {
            let largest = (0..free.len()).max_by_key(|&index| free[index].bytes())?;
            drop(free.swap_remove(largest));
            None
        }
    }
}
