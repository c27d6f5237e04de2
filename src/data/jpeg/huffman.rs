//! Huffman's codes of baseline JPEG: what the next bits mean, mostly from one look into a table.

/// Bits that a look takes in.
const LOOK: u32 = 12;
/// Marks a look that found the code but not all of the number behind it.
const PARTLY: u32 = 0x80;
/// Looks for which one refill is enough.
pub(super) const LOOKS: usize = (56 / LOOK) as usize;
/// A step beyond the end of any block.
const END: u32 = 0x7f;

/// The bits of one run of coded blocks, without stuffing, and with eight bytes behind them that are none of it.
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, from the top.
    buffer: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, buffer: 0, count: 0 }
    }

    /// Behind this there are at least 56 bits; zeros where the data have ended.
    #[inline(always)]
    pub(super) fn refill(&mut self) {
        let next = self.data.get(self.at..).and_then(<[u8]>::first_chunk::<8>).map_or(0, |b| u64::from_be_bytes(*b));
        self.buffer |= next >> self.count;
        // Whole bytes only: those that are not counted come again, in the same place.
        self.at += ((63 - self.count) >> 3) as usize;
        self.count |= 56;
    }

    #[inline(always)]
    fn drop(&mut self, bits: u32) {
        self.buffer <<= bits;
        self.count -= bits;
    }

    /// A number of `size` bits, at most 16, as JPEG writes them: with the first bit 0, it is negative.
    #[inline(always)]
    fn number(&mut self, size: u32) -> i32 {
        if size == 0 {
            return 0;
        }
        let bits = (self.buffer >> (64 - size)) as i32;
        self.drop(size);
        extend(bits, size)
    }
}

#[inline(always)]
fn extend(bits: i32, size: u32) -> i32 {
    if bits < 1 << (size - 1) { bits + 1 - (1 << size) } else { bits }
}

/// A code.
#[derive(Clone, Debug)]
pub(super) struct Code {
    /// By the next bits: number << 16 | step << 8 | bits of both; or size << 16 | step << 8 | PARTLY | bits of the code; or 0.
    look: Box<[u32; 1 << LOOK]>,
    /// By length, the first code that is longer, at the top of 16 bits.
    limits: [u32; 17],
    /// By length, what to add to a code for its place in `symbols`.
    places: [i32; 17],
    symbols: [u8; 256],
}

impl Code {
    /// Of a table segment: how many codes there are of each length from 1 to 16, and their symbols. `None` if there cannot be
    /// such a code.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8], direct: bool) -> Option<Self> {
        let mut all = [0; 256];
        all.get_mut(..symbols.len())?.copy_from_slice(symbols);
        let mut code = Self { look: Box::new([0; 1 << LOOK]), limits: [0; 17], places: [0; 17], symbols: all };
        let (mut next, mut place) = (0_u32, 0_usize);
        for length in 1..=16_u32 {
            let count = usize::from(counts[length as usize - 1]);
            code.places[length as usize] = place as i32 - next as i32;
            for &symbol in symbols.get(place..place + count)? {
                if next >= 1 << length {
                    return None;
                }
                if length <= LOOK {
                    code.note(next, length, symbol, direct);
                }
                next += 1;
            }
            place += count;
            code.limits[length as usize] = next << (16 - length);
            next <<= 1;
        }
        Some(code)
    }

    /// Fills the part of the table that begins with one code.
    fn note(&mut self, code: u32, length: u32, symbol: u8, direct: bool) {
        let (size, step) = meaning(symbol, direct);
        let rest = LOOK - length;
        let entries = &mut self.look[(code << rest) as usize..][..1 << rest];
        if size > rest {
            entries.fill(size << 16 | step << 8 | PARTLY | length);
            return;
        }
        for (number, entries) in entries.chunks_exact_mut(1 << (rest - size)).enumerate() {
            let number = if size == 0 { 0 } else { extend(number as i32, size) };
            entries.fill((number as u32) << 16 | step << 8 | (length + size));
        }
    }

    /// The next number, and how many places it is on. Needs a refill before it, or one before the last [`LOOKS`] of these.
    #[inline(always)]
    pub(super) fn next(&self, bits: &mut Bits<'_>, direct: bool) -> (i32, u32) {
        let entry = self.look[(bits.buffer >> (64 - LOOK)) as usize];
        if entry & 0xff == 0 || entry & PARTLY != 0 {
            // By value: whose address is known elsewhere is not kept in registers.
            let (number, step);
            (*bits, number, step) = self.long(*bits, entry, direct);
            return (number, step);
        }
        bits.drop(entry & 0x7f);
        ((entry as i32) >> 16, entry >> 8 & 0xff)
    }

    /// What one look does not find. As full of bits afterwards as before.
    #[inline(never)]
    fn long<'a>(&self, mut bits: Bits<'a>, entry: u32, direct: bool) -> (Bits<'a>, i32, u32) {
        bits.refill();
        if entry != 0 {
            bits.drop(entry & 0x7f);
            let number = bits.number(entry >> 16);
            bits.refill();
            return (bits, number, entry >> 8 & 0xff);
        }
        let next = (bits.buffer >> 48) as u32;
        let Some(length) = (LOOK + 1..=16).find(|length| next < self.limits[*length as usize]) else {
            // No such code: damage.
            bits.drop(16);
            bits.refill();
            return (bits, 0, END);
        };
        let place = (next >> (16 - length)) as i32 + self.places[length as usize];
        let symbol = self.symbols.get(place as usize).copied().unwrap_or(0);
        bits.drop(length);
        let (size, step) = meaning(symbol, direct);
        let number = bits.number(size);
        bits.refill();
        (bits, number, step)
    }
}

/// Bits of the number behind a symbol, and how many places on it is.
fn meaning(symbol: u8, direct: bool) -> (u32, u32) {
    let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
    match (run, size) {
        _ if direct => (u32::from(symbol).min(16), 1),
        (15, 0) => (0, 16),
        (_, 0) => (0, END),
        _ => (size, run + 1),
    }
}
