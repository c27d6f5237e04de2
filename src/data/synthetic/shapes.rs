//! Signed distances: negative inside, in units of the shape's radius.

use std::f32::consts::{FRAC_PI_3, FRAC_PI_6};

use super::noise::{Lattice, fbm};

/// What an object is. The first ten are the classes, in their order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Shape {
    Disc,
    Square,
    Triangle,
    Ring,
    Star,
    Cross,
    Crescent,
    Heart,
    Arrow,
    Stripes,
    Rock(Lattice),
    Bush(Lattice),
    Post,
}

impl Shape {
    pub(super) const CLASSES: [Self; 10] = [
        Self::Disc,
        Self::Square,
        Self::Triangle,
        Self::Ring,
        Self::Star,
        Self::Cross,
        Self::Crescent,
        Self::Heart,
        Self::Arrow,
        Self::Stripes,
    ];

    /// The distance from `(x, y)`, y downwards. Close to the outline it is good to a few percent.
    pub(super) fn distance(self, x: f32, y: f32) -> f32 {
        match self {
            Self::Disc => length(x, y) - 0.92,
            Self::Square => rounded_box(x, y, 0.82, 0.82, 0.04),
            Self::Triangle => triangle(x, y - 0.18, 0.98) - 0.03,
            Self::Ring => (length(x, y) - 0.7).abs() - 0.22,
            Self::Star => star(x, y, 1.0, 0.46),
            Self::Cross => rounded_box(x, y, 0.95, 0.3, 0.03).min(rounded_box(x, y, 0.3, 0.95, 0.03)),
            Self::Crescent => (length(x, y) - 0.95).max(0.78 - length(x - 0.42, y)),
            Self::Heart => heart(x / 1.35, (0.82 - y) / 1.35) * 1.35,
            Self::Arrow => {
                let head = triangle(x, y + 0.38, 0.62);
                head.min(rounded_box(x, y - 0.45, 0.24, 0.5, 0.02))
            }
            Self::Stripes => {
                // Three bars: fold the plane onto the nearest.
                let nearest = (x / 0.64).round().clamp(-1.0, 1.0) * 0.64;
                rounded_box(x - nearest, y, 0.19, 0.88, 0.03)
            }
            Self::Rock(lattice) => {
                let (x, y) = (x, y * 1.35);
                (length(x, y) - 0.72 - 0.3 * lattice.value(x * 1.6 + 7.0, y * 1.6)) / 1.5
            }
            Self::Bush(lattice) => (length(x, y * 1.1) - 0.55 - 0.45 * fbm(lattice, x * 2.5, y * 2.5, 3)) / 2.2,
            Self::Post => rounded_box(x, y, 0.09, 1.0, 0.03),
        }
    }

    /// How far below its centre the shape reaches.
    pub(super) fn bottom(self, cos: f32, sin: f32) -> f32 {
        const STEPS: i16 = 24;
        let inside = |row: i16| {
            let y = f32::from(row) / f32::from(STEPS) * 1.3;
            (-STEPS..=STEPS).any(|column| {
                let x = f32::from(column) / f32::from(STEPS) * 1.3;
                self.distance(x * cos + y * sin, y * cos - x * sin) < 0.0
            })
        };
        (0..=STEPS).rev().find(|row| inside(*row)).map_or(0.5, |row| f32::from(row) / f32::from(STEPS) * 1.3)
    }
}

fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

fn rounded_box(x: f32, y: f32, half_width: f32, half_height: f32, corner: f32) -> f32 {
    let (x, y) = (x.abs() - half_width + corner, y.abs() - half_height + corner);
    length(x.max(0.0), y.max(0.0)) + x.max(y).min(0.0) - corner
}

/// Equilateral, a point upwards; `size` is half a side.
fn triangle(x: f32, y: f32, size: f32) -> f32 {
    let k = 3.0_f32.sqrt();
    // With y upwards from here on.
    let (mut x, mut y) = (x.abs() - size, -y + size / k);
    if x + k * y > 0.0 {
        (x, y) = ((x - k * y) / 2.0, (-k * x - y) / 2.0);
    }
    x -= x.clamp(-2.0 * size, 0.0);
    -length(x, y) * y.signum()
}

/// Five points; `inner` is the radius between them.
fn star(x: f32, y: f32, outer: f32, inner: f32) -> f32 {
    // One of ten equal sectors, from a point to the notch beside it.
    let sector = FRAC_PI_3 * 0.6;
    let angle = x.atan2(-y).abs();
    let folded = angle - (angle / (2.0 * sector)).round() * 2.0 * sector;
    let radius = length(x, y);
    let (px, py) = (radius * folded.abs().sin(), radius * folded.cos());
    // The edge from the point (0, outer) to the notch.
    let (ex, ey) = (inner * sector.sin(), inner * sector.cos() - outer);
    let (dx, dy) = (px, py - outer);
    let along = ((dx * ex + dy * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
    let side = ex * dy - ey * dx;
    length(dx - ex * along, dy - ey * along) * side.signum()
}

/// Inigo Quilez' heart: its point at the origin, y upwards, about 1.1 high.
fn heart(x: f32, y: f32) -> f32 {
    let x = x.abs();
    if x + y > 1.0 {
        return length(x - 0.25, y - 0.75) - 0.125_f32.sqrt();
    }
    let half = (x + y).max(0.0) / 2.0;
    let a = x * x + (y - 1.0) * (y - 1.0);
    let b = (x - half) * (x - half) + (y - half) * (y - half);
    a.min(b).sqrt() * (x - y).signum()
}

/// Rotations that keep a shape what it is: the largest angle to either side.
pub(super) fn tilt(shape: Shape) -> f32 {
    match shape {
        Shape::Arrow | Shape::Stripes | Shape::Crescent => std::f32::consts::PI,
        Shape::Square | Shape::Cross => FRAC_PI_6 * 0.6,
        Shape::Disc | Shape::Ring => 0.0,
        Shape::Rock(_) | Shape::Bush(_) => 0.4,
        Shape::Post => 0.04,
        _ => FRAC_PI_6 * 0.7,
    }
}
