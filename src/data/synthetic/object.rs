//! Things that stand or lie in a scene: their shapes, what they are made of, and how they look in the light.

use super::color::{LEAVES, ROCK, Rgb, WOOD, hsv, mix, pick, scale};
use super::draws::Draws;
use super::noise::{Lattice, fbm, smooth, step};
use super::shapes::{Shape, tilt};

#[derive(Clone, Copy, Debug)]
enum Pattern {
    Plain,
    Marble,
    Speckle,
    Gradient,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Material {
    color: Rgb,
    other: Rgb,
    pattern: Pattern,
    gloss: f32,
    lattice: Lattice,
}

impl Material {
    /// A material of about this hue.
    pub(super) fn of_hue(draws: &mut Draws, hue: f32) -> Self {
        let color = hsv(hue, draws.range(0.35, 0.95), draws.range(0.55, 0.95));
        let other = hsv(hue + draws.range(-0.12, 0.12), draws.range(0.2, 0.8), draws.range(0.35, 0.95));
        let pattern = match draws.below(6) {
            0 => Pattern::Marble,
            1 => Pattern::Speckle,
            2 | 3 => Pattern::Gradient,
            _ => Pattern::Plain,
        };
        Self { color, other, pattern, gloss: draws.range(0.0, 0.7), lattice: Lattice(draws.word()) }
    }

    fn color(&self, x: f32, y: f32) -> Rgb {
        let grain = 0.9 + 0.2 * fbm(self.lattice, x * 9.0, y * 9.0, 2);
        let base = match self.pattern {
            Pattern::Plain => self.color,
            Pattern::Gradient => mix(self.color, self.other, smooth(y * 0.5 + 0.5)),
            Pattern::Marble => mix(self.color, self.other, step(0.42, 0.58, fbm(self.lattice, x * 2.5, y * 2.5, 4))),
            Pattern::Speckle => mix(self.color, self.other, step(0.62, 0.7, self.lattice.value(x * 7.0, y * 7.0))),
        };
        scale(base, grain)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Object {
    pub(super) shape: Shape,
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) radius: f32,
    cos: f32,
    sin: f32,
    /// The row in which it stands.
    pub(super) base: f32,
    /// The width of the rounded edge, of the radius.
    bevel: f32,
    material: Material,
}

impl Object {
    /// A thing at `(x, y)`, a little tilted.
    pub(super) fn new(draws: &mut Draws, shape: Shape, x: f32, y: f32, radius: f32, material: Material) -> Self {
        let most = tilt(shape);
        let (sin, cos) = draws.range(-most, most).sin_cos();
        let bevel = match shape {
            Shape::Disc => draws.range(0.2, 1.0),
            Shape::Ring | Shape::Post => 0.22,
            Shape::Rock(_) | Shape::Bush(_) => 0.6,
            _ => draws.range(0.08, 0.22),
        };
        Self { shape, x, y, radius, cos, sin, base: y + radius * shape.bottom(cos, sin), bevel, material }
    }

    /// A smaller thing that is not a class, mostly beside the main object.
    pub(super) fn bystander(
        draws: &mut Draws,
        main: &Self,
        horizon: f32,
        half_width: f32,
        half_height: f32,
        above: bool,
    ) -> Self {
        let lattice = Lattice(draws.word());
        let (shape, palette) = match draws.below(if above { 1 } else { 3 }) {
            0 => (Shape::Rock(lattice), &ROCK),
            1 => (Shape::Bush(lattice), &LEAVES),
            _ => (Shape::Post, &WOOD),
        };
        let radius = main.radius * if shape == Shape::Post { draws.range(0.7, 1.2) } else { draws.range(0.2, 0.5) };
        let color = pick(draws, palette);
        let material = Material {
            color,
            other: scale(color, draws.range(0.4, 0.7)),
            pattern: Pattern::Marble,
            gloss: 0.0,
            lattice,
        };
        // Beside: its middle stays out of the middle of the main object.
        let away = draws.range(0.75, 1.7) * main.radius * if draws.chance(0.5) { 1.0 } else { -1.0 };
        let x = (main.x + away).clamp(-half_width, half_width);
        let y = if above { draws.range(-half_height, half_height) } else { 0.0 };
        let mut object = Self::new(draws, shape, x, y, radius, material);
        if !above {
            // Stand it on the ground, behind or before.
            let base = draws.range((horizon + 0.03).max(main.base - 0.25), (main.base + 0.12).min(half_height + 0.05));
            object.y += base - object.base;
            object.base = base;
        }
        object
    }

    /// Its own coordinates.
    fn local(&self, x: f32, y: f32) -> (f32, f32) {
        let (x, y) = ((x - self.x) / self.radius, (y - self.y) / self.radius);
        (x * self.cos + y * self.sin, y * self.cos - x * self.sin)
    }

    pub(super) fn distance(&self, x: f32, y: f32) -> f32 {
        let (lx, ly) = self.local(x, y);
        self.shape.distance(lx, ly) * self.radius
    }

    /// Colour of the surface under the light.
    pub(super) fn shade(&self, x: f32, y: f32, distance: f32, light: &Light) -> Rgb {
        let (lx, ly) = self.local(x, y);
        let bevel = self.bevel * self.radius;
        let depth = (-distance / bevel).clamp(0.0, 1.0);
        let (mut nx, mut ny) = (0.0, 0.0);
        if depth < 1.0 {
            let e = 0.01 * self.radius;
            let (gx, gy) = (self.distance(x + e, y) - distance, self.distance(x, y + e) - distance);
            let norm = (gx * gx + gy * gy).sqrt().max(1e-9);
            (nx, ny) = (gx / norm * (1.0 - depth), gy / norm * (1.0 - depth));
        }
        let nz = (1.0 - nx * nx - ny * ny).max(0.0).sqrt();
        let lambert = (nx * light.x + ny * light.y + nz * light.z).max(0.0);
        let half = (light.z + 1.0).max(0.1);
        let norm = (light.x * light.x + light.y * light.y + half * half).sqrt();
        let shine = ((nx * light.x + ny * light.y + nz * half) / norm).max(0.0);
        let shine = self.material.gloss * {
            let s = shine * shine;
            let s = s * s;
            let s = s * s;
            let s = s * s;
            s * s
        };
        // Less sky light from below.
        let sky = 0.75 - 0.25 * ny;
        let color = self.material.color(lx, ly);
        [0, 1, 2].map(|c| color[c] * (light.ambient[c] * sky + light.sun[c] * lambert) + light.sun[c] * shine)
    }
}

/// Where the light comes from (x to the right, y down, z to the viewer) and its colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Light {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) z: f32,
    pub(super) sun: Rgb,
    pub(super) ambient: Rgb,
}
