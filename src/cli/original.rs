//! What `main_pretrain.py` of the original (facebookresearch/mae) calls otherwise, or has and `pretrain` does not need: its command
//! lines work, and are refused where a flag would do something else here; docs/original.md has the exceptions. Names alone are
//! aliases in `pretrain`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use anyhow::{Context, bail};
use vitmae::distributed::Processes;
use vitmae::train::check_last_checkpoint;

/// Flags without a meaning here. They stand in no help.
#[derive(Debug, clap::Args)]
pub(crate) struct Original {
    #[arg(long, hide = true, alias = "pin_mem")]
    pin_mem: bool,
    #[arg(long, hide = true, alias = "no_pin_mem")]
    no_pin_mem: bool,
    #[arg(long, hide = true, value_name = "N", alias = "start_epoch")]
    start_epoch: Option<u64>,
    #[arg(long, hide = true, value_name = "N", alias = "world_size")]
    world_size: Option<usize>,
    #[arg(long, hide = true, value_name = "N", alias = "local_rank", allow_negative_numbers = true)]
    local_rank: Option<i64>,
    #[arg(long, hide = true, alias = "dist_on_itp")]
    dist_on_itp: bool,
    #[arg(long, hide = true, value_name = "URL", alias = "dist_url")]
    dist_url: Option<OsString>,
}

impl Original {
    /// Another first epoch would be another run, unless a checkpoint decides, as in the original.
    pub(crate) fn check(&self, resume: bool) -> Result<(), String> {
        match self.start_epoch {
            Some(epoch) if epoch > 0 && !resume => Err(format!(
                "--start_epoch {epoch}: a run continues after its last checkpoint, which knows the epoch: use --resume"
            )),
            _ => Ok(()),
        }
    }

    /// Says of each flag that it does nothing.
    ///
    /// # Errors
    /// For more processes than there are: one process with all the batch would be another run.
    pub(crate) fn explain(&self, processes: &Processes) -> anyhow::Result<()> {
        let size = processes.size();
        if let Some(wanted) = self.world_size.filter(|&wanted| wanted > 1 && wanted != size) {
            bail!(
                "--world_size {wanted}, and the launcher has started {size}: start {wanted} processes with torchrun or mpirun, \
                 which say how many there are"
            );
        }
        let pinned = "pictures always go to a GPU through pinned memory";
        let launched = "the launcher's variables say it (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR; or MPI's)";
        let notes = [
            ("pin_mem", self.pin_mem, pinned),
            ("no_pin_mem", self.no_pin_mem, pinned),
            (
                "start_epoch",
                self.start_epoch.is_some(),
                "a run begins at epoch 0, or with --resume where its checkpoint says",
            ),
            ("world_size", self.world_size.is_some(), launched),
            ("local_rank", self.local_rank.is_some(), launched),
            ("dist_on_itp", self.dist_on_itp, launched),
            ("dist_url", self.dist_url.is_some(), launched),
        ];
        for (flag, _, reason) in notes.into_iter().filter(|(_, given, _)| *given) {
            tracing::info!("--{flag} has no effect: {reason}");
        }
        Ok(())
    }
}

/// The pictures of `--data_path`, which the original takes from a sub-folder `train`.
pub(crate) fn training_pictures(data_path: OsString) -> OsString {
    let train = Path::new(&data_path).join("train");
    if !train.is_dir() {
        return data_path;
    }
    tracing::info!("--data_path: the pictures are those of {}", train.display());
    train.into()
}

/// Whether `--resume`, perhaps with a checkpoint's path as the original needs it, resumes the run in `out`.
///
/// # Errors
/// For a checkpoint that is not the last whole one of this run.
pub(crate) fn resumes(resume: Option<Option<&OsStr>>, out: &Path, processes: &Processes) -> anyhow::Result<bool> {
    let checkpoint = match resume {
        None => return Ok(false),
        Some(None) => return Ok(true),
        // The original's default.
        Some(Some(checkpoint)) if checkpoint.is_empty() => return Ok(false),
        Some(Some(checkpoint)) => Path::new(checkpoint),
    };
    // Process 0 alone needs the folder.
    if !processes.is_rank_0() {
        return Ok(true);
    }
    let (Ok(given), Ok(run)) = (checkpoint.canonicalize(), out.canonicalize()) else {
        bail!("--resume {}: there is no such checkpoint in {}", checkpoint.display(), out.display());
    };
    if given == run {
        return Ok(true);
    }
    let step = |path: &Path| -> Option<u64> { path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok() };
    let Some(chosen) = step(&given).filter(|_| given.parent() == Some(&run)) else {
        bail!(
            "--resume {}: a run goes on from a checkpoint of its own in --out {}; to start from other weights, use --from",
            checkpoint.display(),
            out.display()
        );
    };
    // Who names one wants that one: an older one in its place would be a surprise.
    check_last_checkpoint(out, chosen).with_context(|| format!("--resume {}", checkpoint.display()))?;
    Ok(true)
}
