//! NVIDIA's `cuobjdump` over one cubin: what each kernel in it uses, and its instructions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is known of a compiled kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Most threads per block.
    pub threads: u32,
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory per block, without what the system takes.
    pub shared: u32,
    /// Bytes of stack per thread.
    pub stack: u32,
    /// Bytes of local memory per thread besides the stack.
    pub local: u32,
    /// Isa, without what fills up the end.
    pub instructions: u32,
    /// Reads and writes of local memory: spills, and arrays that did not fit into registers.
    pub spills: u32,
    /// Matrix products.
    pub matrix: u32,
    /// Asynchronous copies to shared memory.
    pub async_copies: u32,
    /// Loads of matrix fragments from shared memory.
    pub matrix_loads: u32,
    /// 128-bit reads of global memory.
    pub wide_loads: u32,
    /// 128-bit writes to global memory.
    pub wide_stores: u32,
    /// 128-bit reads of shared memory.
    pub wide_shared_loads: u32,
    /// 128-bit writes to shared memory.
    pub wide_shared_stores: u32,
}

/// Where the tools are.
#[derive(Debug, Clone)]
pub struct Tools {
    folder: PathBuf,
}

impl Tools {
    /// Finds them: in `VITMAE_CUDA_TOOLS`, else in a toolkit or the path.
    pub fn find() -> Result<Self, String> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut folders: Vec<_> = variable("VITMAE_CUDA_TOOLS").into_iter().collect();
        folders.extend(variable("CUDA_HOME").map(|home| home.join("bin")));
        folders.push("/usr/local/cuda/bin".into());
        folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        let complete = |folder: &PathBuf| ["cuobjdump", "nvdisasm"].iter().all(|tool| folder.join(tool).is_file());
        let folder = folders.into_iter().find(complete);
        let folder = folder.ok_or("cuobjdump and nvdisasm were not found; eval \"$(.ci/cuda-tools)\" installs them")?;
        Ok(Self { folder })
    }

    /// Looks at a cubin. `reserved` bytes of static shared memory are the system's.
    pub fn usage(&self, cubin: &[u8], reserved: u32) -> Result<BTreeMap<String, Usage>, String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let path = folder.path().join("kernels.cubin");
        std::fs::write(&path, cubin).map_err(|error| error.to_string())?;
        let mut kernels = resources(&self.run("--dump-resource-usage", &path)?, reserved)?;
        instructions(&self.run("--dump-sass", &path)?, &mut kernels);
        for (kernel, usage) in &mut kernels {
            usage.threads = max_threads(cubin, kernel).ok_or_else(|| format!("{kernel}: no launch bounds"))?;
        }
        Ok(kernels)
    }

    fn run(&self, option: &str, path: &Path) -> Result<String, String> {
        let tool = self.folder.join("cuobjdump");
        let mut command = Command::new(&tool);
        command.arg(option).arg(path).env("NVDISASM_PATH", &self.folder);
        let output = command.output().map_err(|error| format!("{}: {error}", tool.display()))?;
        if !output.status.success() {
            return Err(format!("{}: {}", tool.display(), String::from_utf8_lossy(&output.stderr)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Reads ` Function NAME:` and the line `REG:26 STACK:0 SHARED:0 LOCAL:0 ...` after it.
fn resources(text: &str, reserved: u32) -> Result<BTreeMap<String, Usage>, String> {
    let mut kernels = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.trim().strip_prefix("Function ").and_then(|rest| rest.strip_suffix(':')) else {
            continue;
        };
        let line = lines.next().unwrap_or("");
        let value = |key: &str| -> Result<u32, String> {
            let mut words = line.split_whitespace();
            let word = words.find_map(|word| word.strip_prefix(key)).and_then(|rest| rest.strip_prefix(':'));
            word.and_then(|word| word.parse().ok()).ok_or_else(|| format!("{name}: no {key} in \"{line}\""))
        };
        let usage = Usage {
            registers: value("REG")?,
            stack: value("STACK")?,
            shared: value("SHARED")?.saturating_sub(reserved),
            local: value("LOCAL")?,
            ..Usage::default()
        };
        kernels.insert(name.to_string(), usage);
    }
    Ok(kernels)
}

/// Counts the instructions of each `Function : NAME`: lines like `/*0010*/  @P0 LDG.E.128 R4, [R2.64] ;`.
fn instructions(text: &str, kernels: &mut BTreeMap<String, Usage>) {
    let mut current = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function : ") {
            current = name.to_string();
        }
        let (Some(usage), Some((_, rest))) = (kernels.get_mut(&current), line.split_once("*/")) else { continue };
        if !line.starts_with("/*") || !rest.contains(';') {
            continue;
        }
        let opcode = rest.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or("");
        let opcode = opcode.trim_end_matches(';');
        let name = opcode.split('.').next().unwrap_or("");
        let wide = opcode.split('.').any(|part| part == "128");
        let counts = [
            (name != "NOP", &mut usage.instructions),
            (matches!(name, "LDL" | "STL"), &mut usage.spills),
            (matches!(name, "HMMA" | "HGMMA" | "UTCHMMA"), &mut usage.matrix),
            (name == "LDGSTS", &mut usage.async_copies),
            (name == "LDSM", &mut usage.matrix_loads),
            (name == "LDG" && wide, &mut usage.wide_loads),
            (name == "STG" && wide, &mut usage.wide_stores),
            (name == "LDS" && wide, &mut usage.wide_shared_loads),
            (name == "STS" && wide, &mut usage.wide_shared_stores),
        ];
        for (_, count) in counts.into_iter().filter(|(counts, _)| *counts) {
            *count += 1;
        }
    }
}

/// The launch bounds of a kernel: the attribute EIATTR_MAX_THREADS in the section `.nv.info.KERNEL` of the cubin, an ELF file.
fn max_threads(cubin: &[u8], kernel: &str) -> Option<u32> {
    const MAX_THREADS: [u8; 4] = [4, 5, 12, 0];
    let section = section(cubin, &format!(".nv.info.{kernel}"))?;
    // Attributes are aligned to words: format, attribute, then a size and as many bytes, or two bytes of value.
    let mut rest = section;
    while let [format, _, low, high, ..] = *rest {
        let size = if format == 4 { usize::from(u16::from_le_bytes([low, high])) } else { 0 };
        if rest.starts_with(&MAX_THREADS) {
            let of = |axis: usize| number(rest, 4 + 4 * axis, 4);
            return Some((of(0)? * of(1)? * of(2)?) as u32);
        }
        rest = rest.get((4 + size).next_multiple_of(4)..)?;
    }
    None
}

/// The content of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    let (table, size, count) = (number(elf, 40, 8)?, number(elf, 58, 2)?, number(elf, 60, 2)?);
    // The section header's fields: its name's place in the table of names, and, from 24 on, offset and size in the file.
    let content = |index: usize| -> Option<(usize, &'a [u8])> {
        let header = table.checked_add(index.checked_mul(size)?)?;
        let start = number(elf, header.checked_add(24)?, 8)?;
        let end = start.checked_add(number(elf, header.checked_add(32)?, 8)?)?;
        Some((number(elf, header, 4)?, elf.get(start..end).unwrap_or(&[])))
    };
    let (_, names) = content(number(elf, 62, 2)?)?;
    for index in 0..count {
        let (name, bytes) = content(index)?;
        if names.get(name..)?.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)) {
            return Some(bytes);
        }
    }
    None
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_read() {
        let text =
            "Resource usage:\n Common:\n  GLOBAL:12\n Function scale_bf16:\n  REG:26 STACK:8 SHARED:1040 LOCAL:0 X:1\n";
        let mut kernels = resources(text, 1024).expect("well-formed");
        let sass = "\tcode for sm_90\n\t\tFunction : scale_bf16\n\
            /*0000*/                   LDG.E.128.CONSTANT R4, [R2.64] ;   /* 0x00 */\n\
                                                                          /* 0x01 */\n\
            /*0010*/              @!P0 STG.E.128 [R2.64], R4 ;            /* 0x00 */\n\
            /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, RZ ;\n\
            /*0030*/                   LDSM.16.M88.4 R8, [R40] ;\n\
            /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R2.64] ;\n\
            /*0050*/                   STL [R1], R2 ;\n\
            /*0060*/                   EXIT ;\n\
            /*0070*/                   NOP;\n\t\tFunction : other\n/*0000*/ HMMA R1 ;\n";
        instructions(sass, &mut kernels);
        let expected = Usage {
            registers: 26,
            shared: 16,
            stack: 8,
            instructions: 7,
            spills: 1,
            matrix: 1,
            async_copies: 1,
            matrix_loads: 1,
            wide_loads: 1,
            wide_stores: 1,
            ..Usage::default()
        };
        assert_eq!(kernels.remove("scale_bf16"), Some(expected));
        assert!(kernels.is_empty());
    }

    #[test]
    fn a_file_that_is_no_cubin_has_no_launch_bounds() {
        assert_eq!(max_threads(b"", "kernel"), None);
        assert_eq!(max_threads(&[0xff; 300], "kernel"), None);
    }
}
