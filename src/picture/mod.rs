//! Pictures for people: reconstruction grids and loss curves.

mod canvas;
mod curve;
mod grid;

pub use curve::{Curve, Scale};
pub use grid::{Grid, PictureRef};

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes a file that is either the old one or the whole new one, whatever happens: a temporary name beside it, then a
/// rename.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::io("writing", path, error);
    let Some(name) = path.file_name() else {
        return Err(failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, "this is not the name of a file")));
    };
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)
}
