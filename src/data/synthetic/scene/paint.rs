//! What colour a point of a scene has.

use super::{Backdrop, Ground, Scene};
use crate::data::synthetic::color::{Rgb, mix, scale, times};
use crate::data::synthetic::noise::{fbm, hash, smooth, step, unit};
use crate::data::synthetic::object::Object;
use crate::data::synthetic::shapes::Shape;

impl Scene {
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
    pub(in crate::data::synthetic) fn color(&self, (x, y): (f32, f32), pixel: f32, (column, row): (u32, u32)) -> Rgb {
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
