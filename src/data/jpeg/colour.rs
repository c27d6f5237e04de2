//! Halved chroma made whole (the triangle filter of the JPEG group's library), and luma and chroma made red, green and blue.

use super::baseline::Plane;

/// A row of each chroma channel, whole, and what lies between the two directions of the filter.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines {
    blue: Vec<u8>,
    red: Vec<u8>,
    between: Vec<i16>,
}

/// To interleaved pixels as wide and high as the first channel.
pub(super) fn convert(out: &mut [u8], planes: [Plane<'_>; 3], lines: &mut Lines, transformed: bool) {
    pulp::Arch::new().dispatch(Conversion { out, planes, lines, transformed });
}

struct Conversion<'a> {
    out: &'a mut [u8],
    planes: [Plane<'a>; 3],
    lines: &'a mut Lines,
    transformed: bool,
}

impl pulp::WithSimd for Conversion<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { out, planes: [luma, blue, red], lines, transformed } = self;
        let width = luma.width;
        for (y, out) in out.chunks_exact_mut(width * 3).enumerate() {
            let first = &luma.bytes[y * luma.stride..][..width];
            if blue.width == width && blue.height == luma.height {
                let second = &blue.bytes[y * blue.stride..][..width];
                let third = &red.bytes[y * red.stride..][..width];
                if transformed {
                    colours(out, first, second, third);
                } else {
                    for (out, ((a, b), c)) in
                        out.as_chunks_mut::<3>().0.iter_mut().zip(first.iter().zip(second).zip(third))
                    {
                        *out = [*a, *b, *c];
                    }
                }
                continue;
            }
            let Lines { blue: second, red: third, between } = &mut *lines;
            for (plane, line) in [(blue, &mut *second), (red, &mut *third)] {
                line.resize(2 * plane.width, 0);
                if plane.height == luma.height {
                    across(&plane.bytes[y * plane.stride..][..plane.width], line);
                } else {
                    // The nearer row counts three times.
                    let near = y / 2;
                    let far = if y % 2 == 0 { near.saturating_sub(1) } else { (near + 1).min(plane.height - 1) };
                    let row = |y: usize| &plane.bytes[y * plane.stride..][..plane.width];
                    between.clear();
                    between.extend(row(near).iter().zip(row(far)).map(|(n, f)| 3 * i16::from(*n) + i16::from(*f)));
                    across_both(between, line);
                }
            }
            colours(out, first, &second[..width], &third[..width]);
        }
    }
}

/// Twice as many, each three parts of the nearer one and one of the other neighbour.
#[inline(always)]
fn across(from: &[u8], to: &mut [u8]) {
    let pairs = to.as_chunks_mut::<2>().0;
    let at = |x: usize| u16::from(from[x]);
    let last = from.len() - 1;
    for (three, pair) in from.windows(3).zip(pairs[1..].iter_mut()) {
        let (before, here, after) = (u16::from(three[0]), u16::from(three[1]), u16::from(three[2]));
        *pair = [((3 * here + before + 1) >> 2) as u8, ((3 * here + after + 2) >> 2) as u8];
    }
    pairs[0] = [from[0], ((3 * at(0) + at(1.min(last)) + 2) >> 2) as u8];
    pairs[last] = [((3 * at(last) + at(last.saturating_sub(1)) + 1) >> 2) as u8, from[last]];
}

/// The same of four times the value.
#[inline(always)]
fn across_both(from: &[i16], to: &mut [u8]) {
    let pairs = to.as_chunks_mut::<2>().0;
    let last = from.len() - 1;
    for (three, pair) in from.windows(3).zip(pairs[1..].iter_mut()) {
        *pair = [((3 * three[1] + three[0] + 8) >> 4) as u8, ((3 * three[1] + three[2] + 7) >> 4) as u8];
    }
    pairs[0] = [((4 * from[0] + 8) >> 4) as u8, ((3 * from[0] + from[1.min(last)] + 7) >> 4) as u8];
    let (before, here) = (from[last.saturating_sub(1)], from[last]);
    pairs[last] = [((3 * here + before + 8) >> 4) as u8, ((4 * here + 7) >> 4) as u8];
}

/// Pixels that are converted together.
const PIXELS: usize = 32;

#[inline(always)]
fn colours(out: &mut [u8], luma: &[u8], blue: &[u8], red: &[u8]) {
    let width = luma.len();
    let (mut at, mut rgb) = (0, [[0; PIXELS]; 3]);
    while at < width {
        // The last ones once more where there are no more.
        let start = at.min(width.saturating_sub(PIXELS));
        let chunk = |line: &[u8]| line[start..].first_chunk::<PIXELS>().copied();
        if let (Some(y), Some(b), Some(r)) = (chunk(luma), chunk(blue), chunk(red)) {
            for x in 0..PIXELS {
                let [red, green, blue] = colour(y[x], b[x], r[x]);
                (rgb[0][x], rgb[1][x], rgb[2][x]) = (red, green, blue);
            }
            let [red, green, blue] = &rgb;
            let out = &mut out[start * 3..(start + PIXELS) * 3];
            for (x, out) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                *out = [red[x], green[x], blue[x]];
            }
        } else {
            for (x, out) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                *out = colour(luma[x], blue[x], red[x]);
            }
            return;
        }
        at = start + PIXELS;
    }
}

/// `round(x * 2^16)`.
const fn fixed(x: f64) -> i32 {
    (x * 65536.0 + 0.5) as i32
}

/// ITU-R 601 at full range, in 16 bits behind the point.
#[inline(always)]
fn colour(luma: u8, blue: u8, red: u8) -> [u8; 3] {
    let (luma, blue, red) = (i32::from(luma), i32::from(blue) - 128, i32::from(red) - 128);
    let half = 1 << 15;
    let level = |value: i32| value.clamp(0, 255) as u8;
    [
        level(luma + ((const { fixed(1.402) } * red + half) >> 16)),
        level(luma + ((half - const { fixed(0.344_14) } * blue - const { fixed(0.714_14) } * red) >> 16)),
        level(luma + ((const { fixed(1.772) } * blue + half) >> 16)),
    ]
}
