//! Reads the kernels, and writes the list of their symbols that `src/ops/spec.rs` includes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::units::definitions;

/// The kernels folder in memory.
pub struct Kernels {
    /// The folder.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only embedding needs it"))]
    pub folder: PathBuf,
    /// Name and text of each `.cu` file.
    pub files: Vec<(String, String)>,
    /// Name and text of each `.cuh` file.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only compiling needs them"))]
    pub headers: Vec<(String, String)>,
}

/// Reads kernels/*.cu and *.cuh in a fixed order.
pub fn read_kernels() -> Result<Kernels, String> {
    let root = std::env::var("CARGO_MANIFEST_DIR").map_err(|error| format!("CARGO_MANIFEST_DIR: {error}"))?;
    let folder = Path::new(&root).join("kernels");
    for watched in ["kernels", "build"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    let fail = |path: &Path, error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(|error| fail(&folder, error))? {
        paths.push(entry.map_err(|error| fail(&folder, error))?.path());
    }
    paths.sort();
    let (mut files, mut headers) = (Vec::new(), Vec::new());
    for path in paths {
        let list = match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => &mut files,
            Some("cuh") => &mut headers,
            _ => continue,
        };
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let text = std::fs::read_to_string(&path).map_err(|error| fail(&path, error))?;
        list.push((name, text));
    }
    Ok(Kernels { folder, files, headers })
}

/// Writes the Rust source of the list of all symbols.
pub fn list_symbols(kernels: &Kernels) -> Result<(), String> {
    let mut rust = "&[\n".to_string();
    for (file, text) in &kernels.files {
        let named = named_ops(file, text)?;
        for symbol in definitions(text).into_iter().map(|definition| definition.symbol) {
            let ops = named.iter().find(|(kernel, _)| is_called(&symbol, kernel)).map_or(&[][..], |(_, ops)| ops);
            // Writing to a string does not fail.
            let _ = writeln!(rust, "    KernelSpec {{ file: {file:?}, symbol: {symbol:?}, named_ops: &{ops:?} }},");
        }
    }
    rust.push_str("]\n");
    let path = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("symbols.rs");
    std::fs::write(&path, rust).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// What the comments `// Ops of KERNEL: op, op` of a file say: the ops of kernels whose names do not begin with an op's.
fn named_ops<'a>(file: &str, text: &'a str) -> Result<Vec<(&'a str, Vec<&'a str>)>, String> {
    let defined = definitions(text);
    let mut named = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("// Ops of ")) {
        let (kernel, ops) = line.split_once(": ").ok_or_else(|| format!("{file}: \"Ops of {line}\" names no op"))?;
        if !defined.iter().any(|definition| is_called(&definition.symbol, kernel)) {
            return Err(format!("{file}: \"Ops of {kernel}\" is about a kernel that is not in the file"));
        }
        named.push((kernel, ops.split(", ").collect()));
    }
    Ok(named)
}

/// Whether a symbol has this name, with or without an element type after it.
fn is_called(symbol: &str, name: &str) -> bool {
    symbol.strip_prefix(name).is_some_and(|rest| ["", "_f32", "_bf16"].contains(&rest))
}
