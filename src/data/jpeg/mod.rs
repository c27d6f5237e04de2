//! JPEG files by parts: what of a picture a crop does not show is decoded only as far as the format demands.
//!
//! Decoders go through a picture from its top, and here stop below the crop. The pure-Rust one decodes what lies above and beside
//! it too; libjpeg-turbo (feature `turbojpeg`) only unpacks that, without transforming and colouring it. What is decoded is what
//! the whole picture would show there; but damage behind the last row that is needed goes unnoticed.

use image::metadata::Orientation;

use crate::data::decode::Image;
use crate::data::transform::CropBox;

#[cfg(feature = "turbojpeg")]
mod turbo;
#[cfg(not(feature = "turbojpeg"))]
mod zune;

#[cfg(feature = "turbojpeg")]
use turbo as decoder;
#[cfg(not(feature = "turbojpeg"))]
use zune as decoder;

/// What the segments before the pixels say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) height: usize,
    pub(super) width: usize,
    /// How it is to be turned when it is shown.
    pub(super) orientation: Orientation,
    /// 1 or 3.
    components: usize,
    /// Rows and columns of the blocks that are coded together.
    unit: (usize, usize),
    /// Where the file says how many rows there are.
    height_at: usize,
    /// Whether all of a row's data come before the next row's.
    by_rows: bool,
}

/// The part of a picture that was decoded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// Its pixels.
    pub(crate) image: Image,
    /// The row of the whole picture that it begins with.
    pub(crate) top: usize,
    /// And the column.
    pub(crate) left: usize,
    /// Rows of the whole picture.
    pub(crate) height: usize,
    /// Columns of the whole picture.
    pub(crate) width: usize,
    /// A file that ends where the part does.
    shorter: Vec<u8>,
}

impl Part {
    /// A box of the whole picture, which must be in this part, as one of the part.
    pub(crate) fn inside(&self, crop: CropBox) -> CropBox {
        CropBox { top: crop.top.saturating_sub(self.top), left: crop.left.saturating_sub(self.left), ..crop }
    }
}

impl From<Image> for Part {
    fn from(image: Image) -> Self {
        Self { height: image.height, width: image.width, image, ..Self::default() }
    }
}

/// Decodes `crop` of a picture with this header, and perhaps more of it, into `part`, with 1 or 3 channels, not turned. Whether
/// it could: damaged files and rare kinds are left to the decoder of whole pictures, which knows what to say of them.
pub(super) fn decode(bytes: &[u8], header: &Header, crop: CropBox, part: &mut Part) -> bool {
    (part.height, part.width) = (header.height, header.width);
    part.image.channels = header.components;
    let window = window(header, crop);
    let end = window.top + window.height;
    if !header.by_rows || end == header.height {
        return decoder::decode(bytes, header, window, part);
    }
    // Decoders know only whole pictures: they are given one that ends where the window does.
    let mut shorter = std::mem::take(&mut part.shorter);
    shorter.clear();
    shorter.extend_from_slice(bytes);
    if let Some(height) = shorter.get_mut(header.height_at..header.height_at + 2) {
        height.copy_from_slice(&(end as u16).to_be_bytes());
    }
    let decoded = decoder::decode(&shorter, &Header { height: end, ..*header }, window, part);
    part.shorter = shorter;
    decoded
}

/// The blocks that a crop needs: those it lies in, and one more to each side where the chroma of a pixel depends on its
/// neighbours'.
fn window(header: &Header, crop: CropBox) -> CropBox {
    let along = |start: usize, length: usize, unit: usize, size: usize| {
        let margin = if header.unit == (8, 8) { 0 } else { 1 };
        let first = (start / unit).saturating_sub(margin) * unit;
        let end = (((start + length).div_ceil(unit) + margin) * unit).min(size);
        (first, end - first)
    };
    let (top, height) = along(crop.top, crop.height, header.unit.0, header.height);
    let (left, width) = along(crop.left, crop.width, header.unit.1, header.width);
    CropBox { top, left, height, width }
}

/// Reads the segments up to the first pixels; `None` for anything but 8-bit pictures of one or three channels.
pub(super) fn header(bytes: &[u8]) -> Option<Header> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn jpeg(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
        picture.write_to(&mut bytes, image::ImageFormat::Jpeg).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn headers_say_what_is_there_and_cut_ones_nothing() {
        let bytes = jpeg(40, 30);
        let found = header(&bytes).unwrap();
        assert_eq!((found.height, found.width, found.components), (30, 40, 3));
        let pixels = bytes.windows(2).position(|two| two == [0xff, 0xda]).unwrap();
        for length in 0..pixels + 2 {
            assert_eq!(header(&bytes[..length]), None, "cut to {length}");
        }
    }

    /// What is decoded for a crop is what the whole picture shows there, whatever the kind of file and decoder.
    #[test]
    fn parts_are_those_of_the_whole() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/jpeg");
        let mut random = crate::random::RandomStream::new(1, 0, 0, 255);
        let mut below = |bound: usize| random.next_u32() as usize % bound;
        let (mut part, mut count) = (Part::default(), 0);
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let Some(header) = header(&bytes) else { continue };
            let Header { height, width, components, .. } = header;
            let mut whole = Part::default();
            if !decode(&bytes, &header, CropBox { top: 0, left: 0, height, width }, &mut whole) {
                continue;
            }
            for _ in 0..50 {
                let (top, left) = (below(height), below(width));
                let crop = CropBox { top, left, height: 1 + below(height - top), width: 1 + below(width - left) };
                assert!(decode(&bytes, &header, crop, &mut part));
                let inside = part.inside(crop);
                let row = |image: &Image, top: usize, left: usize| {
                    let start = (top * image.width + left) * components;
                    image.pixels[start..start + crop.width * components].to_vec()
                };
                for y in 0..crop.height {
                    let found = row(&part.image, inside.top + y, inside.left);
                    assert_eq!(found, row(&whole.image, top + y, left), "{} {crop:?} row {y}", path.display());
                }
                count += 1;
            }
        }
        assert!(count >= 1000, "{count}");
    }

    #[test]
    fn windows_cover_crops_in_whole_blocks() {
        let orientation = Orientation::NoTransforms;
        let header =
            Header { height: 100, width: 50, orientation, components: 3, unit: (8, 8), height_at: 0, by_rows: true };
        let crop = CropBox { top: 9, left: 16, height: 7, width: 34 };
        assert_eq!(window(&header, crop), CropBox { top: 8, left: 16, height: 8, width: 34 });
        let header = Header { unit: (16, 16), ..header };
        assert_eq!(window(&header, crop), CropBox { top: 0, left: 0, height: 32, width: 50 });
    }
}
