//! Work in blocks over the threads of the current rayon pool, without allocating.
//!
//! Blocks have fixed sizes, and what a block computes depends on nothing but its number: results are bitwise the same however
//! many threads share them. Threads take the next block when they are done with one.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many workers [`blocks`] uses for `count` blocks.
pub(super) fn workers(count: usize) -> usize {
    rayon::current_num_threads().min(count).max(1)
}

/// Calls `work(block, worker)` once for every block in `0..count`; no two calls with the same `worker`, a number below
/// [`workers`]`(count)`, run at the same time.
pub(super) fn blocks(count: usize, work: impl Fn(usize, usize) + Sync) {
    let workers = workers(count);
    if workers == 1 {
        (0..count).for_each(|block| work(block, 0));
        return;
    }
    let next = AtomicUsize::new(0);
    fork(0, workers, &|worker| {
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= count {
                break;
            }
            work(block, worker);
        }
    });
}

/// Runs `work` for each worker in `from..to`, as far as possible at the same time.
pub(super) fn fork(from: usize, to: usize, work: &(dyn Fn(usize) + Sync)) {
    if to - from == 1 {
        work(from);
    } else {
        let middle = from.midpoint(to);
        rayon::join(|| fork(from, middle, work), || fork(middle, to, work));
    }
}

/// Calls `work(start, end)` for `0..length` in pieces of `piece`.
pub(super) fn pieces(length: usize, piece: usize, work: impl Fn(usize, usize) + Sync) {
    blocks(length.div_ceil(piece), |block, _| work(block * piece, length.min((block + 1) * piece)));
}

/// An output that several threads write, each its own part.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts of a slice under the contract of `part`: disjoint ones.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), life: PhantomData }
    }

    /// The elements `from..to`.
    ///
    /// # Safety
    /// The range is inside the slice, and nobody else uses any of it while the result lives.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts, by the contract")]
    #[inline(always)]
    pub(super) unsafe fn part(&self, from: usize, to: usize) -> &mut [T] {
        debug_assert!(from <= to && to <= self.length);
        // SAFETY: inside the slice, and unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), to - from) }
    }

    /// Where the slice starts, for code that writes rows of a part.
    #[inline(always)]
    pub(super) fn pointer(&self) -> *mut T {
        self.start
    }
}
