//! Smooth noise on a lattice.

/// A plane of noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Lattice(pub(super) u32);

impl Lattice {
    /// Smooth, in `[0, 1]`, one feature per unit.
    pub(super) fn value(self, x: f32, y: f32) -> f32 {
        let (ix, iy) = (floor(x), floor(y));
        let (tx, ty) = (smooth(x - ix as f32), smooth(y - iy as f32));
        let at = |dx: i32, dy: i32| unit(hash(ix.wrapping_add(dx) as u32, iy.wrapping_add(dy) as u32, self.0));
        let top = at(0, 0) + (at(1, 0) - at(0, 0)) * tx;
        let bottom = at(0, 1) + (at(1, 1) - at(0, 1)) * tx;
        top + (bottom - top) * ty
    }

    /// Without smoothness: one number per cell.
    pub(super) fn cell(self, x: f32, y: f32) -> f32 {
        unit(hash(floor(x) as u32, floor(y) as u32, self.0))
    }
}

/// Octaves of noise of falling size and strength, in `[0, 1]`: the 1/f of natural pictures.
pub(super) fn fbm(lattice: Lattice, mut x: f32, mut y: f32, octaves: u32) -> f32 {
    let (mut sum, mut weight, mut total) = (0.0, 0.5, 0.0);
    for octave in 0..octaves {
        sum += weight * Lattice(lattice.0.wrapping_add(octave.wrapping_mul(0x9e37_79b9))).value(x, y);
        total += weight;
        weight *= 0.5;
        // Turned a little, so that lattices do not line up.
        (x, y) = (1.6 * x + 1.2 * y, 1.6 * y - 1.2 * x);
    }
    sum / total
}

/// Without the call that `f32::floor` is on older processors.
pub(super) fn floor(x: f32) -> i32 {
    let whole = x as i32;
    whole - i32::from(x < whole as f32)
}

pub(super) fn smooth(t: f32) -> f32 {
    let t = t.clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// 0 below `low`, 1 above `high`, smooth between.
pub(super) fn step(low: f32, high: f32, x: f32) -> f32 {
    smooth((x - low) / (high - low))
}

pub(super) fn hash(x: u32, y: u32, seed: u32) -> u32 {
    let h = (x.wrapping_mul(0x85eb_ca6b) ^ seed).wrapping_add(y.wrapping_mul(0xc2b2_ae35));
    let h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
    h ^ (h >> 16)
}

pub(super) fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}
