//! Colours in linear light.

use super::draws::Draws;

pub(super) type Rgb = [f32; 3];

pub(super) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t]
}

pub(super) fn scale(a: Rgb, k: f32) -> Rgb {
    [a[0] * k, a[1] * k, a[2] * k]
}

pub(super) fn times(a: Rgb, b: Rgb) -> Rgb {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

/// A colour as it is written on screens, made linear.
pub(super) fn srgb(hex: u32) -> Rgb {
    [16, 8, 0].map(|shift| {
        let value = (hex >> shift & 255) as f32 / 255.0;
        value * value
    })
}

/// Hue in turns.
pub(super) fn hsv(hue: f32, saturation: f32, value: f32) -> Rgb {
    [0.0, 2.0 / 3.0, 1.0 / 3.0].map(|offset| {
        let t = ((hue + offset).fract() * 6.0 - 3.0).abs() - 1.0;
        let v = value * (1.0 + saturation * (t.clamp(0.0, 1.0) - 1.0));
        v * v
    })
}

/// A palette's colour, varied a little.
pub(super) fn pick(draws: &mut Draws, palette: &[u32]) -> Rgb {
    let color = srgb(palette[draws.below(palette.len() as u32) as usize]);
    let brightness = draws.range(0.8, 1.2);
    [0, 1, 2].map(|c| color[c] * brightness * draws.range(0.92, 1.08))
}

pub(super) const ROCK: [u32; 4] = [0x7d7871, 0x5f5b58, 0x9a8d7c, 0x8a6f5c];
pub(super) const LEAVES: [u32; 4] = [0x3f6b2a, 0x557d33, 0x2f5a3c, 0x7a7a34];
pub(super) const WOOD: [u32; 4] = [0x8a5a34, 0xb07b4b, 0x6b4526, 0xc49a6c];
