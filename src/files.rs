//! Reading files of bounded size, and replacing files whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Opens a regular file for reading, with its length. Pipes and devices, which could block or never end, are an error.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let metadata = fs::metadata(path).map_err(|source| Error::io("reading", path, source))?;
    if !metadata.is_file() {
        let kind = io::Error::new(io::ErrorKind::InvalidInput, "this is not a regular file");
        return Err(Error::io("reading", path, kind));
    }
    let file = File::open(path).map_err(|source| Error::io("reading", path, source))?;
    Ok((file, metadata.len()))
}

/// The text of a file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let (file, length) = open(path)?;
    let invalid = |problem: String| Error::io("reading", path, io::Error::new(io::ErrorKind::InvalidData, problem));
    if length > limit {
        return Err(invalid(format!("the file has {length} bytes, and at most {limit} are expected of such a file")));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(|source| Error::io("reading", path, source))?;
    String::from_utf8(bytes).map_err(|error| invalid(format!("the file is not UTF-8 text: {error}")))
}

/// Where [`write_atomically`] puts bytes; errors name the file that is being written.
#[derive(Debug)]
pub struct AtomicWriter<'a, W: Write = File> {
    writer: BufWriter<W>,
    path: &'a Path,
}

impl<W: Write> AtomicWriter<'_, W> {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] that names the file.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|source| Error::io("writing", self.path, source))
    }
}

impl<W: Write> Write for AtomicWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Writes a file so that `path` holds, at any moment and whatever fails, either what it held before or all of the new bytes.
///
/// `write` fills a temporary file in the same folder, which is flushed to the disk and renamed; when anything fails it is
/// removed again.
///
/// # Errors
/// [`Error::Io`]; what `write` returns.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut AtomicWriter<'_>) -> Result<()>) -> Result<()> {
    let create = |temporary: &Path| OpenOptions::new().write(true).create_new(true).open(temporary);
    replace(path, create, File::sync_all, write)
}

/// [`write_atomically`] over any kind of file.
fn replace<W: Write>(
    path: &Path,
    create: impl FnOnce(&Path) -> io::Result<W>,
    sync: impl FnOnce(&W) -> io::Result<()>,
    write: impl FnOnce(&mut AtomicWriter<'_, W>) -> Result<()>,
) -> Result<()> {
    let failed = |source: io::Error| Error::io("writing", path, source);
    let Target { path, folder, temporary } = Target::of(path).map_err(failed)?;
    let failed = |source: io::Error| Error::io("writing", &path, source);

    let file = create(&temporary).map_err(failed)?;
    let mut guard = Temporary(Some(temporary));
    let mut writer = AtomicWriter { writer: BufWriter::with_capacity(1 << 20, file), path: &path };
    write(&mut writer)?;
    writer.writer.flush().map_err(failed)?;
    sync(writer.writer.get_ref()).map_err(failed)?;
    drop(writer);
    guard.rename(&path).map_err(failed)?;
    sync_folder(&folder).map_err(failed)
}

/// Where a file is to be written.
struct Target {
    /// With links followed.
    path: PathBuf,
    folder: PathBuf,
    /// A name for a file beside it that nobody else uses.
    temporary: PathBuf,
}

impl Target {
    fn of(path: &Path) -> io::Result<Self> {
        let invalid = |cause| io::Error::new(io::ErrorKind::InvalidInput, cause);
        // A link stays one: what it points to is replaced. A device or a pipe would be gone for everybody else.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(invalid("there is something of that name that is not a regular file"));
        }
        let name = path.file_name().ok_or_else(|| invalid("the path does not end in a file's name"))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut temporary_name = std::ffi::OsString::from(".");
        temporary_name.push(name);
        temporary_name.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let temporary = folder.join(temporary_name);
        Ok(Self { path, folder, temporary })
    }
}

/// A temporary file that is removed unless it was renamed.
struct Temporary(Option<PathBuf>);

impl Temporary {
    fn rename(&mut self, to: &Path) -> io::Result<()> {
        if let Some(path) = &self.0 {
            fs::rename(path, to)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Fails where a file could not be written later, before there is any work to lose, and refuses to write over a file that is
/// being read; `inputs` are paths.
///
/// # Errors
/// [`Error::Value`] that names both; [`Error::Io`] where there is no such folder, where nothing can be written there, and where
/// there is something of that name that is not a file.
pub fn check_output<'a>(output: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    if let Ok(target) = fs::canonicalize(output)
        && let Some(input) = inputs.into_iter().find(|input| fs::canonicalize(input).is_ok_and(|input| input == target))
    {
        return Err(Error::value(
            format!("output {}", output.display()),
            format!("it is the input {} too, which would be lost; choose another name", input.display()),
        ));
    }
    // Only creating a file shows that one can be created: on some file systems permissions do not.
    Target::of(output)
        .and_then(|Target { temporary, .. }| {
            File::create_new(&temporary)?;
            fs::remove_file(&temporary)
        })
        .map_err(|source| Error::io("writing", output, source))
}

/// As [`check_output`], and refuses to write over a file of the checkpoint that is read: the file itself, or whatever lies in
/// its folder where it is one.
///
/// # Errors
/// As [`check_output`].
pub fn check_output_beside<'a>(
    output: &Path,
    checkpoint: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<()> {
    let parts = [checkpoint.to_owned(), checkpoint.with_file_name("config.json")];
    if checkpoint.is_dir()
        && let (Ok(target), Ok(folder)) = (fs::canonicalize(output), fs::canonicalize(checkpoint))
        && target.starts_with(&folder)
    {
        return Err(Error::value(
            format!("output {}", output.display()),
            format!(
                "it is a file of the checkpoint {}, which would be lost; choose another name",
                checkpoint.display()
            ),
        ));
    }
    let inputs: Vec<PathBuf> = inputs.into_iter().map(Path::to_path_buf).chain(parts).collect();
    check_output(output, inputs.iter().map(PathBuf::as_path))
}

/// Writes a value as indented JSON, as [`write_atomically`].
///
/// # Errors
/// [`Error::Io`], also for a value that is not JSON, such as a map whose keys are not strings.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::io("writing", path, io::Error::new(io::ErrorKind::InvalidData, error)))?;
    write_atomically(path, |file| file.bytes(text.as_bytes()).and_then(|()| file.bytes(b"\n")))
}

/// Makes a rename last through a power failure.
#[cfg(unix)]
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot do this for folders.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result,
    }
}

#[cfg(not(unix))]
pub(crate) fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file on a disk with room for `room` more bytes.
    struct Full {
        file: File,
        room: usize,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let length = bytes.len().min(self.room);
            if length == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= length;
            self.file.write(&bytes[..length])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.file.flush()
        }
    }

    fn names(folder: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_full_disk_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |writer| writer.bytes(b"before")).unwrap();
        // The disk fills up while bytes are passed on, and when the last ones are flushed.
        for (room, length) in [(0, 1), (100, 101), (100, 3 << 20), ((1 << 20) + 7, 3 << 20)] {
            let create = |temporary: &Path| Ok(Full { file: File::create_new(temporary)?, room });
            let bytes = vec![7_u8; length];
            let error =
                replace(&path, create, |_| Ok(()), |writer| bytes.chunks(1000).try_for_each(|part| writer.bytes(part)))
                    .unwrap_err();
            let Error::Io { action: "writing", path: named, cause: source } = error else { panic!("{error}") };
            assert_eq!((named, source.kind()), (path.clone(), io::ErrorKind::StorageFull));
            assert_eq!(fs::read(&path).unwrap(), b"before");
            assert_eq!(names(folder.path()), ["file"]);
        }
    }

    #[test]
    fn a_failing_sync_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |writer| writer.bytes(b"before")).unwrap();
        let sync = |_: &File| Err(io::Error::other("the disk is gone"));
        replace(&path, |temporary| File::create_new(temporary), sync, |writer| writer.bytes(b"after")).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn a_panicking_writer_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |writer| writer.bytes(b"before")).unwrap();
        let attempt = std::panic::catch_unwind(|| write_atomically(&path, |_| panic!("planted")));
        assert!(attempt.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn a_whole_write_replaces_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for text in ["one", "two"] {
            write_atomically(&path, |writer| writer.bytes(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn a_path_without_a_file_name_or_folder_is_an_error() {
        for path in ["/", "..", "/no/such/folder/file"] {
            assert!(matches!(write_atomically(Path::new(path), |_| Ok(())), Err(Error::Io { .. })), "{path}");
        }
    }
}
