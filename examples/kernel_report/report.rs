//! The report on compiled kernels: registers, memory, occupancy and instructions, for each kernel and architecture.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex};

use vitmae::cuda::embedded::{KernelFile, Target};
use vitmae::cuda::embedded_kernels;
use vitmae::cuda::launch::Limits;
use vitmae::cuda::nvrtc::{Nvrtc, NvrtcError, Source};

use super::launches::of_training_steps;
use super::tools::{Tools, Usage};

/// What a multiprocessor of an architecture has, from the CUDA programming guide's table of compute capabilities.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// Its name, as NVRTC takes it.
    pub name: &'static str,
    /// Threads that run at once.
    pub threads: u32,
    /// Blocks that run at once.
    pub blocks: u32,
    /// Shared memory.
    pub shared: u32,
    /// The most of it that a block may have.
    pub shared_per_block: u32,
    /// Multiprocessors of the largest GPU.
    pub multiprocessors: u32,
}

const KIB: u32 = 1 << 10;

/// The architectures of the report, with 65536 registers each.
pub const ARCHITECTURES: [Architecture; 6] = [
    architecture("sm_80", 2048, 32, 164, 163, 108),
    architecture("sm_86", 1536, 16, 100, 99, 84),
    architecture("sm_89", 1536, 24, 100, 99, 142),
    architecture("sm_90a", 2048, 32, 228, 227, 132),
    architecture("sm_100", 2048, 32, 228, 227, 148),
    architecture("sm_120", 1536, 24, 100, 99, 188),
];

const fn architecture(
    name: &'static str,
    threads: u32,
    blocks: u32,
    shared: u32,
    per_block: u32,
    multiprocessors: u32,
) -> Architecture {
    Architecture { name, threads, blocks, shared: shared * KIB, shared_per_block: per_block * KIB, multiprocessors }
}

impl Architecture {
    /// What the system takes of each block's shared memory.
    const RESERVED: u32 = KIB;

    /// The part of it that `cuobjdump` shows as static.
    #[must_use]
    pub fn shown(self) -> u32 {
        if self.name.starts_with("sm_8") { 0 } else { Self::RESERVED }
    }

    /// Blocks of a kernel that run at once: as many as registers (given to warps in units of 256), threads and shared memory
    /// allow.
    #[must_use]
    pub fn blocks_at_once(self, usage: &Usage, dynamic: u32) -> u32 {
        let warps = usage.threads.div_ceil(32).max(1);
        let registers_per_warp = (usage.registers.max(1) * 32).next_multiple_of(256);
        // The register file is split among four schedulers.
        let warps_at_once = (65536 / 4 / registers_per_warp) * 4;
        let shared = (usage.shared + dynamic + Self::RESERVED).next_multiple_of(128);
        self.blocks.min(self.threads / (32 * warps)).min(warps_at_once / warps).min(self.shared / shared)
    }
}

/// Compiles a kernel file, or takes what this process compiled before.
pub fn compile(nvrtc: &Nvrtc, file: &'static KernelFile, target: Target) -> Result<Arc<(Vec<u8>, String)>, NvrtcError> {
    type Compiled = BTreeMap<(&'static str, String), Arc<(Vec<u8>, String)>>;
    static COMPILED: Mutex<Compiled> = Mutex::new(BTreeMap::new());
    let key = (file.name, target.to_string());
    // Held while compiling: two tests that want the same file then share the work.
    let mut compiled = COMPILED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(image) = compiled.get(&key) {
        return Ok(Arc::clone(image));
    }
    let headers: Vec<_> =
        embedded_kernels().headers.iter().map(|header| Source { name: header.name, text: header.text }).collect();
    let image = nvrtc.compile(Source { name: file.name, text: file.text }, &headers, target)?;
    let image = Arc::new((image.image, image.log));
    compiled.insert(key, Arc::clone(&image));
    Ok(image)
}

/// What the kernels of a file use on an architecture.
pub fn usage(
    nvrtc: &Nvrtc,
    tools: &Tools,
    file: &'static KernelFile,
    architecture: Architecture,
) -> Result<BTreeMap<String, Usage>, String> {
    let target = Target::parse(architecture.name).map_err(|error| error.to_string())?;
    let image = compile(nvrtc, file, target).map_err(|error| error.to_string())?;
    tools.usage(&image.0, architecture.shown()).map_err(|error| format!("{} for {target}: {error}", file.name))
}

const HEADER: &str = "\
| architecture | threads | registers | static | dynamic | stack | local accesses | blocks, occupancy | matrix | LDGSTS | LDSM | LDG.128 \
| STG.128 | LDS.128 | STS.128 | instructions |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
";

/// The whole report as Markdown.
pub fn report(nvrtc: &Nvrtc, tools: &Tools) -> Result<String, String> {
    let (major, minor) = nvrtc.version;
    let mut text = format!(
        "# What the compiler made of the kernels\n\n\
         Written by `cargo run --example kernel_report` (after `eval \"$(.ci/nvrtc)\"; eval \"$(.ci/cuda-tools)\"`), held up to date by a\n\
         test. Compiled by NVRTC {major}.{minor}; read from the machine code with cuobjdump and nvdisasm. Nothing here was measured.\n\n\
         *threads*: of a block, and *dynamic*: KiB of dynamic shared memory, as training steps of ViT-B, L and H launch it on a GPU of\n\
         this architecture (of several the launch with most); a kernel that these do not use has the most threads that it may have.\n\
         *static*: bytes of other shared memory. *local accesses*: spills and arrays that are not in registers. *blocks, occupancy*:\n\
         blocks that run at once on a multiprocessor, and their share of its threads. The rest counts instructions in the code:\n\
         matrix products (HMMA, HGMMA), asynchronous copies, fragment loads, 128-bit accesses.\n"
    );
    let launches: Vec<_> = ARCHITECTURES
        .iter()
        .map(|of| of_training_steps(Limits { shared_bytes: of.shared_per_block, multiprocessors: of.multiprocessors }))
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    for file in embedded_kernels().files {
        let usages: Vec<_> = ARCHITECTURES.iter().map(|&of| usage(nvrtc, tools, file, of)).collect::<Result<_, _>>()?;
        let _ = write!(text, "\n## {}\n", file.name);
        for symbol in file.symbols() {
            let _ = write!(text, "\n### `{symbol}`\n\n{HEADER}");
            for ((architecture, usage), launches) in ARCHITECTURES.iter().zip(&usages).zip(&launches) {
                let usage = usage.get(symbol).ok_or_else(|| format!("{symbol} is not in the code"))?;
                line(&mut text, *architecture, usage, launches.get(symbol).copied());
            }
        }
    }
    Ok(text)
}

fn line(text: &mut String, architecture: Architecture, usage: &Usage, launch: Option<(u32, u32)>) {
    let (threads, dynamic) = launch.unwrap_or((usage.threads, 0));
    let blocks = architecture.blocks_at_once(&Usage { threads, ..*usage }, dynamic);
    let share = 100 * blocks * threads / architecture.threads;
    let dynamic =
        launch.map_or_else(|| "not used".to_string(), |_| format!("{:.1}", f64::from(dynamic) / f64::from(KIB)));
    let Usage { registers, shared, stack, spills, matrix, async_copies, matrix_loads, .. } = *usage;
    let Usage { wide_loads, wide_stores, wide_shared_loads, wide_shared_stores, instructions, .. } = *usage;
    let _ = writeln!(
        text,
        "| {} | {threads} | {registers} | {shared} | {dynamic} | {stack} | {spills} | {blocks}, {share} % | {matrix} | {async_copies} | \
         {matrix_loads} | {wide_loads} | {wide_stores} | {wide_shared_loads} | {wide_shared_stores} | {instructions} |",
        architecture.name
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked examples, by the rules of NVIDIA's occupancy calculator.
    #[test]
    fn occupancy_is_what_the_scarcest_resource_allows() {
        let usage = |threads, registers, shared| Usage { threads, registers, shared, ..Usage::default() };
        let of = |name: &str| *ARCHITECTURES.iter().find(|of| of.name == name).expect("in the table");
        // Threads: 2048 / 256. Blocks: 32 of 32 threads. Registers: 255 -> 8192 a warp, 8 warps.
        assert_eq!(of("sm_90a").blocks_at_once(&usage(256, 32, 0), 0), 8);
        assert_eq!(of("sm_90a").blocks_at_once(&usage(32, 32, 0), 0), 32);
        assert_eq!(of("sm_90a").blocks_at_once(&usage(128, 255, 0), 0), 2);
        assert_eq!(of("sm_86").blocks_at_once(&usage(256, 40, 0), 0), 6);
        // 168 registers: 5376 a warp, three on each of four schedulers.
        assert_eq!(of("sm_80").blocks_at_once(&usage(128, 168, 0), 0), 3);
        // Shared memory: 164 KiB / (48 + 1), and 100 KiB / (99 + 1).
        assert_eq!(of("sm_80").blocks_at_once(&usage(128, 32, 0), 48 * KIB), 3);
        assert_eq!(of("sm_89").blocks_at_once(&usage(128, 32, 99 * KIB), 0), 1);
        assert_eq!([of("sm_80").shown(), of("sm_90a").shown(), of("sm_120").shown()], [0, KIB, KIB]);
    }
}
