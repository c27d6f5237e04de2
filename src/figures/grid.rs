//! Pictures side by side, with captions.

use std::path::Path;

use crate::figures::canvas::{Canvas, FONTS, INK, cell, wrap};
use crate::{Error, Result};

/// Cells are enlarged by a whole factor until their longer side has as many pixels.
const LEAST_SIDE: usize = 160;
const MARGIN: usize = 12;
const GAP: usize = 8;
const PAPER: [u8; 3] = [255, 255, 255];
const HIDDEN: [u8; 3] = [168, 168, 168];

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    /// `[H, W, C]`.
    Bytes(&'a [u8]),
    /// `[H, W, C]`, 0 to 1.
    Floats(&'a [f32]),
    /// `[C, H, W]`, 0 to 1.
    Planes(&'a [f32]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(values) => values.len(),
            Self::Floats(values) | Self::Planes(values) => values.len(),
        }
    }
}

/// A mask `[L]` over patches of some size.
#[derive(Clone, Copy, Debug)]
struct Patches<'a> {
    mask: &'a [f32],
    height: usize,
    width: usize,
}

/// A picture to show, borrowed: one channel is shown as grey, three as RGB, four as RGBA over a chequerboard; of other
/// numbers the first three (or the only one before the third) are shown.
#[derive(Clone, Copy, Debug)]
pub struct PictureRef<'a> {
    values: Values<'a>,
    height: usize,
    width: usize,
    channels: usize,
    hidden: Option<Patches<'a>>,
    visible: Option<(Values<'a>, Patches<'a>)>,
}

impl<'a> PictureRef<'a> {
    fn new(values: Values<'a>, height: usize, width: usize, channels: usize) -> Self {
        Self { values, height, width, channels, hidden: None, visible: None }
    }

    /// Bytes `[height, width, channels]`.
    #[must_use]
    pub fn bytes(values: &'a [u8], height: usize, width: usize, channels: usize) -> Self {
        Self::new(Values::Bytes(values), height, width, channels)
    }

    /// Numbers `[height, width, channels]` from 0 to 1; what lies outside is clipped.
    #[must_use]
    pub fn floats(values: &'a [f32], height: usize, width: usize, channels: usize) -> Self {
        Self::new(Values::Floats(values), height, width, channels)
    }

    /// Numbers `[channels, height, width]` from 0 to 1; what lies outside is clipped.
    #[must_use]
    pub fn planes(values: &'a [f32], height: usize, width: usize, channels: usize) -> Self {
        Self::new(Values::Planes(values), height, width, channels)
    }

    /// Greys out the patches whose `mask` `[L]` is not 0.
    #[must_use]
    pub fn masked(mut self, mask: &'a [f32], patch_height: usize, patch_width: usize) -> Self {
        self.hidden = Some(Patches { mask, height: patch_height, width: patch_width });
        self
    }

    /// Shows `original`, a picture of the same size, where `mask` `[L]` is 0, and this one elsewhere.
    #[must_use]
    pub fn pasted_on(
        mut self,
        original: PictureRef<'a>,
        mask: &'a [f32],
        patch_height: usize,
        patch_width: usize,
    ) -> Self {
        self.visible = Some((original.values, Patches { mask, height: patch_height, width: patch_width }));
        self
    }

    fn check(&self) -> Result<()> {
        let length = self.height.checked_mul(self.width).and_then(|n| n.checked_mul(self.channels));
        let layout = format!("{}x{}x{} values, at least one", self.height, self.width, self.channels);
        for values in [Some(self.values), self.visible.map(|visible| visible.0)].into_iter().flatten() {
            if length != Some(values.len()) || values.len() == 0 {
                return Err(Error::shape("Grid::row", "picture", layout, format!("{} values", values.len())));
            }
        }
        for patches in [self.hidden, self.visible.map(|visible| visible.1)].into_iter().flatten() {
            let Patches { mask, height, width } = patches;
            let fits =
                height > 0 && width > 0 && self.height.is_multiple_of(height) && self.width.is_multiple_of(width);
            if !fits || mask.len() != (self.height / height) * (self.width / width) {
                return Err(Error::shape(
                    "Grid::row",
                    "mask",
                    format!("one number per patch of {height}x{width} in {}x{} pixels", self.height, self.width),
                    format!("{} numbers", mask.len()),
                ));
            }
        }
        Ok(())
    }

    /// RGB bytes `[height, width, 3]`.
    fn render(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.height * self.width * 3);
        let hides = |patches: &Patches<'_>, y: usize, x: usize| {
            patches.mask[y / patches.height * (self.width / patches.width) + x / patches.width] != 0.0
        };
        for y in 0..self.height {
            for x in 0..self.width {
                let values = match &self.visible {
                    Some((original, patches)) if !hides(patches, y, x) => *original,
                    _ => self.values,
                };
                let pixel = match &self.hidden {
                    Some(patches) if hides(patches, y, x) => HIDDEN,
                    _ => self.pixel(values, y, x),
                };
                out.extend(pixel);
            }
        }
        out
    }

    fn pixel(&self, values: Values<'_>, y: usize, x: usize) -> [u8; 3] {
        let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0).round() as u8;
        let at = |channel: usize| match values {
            Values::Bytes(values) => values[(y * self.width + x) * self.channels + channel],
            Values::Floats(values) => byte(values[(y * self.width + x) * self.channels + channel]),
            Values::Planes(values) => byte(values[(channel * self.height + y) * self.width + x]),
        };
        match self.channels {
            1 | 2 => [at(0); 3],
            4 => {
                let even = (x * 16 / self.width + y * 16 / self.height).is_multiple_of(2);
                let square = if even { 255_u32 } else { 208 };
                let alpha = u32::from(at(3));
                [0, 1, 2].map(|c| ((u32::from(at(c)) * alpha + square * (255 - alpha) + 127) / 255) as u8)
            }
            _ => [at(0), at(1), at(2)],
        }
    }
}

#[derive(Clone, Debug)]
struct Cell {
    pixels: Vec<u8>,
    width: usize,
    height: usize,
    factor: usize,
}

/// A sheet of pictures: captions above the columns, a label beside each row, notes below.
///
/// ```
/// use vitmae::figures::{Grid, PictureRef};
///
/// let picture = vec![128_u8; 32 * 32 * 3];
/// let mask = [0.0, 1.0, 1.0, 0.0];
/// let original = PictureRef::bytes(&picture, 32, 32, 3);
/// let mut grid = Grid::new(&["original", "masked"]);
/// grid.row("a.jpg", &[original, original.masked(&mask, 16, 16)])?;
/// grid.footer("mask ratio 0.5");
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("grid.png");
/// grid.save(&path)?;
/// # Ok::<(), vitmae::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Grid {
    columns: Vec<String>,
    rows: Vec<(String, Vec<Cell>)>,
    footer: Vec<String>,
}

impl Grid {
    /// A sheet with these captions and no rows yet.
    #[must_use]
    pub fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(ToString::to_string).collect(), rows: Vec::new(), footer: Vec::new() }
    }

    /// Adds a row, of at most as many pictures as there are columns.
    ///
    /// # Errors
    /// [`Error::Shape`] for pictures or masks of another length than their size says, or too many pictures.
    pub fn row(&mut self, label: &str, pictures: &[PictureRef<'_>]) -> Result<&mut Self> {
        if pictures.len() > self.columns.len() {
            let expected = format!("at most {}", self.columns.len());
            return Err(Error::shape("Grid::row", "pictures", expected, pictures.len()));
        }
        let mut cells = Vec::with_capacity(pictures.len());
        for picture in pictures {
            picture.check()?;
            let factor = LEAST_SIDE.div_ceil(picture.height.max(picture.width));
            cells.push(Cell { pixels: picture.render(), width: picture.width, height: picture.height, factor });
        }
        self.rows.push((label.to_owned(), cells));
        Ok(self)
    }

    /// Adds a note below the pictures on how they were made; each begins a line.
    pub fn footer(&mut self, text: &str) -> &mut Self {
        self.footer.push(text.to_owned());
        self
    }

    /// Writes a PNG; an existing file is replaced in one step.
    ///
    /// # Errors
    /// [`Error::Value`] for a sheet without rows, [`Error::Io`] when it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let pictures = self.rows.iter().map(|row| row.1.len()).sum::<usize>();
        if pictures == 0 {
            return Err(Error::value("grid", "it has no pictures yet; add a row"));
        }
        self.draw().save(path.as_ref())
    }

    fn draw(&self) -> Canvas {
        let cells = || self.rows.iter().flat_map(|row| &row.1);
        let cell_width = cells().map(|cell| cell.width * cell.factor).max().unwrap_or(LEAST_SIDE);
        let columns = self.columns.len();

        // Captions: the largest font in which all of them take at most two lines without being cut.
        let captions_in = |font| -> Vec<Vec<String>> {
            self.columns.iter().map(|caption| wrap(caption, cell_width / cell(font).0, 2)).collect()
        };
        let uncut = |font| !captions_in(font).iter().flatten().any(|line| line.ends_with('…'));
        let caption_font = FONTS[..4].iter().find(|font| uncut(font)).copied().unwrap_or(FONTS[3]);
        let captions = captions_in(caption_font);
        let caption_lines = captions.iter().map(Vec::len).max().unwrap_or(0);

        let label_font = FONTS[2];
        let (letter, line) = cell(label_font);
        let longest = self.rows.iter().map(|row| row.0.chars().count()).max().unwrap_or(0);
        let label_columns = longest.min(18);
        let gutter = if label_columns == 0 { 0 } else { label_columns * letter + GAP };

        let width = 2 * MARGIN + gutter + columns * cell_width + columns.saturating_sub(1) * GAP;
        let footer_font = FONTS[2];
        let footer_columns = (width - 2 * MARGIN) / cell(footer_font).0;
        let footer: Vec<String> = self.footer.iter().flat_map(|note| wrap(note, footer_columns, 6)).collect();
        let row_height =
            |row: &(String, Vec<Cell>)| row.1.iter().map(|cell| cell.height * cell.factor).max().unwrap_or(line);
        let rows_height: usize = self.rows.iter().map(|row| row_height(row) + GAP).sum();
        let captions_height = if caption_lines == 0 { 0 } else { caption_lines * cell(caption_font).1 + GAP / 2 };
        let footer_height = if footer.is_empty() { 0 } else { footer.len() * (cell(footer_font).1 + 2) + GAP / 2 };
        let mut canvas = Canvas::new(width, 2 * MARGIN + captions_height + rows_height + footer_height, PAPER);

        let left_of = |column: usize| MARGIN + gutter + column * (cell_width + GAP);
        for (column, lines) in captions.iter().enumerate() {
            // Captions of fewer lines sit on the pictures.
            let first = caption_lines - lines.len();
            for (number, text) in lines.iter().enumerate() {
                let (letter, line) = cell(caption_font);
                let free = cell_width.saturating_sub(text.chars().count() * letter);
                canvas.text((left_of(column) + free / 2, MARGIN + (first + number) * line), text, caption_font, INK);
            }
        }
        let mut top = MARGIN + captions_height;
        for row in &self.rows {
            let height = row_height(row);
            let lines = wrap(&row.0, label_columns, (height / line).max(1));
            let start = top + height.saturating_sub(lines.len() * line) / 2;
            for (number, text) in lines.iter().enumerate() {
                canvas.text((MARGIN, start + number * line), text, label_font, INK);
            }
            for (column, cell) in row.1.iter().enumerate() {
                let left = left_of(column) + (cell_width - cell.width * cell.factor) / 2;
                let above = (height - cell.height * cell.factor) / 2;
                canvas.paste((left, top + above), &cell.pixels, cell.width, cell.factor);
            }
            top += height + GAP;
        }
        for (number, text) in footer.iter().enumerate() {
            let at = top + GAP / 2 + number * (cell(footer_font).1 + 2);
            canvas.text((MARGIN, at), text, footer_font, INK);
        }
        canvas
    }
}
