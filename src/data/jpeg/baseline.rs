//! The usual JPEG: 8 bits, Huffman's codes, one scan, grey or colour, with or without halved chroma. Pixels are those of
//! libjpeg-turbo's default settings, which Pillow and torchvision use, bit for bit.
//!
//! Codes have no places to go to, so all blocks up to the last one that is needed are read; but only those of the window are
//! kept, transformed, and coloured.

use super::huffman::{Bits, Code, LOOKS};
use super::{Header, Part, colour, idct};
use crate::data::transform::CropBox;

/// Where the coefficients of a block go, in the order in which they come.
#[rustfmt::skip]
const ORDER: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// What the segments say, beyond the [`Header`].
#[derive(Default)]
struct Tables {
    /// Steps of the coefficients, in the order in which these come.
    steps: [Option<[i16; 64]>; 4],
    direct: [Option<Code>; 4],
    alternating: [Option<Code>; 4],
    components: Vec<Component>,
    /// Units between restarts; 0 for none.
    interval: usize,
    /// Where the coded blocks begin.
    start: usize,
    /// Whether there is a JFIF segment, which means luma and chroma.
    jfif: bool,
    /// What an Adobe segment says of the colours; 0 means that they are not transformed.
    adobe: Option<u8>,
    /// Red, green and blue as such.
    plain_colours: bool,
}

/// One channel.
#[derive(Clone, Copy, Default)]
struct Component {
    name: u8,
    /// Blocks of a unit, down and across.
    blocks: (usize, usize),
    steps: usize,
    direct: usize,
    alternating: usize,
}

/// Memory that is used again.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    /// The coded blocks without stuffing.
    data: Vec<u8>,
    planes: [Vec<u8>; 3],
    lines: colour::Lines,
}

/// The planes of the window.
#[derive(Clone, Copy)]
pub(super) struct Plane<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) stride: usize,
    /// Rows and columns that are in the picture.
    pub(super) height: usize,
    pub(super) width: usize,
}

/// Decodes `window`, which consists of whole units; whether it could.
pub(super) fn decode(bytes: &[u8], header: &Header, window: CropBox, part: &mut Part, scratch: &mut Scratch) -> bool {
    match Tables::read(bytes, header) {
        Some(tables) => decode_with(bytes, &tables, header, window, part, scratch).is_some(),
        None => false,
    }
}

fn decode_with(
    bytes: &[u8],
    tables: &Tables,
    header: &Header,
    window: CropBox,
    part: &mut Part,
    scratch: &mut Scratch,
) -> Option<()> {
    let (unit_height, unit_width) = header.unit;
    let units = (header.height.div_ceil(unit_height), header.width.div_ceil(unit_width));
    let rows = window.top / unit_height..(window.top + window.height).div_ceil(unit_height);
    let columns = window.left / unit_width..(window.left + window.width).div_ceil(unit_width);
    let Scratch { data, planes, lines } = scratch;

    for (component, plane) in tables.components.iter().zip(planes.iter_mut()) {
        let (down, across) = component.blocks;
        // All of it is written.
        plane.resize(rows.len() * down * columns.len() * across * 64, 0);
    }
    let last = rows.end * units.1;
    let interval = if tables.interval == 0 { last } else { tables.interval };
    let ends = without_stuffing(bytes.get(tables.start..)?, data, last.div_ceil(interval));
    let mut start = 0;
    for (run, first) in (0..last).step_by(interval).enumerate() {
        // Where runs are missing, what is left is grey.
        let end = ends.get(run).copied().unwrap_or(start);
        let data = data.get(start..end + 8)?;
        start = end + 8;
        let work = Run {
            tables,
            data,
            units: first..(first + interval).min(last),
            across: units.1,
            rows: &rows,
            columns: &columns,
        };
        pulp::Arch::new().dispatch(Work { run: work, planes });
    }

    let shown = (window.height, window.width);
    (part.top, part.left) = (window.top, window.left);
    (part.image.height, part.image.width, part.image.channels) = (shown.0, shown.1, header.components);
    part.image.pixels.resize(shown.0 * shown.1 * header.components, 0);
    let planes: Vec<Plane<'_>> = tables
        .components
        .iter()
        .zip(planes.iter())
        .map(|(component, bytes)| {
            let (down, across) = component.blocks;
            let stride = columns.len() * across * 8;
            // Of the picture's last rows and columns, those of halved channels stand for two, or for one that is left.
            let height = (shown.0 * down * 8).div_ceil(unit_height);
            let width = (shown.1 * across * 8).div_ceil(unit_width);
            Plane { bytes, stride, height, width }
        })
        .collect();
    match planes[..] {
        [grey] => {
            for (to, from) in part.image.pixels.chunks_exact_mut(grey.width).zip(grey.bytes.chunks(grey.stride)) {
                to.copy_from_slice(&from[..grey.width]);
            }
        }
        [first, second, third] => {
            let out = &mut part.image.pixels;
            colour::convert(out, [first, second, third], lines, !tables.plain_colours);
        }
        _ => return None,
    }
    Some(())
}

/// Copies coded blocks without what keeps them from looking like markers; where each run between restarts ends. Behind
/// each are eight zeros.
fn without_stuffing(bytes: &[u8], data: &mut Vec<u8>, runs: usize) -> Vec<usize> {
    data.clear();
    data.reserve(bytes.len() + 8 * (runs + 1));
    let (mut rest, mut ends) = (bytes, Vec::new());
    while ends.len() < runs {
        let whole = memchr::memchr(0xff, rest).unwrap_or(rest.len());
        data.extend_from_slice(&rest[..whole]);
        rest = &rest[whole..];
        match rest {
            [0xff, 0, behind @ ..] => {
                data.push(0xff);
                rest = behind;
            }
            // Fill bytes.
            [0xff, 0xff, ..] => rest = &rest[1..],
            [0xff, 0xd0..=0xd7, behind @ ..] => {
                ends.push(data.len());
                data.extend([0; 8]);
                rest = behind;
            }
            // Another marker, or the end.
            _ => {
                ends.push(data.len());
                data.extend([0; 8]);
                break;
            }
        }
    }
    ends
}

/// The blocks between two restarts.
struct Run<'a> {
    tables: &'a Tables,
    data: &'a [u8],
    units: std::ops::Range<usize>,
    /// Units in a row of the picture.
    across: usize,
    rows: &'a std::ops::Range<usize>,
    columns: &'a std::ops::Range<usize>,
}

struct Work<'a, 'b> {
    run: Run<'a>,
    planes: &'b mut [Vec<u8>; 3],
}

impl pulp::WithSimd for Work<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { run: Run { tables, data, units, across, rows, columns }, planes } = self;
        let mut bits = Bits::new(data);
        let mut means = [0_i32; 3];
        let mut coefficients = [0_i16; 64];
        let (mut row, mut column) = (units.start / across, units.start % across);
        for _ in units {
            let kept = rows.contains(&row) && columns.contains(&column);
            for ((component, mean), plane) in tables.components.iter().zip(&mut means).zip(planes.iter_mut()) {
                let (Some(steps), Some(direct), Some(alternating)) = (
                    &tables.steps[component.steps],
                    &tables.direct[component.direct],
                    &tables.alternating[component.alternating],
                ) else {
                    return;
                };
                let (down, wide) = component.blocks;
                let stride = columns.len() * wide * 8;
                for y in 0..down {
                    for x in 0..wide {
                        bits.refill();
                        *mean = mean.wrapping_add(direct.next(&mut bits, true).0);
                        if !kept {
                            skip(&mut bits, alternating);
                            continue;
                        }
                        let place =
                            ((row - rows.start) * down + y) * 8 * stride + ((column - columns.start) * wide + x) * 8;
                        let Some(out) = plane.get_mut(place..) else { return };
                        coefficients[0] = (*mean as i16).wrapping_mul(steps[0]);
                        if read(&mut bits, alternating, steps, &mut coefficients) {
                            idct::block(&coefficients, out, stride);
                            coefficients = [0; 64];
                        } else {
                            idct::flat(coefficients[0], out, stride);
                        }
                    }
                }
            }
            column += 1;
            if column == across {
                (row, column) = (row + 1, 0);
            }
        }
    }
}

/// Reads a block but its mean; whether anything is in it.
#[inline(always)]
fn read(bits: &mut Bits<'_>, code: &Code, steps: &[i16; 64], coefficients: &mut [i16; 64]) -> bool {
    let (mut place, mut any) = (0, false);
    loop {
        bits.refill();
        for _ in 0..LOOKS {
            let (number, step) = code.next(bits, false);
            place += step as usize;
            let (Some(step), Some(at)) = (steps.get(place), ORDER.get(place)) else { return any };
            coefficients[usize::from(*at & 63)] = (number as i16).wrapping_mul(*step);
            any = true;
            if place == 63 {
                return any;
            }
        }
    }
}

/// Passes over a block.
#[inline(always)]
fn skip(bits: &mut Bits<'_>, code: &Code) {
    let mut place = 0;
    loop {
        bits.refill();
        for _ in 0..LOOKS {
            place += code.next(bits, false).1;
            if place >= 63 {
                return;
            }
        }
    }
}

impl Tables {
    /// Reads the segments; `None` if this is not the usual kind.
    fn read(bytes: &[u8], header: &Header) -> Option<Self> {
        let mut tables = Self::default();
        let mut rest = bytes.get(2..)?;
        loop {
            let (marker, behind) = match rest {
                [0xff, 0xff, ..] => {
                    rest = &rest[1..];
                    continue;
                }
                [0xff, marker, behind @ ..] => (*marker, behind),
                _ => return None,
            };
            let length = usize::from(u16::from_be_bytes(*behind.first_chunk()?));
            let segment = behind.get(2..length)?;
            rest = behind.get(length..)?;
            match marker {
                0xc4 => tables.codes(segment)?,
                0xdb => tables.steps(segment)?,
                0xdd => tables.interval = usize::from(u16::from_be_bytes(*segment.first_chunk()?)),
                0xe0 => tables.jfif |= segment.starts_with(b"JFIF\0"),
                0xee if segment.starts_with(b"Adobe") => tables.adobe = segment.get(11).copied(),
                0xc0 | 0xc1 => {
                    for &[name, factors, steps] in segment.get(6..6 + 3 * header.components)?.as_chunks::<3>().0 {
                        let blocks = (usize::from(factors & 15), usize::from(factors >> 4));
                        tables.components.push(Component { name, blocks, steps: steps.into(), ..Component::default() });
                    }
                }
                0xda => {
                    tables.scan(segment, header)?;
                    tables.start = bytes.len() - rest.len();
                    return Some(tables);
                }
                0xc2 => return None,
                _ => (),
            }
        }
    }

    fn codes(&mut self, mut segment: &[u8]) -> Option<()> {
        while let [place, rest @ ..] = segment {
            let (counts, rest) = rest.split_first_chunk::<16>()?;
            let count = counts.iter().map(|count| usize::from(*count)).sum();
            let (symbols, rest) = rest.split_at_checked(count)?;
            let direct = place >> 4 == 0;
            let tables = if direct { &mut self.direct } else { &mut self.alternating };
            *tables.get_mut(usize::from(place & 15))? = Some(Code::new(counts, symbols, direct)?);
            segment = rest;
        }
        Some(())
    }

    fn steps(&mut self, mut segment: &[u8]) -> Option<()> {
        while let [place, rest @ ..] = segment {
            let mut steps = [0; 64];
            let long = place >> 4 != 0;
            let (numbers, rest) = rest.split_at_checked(if long { 128 } else { 64 })?;
            for (at, step) in steps.iter_mut().enumerate() {
                *step =
                    if long { i16::from_be_bytes([numbers[2 * at], numbers[2 * at + 1]]) } else { numbers[at].into() };
            }
            *self.steps.get_mut(usize::from(place & 15))? = Some(steps);
            segment = rest;
        }
        Some(())
    }

    fn scan(&mut self, segment: &[u8], header: &Header) -> Option<()> {
        let [count, rest @ ..] = segment else { return None };
        if usize::from(*count) != header.components || self.components.len() != header.components {
            return None;
        }
        let (chosen, rest) = rest.split_at_checked(2 * header.components)?;
        // All coefficients, in one go.
        if !rest.starts_with(&[0, 63, 0]) {
            return None;
        }
        for (component, &[name, codes]) in self.components.iter_mut().zip(chosen.as_chunks::<2>().0) {
            (component.direct, component.alternating) = (usize::from(codes >> 4), usize::from(codes & 15));
            let there = matches!(self.steps.get(component.steps), Some(Some(_)))
                && matches!(self.direct.get(component.direct), Some(Some(_)))
                && matches!(self.alternating.get(component.alternating), Some(Some(_)));
            if name != component.name || !there {
                return None;
            }
        }
        match &mut self.components[..] {
            // A single channel is coded block by block, whatever its factors are.
            [grey] => grey.blocks = (1, 1),
            [first, second, third] => {
                let named = [first.name, second.name, third.name] == *b"RGB";
                self.plain_colours = !self.jfif && self.adobe.map_or(named, |transform| transform == 0);
                // Luma and chroma, which may be halved across or both ways. libjpeg-turbo filters very narrow pictures
                // otherwise, and nobody halves colours.
                let halved = first.blocks != (1, 1);
                if second.blocks != (1, 1)
                    || third.blocks != (1, 1)
                    || !matches!(first.blocks, (1, 1) | (1, 2) | (2, 2))
                    || halved && (header.width <= 4 || self.plain_colours)
                {
                    return None;
                }
            }
            _ => return None,
        }
        Some(())
    }
}
