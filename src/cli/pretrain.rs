//! `vitmae pretrain`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use vitmae::config::MaeConfig;
use vitmae::ops::Backend;
use vitmae::train::{Event, OptimizerSettings, PretrainSettings, RunLength, config_of_run, pretrain};
use vitmae::weights::Checkpoint;

use crate::cli::arguments::{Size, at_least_one, at_least_one_u64, mask_ratio, not_negative, positive};
use crate::cli::progress;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Pictures: a folder (class sub-folders optional), or synthetic[:COUNT]
    #[arg(long, value_name = "SRC")]
    data: OsString,
    /// Folder for checkpoints, metrics, loss curve and reconstructions
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// tiny, small, base, large, huge, or a config.json [default: base, or that of --from]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Start from these weights
    #[arg(long, value_name = "CKPT")]
    from: Option<PathBuf>,
    /// Passes over the pictures [default: 400]
    #[arg(long, value_name = "N", conflicts_with = "steps", value_parser = at_least_one_u64)]
    epochs: Option<u64>,
    /// Optimiser steps, instead of epochs
    #[arg(long, value_name = "N", value_parser = at_least_one_u64)]
    steps: Option<u64>,
    /// Pictures in a batch
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    batch_size: usize,
    /// Batches in an optimiser step; gives what one large batch gives
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    accumulate: usize,
    /// Base learning rate: that of 256 pictures in a step
    #[arg(long, value_name = "F", default_value_t = 1.5e-4, allow_negative_numbers = true, value_parser = not_negative)]
    blr: f64,
    /// The learning rate at the end of the cosine
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative)]
    min_lr: f64,
    /// Epochs of linear warm-up [default: a twentieth of the run, at most 40]
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = not_negative)]
    warmup_epochs: Option<f64>,
    /// Weight decay of matrices; biases, norms and tokens do not decay
    #[arg(long, value_name = "F", default_value_t = 0.05, allow_negative_numbers = true, value_parser = not_negative)]
    weight_decay: f64,
    /// Scale gradients down to this norm where they are larger
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = positive)]
    clip_grad: Option<f64>,
    /// Share of patches that are hidden [default: the model's, 0.75]
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = mask_ratio)]
    mask_ratio: Option<f64>,
    /// Predict patches normalised by their own mean and variance
    #[arg(long)]
    norm_pix_loss: bool,
    /// Pixels of a side, or HEIGHTxWIDTH [default: the model's, 224]
    #[arg(long, value_name = "N|HxW")]
    image_size: Option<Size>,
    /// Pixels of a patch's side, or HEIGHTxWIDTH [default: the model's, 16]
    #[arg(long, value_name = "N|HxW")]
    patch_size: Option<Size>,
    /// Colour channels of the pictures: 1, 3 or 4 [default: the model's, 3]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    channels: Option<usize>,
    /// Steps between checkpoints [default: a tenth of the run]
    #[arg(long, value_name = "STEPS", value_parser = at_least_one_u64)]
    checkpoint_every: Option<u64>,
    /// The newest checkpoints that are kept [default: all with --checkpoint-every, else one]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    keep: Option<usize>,
    /// Steps between reconstruction pictures [default: a tenth of the run]
    #[arg(long, value_name = "STEPS", value_parser = at_least_one_u64)]
    picture_every: Option<u64>,
    /// Decides weights, order, crops and masks
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on from the last checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Images in the model at a time: more is faster up to a point and needs more memory; the result is the same [default: 16
    /// on the CPU, the batch on a GPU]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    micro_batch: Option<usize>,
    /// Compute activations again in backward instead of keeping them: less memory, a third more time, the same result
    #[arg(long)]
    recompute: bool,
}

impl Arguments {
    /// The model's configuration: that of `--model`, of the run that goes on, or of `--from`, changed by the flags.
    fn config(&self) -> anyhow::Result<MaeConfig> {
        let resumed = if self.resume { config_of_run(&self.out)? } else { None };
        let mut config = match (&self.model, resumed, &self.from) {
            (Some(name), ..) if name.ends_with(".json") => MaeConfig::from_file(name)?,
            (Some(name), ..) => MaeConfig::by_name(name)?,
            // A run that goes on has the model that it had.
            (None, Some(config), _) => config,
            (None, None, Some(from)) => Checkpoint::open(from)?.require_config()?.clone(),
            (None, None, None) => MaeConfig::base(),
        };
        if let Some(ratio) = self.mask_ratio {
            config.mask_ratio = ratio;
        }
        config.norm_pix_loss |= self.norm_pix_loss;
        if let Some(size) = self.image_size {
            config.image_size = (size.height, size.width).into();
        }
        if let Some(size) = self.patch_size {
            config.patch_size = (size.height, size.width).into();
        }
        if let Some(channels) = self.channels {
            config.num_channels = channels;
        }
        config.validate()?;
        Ok(config)
    }
}

pub(crate) fn run<B: Backend>(backend: B, arguments: Arguments, threads: usize, quiet: bool) -> anyhow::Result<()> {
    let config = arguments.config()?;
    // A CPU's caches are small; a GPU wants as much to do at once as there is.
    let micro_batch = arguments.micro_batch.unwrap_or(if backend.records() { arguments.batch_size } else { 16 });
    let settings = PretrainSettings {
        length: match arguments.steps {
            Some(steps) => RunLength::Steps(steps),
            None => RunLength::Epochs(arguments.epochs.unwrap_or(400)),
        },
        config,
        data: arguments.data,
        out: arguments.out,
        from: arguments.from,
        batch_size: arguments.batch_size,
        accumulate: arguments.accumulate,
        base_learning_rate: arguments.blr,
        minimum_learning_rate: arguments.min_lr,
        warmup_epochs: arguments.warmup_epochs,
        optimizer: OptimizerSettings {
            weight_decay: arguments.weight_decay,
            clip_norm: arguments.clip_grad,
            ..OptimizerSettings::default()
        },
        checkpoint_every: arguments.checkpoint_every,
        keep_checkpoints: arguments.keep,
        picture_every: arguments.picture_every,
        seed: arguments.seed,
        resume: arguments.resume,
        micro_batch,
        recompute: arguments.recompute,
        workers: threads,
    };

    let stop = stop_on_signals().context("listening to signals")?;
    let mut watcher = Watcher { bar: None, quiet, seen: 0, mean_loss: None, last_line: Instant::now() };
    let report = pretrain(backend, &settings, &mut |event| {
        watcher.see(&event);
        !stop.load(Ordering::Relaxed)
    });
    progress::clear();
    let report = report?;

    if report.skipped_pictures > 0 {
        tracing::warn!("{} pictures could not be decoded and were skipped", report.skipped_pictures);
    }
    if report.skipped_steps > 0 {
        tracing::warn!("{} steps were skipped because they were not finite", report.skipped_steps);
    }
    if report.interrupted {
        bail!(
            "stopped after step {} as asked; the checkpoint is {}: go on with --resume",
            report.steps,
            report.checkpoint.display()
        );
    }
    if let Some((first, last)) = report.loss {
        writeln!(io::stdout(), "trained {} steps: loss {first:.4} at the start, {last:.4} at the end", report.steps)?;
    }
    writeln!(io::stdout(), "checkpoint: {}", report.checkpoint.display())?;
    writeln!(io::stdout(), "open these pictures:")?;
    if let Some(picture) = &report.picture {
        writeln!(io::stdout(), "  {}  what the model sees and what it makes of it", picture.display())?;
    }
    writeln!(io::stdout(), "  {}  the loss", report.curve.display())?;
    Ok(())
}

/// A flag that the first Ctrl-C raises, which asks to stop behind the step; the second one stops at once.
fn stop_on_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let signals = [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        #[cfg(unix)]
        signal_hook::consts::SIGHUP,
    ];
    for signal in signals {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    #[cfg(unix)]
    {
        // A thread of its own, as a signal's handler may not print.
        let mut arrived = signal_hook::iterator::Signals::new(signals)?;
        std::thread::spawn(move || {
            if arrived.forever().next().is_some() {
                tracing::warn!("stopping behind this step, with a checkpoint; once more stops at once");
            }
        });
    }
    Ok(stop)
}

/// Shows events on standard error: a bar on a terminal, lines now and then elsewhere.
struct Watcher {
    bar: Option<indicatif::ProgressBar>,
    quiet: bool,
    seen: u64,
    mean_loss: Option<f64>,
    last_line: Instant,
}

/// Seconds between lines where standard error is not a terminal.
const LINE_SECONDS: u64 = 10;

impl Watcher {
    fn see(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { total_steps, done, pictures, parameters } => {
                tracing::info!(
                    "{pictures} pictures, {:.1} M parameters, steps {done} to {total_steps}",
                    *parameters as f64 / 1e6
                );
                self.bar = Some(progress::bar(*total_steps, *done, self.quiet));
            }
            Event::Step(metrics) => {
                self.seen += 1;
                if let Some(loss) = metrics.loss {
                    // A running mean over about twenty steps: single losses jump.
                    let mean = self.mean_loss.map_or(loss, |mean| mean + (loss - mean) / self.seen.min(20) as f64);
                    self.mean_loss = Some(mean);
                }
                let text = format!(
                    "loss {:.4}  {:.1} images/s",
                    self.mean_loss.unwrap_or(f64::NAN),
                    metrics.images_per_second
                );
                let Some(bar) = &self.bar else { return };
                bar.set_message(text.clone());
                bar.inc(1);
                if bar.is_hidden() && self.last_line.elapsed().as_secs() >= LINE_SECONDS {
                    self.last_line = Instant::now();
                    tracing::info!("step {} of {}: {text}", metrics.step, bar.length().unwrap_or(0));
                }
            }
            Event::Wrote(path) => tracing::debug!("wrote {}", path.display()),
        }
    }
}
