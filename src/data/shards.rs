//! Tar shards in WebDataset's layout: the files of a sample follow each other and share a name up to its first dot.
//!
//! The headers are read once, when the set is opened; after that, every picture is one read at a known offset. So an epoch is
//! shuffled as a whole, not through a window, and a picture's number does not depend on which process reads which shard.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::data::decode::Decoder;
use crate::data::pictures::{PICTURE_EXTENSIONS, Pictures, SourceOptions};
use crate::{Error, Result};

/// Shards that a pattern may name, at most.
const MOST_SHARDS: usize = 100_000;
/// Bytes of a file with a class, at most: it holds one number.
const CLASS_BYTES: u64 = 64;
/// Classes, at most.
const MOST_CLASSES: u32 = 1_000_000;
/// Bytes of one picture file, at most.
const MOST_BYTES: u64 = 1 << 30;

/// Compressed files: how their names end, their first bytes, the format, and the tool that decompresses them.
const COMPRESSED: [(&[&str], &[u8], &str, &str); 6] = [
    (&[".tar.gz", ".tgz"], &[0x1f, 0x8b], "gzip", "gunzip"),
    (&[".tar.zst", ".tzst"], &[0x28, 0xb5, 0x2f, 0xfd], "zstd", "unzstd"),
    (&[".tar.bz2", ".tbz2"], b"BZh", "bzip2", "bunzip2"),
    (&[".tar.xz", ".txz"], b"\xfd7zXZ\x00", "xz", "unxz"),
    (&[".tar.lz4", ".tlz4"], &[0x04, 0x22, 0x4d, 0x18], "lz4", "unlz4"),
    (&[".zip"], b"PK\x03\x04", "zip", "unzip"),
];

/// What a shard with this name is compressed with, and what to do about it.
pub(crate) fn compressed_by_name(name: &str) -> Option<String> {
    let name = name.to_ascii_lowercase();
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    COMPRESSED.iter().find(|(names, ..)| ends(names)).map(|&(_, _, by, tool)| advice(by, tool))
}

/// The same by how a file begins: its name may say nothing.
fn compressed_by_content(start: &[u8]) -> Option<String> {
    COMPRESSED.iter().find(|(_, magic, ..)| start.starts_with(magic)).map(|&(_, _, by, tool)| advice(by, tool))
}

fn advice(by: &str, tool: &str) -> String {
    format!(
        "it is compressed with {by}; shards are read at random offsets, which compression prevents: decompress it first ({tool}); \
         pictures hardly shrink when they are compressed again"
    )
}

/// The first compressed shard of a folder, and how many there are.
pub(crate) fn compressed_in_folder(folder: &Path) -> Result<Option<(PathBuf, usize)>> {
    let files = listed(folder, |name| compressed_by_name(&name.to_string_lossy()).is_some())?;
    let count = files.len();
    Ok(files.into_iter().next().map(|first| (first, count)))
}

/// Pictures in tar files.
#[derive(Debug)]
pub(crate) struct Shards {
    decoder: Decoder,
    shards: Vec<PathBuf>,
    samples: Vec<Sample>,
    /// Of each sample; empty if one of them has none.
    labels: Vec<u32>,
    classes: Option<Vec<String>>,
}

/// Where a picture is.
#[derive(Debug)]
struct Sample {
    shard: u32,
    bytes: u32,
    offset: u64,
    name: Box<str>,
}

impl Shards {
    /// Reads the headers of all shards, in the order given. What is damaged is left out, with a warning that names it.
    pub(crate) fn open(shards: Vec<PathBuf>, options: &SourceOptions) -> Result<Self> {
        let description = match &*shards {
            [one] => one.display().to_string(),
            several => format!("{} shards", several.len()),
        };
        let refuse = |problem: String| Error::Data { source_name: description.clone(), problem };
        let mut index = Index::default();
        for (number, shard) in shards.iter().enumerate() {
            index.read(number as u32, shard)?;
        }
        if index.samples.is_empty() {
            return Err(refuse(format!(
                "no pictures in it; looked for files with .{}",
                PICTURE_EXTENSIONS.join(", .")
            )));
        }
        let labels: Option<Vec<u32>> = index.labels.into_iter().collect();
        let most = labels.as_deref().and_then(|labels| labels.iter().max().copied());
        let classes = match (most, &options.classes) {
            (None, Some(_)) => return Err(refuse("labels are needed: a .cls file beside every picture".to_owned())),
            (Some(most), Some(classes)) if most as usize >= classes.len() => {
                return Err(refuse(format!("class {most} is not one of the {} classes", classes.len())));
            }
            (Some(_), Some(classes)) => Some(classes.clone()),
            (Some(most), None) => Some((0..=most).map(|class| class.to_string()).collect()),
            (None, None) => None,
        };
        Ok(Self {
            decoder: options.decoder,
            shards,
            samples: index.samples,
            labels: labels.unwrap_or_default(),
            classes,
        })
    }
}

impl Pictures for Shards {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn channels(&self) -> usize {
        self.decoder.channels()
    }

    fn name(&self, index: usize) -> PathBuf {
        match self.samples.get(index) {
            Some(sample) => self.shards[sample.shard as usize].join(&*sample.name),
            None => PathBuf::new(),
        }
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.get(index).copied()
    }

    fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    fn file_size(&self, index: usize) -> Result<Option<u64>> {
        Ok(self.samples.get(index).map(|sample| u64::from(sample.bytes)))
    }

    fn read_file(&self, index: usize, buffer: &mut Vec<u8>) -> Result<Option<Decoder>> {
        let Some(sample) = self.samples.get(index) else {
            return Err(Error::value("picture index", format!("{index} is not below {}", self.samples.len())));
        };
        let bad = |problem: String| Error::Picture { path: self.name(index), problem };
        // Opened for each read: thousands of shards would be more files than a process may hold open.
        let mut file = File::open(&self.shards[sample.shard as usize]).map_err(|error| bad(error.to_string()))?;
        buffer.clear();
        buffer.try_reserve_exact(sample.bytes as usize).map_err(|error| bad(error.to_string()))?;
        buffer.resize(sample.bytes as usize, 0);
        file.seek(SeekFrom::Start(sample.offset))
            .and_then(|_| file.read_exact(buffer))
            .map_err(|error| bad(format!("the shard has changed since it was opened: {error}")))?;
        Ok(Some(self.decoder))
    }
}

/// What the headers say.
#[derive(Debug, Default)]
struct Index {
    samples: Vec<Sample>,
    labels: Vec<Option<u32>>,
}

impl Index {
    fn read(&mut self, number: u32, path: &Path) -> Result<()> {
        let refuse = |problem: String| Error::Data { source_name: path.display().to_string(), problem };
        let mut file = File::open(path).map_err(|error| refuse(error.to_string()))?;
        let length = file.metadata().map_err(|error| refuse(error.to_string()))?.len();
        let mut start = Vec::new();
        let read = file.by_ref().take(8).read_to_end(&mut start).and_then(|_| file.rewind());
        read.map_err(|error| refuse(error.to_string()))?;
        // A tar file begins with a name, and none of these is one.
        if let Some(problem) = compressed_by_content(&start) {
            return Err(refuse(problem));
        }
        let mut archive = tar::Archive::new(file);
        let entries = archive.entries_with_seek().map_err(|error| refuse(error.to_string()))?;
        // The sample that is being put together: its name up to the first dot, its class, and its picture in `samples`.
        let (mut key, mut label, mut picture) = (String::new(), None, None::<usize>);
        let (before, mut damaged) = (self.samples.len(), None);
        for entry in entries {
            let mut entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    damaged = Some(error.to_string());
                    break;
                }
            };
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let Some((start, extension)) = split(&name) else { continue };
            let (offset, bytes) = (entry.raw_file_position(), entry.size());
            if offset.checked_add(bytes).is_none_or(|end| end > length) {
                damaged = Some(format!("{name} extends past the end of the file"));
                break;
            }
            if start != key {
                (key, label, picture) = (start.to_owned(), None, None);
            }
            if extension.eq_ignore_ascii_case("cls") {
                label = class(&mut entry.by_ref().take(CLASS_BYTES)).or_else(|| {
                    warn!("{}: {name} holds no class; expected a number below {MOST_CLASSES}", path.display());
                    None
                });
                if let Some(picture) = picture {
                    self.labels[picture] = label;
                }
            } else if picture.is_none() && is_picture(extension) {
                if bytes > MOST_BYTES {
                    warn!("{}: {name} is left out: {bytes} bytes are too many for a picture", path.display());
                    continue;
                }
                picture = Some(self.samples.len());
                self.samples.push(Sample { shard: number, bytes: bytes as u32, offset, name: name.into_boxed_str() });
                self.labels.push(label);
            }
        }
        let found = self.samples.len() - before;
        if let Some(problem) = damaged {
            warn!("{}: damaged after {found} pictures, the rest is left out: {problem}", path.display());
        } else if found == 0 {
            warn!("{}: no pictures in this shard", path.display());
        }
        Ok(())
    }
}

/// A name in a tar file as WebDataset splits it: at the first dot after the last slash.
fn split(name: &str) -> Option<(&str, &str)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = file + name[file..].find('.')?;
    // Hidden files are not samples.
    (dot > file).then(|| (&name[..dot], &name[dot + 1..]))
}

/// `jpg`, and `rgb.jpg`.
fn is_picture(extension: &str) -> bool {
    let last = extension.rsplit('.').next().unwrap_or(extension);
    PICTURE_EXTENSIONS.iter().any(|known| last.eq_ignore_ascii_case(known))
}

fn class(from: &mut impl Read) -> Option<u32> {
    let mut text = String::new();
    from.read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|&class| class < MOST_CLASSES)
}

/// The names that a pattern stands for: `{00..12}` counts, with as many digits as its first number has, and `{a,b}` chooses.
pub(crate) fn expand(pattern: &str) -> Result<Vec<PathBuf>> {
    let refuse = |problem: &str| Error::Data { source_name: pattern.to_owned(), problem: problem.to_owned() };
    let (mut names, mut rest) = (vec![String::new()], pattern);
    while let Some(open) = rest.find('{') {
        let close = rest[open..].find('}').map(|close| open + close).ok_or_else(|| refuse("a { without its }"))?;
        let inside = &rest[open + 1..close];
        let choices: Vec<String> = match inside.split_once("..") {
            Some((first, last)) => {
                let number = |text: &str| text.parse::<usize>().map_err(|_| refuse("expected numbers as in {00..12}"));
                let (from, to, width) = (number(first)?, number(last)?, first.len());
                if to < from || to - from >= MOST_SHARDS {
                    return Err(refuse("expected a range of shards as in {00..12}, from low to high"));
                }
                (from..=to).map(|number| format!("{number:0width$}")).collect()
            }
            None => inside.split(',').map(str::to_owned).collect(),
        };
        if names.len().saturating_mul(choices.len()) > MOST_SHARDS {
            return Err(refuse(&format!("more than {MOST_SHARDS} shards")));
        }
        names = names
            .iter()
            .flat_map(|name| choices.iter().map(move |choice| format!("{name}{}{choice}", &rest[..open])))
            .collect();
        rest = &rest[close + 1..];
    }
    let mut paths = Vec::new();
    for path in names.into_iter().map(|name| PathBuf::from(name + rest)) {
        match path.file_name().map(|name| name.to_string_lossy().into_owned()) {
            Some(name) if name.contains(['*', '?']) && !path.exists() => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let before = paths.len();
                paths.extend(listed(folder, |found| matches(name.as_bytes(), found.as_encoded_bytes()))?);
                if paths.len() == before {
                    return Err(refuse(&format!("nothing in {} is called {name}", folder.display())));
                }
            }
            _ => paths.push(path),
        }
    }
    Ok(paths)
}

/// Whether a name is one that `*` (anything) and `?` (one byte) stand for.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // Where to continue when the last star has to stand for one byte more.
    let (mut at, mut place, mut star) = (0, 0, None);
    while place < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at + 1, place));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[place] => (at, place) = (at + 1, place + 1),
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    (at, place) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// The files of a folder whose names end like this, sorted, if it has any.
pub(crate) fn in_folder(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    listed(folder, |name| Path::new(name).extension().is_some_and(|found| found.eq_ignore_ascii_case(extension)))
}

/// The files of a folder with such names, sorted.
fn listed(folder: &Path, wanted: impl Fn(&OsStr) -> bool) -> Result<Vec<PathBuf>> {
    let unreadable = |error: std::io::Error| Error::io("listing", folder, error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(b".") || !wanted(name) {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(data) if data.is_file() => files.push(path),
            Ok(_) => (),
            Err(error) if error.kind() == ErrorKind::NotFound => (),
            Err(error) => return Err(Error::io("reading", &path, error)),
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_and_question_marks_stand_for_what_is_there() {
        let is = |pattern: &str, name: &str| matches(pattern.as_bytes(), name.as_bytes());
        for (pattern, name) in [("*", ""), ("*", "a"), ("a*c", "abbc"), ("a*bc", "abbc"), ("?b*", "ab"), ("**a", "a")] {
            assert!(is(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("", "a"), ("?", ""), ("a*c", "abcd"), ("a*b*c", "acb"), ("ab", "a"), ("a", "ab")] {
            assert!(!is(pattern, name), "{pattern} {name}");
        }
    }
}
