//! The order of the samples of an epoch.

use std::sync::{Arc, Mutex, PoisonError};

use rand::seq::SliceRandom;

use crate::random::{ORDER_STREAM, RandomStream};

/// Seeded permutations, a function of (seed, epoch) alone. The latest two are kept.
#[derive(Debug)]
pub(crate) struct Order {
    count: u32,
    seed: u64,
    kept: Mutex<Vec<(u32, Arc<[u32]>)>>,
}

impl Order {
    pub(crate) fn new(count: u32, seed: u64) -> Self {
        Self { count, seed, kept: Mutex::new(Vec::new()) }
    }

    /// The permutation of an epoch.
    pub(crate) fn epoch(&self, epoch: u32) -> Arc<[u32]> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = kept.iter().find(|(known, _)| *known == epoch) {
            return Arc::clone(order);
        }
        let order: Arc<[u32]> = shuffled(self.count, self.seed, epoch).into();
        if kept.len() == 2 {
            kept.remove(0);
        }
        kept.push((epoch, Arc::clone(&order)));
        order
    }
}

/// All samples once, in random order.
fn shuffled(count: u32, seed: u64, epoch: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    order.shuffle(&mut RandomStream::new(seed, epoch, 0, ORDER_STREAM));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_permutation_that_depends_on_seed_and_epoch() {
        for count in [0, 1, 2, 7, 1000] {
            let mut sorted = shuffled(count, 3, 4);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
        }
        assert_eq!(shuffled(100, 1, 0), shuffled(100, 1, 0));
        assert_ne!(shuffled(100, 1, 0), shuffled(100, 1, 1));
        assert_ne!(shuffled(100, 1, 0), shuffled(100, 2, 0));
    }

    #[test]
    fn every_permutation_of_three_is_about_as_frequent() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(shuffled(3, 9, epoch)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|n| (850..1150).contains(n)), "{counts:?}");
    }
}
