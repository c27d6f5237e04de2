//! One scene: sky, wall or table, ground, objects, light.
//!
//! Colours are linear light while they are mixed and become square roots (gamma 2) at the end. The shorter side of the
//! picture runs from -0.5 to 0.5, y downwards; shapes and textures do not depend on the resolution.

use super::noise::{Lattice, fbm, hash, smooth, step, unit};
use super::shapes::{Shape, tilt};
use crate::data::random::Draws;

pub(super) type Rgb = [f32; 3];

fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t]
}

fn scale(a: Rgb, k: f32) -> Rgb {
    [a[0] * k, a[1] * k, a[2] * k]
}

fn times(a: Rgb, b: Rgb) -> Rgb {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

/// A colour as it is written on screens, made linear.
fn srgb(hex: u32) -> Rgb {
    [16, 8, 0].map(|shift| {
        let value = (hex >> shift & 255) as f32 / 255.0;
        value * value
    })
}

/// Hue in turns.
fn hsv(hue: f32, saturation: f32, value: f32) -> Rgb {
    [0.0, 2.0 / 3.0, 1.0 / 3.0].map(|offset| {
        let t = ((hue + offset).fract() * 6.0 - 3.0).abs() - 1.0;
        let v = value * (1.0 + saturation * (t.clamp(0.0, 1.0) - 1.0));
        v * v
    })
}

/// A palette's colour, varied a little.
fn pick(draws: &mut Draws, palette: &[u32]) -> Rgb {
    let color = srgb(palette[draws.below(palette.len() as u32) as usize]);
    let brightness = draws.range(0.8, 1.2);
    [0, 1, 2].map(|c| color[c] * brightness * draws.range(0.92, 1.08))
}

const ROCK: [u32; 4] = [0x7d7871, 0x5f5b58, 0x9a8d7c, 0x8a6f5c];
const LEAVES: [u32; 4] = [0x3f6b2a, 0x557d33, 0x2f5a3c, 0x7a7a34];
const WOOD: [u32; 4] = [0x8a5a34, 0xb07b4b, 0x6b4526, 0xc49a6c];

#[derive(Clone, Copy, Debug)]
enum Pattern {
    Plain,
    Marble,
    Speckle,
    Gradient,
}

#[derive(Clone, Copy, Debug)]
struct Material {
    color: Rgb,
    other: Rgb,
    pattern: Pattern,
    gloss: f32,
    lattice: Lattice,
}

impl Material {
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
struct Object {
    shape: Shape,
    x: f32,
    y: f32,
    radius: f32,
    cos: f32,
    sin: f32,
    /// The row in which it stands.
    base: f32,
    /// The width of the rounded edge, of the radius.
    bevel: f32,
    material: Material,
}

impl Object {
    /// Its own coordinates.
    fn local(&self, x: f32, y: f32) -> (f32, f32) {
        let (x, y) = ((x - self.x) / self.radius, (y - self.y) / self.radius);
        (x * self.cos + y * self.sin, y * self.cos - x * self.sin)
    }

    fn distance(&self, x: f32, y: f32) -> f32 {
        let (lx, ly) = self.local(x, y);
        self.shape.distance(lx, ly) * self.radius
    }

    /// Colour of the surface under the light.
    fn shade(&self, x: f32, y: f32, distance: f32, light: &Light) -> Rgb {
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
struct Light {
    x: f32,
    y: f32,
    z: f32,
    sun: Rgb,
    ambient: Rgb,
}

#[derive(Clone, Copy, Debug)]
enum Backdrop {
    Sky {
        zenith: Rgb,
        horizon: Rgb,
        cloud: Rgb,
        cover: f32,
        hills: [(f32, Rgb); 2],
        lattice: Lattice,
    },
    Wall {
        color: Rgb,
        other: Rgb,
        style: u32,
        size: f32,
        lattice: Lattice,
    },
    /// Seen from above: the ground is everywhere.
    None,
}

#[derive(Clone, Copy, Debug)]
enum Ground {
    Soft,
    Planks,
    Tiles,
}

/// A scene that can be asked for the colour of any point.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    backdrop: Backdrop,
    horizon: f32,
    ground: Ground,
    ground_color: Rgb,
    ground_other: Rgb,
    ground_size: f32,
    ground_lattice: Lattice,
    light: Light,
    /// How far shadows lean and how much the ground is foreshortened.
    lean: f32,
    squash: f32,
    /// From back to front.
    objects: Vec<Object>,
    vignette: f32,
    grain: f32,
    grain_seed: u32,
}

impl Scene {
    /// Draws a scene whose main object is of class `class`; `half_width` is that of the picture in units of its shorter
    /// side, and likewise `half_height`.
    pub(super) fn new(draws: &mut Draws, class: usize, half_width: f32, half_height: f32) -> Self {
        let shape = Shape::CLASSES[class % Shape::CLASSES.len()];
        let above = draws.chance(0.25);
        let indoor = draws.chance(0.4);

        // The light, from above and the viewer's side.
        let side = if draws.chance(0.5) { 1.0 } else { -1.0 };
        let (lx, ly, lz) = (side * draws.range(0.35, 0.9), -draws.range(0.45, 0.9), draws.range(0.5, 0.9));
        let norm = (lx * lx + ly * ly + lz * lz).sqrt();
        let warm = draws.range(0.0, 1.0);
        let strength = draws.range(0.75, 1.15);
        let light = Light {
            x: lx / norm,
            y: ly / norm,
            z: lz / norm,
            sun: scale(mix([0.95, 0.97, 1.05], [1.15, 0.98, 0.78], warm), strength),
            ambient: scale(mix([0.36, 0.42, 0.52], [0.46, 0.44, 0.42], warm), draws.range(0.6, 1.0)),
        };

        // The main object, roughly in the middle.
        let radius = draws.range(0.2, 0.33);
        let room = |half: f32| (half - radius * 0.9).max(0.0) * 0.6;
        let (rx, ry) = (room(half_width), room(half_height));
        let x = draws.range(-rx, rx);
        let y = draws.range(-ry, ry);
        let hue = draws.range(0.0, 1.0);
        let material = Self::paint(draws, hue);
        let main = Self::object(draws, shape, x, y, radius, material);

        let mut objects = Vec::with_capacity(6);
        let horizon =
            if above { f32::NEG_INFINITY } else { (main.base - draws.range(0.1, 0.38)).min(half_height - 0.12) };
        for _ in 0..draws.below(5) {
            objects.push(Self::bystander(draws, &main, horizon, half_width, half_height, above));
        }
        objects.push(main);
        if !above {
            objects.sort_by(|a, b| a.base.total_cmp(&b.base));
        }

        let backdrop = if above {
            Backdrop::None
        } else if indoor {
            Self::wall(draws)
        } else {
            Self::sky(draws)
        };
        let (ground, palette): (_, &[u32]) = match (above, indoor) {
            (false, true) | (true, true) => match draws.below(3) {
                0 => (Ground::Planks, &WOOD),
                1 => (Ground::Tiles, &[0xb9b2a6, 0x8f969c, 0xc7b299, 0x77706a]),
                _ => (Ground::Soft, &[0x8a8178, 0x6d7480, 0xa08a77, 0x84746c]),
            },
            _ => (Ground::Soft, &[0x6a8a3a, 0x7f9a4a, 0xc2a36b, 0x8a6a48, 0x6f6f6f, 0xd9dde2, 0x9a8f72]),
        };
        let ground_color = pick(draws, palette);
        Self {
            backdrop,
            horizon,
            ground,
            ground_color,
            ground_other: scale(mix(ground_color, pick(draws, palette), 0.35), draws.range(0.55, 0.8)),
            ground_size: draws.range(0.7, 1.5),
            ground_lattice: Lattice(draws.word()),
            light,
            lean: -side * draws.range(0.5, 1.5),
            squash: draws.range(0.28, 0.5),
            objects,
            vignette: draws.range(0.0, 0.5),
            grain: draws.range(0.004, 0.016),
            grain_seed: draws.word(),
        }
    }

    fn paint(draws: &mut Draws, hue: f32) -> Material {
        let color = hsv(hue, draws.range(0.35, 0.95), draws.range(0.55, 0.95));
        let other = hsv(hue + draws.range(-0.12, 0.12), draws.range(0.2, 0.8), draws.range(0.35, 0.95));
        let pattern = match draws.below(6) {
            0 => Pattern::Marble,
            1 => Pattern::Speckle,
            2 | 3 => Pattern::Gradient,
            _ => Pattern::Plain,
        };
        Material { color, other, pattern, gloss: draws.range(0.0, 0.7), lattice: Lattice(draws.word()) }
    }

    fn object(draws: &mut Draws, shape: Shape, x: f32, y: f32, radius: f32, material: Material) -> Object {
        let most = tilt(shape);
        let (sin, cos) = draws.range(-most, most).sin_cos();
        let bevel = match shape {
            Shape::Disc => draws.range(0.2, 1.0),
            Shape::Ring | Shape::Post => 0.22,
            Shape::Rock(_) | Shape::Bush(_) => 0.6,
            _ => draws.range(0.08, 0.22),
        };
        Object { shape, x, y, radius, cos, sin, base: y + radius * shape.bottom(cos, sin), bevel, material }
    }

    /// A smaller thing that is no class, mostly beside the main object.
    fn bystander(
        draws: &mut Draws,
        main: &Object,
        horizon: f32,
        half_width: f32,
        half_height: f32,
        above: bool,
    ) -> Object {
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
        let mut object = Self::object(draws, shape, x, y, radius, material);
        if !above {
            // Stand it on the ground, behind or before.
            let base = draws.range((horizon + 0.03).max(main.base - 0.25), (main.base + 0.12).min(half_height + 0.05));
            object.y += base - object.base;
            object.base = base;
        }
        object
    }

    fn sky(draws: &mut Draws) -> Backdrop {
        let (zenith, low, cloud) = match draws.below(5) {
            0 => (0x4a6fa5, 0xf0b27a, 0xf6d2b0),
            1 => (0x8d99a6, 0xc9ced3, 0xe4e6e8),
            2 => (0x27496d, 0x8fa9bf, 0xb9c4cf),
            _ => (0x2f6fb5, 0xbcd9ee, 0xf7f9fb),
        };
        let haze = srgb(low);
        let mut hill = |least: f32, most: f32, haze_share: f32| {
            let height = if draws.chance(0.6) { draws.range(least, most) } else { 0.0 };
            (height, mix(pick(draws, &[0x4d6b44, 0x5a6650, 0x6b6f78, 0x7a6a52]), haze, haze_share))
        };
        let far = hill(0.06, 0.22, 0.6);
        let near = hill(0.02, 0.1, 0.3);
        Backdrop::Sky {
            zenith: srgb(zenith),
            horizon: haze,
            cloud: srgb(cloud),
            cover: draws.range(0.35, 0.75),
            hills: [far, near],
            lattice: Lattice(draws.word()),
        }
    }

    fn wall(draws: &mut Draws) -> Backdrop {
        let color = pick(draws, &[0xd8cfc0, 0xb7c3c9, 0xcdb8a0, 0x9fae9a, 0xb98f86, 0x8b93a8, 0xe2ded6]);
        Backdrop::Wall {
            color,
            other: scale(color, draws.range(0.55, 0.85)),
            style: draws.below(3),
            size: draws.range(0.05, 0.11),
            lattice: Lattice(draws.word()),
        }
    }

    /// What lies behind the objects at `(x, y)`.
    fn background(&self, x: f32, y: f32, pixel: f32) -> Rgb {
        if y > self.horizon {
            let ground = self.ground(x, y, pixel);
            // The far ground fades into the backdrop over a pixel or two.
            let edge = ((y - self.horizon) / pixel).min(1.0);
            return if edge < 1.0 { mix(self.behind(x, y), ground, edge) } else { ground };
        }
        self.behind(x, y)
    }

    fn behind(&self, x: f32, y: f32) -> Rgb {
        match self.backdrop {
            Backdrop::None => self.ground_color,
            Backdrop::Sky { zenith, horizon, cloud, cover, hills, lattice } => {
                let height = (self.horizon - y).max(0.0);
                let mut color = mix(horizon, zenith, smooth(height / 0.9).sqrt());
                // Clouds flatten towards the horizon.
                let flat = 1.0 / (height + 0.25);
                let density = fbm(lattice, x * flat * 1.2, flat * 2.2, 4);
                color = mix(color, cloud, step(cover, cover + 0.3, density) * step(0.02, 0.2, height) * 0.9);
                for (number, (top, hill)) in hills.iter().enumerate() {
                    if *top > 0.0 && height < top * 1.3 {
                        let line = top * (0.35 + fbm(lattice, x * 2.5 + 31.0 * number as f32, 5.5, 4));
                        if height < line {
                            let rough = 0.85 + 0.3 * lattice.value(x * 40.0, y * 60.0);
                            color = scale(times(*hill, self.light.sun), rough);
                        }
                    }
                }
                color
            }
            Backdrop::Wall { color, other, style, size, lattice } => {
                let base = match style {
                    // Bricks.
                    0 => {
                        let row = (y / size).floor();
                        let shift = if row as i32 % 2 == 0 { 0.0 } else { 0.5 };
                        let (u, v) = (x / (2.2 * size) + shift, y / size);
                        let mortar = |t: f32, width: f32| step(0.0, width, t.fract().abs().min(1.0 - t.fract().abs()));
                        let (u_fract, v_fract) = (u - u.floor(), v - v.floor());
                        let brick = mortar(u_fract, 0.06).min(mortar(v_fract, 0.12));
                        let tone = 0.8 + 0.4 * lattice.cell(u, v);
                        mix(other, scale(color, tone), brick)
                    }
                    // Wallpaper.
                    1 => {
                        let wave = (x / size * 3.0).sin();
                        mix(color, other, step(-0.3, 0.3, wave) * 0.5)
                    }
                    _ => color,
                };
                let plaster = 0.88 + 0.24 * fbm(lattice, x * 6.0, y * 6.0, 4);
                // The skirting board.
                let skirting = if self.horizon - y < 0.025 { 0.6 } else { 1.0 };
                let lit = mix(self.light.ambient, self.light.sun, 0.55 + 0.25 * x * self.light.x.signum());
                scale(times(base, lit), plaster * skirting)
            }
        }
    }

    fn ground(&self, x: f32, y: f32, pixel: f32) -> Rgb {
        // Ground coordinates: across and away from the viewer; and how many of their units a pixel covers.
        let (u, v, footprint) = if self.horizon == f32::NEG_INFINITY {
            (x * 2.0, y * 2.0, pixel * 2.0)
        } else {
            let near = (y - self.horizon + 0.06).max(0.02);
            (x / near * 0.6, 0.35 / near, pixel / near * 0.6)
        };
        let (u, v) = (u / self.ground_size, v / self.ground_size);
        let lattice = self.ground_lattice;
        // What is finer than a pixel is not drawn: it would only flicker.
        let fine = 1.0 - step(0.06, 0.3, footprint / self.ground_size);
        let mut color = match self.ground {
            Ground::Soft => {
                let patches = fbm(lattice, u * 1.7, v * 1.7, 4);
                let blades = fbm(lattice, u * 14.0, v * 9.0, 3);
                mix(
                    self.ground_color,
                    self.ground_other,
                    (0.75 * patches + 0.55 * (blades - 0.5) * fine).clamp(0.0, 1.0),
                )
            }
            Ground::Planks => {
                let tone = lattice.cell(u * 3.0, (v + lattice.cell(u * 3.0, 1.0) * 5.0) * 0.6);
                let veins = fbm(lattice, u * 30.0, v * 2.5, 3);
                let across = u * 3.0 - (u * 3.0).floor();
                let gap = step(0.0, 0.05, across.min(1.0 - across));
                let wood = mix(self.ground_color, self.ground_other, 0.5 * tone + 0.5 * (veins - 0.3) * fine);
                scale(wood, 1.0 - 0.6 * (1.0 - gap) * fine)
            }
            Ground::Tiles => {
                let (a, b) = (u * 2.5, v * 2.5);
                let even = (a.floor() + b.floor()).rem_euclid(2.0) < 1.0;
                let grout = |t: f32| step(0.0, 0.04, (t - t.floor()).min(1.0 - (t - t.floor())));
                let tile = if even { self.ground_color } else { self.ground_other };
                let far = mix(self.ground_color, self.ground_other, 0.5);
                let stain = 0.9 + 0.2 * fbm(lattice, u * 4.0, v * 4.0, 3);
                let near = scale(tile, (0.5 + 0.5 * grout(a).min(grout(b))) * stain);
                mix(far, near, fine)
            }
        };
        let depth = if self.horizon == f32::NEG_INFINITY { 1.0 } else { 0.8 + 0.3 * step(0.0, 0.6, y - self.horizon) };
        color = scale(color, depth);
        let mut sun: f32 = 1.0;
        let mut sky: f32 = 1.0;
        for object in &self.objects {
            let (cast, contact) = self.shadow(object, x, y);
            sun = sun.min(1.0 - cast);
            sky = sky.min(1.0 - contact);
        }
        // A flat ground sees the sun at the height of the light.
        let slope = if self.horizon == f32::NEG_INFINITY { self.light.z } else { -self.light.y };
        let sun = 0.35 * sun + 0.75 * sun * slope;
        [0, 1, 2].map(|c| color[c] * (self.light.ambient[c] * sky + self.light.sun[c] * sun))
    }

    /// How much of the sun, and of the sky, an object takes from the ground at `(x, y)`.
    fn shadow(&self, object: &Object, x: f32, y: f32) -> (f32, f32) {
        let reach = object.radius * 3.2;
        if (x - object.x).abs() > reach || (y - object.base).abs() > reach {
            return (0.0, 0.0);
        }
        if self.horizon == f32::NEG_INFINITY {
            // Lying on the ground: the shadow is beside it.
            let (dx, dy) = (self.light.x * 0.22 * object.radius, self.light.y * 0.22 * object.radius);
            let soft = 0.1 * object.radius;
            let cast = 1.0 - step(-soft, soft, object.distance(x + dx, y + dy));
            return (cast * 0.85, (1.0 - step(0.0, 0.2 * object.radius, object.distance(x, y))) * 0.5);
        }
        let height = (object.base - y) / self.squash;
        let mut cast = 0.0;
        if height > -0.02 {
            // The part of the object at this height above the ground throws its shadow here.
            let soft = 0.012 + 0.12 * height.max(0.0);
            let distance = object.distance(x - self.lean * height, object.base - height);
            cast = (1.0 - step(-soft, soft, distance)) * (1.0 - step(0.3, 1.1, height)) * 0.9;
        }
        let (dx, dy) = ((x - object.x) / object.radius, (y - object.base) / (0.3 * object.radius));
        let width = if object.shape == Shape::Post { 0.15 } else { 0.7 };
        let near = (dx / width) * (dx / width) + dy * dy;
        (cast, 0.7 / (1.0 + 2.0 * near * near))
    }

    /// The colour at `(x, y)`, as it is shown (0 to 1); `pixel` is the size of a pixel, and `(column, row)` which it is.
    pub(super) fn color(&self, (x, y): (f32, f32), pixel: f32, (column, row): (u32, u32)) -> Rgb {
        // From the front: what is hidden need not be painted.
        let mut color = [0.0; 3];
        let mut left = 1.0;
        for object in self.objects.iter().rev() {
            let reach = object.radius * 1.45;
            if (x - object.x).abs() > reach || (y - object.y).abs() > reach {
                continue;
            }
            let distance = object.distance(x, y);
            let cover = (0.5 - distance / pixel).clamp(0.0, 1.0) * left;
            if cover > 0.0 {
                let shade = object.shade(x, y, distance, &self.light);
                color = [0, 1, 2].map(|c| color[c] + cover * shade[c]);
                left -= cover;
                if left < 0.004 {
                    break;
                }
            }
        }
        if left >= 0.004 {
            let behind = self.background(x, y, pixel);
            color = [0, 1, 2].map(|c| color[c] + left * behind[c]);
        }
        let dark = 1.0 - self.vignette * (x * x + y * y).min(1.0);
        let word = hash(column, row, self.grain_seed);
        // Two uniform numbers make a triangle, close enough to a bell.
        let noise = self.grain * (unit(word << 16) + unit(word & 0xffff_0000) - 1.0) * 2.0;
        color.map(|value| (value * dark).max(0.0).sqrt() + noise)
    }
}
