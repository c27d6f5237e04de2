//! What the emulator is made of: C++ files that include the kernels and list them. Compiled into the build script, and into a
//! test that builds the emulator by itself.

use std::fmt::Write;
use std::path::Path;

/// Options for every C++ file; kernels get [`CHECKED`] on top.
pub const FLAGS: &[&str] = &[
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-DVITMAE_EMULATOR",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-exceptions",
];

/// Makes the compiler report accesses to memory; see kernels/emulator/host.h.
pub const CHECKED: &str = "-fsanitize=thread";

/// A C++ file.
pub struct Unit {
    /// Its name, without an ending.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Whether accesses to memory are reported.
    pub checked: bool,
}

/// A kernel in a `.cu` file.
#[derive(Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name.
    pub symbol: String,
    /// Most threads per block.
    pub max_threads: String,
}

/// The kernels in a `.cu` file, in the order they appear: `KERNEL(threads)` opens each, at the start of a line.
pub fn definitions(text: &str) -> Vec<Definition> {
    let mut found = Vec::new();
    for definition in text.split("\nKERNEL(").skip(1) {
        let (max_threads, rest) = definition.split_once(')').unwrap_or((definition, ""));
        let symbol = rest.split('(').next().unwrap_or("").trim();
        found.push(Definition { symbol: symbol.to_string(), max_threads: max_threads.trim().to_string() });
    }
    found
}

/// The files for the kernels `files` (name and text, in `folder`): one each, the planted faults, and the runtime with a table.
pub fn units(folder: &Path, files: &[(String, String)]) -> std::io::Result<Vec<Unit>> {
    let faults = "emulator/faults.cu".to_string();
    let faults_text = std::fs::read_to_string(folder.join(&faults))?;
    let mut units = Vec::new();
    let mut declarations = String::new();
    let mut table = String::new();
    for (name, text) in files.iter().map(|(name, text)| (name, text)).chain([(&faults, &faults_text)]) {
        let stem = name.trim_end_matches(".cu").replace('/', "_");
        let mut unit = format!("#include \"{}\"\n", folder.join(name).display());
        let mut line = |text: String| {
            // Writing to a string does not fail.
            let _ = writeln!(unit, "{text}");
        };
        line(format!("extern const emulator::Entry vitmae_emulator_{stem}[];"));
        line(format!("constexpr emulator::Entry vitmae_emulator_{stem}[] = {{"));
        for Definition { symbol, max_threads } in definitions(text) {
            line(format!("    emulator::Thunk<&{symbol}>::entry(\"{symbol}\", {max_threads}),"));
        }
        line("    {nullptr, 0, nullptr, nullptr, 0},".to_string());
        line("};".to_string());
        units.push(Unit { name: stem.clone(), text: unit, checked: true });
        let _ = writeln!(declarations, "extern const emulator::Entry vitmae_emulator_{stem}[];");
        let _ = write!(table, "vitmae_emulator_{stem}, ");
    }
    let runtime = format!(
        "#include \"{}\"\n{declarations}const emulator::Entry* const vitmae_emulator_entries[] = {{{table}nullptr}};\n",
        folder.join("emulator/runtime.cpp").display()
    );
    units.push(Unit { name: "runtime".to_string(), text: runtime, checked: false });
    Ok(units)
}
