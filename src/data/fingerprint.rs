//! Whether two runs saw the same set.

use crate::data::source::Source;

/// Pictures whose file sizes count, at most: those of a larger set are evenly spaced.
const MOST_SIZES: usize = 4096;

impl Source {
    /// A hash of how many pictures there are, their names, their classes and the sizes of their files: 16 hexadecimal
    /// digits. Equal hashes mean that two runs saw the same set.
    ///
    /// Of more than 4096 pictures, the sizes of 4096 evenly spaced ones count, so that opening a large set stays fast. Files are
    /// not read: a picture that was replaced by another of the same size goes unnoticed.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
        hash.add(&(self.len() as u64).to_le_bytes());
        for class in self.classes().unwrap_or_default() {
            hash.add(class.as_bytes());
            hash.add(&[0]);
        }
        for index in 0..self.len() {
            hash.add(self.name_inside(index).as_os_str().as_encoded_bytes());
            hash.add(&self.label(index).unwrap_or(u32::MAX).to_le_bytes());
        }
        for index in sampled(self.len()) {
            match self.file_size(index) {
                Ok(Some(size)) => hash.add(&size.to_le_bytes()),
                Ok(None) => (),
                // A file that cannot be opened differs from one that can.
                Err(_) => hash.add(&u64::MAX.to_le_bytes()),
            }
        }
        format!("{:016x}", hash.0)
    }
}

/// The pictures whose sizes count.
fn sampled(length: usize) -> impl Iterator<Item = usize> {
    let count = length.min(MOST_SIZES);
    (0..count).map(move |place| (place as u128 * length as u128 / count as u128) as usize)
}

/// FNV-1a, 64 bits.
struct Fnv(u64);

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_large_set_are_sampled_evenly() {
        assert_eq!(sampled(0).count(), 0);
        assert!(sampled(3).eq(0..3));
        assert!(sampled(MOST_SIZES).eq(0..MOST_SIZES));
        let places: Vec<usize> = sampled(1_281_167).collect();
        assert_eq!((places.len(), places[0]), (MOST_SIZES, 0));
        // 1,281,167 / 4096 is 312.8; the last one is as far from the end.
        assert!(places.windows(2).all(|pair| matches!(pair[1] - pair[0], 312 | 313)));
        assert!(matches!(1_281_167 - places[MOST_SIZES - 1], 312 | 313));
    }
}
