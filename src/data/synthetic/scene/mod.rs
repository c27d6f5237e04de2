//! One scene: sky, wall or table, ground, objects, light.
//!
//! Colours are linear light while they are mixed and become square roots (gamma 2) at the end. The shorter side of the
//! picture runs from -0.5 to 0.5, y downwards; shapes and textures do not depend on the resolution.

mod paint;

use super::color::{Rgb, WOOD, mix, pick, scale, srgb};
use super::draws::Draws;
use super::noise::Lattice;
use super::object::{Light, Material, Object};
use super::shapes::Shape;

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
        let material = Material::of_hue(draws, hue);
        let main = Object::new(draws, shape, x, y, radius, material);

        let mut objects = Vec::with_capacity(6);
        let horizon =
            if above { f32::NEG_INFINITY } else { (main.base - draws.range(0.1, 0.38)).min(half_height - 0.12) };
        for _ in 0..draws.below(5) {
            objects.push(Object::bystander(draws, &main, horizon, half_width, half_height, above));
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
}
