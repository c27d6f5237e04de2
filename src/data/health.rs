//! How many of a set's pictures are bad, and when that is too many.

use std::collections::HashSet;

use crate::Error;

/// The share of bad pictures above which a set is refused.
pub(crate) const BAD_SHARE: f64 = 0.1;

/// Whether `bad` of the `seen` pictures of one of `world` processes are too many. Unless the count is `certain`, it must also be
/// beyond chance.
pub(crate) fn too_many(seen: usize, bad: usize, certain: bool, world: usize) -> bool {
    let expected = BAD_SHARE * seen as f64;
    let deviations = 2.0 + (2.0 * (world as f64).ln()).sqrt();
    let beyond_chance = expected + deviations * (expected * (1.0 - BAD_SHARE)).sqrt();
    bad as f64 > expected && (certain || (seen >= 10 && bad as f64 > beyond_chance))
}

/// Counts good and bad pictures, each once.
#[derive(Debug, Default)]
pub(crate) struct Health {
    count: usize,
    /// Processes that read the set: the more there are, the likelier one of them meets many bad pictures by chance.
    world: usize,
    /// One bit per picture.
    seen_bits: Vec<u64>,
    seen: usize,
    pub(crate) bad_pictures: HashSet<usize>,
    examples: Vec<String>,
    /// Bad pictures that an earlier pass has logged.
    pub(crate) known: HashSet<usize>,
}

impl Health {
    pub(crate) fn new(count: usize, world: usize) -> Self {
        Self { count, world, seen_bits: vec![0; count.div_ceil(64)], ..Self::default() }
    }

    /// How many pictures are bad.
    pub(crate) fn bad(&self) -> usize {
        self.bad_pictures.len()
    }

    pub(crate) fn saw(&mut self, index: usize) {
        if let Some(word) = self.seen_bits.get_mut(index / 64) {
            let bit = 1 << (index % 64);
            self.seen += usize::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Counts a bad picture; returns whether it is to be logged.
    pub(crate) fn saw_bad(&mut self, index: usize, error: &Error) -> bool {
        self.saw(index);
        let new = self.bad_pictures.insert(index);
        if new && self.examples.len() < 3 {
            self.examples.push(error.to_string());
        }
        new && !self.known.contains(&index)
    }

    /// Whether too many are bad. Before everything was seen, the count must also be beyond chance (two standard deviations above
    /// 10 %, and more where several processes look, each at its part of an epoch): the first ten pictures of a set with 5 % bad ones
    /// often hold two of them.
    pub(crate) fn is_refused(&self, whole_epoch: bool) -> bool {
        let certain = (whole_epoch && self.world == 1) || self.seen == self.count;
        too_many(self.seen, self.bad(), certain, self.world)
    }

    pub(crate) fn problem(&self) -> String {
        format!(
            "{} of {} pictures seen cannot be used, more than {:.0} %: {}{}. Repair or remove them",
            self.bad(),
            self.seen,
            BAD_SHARE * 100.0,
            self.examples.join("; "),
            if self.bad() > self.examples.len() { "; …" } else { "" }
        )
    }
}
