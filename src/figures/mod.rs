//! Pictures for people: reconstruction grids and loss curves.

mod canvas;
mod curve;
mod grid;
mod reconstruction;

pub use curve::{Curve, Scale};
pub use grid::{Grid, PictureRef};
pub use reconstruction::reconstruction_grid;
