//! Generated scenes, so that everything runs without a download.
//!
//! A scene is an object on a ground (grass, sand, planks, tiles, ...) before a sky or a wall, or lying on a table seen from
//! above, with smaller things around it that may hide a part of it, lit from one side, with soft shadows and a little
//! sensor noise. The shape of the main object is the class.

mod color;
mod draws;
mod noise;
mod object;
mod scene;
mod shapes;

use std::path::PathBuf;

use self::draws::Draws;
use self::scene::Scene;
use crate::data::decode::luma;
use crate::data::image::Image;
use crate::data::pictures::Pictures;
use crate::{Error, Result};

/// The classes of generated scenes: the shape of the main object.
pub const SYNTHETIC_CLASSES: [&str; 10] =
    ["disc", "square", "triangle", "ring", "star", "cross", "crescent", "heart", "arrow", "stripes"];

/// Scenes in a set whose size was not said.
pub const SYNTHETIC_COUNT: usize = 10_000;

/// A numbered set of generated scenes: scene `i` is of class `i % 10`, and a function of (seed, `i`, size).
#[derive(Clone, Debug)]
pub struct Synthetic {
    count: usize,
    seed: u64,
    channels: usize,
    height: usize,
    width: usize,
    classes: Vec<String>,
}

impl Synthetic {
    /// `count` scenes of `height x width` pixels and 1, 3 or 4 channels.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty set, or sizes that make no picture.
    pub fn new(count: usize, seed: u64, channels: usize, height: usize, width: usize) -> Result<Self> {
        if count == 0 || height == 0 || width == 0 || !matches!(channels, 1 | 3 | 4) {
            return Err(Error::Config(format!(
                "generated pictures need a count and sizes of at least 1 and 1, 3 or 4 channels, found {count} of \
                 {height}x{width}x{channels}"
            )));
        }
        let classes = SYNTHETIC_CLASSES.iter().map(ToString::to_string).collect();
        Ok(Self { count, seed, channels, height, width, classes })
    }
}

impl Pictures for Synthetic {
    fn len(&self) -> usize {
        self.count
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn name(&self, index: usize) -> PathBuf {
        let Self { seed, height, width, .. } = self;
        let class = SYNTHETIC_CLASSES[index % SYNTHETIC_CLASSES.len()];
        PathBuf::from(format!("synthetic-{seed}-{height}x{width}/{class}-{index}"))
    }

    fn label(&self, index: usize) -> Option<u32> {
        (index < self.count).then_some((index % SYNTHETIC_CLASSES.len()) as u32)
    }

    fn classes(&self) -> Option<&[String]> {
        Some(&self.classes)
    }

    fn read(&self, index: usize, _: &mut Vec<u8>) -> Result<Image> {
        let (width, height) = (self.width as f32, self.height as f32);
        let pixel = 1.0 / width.min(height);
        let mut draws = Draws::new(self.seed, index as u64);
        let class = index % SYNTHETIC_CLASSES.len();
        let scene = Scene::new(&mut draws, class, width * pixel / 2.0, height * pixel / 2.0);
        let mut pixels = Vec::with_capacity(self.width * self.height * self.channels);
        for row in 0..self.height {
            let y = (row as f32 + 0.5 - height / 2.0) * pixel;
            for column in 0..self.width {
                let x = (column as f32 + 0.5 - width / 2.0) * pixel;
                let color = scene.color((x, y), pixel, (column as u32, row as u32));
                let [red, green, blue] = color.map(|value| (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
                match self.channels {
                    1 => pixels.push(luma(red, green, blue)),
                    3 => pixels.extend([red, green, blue]),
                    _ => pixels.extend([red, green, blue, 255]),
                }
            }
        }
        Image::new(self.width, self.height, self.channels, pixels)
    }
}
