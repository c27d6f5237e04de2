//! The command line: one file per subcommand.
//!
//! Results go to standard output; progress and logs to standard error. Exit status: 0 done, 1 the work failed, 2 wrong usage.

mod arguments;
mod embed;
mod forward;
mod info;
mod original;
mod pretrain;
mod progress;
mod reconstruct;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};

use vitmae::device::{Device, DeviceChoice, Precision, Work};
use vitmae::distributed::{Launch, Processes};
use vitmae::ops::Backend;

/// Masked autoencoders: pre-training, reconstructions and features.
#[derive(Debug, Parser)]
#[command(name = "vitmae", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Where to run: auto, cpu, cuda, cuda:N or emulator
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,
    /// Numbers of activations and working weights: f32 or bf16 [default: bf16 on a GPU, f32 on the CPU]
    #[arg(long, global = true, value_name = "TYPE")]
    precision: Option<Precision>,
    /// CPU threads [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = arguments::threads)]
    threads: Option<usize>,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a masked autoencoder on pictures
    #[command(args_override_self = true)]
    Pretrain(Box<pretrain::Arguments>),
    /// Draw original, masked picture and reconstruction side by side
    Reconstruct(reconstruct::Arguments),
    /// Write features of pictures
    Embed(embed::Arguments),
    /// Tensors in, tensors out: loss, predictions, masks, gradients
    Forward(forward::Arguments),
    /// Show devices and kernels, or a model's parameters, FLOPs and memory
    Info(info::Arguments),
}

/// Parses, runs and reports.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Pretrain(arguments) = &cli.command
        && let Err(problem) = arguments.check()
    {
        Cli::command().error(clap::error::ErrorKind::ValueValidation, problem).exit();
    }
    // Other commands are nothing that processes do together, whatever started them.
    let launch = match cli.command {
        Command::Pretrain(_) => Launch::from_environment(),
        _ => Ok(Launch::Single),
    };
    let rank = launch.as_ref().map_or(0, Launch::rank);
    progress::start_log(cli.global.quiet, cli.global.verbose, rank);
    let (processes, result) = match launch.and_then(|launch| Processes::join(&launch)) {
        Err(error) => (None, Err(error.into())),
        Ok(processes) => {
            progress::name_process(processes.rank(), processes.size());
            let result = processes.finish(run(cli, &processes));
            (Some(processes), result)
        }
    };
    let status = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            progress::clear();
            if !is_told_elsewhere(&error, rank) {
                progress::write_or_lose(format!("error: {error:#}\n").as_bytes());
            }
            ExitCode::from(1)
        }
    };
    // Behind the message: where an exchange has failed, this ends the program.
    drop(processes);
    status
}

fn run(cli: Cli, processes: &Processes) -> anyhow::Result<()> {
    let Global { device, precision, threads, quiet, .. } = cli.global;
    if let Command::Info(arguments) = &cli.command {
        return info::run(arguments, device, precision);
    }
    let device = Device::open(device.for_process(processes)?, precision)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or((cores / processes.local_size()).max(1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("starting the worker threads")?;
    let mut name = device.to_string();
    if processes.size() > 1 {
        name += &format!(", in {} processes", processes.size());
    }
    let place =
        pretrain::Place { device: name, peak_flops: device.peak_flops(), threads, processes: processes.clone() };
    pool.install(|| device.run(Running { command: cli.command, place, quiet }))
}

/// A command that needs a device.
struct Running {
    command: Command,
    place: pretrain::Place,
    quiet: bool,
}

impl Work for Running {
    type Output = anyhow::Result<()>;

    fn run<B: Backend>(self, backend: B) -> Self::Output {
        let Self { command, place, quiet } = self;
        let threads = place.threads;
        match command {
            Command::Pretrain(arguments) => pretrain::run(backend, *arguments, place, quiet),
            Command::Reconstruct(arguments) => reconstruct::run(backend, &arguments),
            Command::Embed(arguments) => embed::run(backend, arguments, threads, quiet),
            Command::Forward(arguments) => forward::run(backend, &arguments),
            // It shows devices and opens none.
            Command::Info(arguments) => info::run(&arguments, DeviceChoice::Auto, None),
        }
    }
}

/// Whether another process says what is wrong; process 0 says that as well.
fn is_told_elsewhere(error: &anyhow::Error, rank: usize) -> bool {
    rank > 0 && matches!(error.downcast_ref(), Some(vitmae::Error::Peer { .. }))
}

/// `vitmae info | head` is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
