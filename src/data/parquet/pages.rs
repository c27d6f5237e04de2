//! Where the pages of a column are: their headers say how long they are and how many rows they hold. The reader of whole
//! columns could do without, but one picture out of a row group of hundreds of megabytes should cost one page.

use std::io::Read;

/// Bytes of a page, at most, uncompressed.
const MOST_BYTES: i64 = 1 << 30;
/// Bytes of a header, at most: it may hold the smallest and the largest value.
const MOST_HEADER: u64 = 4 << 20;

/// A page with values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: u64,
    /// With its header.
    pub(super) bytes: i32,
    /// The first row of the row group that it holds.
    pub(super) first: usize,
    /// Whether its values are places in the dictionary.
    pub(super) dictionary: bool,
}

/// Finds the pages with the first `rows` values of a column that lies in `start..end`.
pub(super) fn find<R: Read>(
    read: impl Fn(u64) -> std::io::Result<R>,
    (start, end): (u64, u64),
    rows: usize,
) -> Result<Vec<Place>, String> {
    let (mut places, mut offset, mut first) = (Vec::new(), start, 0);
    let mut bytes = Vec::new();
    while first < rows {
        let mut length = 4096_u64;
        let (header, used) = loop {
            bytes.clear();
            let here = read(offset)
                .and_then(|reader| reader.take(length.min(end.saturating_sub(offset))).read_to_end(&mut bytes));
            here.map_err(|error| error.to_string())?;
            match Header::read(&bytes) {
                Some(found) => break found,
                None if length < MOST_HEADER && bytes.len() as u64 == length => length *= 16,
                None => return Err(format!("there is no page at byte {offset}, where row {first} should be")),
            }
        };
        let whole = used as i64 + header.compressed;
        let next = offset.saturating_add(whole as u64);
        if header.compressed < 0 || !(0..=MOST_BYTES).contains(&header.uncompressed) || next > end || whole > MOST_BYTES
        {
            return Err(format!("the page at byte {offset} cannot be as long as it says"));
        }
        // Of values; the others are dictionaries and indices.
        if matches!(header.kind, 0 | 3) {
            let count = usize::try_from(header.values).unwrap_or(0);
            if count > 0 {
                // PLAIN_DICTIONARY and RLE_DICTIONARY.
                let dictionary = matches!(header.encoding, 2 | 8);
                places.push(Place { offset, bytes: whole as i32, first, dictionary });
            }
            first = first.saturating_add(count);
        }
        offset = next;
    }
    Ok(places)
}

/// A page's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    kind: i64,
    uncompressed: i64,
    compressed: i64,
    values: i64,
    encoding: i64,
}

impl Header {
    /// Reads Thrift's compact protocol; how long the header is. `None` if the bytes end before it does.
    fn read(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut from = Compact { bytes, at: 0 };
        let mut header = Self::default();
        let mut complete = false;
        from.structure(&mut |from, field, kind| {
            let number = match (field, kind) {
                (1, 5) => &mut header.kind,
                (2, 5) => &mut header.uncompressed,
                (3, 5) => {
                    complete = true;
                    &mut header.compressed
                }
                // Data pages of both versions: values first; the encoding is second and fourth.
                (5 | 8, 12) => {
                    let encoding = if field == 5 { 2 } else { 4 };
                    return from.structure(&mut |from, field, kind| {
                        if field == 1 && kind == 5 {
                            header.values = from.number()?;
                        } else if field == encoding && kind == 5 {
                            header.encoding = from.number()?;
                        } else {
                            from.skip(kind, 0)?;
                        }
                        Some(())
                    });
                }
                _ => return from.skip(kind, 0),
            };
            *number = from.number()?;
            Some(())
        })?;
        complete.then_some((header, from.at))
    }
}

/// Thrift's compact protocol.
struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn unsigned(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn number(&mut self) -> Option<i64> {
        let value = self.unsigned()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Reads fields up to the end of a structure; `field` gets each one's number and kind, and reads it.
    fn structure(&mut self, field: &mut dyn FnMut(&mut Self, i64, u8) -> Option<()>) -> Option<()> {
        let mut number = 0_i64;
        loop {
            let byte = self.byte()?;
            if byte == 0 {
                return Some(());
            }
            let step = i64::from(byte >> 4);
            number = if step == 0 { self.number()? } else { number.checked_add(step)? };
            field(self, number, byte & 15)?;
        }
    }

    fn skip(&mut self, kind: u8, depth: u32) -> Option<()> {
        if depth > 16 {
            return None;
        }
        match kind {
            // True and false.
            1 | 2 => (),
            3 => self.at += 1,
            4..=6 => {
                self.unsigned()?;
            }
            7 => self.at += 8,
            8 => {
                let length = usize::try_from(self.unsigned()?).ok()?;
                self.at = self.at.checked_add(length)?;
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.unsigned()? } else { u64::from(head >> 4) };
                for _ in 0..count {
                    // In lists a truth value is a byte.
                    self.skip(if matches!(head & 15, 1 | 2) { 3 } else { head & 15 }, depth + 1)?;
                    if self.at > self.bytes.len() {
                        return None;
                    }
                }
            }
            12 => self.structure(&mut |from, _, kind| from.skip(kind, depth + 1))?,
            _ => return None,
        }
        (self.at <= self.bytes.len()).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A data page of the first version: 5 values, PLAIN, with statistics, 100 bytes that compress to 60.
    const HEADER: [u8; 25] = [
        0x15, 0, 0x15, 200, 1, 0x15, 120, 0x2c, 0x15, 10, 0x15, 0, 0x15, 6, 0x15, 6, 0x1c, 0x18, 2, b'h', b'i', 0, 0,
        0, 0,
    ];

    #[test]
    fn headers_are_read_and_cut_ones_are_not() {
        let (header, length) = Header::read(&HEADER).unwrap();
        assert_eq!(header, Header { kind: 0, uncompressed: 100, compressed: 60, values: 5, encoding: 0 });
        assert_eq!(length, 24);
        for cut in 0..24 {
            assert_eq!(Header::read(&HEADER[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn pages_are_found_and_lies_are_errors() {
        let mut file = HEADER[..24].to_vec();
        file.extend([0; 60]);
        file.extend(file.clone());
        let find = |end: u64, rows| find(|at| Ok(&file[at as usize..]), (0, end), rows);
        let places = find(168, 10).unwrap();
        let place = |offset, first| Place { offset, bytes: 84, first, dictionary: false };
        assert_eq!(places, [place(0, 0), place(84, 5)]);
        assert_eq!(find(168, 5).unwrap().len(), 1);
        assert!(find(168, 11).is_err());
        assert!(find(100, 10).is_err());
    }
}
