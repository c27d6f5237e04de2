//! Where pictures come from.

use std::ffi::OsStr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::data::folder::Folder;
use crate::data::image::{Image, Part, Region};
use crate::data::parquet::{self, Request};
use crate::data::pictures::{Pictures, SourceOptions};
use crate::data::shards::{self, Shards};
use crate::data::synthetic::{SYNTHETIC_COUNT, Synthetic};
use crate::{Error, Result};

/// Most scenes of a set: their order is drawn in memory, and nobody trains on more.
const MOST_SCENES: usize = 100_000_000;

/// A set of pictures: a folder, a file or the procedural set. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Source {
    pictures: Arc<dyn Pictures>,
    description: String,
    /// What the names of a folder's pictures begin with.
    root: PathBuf,
}

impl Source {
    /// Opens what the user asked for:
    ///
    /// - `synthetic`, `synthetic:COUNT` or `synthetic:COUNT:SEED`: generated scenes ([`Synthetic`]), by default
    ///   [`SYNTHETIC_COUNT`] of the seed in `options`. (A folder of this name is `./synthetic`.)
    /// - a folder: its pictures and those of its sub-folders. If all of them lie in sub-folders, those of the first level
    ///   are the classes. Symbolic links are followed; names that start with a dot are not looked at;
    /// - tar shards in WebDataset's layout: `train-{000..146}.tar`, one such file, or a folder with nothing but tar files. The
    ///   class is the number in the `.cls` file beside a picture. Compressed shards are refused: pictures are read at random offsets;
    /// - parquet files as Hugging Face's data sets have them (with the feature `parquet`): one file, a pattern, or a folder with
    ///   nothing but such files. Pictures are in the column `image`, or the only one that can hold them, as bytes or in a group
    ///   with `bytes`; the class is a number in `label`, and its name is what the file says. `FILE.parquet#IMAGE,LABEL` names
    ///   other columns;
    /// - a file: that one picture.
    ///
    /// In a pattern `{000..146}` counts and `{a,b}` chooses; `*` and `?` in the last part stand for what is there.
    ///
    /// # Errors
    /// [`Error::Data`] when there is no such thing, no picture in it, or it is of a kind that is not read.
    pub fn parse(spec: impl AsRef<OsStr>, options: &SourceOptions) -> Result<Self> {
        let spec = spec.as_ref();
        let path = Path::new(spec);
        let text = spec.to_string_lossy();
        let refuse = |problem: String| Err(Error::Data { source_name: text.clone().into_owned(), problem });
        if let Some(arguments) = text.strip_prefix("synthetic").filter(|rest| rest.is_empty() || rest.starts_with(':'))
        {
            let mut numbers = arguments.split(':').skip(1);
            let (count, seed, more) = (numbers.next(), numbers.next(), numbers.next());
            let count = count.map_or(Ok(SYNTHETIC_COUNT), str::parse);
            let seed = seed.map_or(Ok(options.synthetic_seed), str::parse);
            return match (count, seed, more) {
                (Ok(count), Ok(seed), None) if (1..=MOST_SCENES).contains(&count) => {
                    Self::synthetic(count, seed, options)
                        .map(|source| Self { description: text.into_owned(), ..source })
                }
                _ => refuse(format!(
                    "expected synthetic, synthetic:COUNT or synthetic:COUNT:SEED with COUNT from 1 to {MOST_SCENES}"
                )),
            };
        }
        let lower = text.to_ascii_lowercase();
        let ends = |ends: &[&str]| ends.iter().any(|end| lower.ends_with(end));
        let supported = "give a folder of pictures, tar shards, parquet files, one picture, or synthetic[:COUNT]";
        if !path.is_dir() {
            if ends(&[".tar"]) {
                // A name with braces in it is that file, if there is one.
                let names = if path.exists() { vec![path.to_path_buf()] } else { shards::expand(&text)? };
                return Self::shards(names, text.into_owned(), options);
            }
            if let Some(problem) = shards::compressed_by_name(&text) {
                return refuse(problem);
            }
            let (file, columns) = text.rsplit_once('#').filter(|(file, _)| file.ends_with(".parquet")).unzip();
            if ends(&[".parquet"]) || file.is_some() {
                let pattern = if path.exists() { &*text } else { file.unwrap_or(&text) };
                let mut columns = columns.filter(|_| !path.exists()).unwrap_or_default().split(',').map(str::to_owned);
                let mut column = || columns.next().filter(|name| !name.is_empty());
                let (picture, label) = (column(), column());
                let literal = Path::new(pattern).exists();
                let files = if path.exists() {
                    vec![path.to_path_buf()]
                } else if literal {
                    vec![PathBuf::from(pattern)]
                } else {
                    shards::expand(pattern)?
                };
                return Self::parquet(Request { description: text.into_owned(), files, picture, label }, options);
            }
        }
        match std::fs::metadata(path) {
            Ok(data) if data.is_dir() => match Self::folder(path, options) {
                Err(error @ Error::Data { .. }) => {
                    let (description, shards) = (text.into_owned(), shards::in_folder(path, "tar")?);
                    let compressed = shards::compressed_in_folder(path)?;
                    if !shards.is_empty() {
                        if let Some((first, count)) = compressed {
                            tracing::warn!("{count} compressed shards are left out: {}, …", first.display());
                        }
                        return Self::shards(shards, description, options);
                    }
                    if let Some((first, _)) = compressed {
                        let problem = shards::compressed_by_name(&first.to_string_lossy()).unwrap_or_default();
                        return Err(Error::Data { source_name: first.display().to_string(), problem });
                    }
                    match shards::in_folder(path, "parquet")? {
                        none if none.is_empty() => Err(error),
                        files => Self::parquet(Request { description, files, ..Request::default() }, options),
                    }
                }
                folder => folder,
            },
            Ok(_) => Self::file(path, options),
            Err(error) => refuse(format!("{error}; {supported}")),
        }
    }

    /// The pictures of a folder.
    ///
    /// # Errors
    /// [`Error::Data`] when it holds none, [`Error::Io`] when it cannot be listed.
    pub fn folder(path: impl AsRef<Path>, options: &SourceOptions) -> Result<Self> {
        let path = path.as_ref();
        let folder = Folder::open(path, options)?;
        Ok(Self { root: path.to_path_buf(), ..Self::from_pictures(folder, path.display().to_string()) })
    }

    /// The pictures of tar shards in WebDataset's layout, in this order.
    ///
    /// # Errors
    /// [`Error::Data`] when one cannot be opened, or there is no picture in any of them.
    pub fn shards(paths: Vec<PathBuf>, description: impl Into<String>, options: &SourceOptions) -> Result<Self> {
        // Shards may move as folders may: only their own names count.
        let root = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new("")).to_path_buf();
        Ok(Self { root, ..Self::from_pictures(Shards::open(paths, options)?, description) })
    }

    /// The pictures of parquet files, in this order.
    fn parquet(request: Request, options: &SourceOptions) -> Result<Self> {
        let root = request.files.first().and_then(|path| path.parent()).unwrap_or(Path::new("")).to_path_buf();
        Ok(Self { pictures: parquet::open(&request, options)?, description: request.description, root })
    }

    /// One picture file, whatever its name.
    ///
    /// # Errors
    /// None yet: the file is opened when it is read.
    pub fn file(path: impl AsRef<Path>, options: &SourceOptions) -> Result<Self> {
        let path = path.as_ref();
        let file = Folder::of_files(&[path.to_path_buf()], options);
        Ok(Self::from_pictures(file, path.display().to_string()))
    }

    /// These picture files, in this order.
    ///
    /// # Errors
    /// [`Error::Data`] for an empty list.
    pub fn files(paths: &[PathBuf], options: &SourceOptions) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::Data { source_name: "files".to_owned(), problem: "no picture was given".to_owned() });
        }
        Ok(Self::from_pictures(Folder::of_files(paths, options), format!("{} files", paths.len())))
    }

    /// Generated scenes.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty set or one of more than 2^32 - 1 scenes.
    pub fn synthetic(count: usize, seed: u64, options: &SourceOptions) -> Result<Self> {
        let scenes = Synthetic::new(count, seed, options.decoder.channels(), options.height, options.width)?;
        Ok(Self::from_pictures(scenes, format!("synthetic:{count}:{seed}")))
    }

    /// Pictures of the caller's own.
    pub fn from_pictures(pictures: impl Pictures + 'static, description: impl Into<String>) -> Self {
        Self { pictures: Arc::new(pictures), description: description.into(), root: PathBuf::new() }
    }

    /// A picture's name without the folder that the set is in, which may have moved.
    pub(crate) fn name_inside(&self, index: usize) -> PathBuf {
        let name = self.name(index);
        name.strip_prefix(&self.root).map(Path::to_path_buf).unwrap_or(name)
    }

    /// Reads one picture.
    ///
    /// # Errors
    /// [`Error::Picture`] when it is bad, [`Error::Value`] when there is no such index.
    pub fn read(&self, index: usize) -> Result<Image> {
        self.check_index(index)?;
        self.pictures.read(index, &mut Vec::new())
    }

    /// Reads the region that `choose` wants of a picture of so many rows and columns, and perhaps more.
    pub(crate) fn read_part(
        &self,
        index: usize,
        buffer: &mut Vec<u8>,
        choose: impl Fn(usize, usize) -> Region,
        part: &mut Part,
    ) -> Result<()> {
        self.check_index(index)?;
        match self.pictures.read_file(index, buffer)? {
            Some(decoder) => decoder.decode_part(buffer, || self.name(index), choose, part),
            None => {
                part.hold(self.pictures.read(index, buffer)?, choose);
                Ok(())
            }
        }
    }

    fn check_index(&self, index: usize) -> Result<()> {
        if index < self.len() {
            return Ok(());
        }
        Err(Error::value("picture index", format!("{index} is not below {}", self.len())))
    }

    /// What was asked for, for messages and records.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }
}

/// What is known of its pictures: their number, names, labels, classes.
impl Deref for Source {
    type Target = dyn Pictures;

    fn deref(&self) -> &Self::Target {
        &*self.pictures
    }
}
