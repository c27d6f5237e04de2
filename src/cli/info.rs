//! `vitmae info`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use vitmae::config::{MaeConfig, PRESETS};
use vitmae::model::{MemoryUse, Purpose, WorkspaceShape};
use vitmae::ops::{MaskingShape, OPS};
use vitmae::weights::{Checkpoint, Parts};

use vitmae::device::{Device, DeviceChoice, Precision};

use crate::cli::arguments::at_least_one;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A checkpoint, a config.json, or tiny, small, base, large, huge
    #[arg(value_name = "CKPT")]
    checkpoint: Option<PathBuf>,
    /// Images that the memory is counted for [default: 1, 16 and 64]
    #[arg(long, value_name = "N", value_parser = batch)]
    batch_size: Option<usize>,
    /// Lists the CUDA kernels of this build and what is embedded of each
    #[arg(long, conflicts_with_all = ["checkpoint", "batch_size"])]
    kernels: bool,
    /// Lists the ops and the kernels that compute each on a GPU
    #[arg(long, conflicts_with_all = ["checkpoint", "batch_size"])]
    ops: bool,
}

/// Images at a time, at most: the memory of more is not a number of bytes.
const MOST_IMAGES: usize = 1 << 20;

fn batch(text: &str) -> Result<usize, String> {
    match at_least_one(text)? {
        number if number > MOST_IMAGES => Err(format!("expected at most {MOST_IMAGES}")),
        number => Ok(number),
    }
}

pub(crate) fn run(arguments: &Arguments, device: DeviceChoice, precision: Option<Precision>) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if let Some(path) = &arguments.checkpoint {
        return model(&mut out, path, arguments.batch_size, precision.unwrap_or(Precision::F32));
    }
    if arguments.kernels {
        kernels(&mut out)?;
    }
    if arguments.ops {
        ops(&mut out)?;
    }
    if !arguments.kernels && !arguments.ops {
        overview(&mut out, device, precision, arguments.batch_size.unwrap_or(16))?;
    }
    Ok(())
}

/// One screen: version, devices, what is embedded, and the models.
fn overview(
    out: &mut impl Write,
    device: DeviceChoice,
    precision: Option<Precision>,
    batch: usize,
) -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(out, "vitmae {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out)?;
    writeln!(out, "devices")?;
    writeln!(out, "  cpu      {threads} threads, {}", vitmae::cpu::Isa::used())?;
    gpus(out)?;
    writeln!(
        out,
        "  --device {device} {}",
        Device::open(device, precision)
            .map_or_else(|error| format!("cannot be used: {error}"), |device| format!("is {device}"))
    )?;
    writeln!(out)?;
    embedded(out)?;
    writeln!(out)?;
    let precision = precision.unwrap_or(Precision::F32);
    let memory = memory_in(precision);
    writeln!(
        out,
        "model   parameters, M   GFLOP/image in training   MB for training {batch} at a time in {precision}"
    )?;
    for name in PRESETS {
        let config = MaeConfig::by_name(name)?;
        let image = config.image();
        let keep = MaskingShape::new(1, image.patches(), config.mask_ratio)?.keep;
        let shape =
            WorkspaceShape { batch, image, keep, purpose: Purpose::Train, interpolation: None, recompute: false };
        writeln!(
            out,
            "{name:<7} {:>13.2}   {:>23.2}   {:>12.0}",
            count(&config, Parts::All) / 1e6,
            config.flops(config.mask_ratio)?.step as f64 / 1e9,
            memory(&config, &shape)?.total() as f64 / 1e6
        )?;
    }
    writeln!(out)?;
    writeln!(out, "`vitmae info base` or a checkpoint: more of one model; --kernels, --ops: what this build has")?;
    Ok(())
}

/// How memory is counted in this precision.
fn memory_in(precision: Precision) -> fn(&MaeConfig, &WorkspaceShape) -> vitmae::Result<MemoryUse> {
    match precision {
        Precision::F32 => MemoryUse::of,
        Precision::Bf16 => MemoryUse::of_bf16,
    }
}

/// The number of parameters, position tables included; of a configuration that no weights bear out it may exceed a `u64`.
fn count(config: &MaeConfig, parts: Parts) -> f64 {
    let numbers = |shape: &[usize]| shape.iter().map(|&n| n as f64).product::<f64>();
    vitmae::weights::parameters(config, parts).iter().map(|spec| numbers(&spec.shape)).sum()
}

fn ops(out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "ops")?;
    for op in OPS {
        let symbols: Vec<_> = op.symbols().collect();
        let symbols = if symbols.is_empty() { "-".to_string() } else { symbols.join(" ") };
        writeln!(out, "  {:13} {:33} {symbols}", op.family, op.name)?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn gpus(out: &mut impl Write) -> anyhow::Result<()> {
    match vitmae::cuda::devices() {
        Ok(devices) if devices.is_empty() => writeln!(out, "  cuda     no GPU found")?,
        Ok(devices) => {
            for device in devices {
                let (major, minor) = device.compute_capability;
                writeln!(
                    out,
                    "  cuda:{}   {}, compute capability {major}.{minor}, {:.0} GB, {} multiprocessors",
                    device.ordinal,
                    device.name,
                    device.memory_bytes as f64 / 1e9,
                    device.multiprocessors
                )?;
            }
        }
        Err(error) => writeln!(out, "  cuda     not available: {error}")?,
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn gpus(out: &mut impl Write) -> anyhow::Result<()> {
    Ok(writeln!(out, "  cuda     built without it")?)
}

/// One line on the kernels of this build.
#[cfg(feature = "cuda")]
fn embedded(out: &mut impl Write) -> anyhow::Result<()> {
    let manifest = vitmae::cuda::embedded_kernels();
    let count: usize = manifest.files.iter().map(|file| file.symbols().count()).sum();
    match manifest.nvrtc {
        Some((major, minor)) => {
            let mut targets: Vec<_> = manifest
                .files
                .iter()
                .flat_map(|file| file.images.iter().map(|image| image.target.to_string()))
                .collect();
            targets.sort_unstable();
            targets.dedup();
            writeln!(out, "kernels  {count}, compiled by NVRTC {major}.{minor} for {}", targets.join(", "))?;
        }
        None => writeln!(out, "kernels  {count}, compiled on first use (this build had no NVRTC)")?,
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn embedded(out: &mut impl Write) -> anyhow::Result<()> {
    kernels(out)
}

#[cfg(feature = "cuda")]
fn kernels(out: &mut impl Write) -> anyhow::Result<()> {
    let manifest = vitmae::cuda::embedded_kernels();
    match manifest.nvrtc {
        Some((major, minor)) => writeln!(out, "kernels, compiled by NVRTC {major}.{minor}")?,
        None => writeln!(out, "kernels, compiled on first use (this build had no NVRTC)")?,
    }
    for file in manifest.files {
        let images: Vec<String> =
            file.images.iter().map(|image| format!("{} {} bytes", image.target, image.len)).collect();
        writeln!(out, "  {:12} {}", file.name, images.join(", "))?;
        for symbol in file.symbols() {
            writeln!(out, "    {symbol}")?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn kernels(out: &mut impl Write) -> anyhow::Result<()> {
    Ok(writeln!(out, "kernels: none, built without the feature `cuda`")?)
}

fn model(out: &mut impl Write, path: &Path, batch_size: Option<usize>, precision: Precision) -> anyhow::Result<()> {
    let preset = path.to_str().and_then(|name| MaeConfig::by_name(name).ok());
    let (config, whole) = if let Some(config) = preset {
        (config, true)
    } else if path.extension().is_some_and(|end| end == "json") {
        (MaeConfig::from_file(path)?, true)
    } else {
        let checkpoint = Checkpoint::open(path)?;
        let whole = checkpoint.has_decoder();
        let config = checkpoint.require_config()?.clone();
        config.validate()?;
        // A configuration that the weights do not bear out would be shown as if it were theirs.
        let parts = if whole { Parts::All } else { Parts::EncoderOnly };
        checkpoint.check(&vitmae::weights::parameters(&config, parts))?;
        (config, whole)
    };
    config.validate()?;
    let image = config.image();
    let (rows, columns) = image.grid();
    let keep = MaskingShape::new(1, image.patches(), config.mask_ratio)?.keep;
    let (encoder, all) = (count(&config, Parts::EncoderOnly), count(&config, Parts::All));

    writeln!(out, "model        {}{}", path.display(), if whole { "" } else { " (encoder only)" })?;
    writeln!(
        out,
        "encoder      {} blocks, width {}, {} heads, MLP {}, {}",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_act
    )?;
    // A configuration always has a decoder: where the weights have none, nothing is said of it.
    if whole {
        writeln!(
            out,
            "decoder      {} blocks, width {}, {} heads, MLP {}",
            config.decoder_num_hidden_layers,
            config.decoder_hidden_size,
            config.decoder_num_attention_heads,
            config.decoder_intermediate_size
        )?;
    }
    writeln!(
        out,
        "images       {}x{}, {} channels, patches of {}x{}: {rows}x{columns} = {} of which {keep} visible (mask ratio {})",
        image.height,
        image.width,
        image.channels,
        image.patch_height,
        image.patch_width,
        image.patches(),
        config.mask_ratio
    )?;
    if whole {
        writeln!(
            out,
            "loss         {}, LayerNorm epsilon {:e}",
            if config.norm_pix_loss { "normalised patches" } else { "raw pixels" },
            config.layer_norm_eps
        )?;
        writeln!(
            out,
            "parameters   {:.2} M: encoder {:.2} M, decoder {:.2} M (position tables included)",
            all / 1e6,
            encoder / 1e6,
            (all - encoder) / 1e6
        )?;
        let flops = config.flops(config.mask_ratio)?;
        writeln!(
            out,
            "GFLOP/image  {:.2} forward, {:.2} in a training step",
            flops.forward as f64 / 1e9,
            flops.step as f64 / 1e9
        )?;
    } else {
        writeln!(out, "norms        LayerNorm epsilon {:e}", config.layer_norm_eps)?;
        writeln!(out, "parameters   {:.2} M (position table included)", encoder / 1e6)?;
    }
    writeln!(out)?;
    let purposes: &[(&str, Purpose)] = match whole {
        true => &[("encode", Purpose::Encode), ("forward", Purpose::Predict), ("training", Purpose::Train)],
        false => &[("encode", Purpose::Encode)],
    };
    write!(out, "memory in {:5} MB  ", format!("{precision},"))?;
    purposes.iter().try_for_each(|(name, _)| write!(out, "{name:>10} "))?;
    writeln!(out)?;
    let memory = memory_in(precision);
    let batches = batch_size.map_or_else(|| vec![1, 16, 64], |batch| vec![batch]);
    for batch in batches {
        write!(out, "  {batch:>4} at a time  ")?;
        for (_, purpose) in purposes {
            let keep = if *purpose == Purpose::Encode { image.patches() } else { keep };
            let shape = WorkspaceShape { batch, image, keep, purpose: *purpose, interpolation: None, recompute: false };
            let bytes = memory(&config, &shape)?.total();
            write!(out, "{:>10.0} ", bytes as f64 / 1e6)?;
        }
        writeln!(out)?;
    }
    if whole {
        writeln!(
            out,
            "(training puts a batch through the model in micro-batches: on the CPU 16 at a time unless told otherwise)"
        )?;
    }
    Ok(())
}
