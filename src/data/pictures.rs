//! What every source of pictures is.

use std::fmt;
use std::path::PathBuf;

use crate::data::decode::Decoder;
use crate::data::image::Image;
use crate::{Error, Result};

/// Extensions of picture files, in upper or lower case.
pub const PICTURE_EXTENSIONS: [&str; 11] =
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "mpo"];

/// A numbered set of pictures. Implement it to feed pictures of your own to a [`Loader`](crate::data::Loader).
///
/// Indices are stable: the same index is the same picture in every epoch, process and run.
pub trait Pictures: fmt::Debug + Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Channels of every picture.
    fn channels(&self) -> usize;

    /// What to call a picture in messages: its file, or its number.
    fn name(&self, index: usize) -> PathBuf;

    /// The class of a picture, an index into [`Pictures::classes`]. All pictures have one or none has.
    fn label(&self, index: usize) -> Option<u32>;

    /// The names of the classes.
    fn classes(&self) -> Option<&[String]>;

    /// Bytes of a picture's file, or of the part of a larger file that it lies in; `None` where pictures are not files.
    /// [`Source::fingerprint`](crate::data::Source::fingerprint) sees a picture's name and this; reading does not need it.
    ///
    /// # Errors
    /// [`Error::Picture`] for a file that cannot be opened.
    fn file_size(&self, index: usize) -> Result<Option<u64>> {
        let _ = index;
        Ok(None)
    }

    /// Reads one picture; `buffer` may be used for its encoded bytes. Pictures that are files need only
    /// [`Pictures::read_file`], pictures that are not only this.
    ///
    /// # Errors
    /// [`Error::Picture`] for a bad picture, which the loader skips. Any other error stops it.
    fn read(&self, index: usize, buffer: &mut Vec<u8>) -> Result<Image> {
        match self.read_file(index, buffer)? {
            Some(decoder) => decoder.decode(buffer, self.name(index)),
            None => {
                Err(Error::Picture { path: self.name(index), problem: "its source does not say how to read it".into() })
            }
        }
    }

    /// Reads the file of one picture into `buffer` and says what decodes it, so that a loader can decode no more of it than a
    /// crop shows. `None`, where pictures are not files: then they are read with [`Pictures::read`].
    ///
    /// # Errors
    /// As [`Pictures::read`].
    fn read_file(&self, index: usize, buffer: &mut Vec<u8>) -> Result<Option<Decoder>> {
        let _ = (index, buffer);
        Ok(None)
    }
}

/// What a source needs to know.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Decodes the files; decides the number of channels.
    pub decoder: Decoder,
    /// Rows of generated pictures.
    pub height: usize,
    /// Columns of generated pictures.
    pub width: usize,
    /// Which generated set; the same seed is the same set.
    pub synthetic_seed: u64,
    /// The classes that class sub-folders must belong to, in order. Give a validation set those of the training set: a
    /// class that is missing in a folder would otherwise shift the labels of those that follow.
    pub classes: Option<Vec<String>>,
}

impl SourceOptions {
    /// Pictures of `channels` channels, generated ones of `height x width` pixels.
    ///
    /// # Errors
    /// [`Error::Config`] for channels other than 1, 3 and 4, or empty sizes.
    pub fn new(channels: usize, height: usize, width: usize) -> Result<Self> {
        if height == 0 || width == 0 {
            return Err(Error::Config(format!("pictures of {height}x{width} pixels are empty")));
        }
        Ok(Self { decoder: Decoder::new(channels)?, height, width, synthetic_seed: 0, classes: None })
    }
}
