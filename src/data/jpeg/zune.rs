//! In pure Rust, by zune-jpeg.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Header, Part};
use crate::data::transform::CropBox;

/// Decodes the rows of `window`, all columns and all rows above; whether it could.
pub(super) fn decode(bytes: &[u8], header: &Header, window: CropBox, part: &mut Part) -> bool {
    // The decoder knows only whole pictures: it is given one that ends where the window does.
    let rows = if header.by_rows { window.top + window.height } else { header.height };
    if rows == header.height {
        return decode_rows(bytes, header, rows, part);
    }
    let mut shorter = std::mem::take(&mut part.scratch);
    shorter.clear();
    shorter.extend_from_slice(bytes);
    if let Some(height) = shorter.get_mut(header.height_at..header.height_at + 2) {
        height.copy_from_slice(&(rows as u16).to_be_bytes());
    }
    let decoded = decode_rows(&shorter, header, rows, part);
    part.scratch = shorter;
    decoded
}

fn decode_rows(bytes: &[u8], header: &Header, rows: usize, part: &mut Part) -> bool {
    let (space, channels) = if header.components == 1 { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(space);
    (part.top, part.left) = (0, 0);
    (part.image.height, part.image.width) = (rows, header.width);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    crate::data::zeros(&mut part.image.pixels, rows * header.width * channels).is_ok()
        && decoder.decode_headers().is_ok()
        && decoder.output_buffer_size() == Some(part.image.pixels.len())
        && decoder.decode_into(&mut part.image.pixels).is_ok()
}
