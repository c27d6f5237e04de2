//! Sizes of images and patches.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Height and width in pixels; `config.json` has one number where both are equal, else `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

impl From<usize> for Size {
    /// A square.
    fn from(side: usize) -> Self {
        Self { height: side, width: side }
    }
}

impl From<(usize, usize)> for Size {
    /// From (height, width).
    fn from((height, width): (usize, usize)) -> Self {
        Self { height, width }
    }
}

impl fmt::Display for Size {
    /// `224` for a square, else `192x256` (height first): what [`Size::from_str`] reads.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.height == self.width {
            write!(formatter, "{}", self.height)
        } else {
            write!(formatter, "{}x{}", self.height, self.width)
        }
    }
}

impl FromStr for Size {
    type Err = Error;

    /// From `224` or `192x256` (height first).
    fn from_str(text: &str) -> Result<Self> {
        let number = |part: &str| part.trim().parse::<usize>().ok();
        let size = match text.split_once(['x', 'X', '×']) {
            None => number(text).map(Self::from),
            Some((height, width)) => number(height).zip(number(width)).map(Self::from),
        };
        size.ok_or_else(|| {
            Error::Config(format!(
                "size {text:?} is neither a number of pixels such as 224 nor HEIGHTxWIDTH such as 192x256"
            ))
        })
    }
}
