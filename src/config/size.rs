//! Sizes of images and patches.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Height and width in pixels; `config.json` has one number where both are equal, else `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(from = "Written", into = "Written")]
pub struct Size {
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
}

/// A size in `config.json`.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Written {
    Side(usize),
    Sides([usize; 2]),
}

impl From<Written> for Size {
    fn from(written: Written) -> Self {
        match written {
            Written::Side(side) => Self::from(side),
            Written::Sides([height, width]) => Self { height, width },
        }
    }
}

impl From<Size> for Written {
    fn from(Size { height, width }: Size) -> Self {
        if height == width { Self::Side(height) } else { Self::Sides([height, width]) }
    }
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

/// Pixels of a side, at most: attention over more patches would not end.
const MOST_PIXELS: usize = 1 << 15;

impl FromStr for Size {
    type Err = Error;

    /// From `224` or `192x256` (height first), for command lines.
    ///
    /// # Errors
    /// [`Error::Value`] for other text, and sides that are 0 or above 32,768.
    fn from_str(text: &str) -> Result<Self> {
        let problem = |problem: String| Error::value(format!("size {text:?}"), problem);
        let side = |part: &str| match part.trim().parse() {
            Ok(0) | Err(_) => {
                Err(problem("expected a number of pixels such as 224, or HEIGHTxWIDTH such as 192x256".into()))
            }
            Ok(side) if side > MOST_PIXELS => {
                Err(problem(format!("expected at most {MOST_PIXELS} pixels, found {side}")))
            }
            Ok(side) => Ok(side),
        };
        let (height, width) = text.split_once(['x', 'X', '×']).unwrap_or((text, text));
        Ok(Self { height: side(height)?, width: side(width)? })
    }
}
