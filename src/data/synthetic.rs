//! Generated scenes.

use crate::data::decode::{Image, luma};
use crate::data::random::Draws;
use crate::data::source::Pictures;
use crate::{Error, Result};
use std::path::PathBuf;

/// The classes of generated scenes: the shape of the main object.
pub const SYNTHETIC_CLASSES: [&str; 10] =
    ["disc", "square", "triangle", "ring", "star", "cross", "crescent", "heart", "hexagon", "stripes"];

/// Scenes in a set whose size was not said.
pub const SYNTHETIC_COUNT: usize = 10_000;

/// A numbered set of generated scenes.
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
        PathBuf::from(format!("synthetic:{}:{}#{index}", self.count, self.seed))
    }

    fn label(&self, index: usize) -> Option<u32> {
        (index < self.count).then_some((index % SYNTHETIC_CLASSES.len()) as u32)
    }

    fn classes(&self) -> Option<&[String]> {
        Some(&self.classes)
    }

    fn read(&self, index: usize, _: &mut Vec<u8>) -> Result<Image> {
        let mut draws = Draws::new(self.seed, index as u64);
        let (r, g, b) = (draws.below(256) as u8, draws.below(256) as u8, draws.below(256) as u8);
        let mut pixels = Vec::new();
        for y in 0..self.height {
            for x in 0..self.width {
                let shade = |v: u8| v / 2 + (x * 64 / self.width + y * 64 / self.height) as u8;
                match self.channels {
                    1 => pixels.push(luma(shade(r), shade(g), shade(b))),
                    3 => pixels.extend([shade(r), shade(g), shade(b)]),
                    _ => pixels.extend([shade(r), shade(g), shade(b), 255]),
                }
            }
        }
        Image::new(self.width, self.height, self.channels, pixels)
    }
}
