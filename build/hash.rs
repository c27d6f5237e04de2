//! A hash of sources. Compiled into the build script and, through `#[path]`, into the crate.

/// FNV-1a, 128 bits: names cache entries and tells source versions apart. Not cryptographic.
pub fn hash(parts: &[&[u8]]) -> u128 {
    let mut hash: u128 = 0x6c62272e07bb014262b821756295c58d;
    let mut mix = |byte: u8| hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000000001000000000000000000013b);
    for part in parts {
        part.iter().for_each(|&byte| mix(byte));
        // The length keeps ["ab", "c"] and ["a", "bc"] apart.
        (part.len() as u64).to_le_bytes().into_iter().for_each(&mut mix);
    }
    hash
}
