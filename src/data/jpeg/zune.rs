//! In pure Rust, by zune-jpeg.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::header::Header;
use crate::data::image::{CropBox, Part, zeros};

/// Decodes the whole picture, of which `window` is a part; whether it could.
pub(super) fn decode(bytes: &[u8], header: &Header, _window: CropBox, part: &mut Part) -> bool {
    let (space, channels) = if header.components == 1 { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(space);
    (part.top, part.left) = (0, 0);
    (part.image.height, part.image.width) = (header.height, header.width);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    zeros(&mut part.image.pixels, header.height * header.width * channels).is_ok()
        && decoder.decode_headers().is_ok()
        && decoder.output_buffer_size() == Some(part.image.pixels.len())
        && decoder.decode_into(&mut part.image.pixels).is_ok()
}
