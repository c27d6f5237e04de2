//! Compiles the emulator into a static library, for the feature `emulator`.

use std::path::{Path, PathBuf};

use crate::kernels::Kernels;
use crate::units::{CHECKED, FLAGS, Unit, units};

/// Compiles every unit and tells cargo to link them.
pub fn compile(kernels: &Kernels) -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let units = units(&kernels.folder, &kernels.files).map_err(|error| format!("cannot read the emulator: {error}"))?;
    let (checked, plain): (Vec<_>, Vec<_>) = units.into_iter().partition(|unit| unit.checked);
    // The kernels first: a linker reads archives once, and they need the runtime.
    archive("vitmae_emulator_kernels", &checked, &out)?;
    archive("vitmae_emulator_runtime", &plain, &out)
}

fn archive(name: &str, units: &[Unit], out: &Path) -> Result<(), String> {
    let mut build = cc::Build::new();
    build.cpp(true).warnings(false).no_default_flags(false).opt_level(1);
    for flag in FLAGS {
        build.flag(flag);
    }
    for unit in units {
        let path = out.join(format!("{}.cpp", unit.name));
        std::fs::write(&path, &unit.text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        build.file(path);
        if unit.checked {
            build.flag(CHECKED);
        }
    }
    build.try_compile(name).map_err(|error| format!("the emulator does not compile: {error}"))
}
