//! `vitmae pretrain`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::{Map, Value};
use vitmae::config::{MaeConfig, Size};
use vitmae::distributed::Processes;
use vitmae::ops::Backend;
use vitmae::train::{
    Event, FIELDS, Kind, PretrainReport, PretrainSettings, RunLength, config_of_run, pretrain_together,
};
use vitmae::weights::Checkpoint;

use crate::cli::arguments::{at_least_one, at_least_one_u64, helpers, mask_ratio, positive};
use crate::cli::original::{Original, resumes, training_pictures};
use crate::cli::progress;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Folder for checkpoints, metrics, loss curve and reconstructions
    #[arg(long, value_name = "DIR", aliases = ["output_dir", "output-dir"])]
    out: PathBuf,
    /// Folder for TensorBoard's events [default: that of --out]
    #[arg(long, value_name = "DIR", alias = "log_dir")]
    log_dir: Option<PathBuf>,
    /// Do the run of this recipe.json once more: it replaces the flags that decide what a run does
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Go on from the last checkpoint in --out, which may be named
    #[arg(long, value_name = "CKPT", num_args = 0..=1)]
    resume: Option<Option<OsString>>,
    /// Threads that read and decode pictures [default: those of --threads]
    #[arg(long, value_name = "N", alias = "num_workers", value_parser = helpers)]
    num_workers: Option<usize>,
    /// The device's peak, of which the log shows the share used (MFU) [default: that of the GPU's data sheet]
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = positive)]
    peak_tflops: Option<f64>,
    #[command(flatten)]
    original: Original,
    #[command(flatten)]
    settings: Settings,
}

/// What a recipe has as well.
#[derive(Debug, clap::Args)]
#[group(id = "settings", multiple = true, conflicts_with = "recipe")]
struct Settings {
    /// Pictures: a folder (class sub-folders optional), tar shards (braces allowed), or synthetic[:COUNT]
    #[arg(long, value_name = "SRC", required_unless_present_any = ["recipe", "data_path"])]
    data: Option<OsString>,
    /// The original's name: a folder, whose pictures are those of its sub-folder `train` where it has one
    #[arg(long, value_name = "DIR", alias = "data_path", conflicts_with = "data", hide = true)]
    data_path: Option<OsString>,
    /// Other pictures, whose reconstruction loss is taken at every checkpoint; the best checkpoint is kept
    #[arg(long, value_name = "SRC")]
    val: Option<OsString>,
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
    /// Share of patches that are hidden [default: the model's, 0.75]
    #[arg(long, value_name = "F", alias = "mask_ratio", allow_negative_numbers = true, value_parser = mask_ratio)]
    mask_ratio: Option<f64>,
    /// Predict patches normalised by their own mean and variance
    #[arg(long, alias = "norm_pix_loss")]
    norm_pix_loss: bool,
    /// Pixels of a side, or HEIGHTxWIDTH [default: the model's, 224]
    #[arg(long, value_name = "N|HxW", aliases = ["input_size", "input-size"])]
    image_size: Option<Size>,
    /// Pixels of a patch's side, or HEIGHTxWIDTH [default: the model's, 16]
    #[arg(long, value_name = "N|HxW")]
    patch_size: Option<Size>,
    /// Colour channels of the pictures: 1, 3 or 4 [default: the model's, 3]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    channels: Option<usize>,
    #[command(flatten)]
    fields: Fields,
}

impl Arguments {
    /// What flags alone cannot say of each other.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.original
            .check(self.resume.as_ref().is_some_and(|named| named.as_ref().is_none_or(|name| !name.is_empty())))
    }

    /// The run's settings: those of the recipe, or of the flags.
    fn settings(self, resume: bool, many_at_a_time: bool) -> anyhow::Result<PretrainSettings> {
        match self.recipe {
            Some(recipe) => Ok(PretrainSettings::from_recipe(recipe, self.out)?),
            None => self.settings.resolve(self.out, resume, many_at_a_time),
        }
    }
}

impl Settings {
    /// The settings that the flags stand for.
    fn resolve(self, out: PathBuf, resume: bool, many_at_a_time: bool) -> anyhow::Result<PretrainSettings> {
        let config = self.config(if resume { config_of_run(&out)? } else { None })?;
        let mut values = self.fields.0;
        if values.contains_key("learning_rate") {
            // It has no effect then.
            values.remove("base_learning_rate");
        }
        let chosen = values.contains_key("micro_batch");
        let settings = PretrainSettings {
            data: self.data.or(self.data_path.map(training_pictures)).context("--data is missing")?,
            validation: self.val,
            out,
            config,
            from: self.from,
            length: match self.steps {
                Some(steps) => RunLength::Steps(steps),
                None => RunLength::Epochs(self.epochs.unwrap_or(400)),
            },
            resume,
            ..PretrainSettings::default()
        };
        let mut settings = settings.with(values)?;
        // A CPU's caches are small; a GPU wants as much to do at once as there is.
        if many_at_a_time && !chosen {
            settings.micro_batch = settings.batch_size;
        }
        Ok(settings)
    }

    /// The model's configuration: that of `--model`, of the run that is resumed, or of `--from`, changed by the flags.
    fn config(&self, resumed: Option<MaeConfig>) -> anyhow::Result<MaeConfig> {
        let mut config = match (&self.model, resumed, &self.from) {
            (Some(name), ..) if name.ends_with(".json") => MaeConfig::from_file(name)?,
            (Some(name), ..) => MaeConfig::by_name(name)?,
            // A resumed run keeps its model.
            (None, Some(config), _) => config,
            (None, None, Some(from)) => Checkpoint::open(from)?.require_config()?.clone(),
            (None, None, None) => MaeConfig::base(),
        };
        if let Some(ratio) = self.mask_ratio {
            config.mask_ratio = ratio;
        }
        config.norm_pix_loss |= self.norm_pix_loss;
        if let Some(size) = self.image_size {
            config.image_size = size;
        }
        if let Some(size) = self.patch_size {
            config.patch_size = size;
        }
        if let Some(channels) = self.channels {
            config.num_channels = channels;
        }
        config.validate()?;
        Ok(config)
    }
}

/// The flags of [`FIELDS`], by the fields' names; only those that were given.
#[derive(Debug)]
struct Fields(Map<String, Value>);

impl clap::Args for Fields {
    fn augment_args(command: clap::Command) -> clap::Command {
        let flags = FIELDS.iter().filter(|field| !field.flag.is_empty() && field.kind != Kind::Path);
        command.args(flags.map(|field| {
            let flag =
                clap::Arg::new(field.name).long(field.flag).aliases(field.aliases.iter().copied()).group("settings");
            if field.kind == Kind::Switch {
                return flag.action(clap::ArgAction::SetTrue).help(field.help);
            }
            let kind = field.kind;
            flag.value_name(field.value_name)
                .allow_negative_numbers(true)
                .value_parser(move |text: &str| kind.parse(text))
                .help(match PretrainSettings::default_of(field) {
                    Some(default) => format!("{} [default: {default}]", field.help),
                    None => field.help.to_owned(),
                })
        }))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Fields {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let given =
            FIELDS.iter().filter(|field| !field.flag.is_empty() && field.kind != Kind::Path).filter_map(|field| {
                let value = match field.kind {
                    Kind::Switch => matches.get_flag(field.name).then(|| Value::from(true))?,
                    _ => matches.get_one::<Value>(field.name)?.clone(),
                };
                Some((field.name.to_owned(), value))
            });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        self.0.extend(Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

/// What a run is done on.
pub(crate) struct Place {
    /// In words.
    pub device: String,
    /// Operations per second in matrix products, as far as known.
    pub peak_flops: Option<f64>,
    /// Threads of the CPU.
    pub threads: usize,
    /// Who does it together.
    pub processes: Processes,
}

pub(crate) fn run<B: Backend>(backend: B, arguments: Arguments, place: Place, quiet: bool) -> anyhow::Result<()> {
    let workers = arguments.num_workers.unwrap_or(place.threads);
    let peak_flops = arguments.peak_tflops.map(|peak| peak * 1e12).or(place.peak_flops);
    let processes = &place.processes;
    arguments.original.explain(processes)?;
    let resume = resumes(arguments.resume.as_ref().map(Option::as_deref), &arguments.out, processes)?;
    let events = arguments.log_dir.clone();
    let mut settings = arguments.settings(resume, backend.wants_large_batches())?;
    settings.config = shared_config(settings.config, processes)?;
    if settings.data_fingerprint.is_some() && settings.device != place.device {
        tracing::warn!(
            "the recipe is of a run on {}, and this is {}: the run will be much the same, and not bit for bit",
            settings.device,
            place.device
        );
    }
    settings = PretrainSettings { resume, workers, peak_flops, events, device: place.device, ..settings };

    let stop = stop_on_signals().context("listening to signals")?;
    let mut watcher = Watcher { bar: None, quiet, seen: 0, mean_loss: None, last_line: Instant::now() };
    let report = pretrain_together(backend, &settings, processes, &mut |event| {
        if processes.is_rank_0() {
            watcher.see(&event);
        }
        !stop.load(Ordering::Relaxed)
    });
    progress::clear();
    let report = report?;

    if report.skipped_pictures > 0 {
        tracing::warn!("{} pictures could not be decoded and were skipped", report.skipped_pictures);
    }
    if report.skipped_steps > 0 && processes.is_rank_0() {
        tracing::warn!("{} steps were skipped because they were not finite", report.skipped_steps);
    }
    if report.failed_validations > 0 && processes.is_rank_0() {
        tracing::warn!(
            "{} validation losses were left out: their pictures could not be read",
            report.failed_validations
        );
    }
    if report.interrupted {
        bail!(
            "stopped after step {} as asked; the checkpoint is {}: go on with --resume",
            report.steps,
            report.checkpoint.display()
        );
    }
    if !processes.is_rank_0() {
        return Ok(());
    }
    print(&report).with_context(|| {
        format!(
            "the run is done, and its checkpoint is {}; standard output cannot be written",
            report.checkpoint.display()
        )
    })
}

/// Says on standard output what a run has come to.
fn print(report: &PretrainReport) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if let Some((first, last)) = report.loss {
        writeln!(out, "trained {} steps: loss {first:.4} at the start, {last:.4} at the end", report.steps)?;
    }
    writeln!(out, "checkpoint: {}", report.checkpoint.display())?;
    if let Some((loss, best)) = &report.best {
        writeln!(out, "best checkpoint: {}, validation loss {loss:.4}", best.display())?;
    }
    writeln!(out, "open these pictures:")?;
    if let Some(picture) = &report.picture {
        writeln!(out, "  {}  what the model sees and what it makes of it", picture.display())?;
    }
    writeln!(out, "  {}  the loss", report.curve.display())?;
    out.flush()
}

/// The configuration of process 0, the only one that needs the folder of a resumed run.
fn shared_config(own: MaeConfig, processes: &Processes) -> anyhow::Result<MaeConfig> {
    processes.ready()?;
    let json = processes.share(own.to_json().into_bytes())?;
    if processes.is_rank_0() { Ok(own) } else { Ok(MaeConfig::from_json(&String::from_utf8_lossy(&json))?) }
}

/// A flag that the first Ctrl-C raises to stop the run after the current step; the second one stops it at once.
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
                tracing::warn!("stopping after this step, with a checkpoint; a second signal stops at once");
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
