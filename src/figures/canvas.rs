//! A sheet of RGB pixels with text on it.

use std::convert::Infallible;
use std::io::Cursor;
use std::path::Path;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::iso_8859_1::{FONT_5X8, FONT_6X10, FONT_7X13, FONT_8X13, FONT_9X15};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics::{Drawable, prelude::WebColors};
use image::ImageEncoder;

use crate::files::write_atomically;
use crate::{Error, Result};

/// Fonts from large to small.
pub(super) const FONTS: [&MonoFont<'static>; 5] = [&FONT_9X15, &FONT_8X13, &FONT_7X13, &FONT_6X10, &FONT_5X8];

/// Text.
pub(super) const INK: Rgb888 = Rgb888::CSS_DARK_SLATE_GRAY;

/// `[height, width, 3]`.
#[derive(Clone, Debug)]
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, [red, green, blue]: [u8; 3]) -> Self {
        let mut pixels = vec![0; width * height * 3];
        for pixel in pixels.as_chunks_mut::<3>().0 {
            *pixel = [red, green, blue];
        }
        Self { width, height, pixels }
    }

    /// A filled rectangle, clipped.
    pub(super) fn fill(&mut self, (left, top): (usize, usize), (width, height): (usize, usize), color: [u8; 3]) {
        let right = (left + width).min(self.width);
        for y in top..(top + height).min(self.height) {
            for pixel in self.row_mut(y, left.min(right), right) {
                *pixel = color;
            }
        }
    }

    /// Pixels `[height, width, 3]` enlarged by a whole factor, clipped.
    pub(super) fn paste(&mut self, (left, top): (usize, usize), pixels: &[u8], width: usize, factor: usize) {
        let rows = pixels.as_chunks::<3>().0;
        for (y, row) in rows.chunks_exact(width.max(1)).enumerate() {
            for copy in 0..factor {
                let at = top + y * factor + copy;
                if at >= self.height {
                    return;
                }
                let right = (left + width * factor).min(self.width);
                for (x, pixel) in self.row_mut(at, left.min(right), right).iter_mut().enumerate() {
                    *pixel = row[x / factor];
                }
            }
        }
    }

    fn row_mut(&mut self, y: usize, left: usize, right: usize) -> &mut [[u8; 3]] {
        let start = y * self.width;
        &mut self.pixels.as_chunks_mut::<3>().0[start + left..start + right]
    }

    /// One line of text from its top left corner. Fonts are Latin-1: what they lack appears as a question mark, except for
    /// the ellipsis, which is drawn.
    pub(super) fn text(
        &mut self,
        (left, top): (usize, usize),
        text: &str,
        font: &'static MonoFont<'static>,
        ink: Rgb888,
    ) {
        let cell = cell(font);
        for (column, character) in text.chars().enumerate() {
            let x = left + column * cell.0;
            if character == '…' {
                let third = cell.0 / 3;
                for dot in 0..3 {
                    let at = (x + dot * third + third / 2, top + font.baseline as usize - 1);
                    self.fill(at, (1, 1), [ink.r(), ink.g(), ink.b()]);
                }
                continue;
            }
            let mut buffer = [0; 4];
            let style = MonoTextStyle::new(font, ink);
            let at = Point::new(x as i32, top as i32);
            // Drawing on pixels in memory cannot fail.
            let _ = Text::with_baseline(character.encode_utf8(&mut buffer), at, style, Baseline::Top).draw(self);
        }
    }

    /// Writes a PNG.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let mut bytes = Cursor::new(Vec::new());
        let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(&self.pixels, size(self.width), size(self.height), image::ExtendedColorType::Rgb8)
            .map_err(|error| Error::Picture {
                path: path.to_path_buf(),
                problem: format!("cannot be encoded: {error}"),
            })?;
        write_atomically(path, |file| file.bytes(bytes.get_ref()))
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.width as u32, self.height as u32)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> std::result::Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            let (Ok(x), Ok(y)) = (usize::try_from(at.x), usize::try_from(at.y)) else { continue };
            if x < self.width && y < self.height {
                self.row_mut(y, x, x + 1)[0] = [color.r(), color.g(), color.b()];
            }
        }
        Ok(())
    }
}

/// Width and height of a character, with the space to the next.
pub(super) fn cell(font: &MonoFont<'_>) -> (usize, usize) {
    ((font.character_size.width + font.character_spacing) as usize, font.character_size.height as usize)
}

/// Breaks text into lines of at most `columns` characters, after spaces and `/ _ - ,` where it can; what does not fit in
/// `lines` lines ends in an ellipsis.
pub(super) fn wrap(text: &str, columns: usize, lines: usize) -> Vec<String> {
    let columns = columns.max(1);
    let characters: Vec<char> = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut rest = &characters[..];
    let mut out: Vec<String> = Vec::new();
    while !rest.is_empty() && out.len() < lines {
        if rest.len() <= columns {
            out.push(rest.iter().collect());
            return out;
        }
        if out.len() + 1 == lines {
            let line: String = rest[..columns - 1].iter().collect();
            out.push(line.trim_end().to_owned() + "…");
            return out;
        }
        // A space may hang over the end; other break characters stay on the line.
        let fits = |at: usize| rest[at] == ' ' || (at < columns && matches!(rest[at], '/' | '_' | '-' | ','));
        let line = match (columns / 3..=columns).rev().find(|at| fits(*at)) {
            Some(at) => at + 1,
            None => columns,
        };
        out.push(rest[..line].iter().collect::<String>().trim_end().to_owned());
        rest = &rest[line..];
        while rest.first() == Some(&' ') {
            rest = &rest[1..];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::wrap;

    #[test]
    fn lines_break_at_words_and_end_in_an_ellipsis() {
        assert_eq!(wrap("reconstruction + visible", 30, 2), ["reconstruction + visible"]);
        assert_eq!(wrap("reconstruction + visible", 17, 2), ["reconstruction +", "visible"]);
        assert_eq!(wrap("n01530575_brambling.JPEG", 12, 2), ["n01530575_", "brambling.J…"]);
        assert_eq!(wrap("abcdefghij", 4, 2), ["abcd", "efg…"]);
        assert_eq!(wrap("", 4, 2), Vec::<String>::new());
        assert_eq!(wrap("ab", 1, 1), ["…"]);
    }
}
