//! JPEG files by parts: what of a picture a crop does not show is decoded only as far as the format demands.
//!
//! Decoders go through a picture from its top, and here stop below the crop. The pure-Rust one decodes what lies above and beside
//! it too; libjpeg-turbo (feature `turbojpeg`) only unpacks that, without transforming and colouring it. What is decoded is what
//! the whole picture would show there; damage after the last row that is needed goes unnoticed.

use crate::data::image::{CropBox, Part};

mod header;
#[cfg(feature = "turbojpeg")]
mod turbo;
#[cfg(not(feature = "turbojpeg"))]
mod zune;

#[cfg(feature = "turbojpeg")]
use turbo as decoder;
#[cfg(not(feature = "turbojpeg"))]
use zune as decoder;

pub(super) use header::{Header, header};

/// Decodes `crop` of a picture with this header, and perhaps more of it, into `part`, with 1 or 3 channels, not turned. Whether
/// it could: damaged files and rare kinds are left to the decoder of whole pictures, which knows what to say of them.
pub(super) fn decode(bytes: &[u8], header: &Header, crop: CropBox, part: &mut Part) -> bool {
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

#[cfg(test)]
mod tests {
    use image::metadata::Orientation;

    use super::*;
    use crate::data::image::Image;

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
