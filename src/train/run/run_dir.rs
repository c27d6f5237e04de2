//! The folder of a run: one run at a time writes to it, and none over another.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::train::run::checkpoint;
use crate::{Error, Result};

/// Locked by the run that writes to the folder.
const LOCK: &str = ".lock";

/// Refuses a folder that holds a run, unless that run is to be resumed.
pub(in crate::train) fn refuse_to_overwrite(out: &Path, resume: bool) -> Result<()> {
    // A run that was refused before its first step has an empty file there.
    let began = fs::metadata(out.join("metrics.jsonl")).is_ok_and(|metrics| metrics.len() > 0);
    let holds = began || checkpoint::exists(out)?;
    if resume || !holds {
        return Ok(());
    }
    let out = out.display();
    Err(Error::Config(format!("{out} already holds a run: go on with --resume, or choose another folder")))
}

/// Refuses a folder of a run, called `what`, that lies among the pictures of a set, which the run would write into.
pub(in crate::train) fn refuse_inside(what: &str, out: &Path, data: &OsStr) -> Result<()> {
    let data = Path::new(data);
    // The folder may not be there yet: what is there of its path counts.
    let place = std::path::absolute(out).ok().and_then(|out| {
        let there = out.ancestors().find(|path| path.exists())?;
        Some(fs::canonicalize(there).ok()?.join(out.strip_prefix(there).ok()?))
    });
    if data.is_dir()
        && let (Some(place), Ok(pictures)) = (place, fs::canonicalize(data))
        && place.starts_with(&pictures)
    {
        return Err(Error::Config(format!(
            "{what} {} lies in the folder of pictures {}, and what a run draws would become part of them; choose another folder",
            out.display(),
            data.display()
        )));
    }
    Ok(())
}

/// Keeps other runs out of a folder as long as it lives.
#[derive(Debug)]
pub(in crate::train) struct RunLock {
    path: PathBuf,
    _file: fs::File,
}

impl Drop for RunLock {
    /// Removes the folder of a run that did not come to its first file.
    fn drop(&mut self) {
        let Some(folder) = self.path.parent() else { return };
        let alone = fs::read_dir(folder).is_ok_and(|entries| entries.count() == 1);
        // Nobody's work is lost if either fails.
        if alone && fs::remove_file(&self.path).is_ok() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Takes the folder of a run for this run alone and clears what a killed one was writing; says where to go on.
pub(in crate::train) fn take(out: &Path, resume: bool) -> Result<(RunLock, Option<(u64, PathBuf)>)> {
    let lock = lock(out)?;
    // Once more: another run may have been here since.
    refuse_to_overwrite(out, resume)?;
    remove_leftovers(out)?;
    let resumed = if resume { checkpoint::latest(out)? } else { None };
    if resume && resumed.is_none() {
        tracing::warn!("no checkpoint in {} yet: starting from the beginning", out.display());
    }
    Ok((lock, resumed))
}

/// Makes the folder of a run and keeps other runs out of it until the result is dropped.
fn lock(out: &Path) -> Result<RunLock> {
    fs::create_dir_all(out).map_err(|error| Error::io("creating", out, error))?;
    let path = out.join(LOCK);
    let file = fs::File::create(&path).map_err(|error| Error::io("creating", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(RunLock { path, _file: file }),
        Err(fs::TryLockError::WouldBlock) => Err(Error::Config(format!(
            "another run is writing to {}: wait for its end, or choose another folder",
            out.display()
        ))),
        // Some network file systems have no locks: continue without.
        Err(fs::TryLockError::Error(error)) => {
            tracing::warn!("{} cannot be locked ({error}): see to it that no other run writes there", path.display());
            Ok(RunLock { path, _file: file })
        }
    }
}

/// Removes what a killed run was writing: temporary names of a run's own files. The caller holds the run's lock.
fn remove_leftovers(out: &Path) -> Result<()> {
    let unreadable = |error| Error::io("reading", out, error);
    for entry in fs::read_dir(out).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(name) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")) else { continue };
        let ours = [checkpoint::PREFIX, "metrics.jsonl.", "recipe.json.", "loss.svg.", "reconstruction-"];
        if !ours.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(|error| Error::io("removing", &path, error))?;
    }
    Ok(())
}
