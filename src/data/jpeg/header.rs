//! What a JPEG says before its pixels.

use image::metadata::Orientation;

/// What the segments before the pixels say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// How a viewer turns the picture.
    pub(crate) orientation: Orientation,
    /// 1 or 3.
    pub(crate) components: usize,
    /// Rows and columns of the blocks that are coded together.
    pub(crate) unit: (usize, usize),
    /// Where the file says how many rows there are.
    pub(crate) height_at: usize,
    /// Whether all of a row's data come before the next row's.
    pub(crate) by_rows: bool,
}

/// Reads the segments up to the first pixels; `None` for anything but 8-bit pictures of one or three channels.
pub(crate) fn header(bytes: &[u8]) -> Option<Header> {
    let (mut header, mut orientation) = (None::<Header>, None);
    let mut rest = bytes.strip_prefix(&[0xff, 0xd8])?;
    loop {
        // Any number of fill bytes before a marker.
        let marker;
        (marker, rest) = match rest {
            [0xff, 0xff, ..] => {
                rest = &rest[1..];
                continue;
            }
            [0xff, marker, rest @ ..] => (*marker, rest),
            _ => return None,
        };
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
        let at = bytes.len() - rest.len();
        let segment = rest.get(2..length)?;
        rest = rest.get(length..)?;
        match marker {
            // Baseline, extended and progressive, coded with Huffman's codes.
            0xc0..=0xc2 => {
                let [8, h0, h1, w0, w1, components @ (1 | 3), factors @ ..] = segment else { return None };
                let count = usize::from(*components);
                let factors = factors.get(..3 * count)?.as_chunks::<3>().0;
                let most = |shift: u8| factors.iter().map(|factor| usize::from(factor[1] >> shift & 15)).max();
                let unit = if count == 1 { (8, 8) } else { (most(0)? * 8, most(4)? * 8) };
                let (height, width) = (u16::from_be_bytes([*h0, *h1]), u16::from_be_bytes([*w0, *w1]));
                if height == 0 || width == 0 || unit.0 == 0 || unit.1 == 0 {
                    return None;
                }
                header = Some(Header {
                    height: height.into(),
                    width: width.into(),
                    components: count,
                    unit,
                    orientation: Orientation::NoTransforms,
                    height_at: at + 3,
                    by_rows: marker != 0xc2,
                });
            }
            0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return None,
            0xe1 => {
                let exif = || segment.strip_prefix(b"Exif\0\0").and_then(Orientation::from_exif_chunk);
                orientation = orientation.or_else(exif);
            }
            // The first scan.
            0xda => {
                let mut header = header?;
                header.by_rows &= segment.first().is_some_and(|count| usize::from(*count) == header.components);
                header.orientation = orientation.unwrap_or(Orientation::NoTransforms);
                return Some(header);
            }
            _ => (),
        }
    }
}
