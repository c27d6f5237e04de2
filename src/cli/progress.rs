//! What a run says on standard error: log lines, and a progress bar where that is a terminal.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, OnceLock};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing::level_filters::LevelFilter;

/// The bar on the screen now, so that log lines can go above it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// What messages begin with where there are several processes.
static PROCESS: OnceLock<String> = OnceLock::new();

/// From here on messages say which process they are of, where there are several.
pub(crate) fn name_process(rank: usize, size: usize) {
    if size > 1 {
        // It is called once.
        let _ = PROCESS.set(format!("process {rank} of {size}: "));
    }
}

/// Sends log lines to standard error; of processes other than 0, only what is wrong with them.
pub(crate) fn start_log(quiet: bool, verbose: bool, rank: usize) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, false) if rank > 0 => LevelFilter::WARN,
        (false, false) => LevelFilter::INFO,
        (false, true) => LevelFilter::DEBUG,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(|| AboveBar)
        .init();
}

/// Writes to standard error above the bar. A line that nobody can be told (a full disk, a closed pipe) is lost and no failure:
/// the work goes on.
struct AboveBar;

impl Write for AboveBar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bar = BAR.lock().ok().and_then(|bar| bar.clone());
        match bar {
            Some(bar) => bar.suspend(|| write_or_lose(bytes)),
            None => write_or_lose(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error has no buffer: what can be written is there at once.
pub(crate) fn write_or_lose(bytes: &[u8]) {
    let process = PROCESS.get().map_or("", String::as_str);
    let text = format!("{process}{}", printable(&String::from_utf8_lossy(bytes)));
    // There is nobody left to tell.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Control characters spelt out, but for ends of lines: names of files and tensors may hold what a terminal obeys.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            _ if character.is_control() => shown.extend(character.escape_default()),
            _ => shown.push(character),
        }
    }
    shown
}

/// A bar over `length` items that started at `position`; invisible where standard error is not a terminal, or with `quiet`.
pub(crate) fn bar(length: u64, position: u64, quiet: bool) -> ProgressBar {
    let target = if quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr_with_hz(5)
    };
    let bar = ProgressBar::with_draw_target(Some(length), target).with_position(position);
    if let Ok(style) = ProgressStyle::with_template("{bar:28} {pos}/{len}  {msg}  {eta} left") {
        bar.set_style(style);
    }
    if let Ok(mut current) = BAR.lock() {
        *current = Some(bar.clone());
    }
    bar
}

/// Takes the bar off the screen.
pub(crate) fn clear() {
    if let Some(bar) = BAR.lock().ok().and_then(|mut bar| bar.take()) {
        bar.finish_and_clear();
    }
}
