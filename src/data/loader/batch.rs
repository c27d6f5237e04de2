//! A batch and its memory, which comes back to the loader.

use std::sync::mpsc::SyncSender;
use std::time::Duration;

use crate::Error;

/// Pictures for one step. Dropping it hands its memory back to the loader.
#[derive(Debug)]
pub struct Batch {
    /// `[B, height, width, channels]`.
    pub pixels: Vec<u8>,
    /// The index of each picture in the source `[B]`.
    pub samples: Vec<u64>,
    /// The class of each picture `[B]`, if the source has classes.
    pub labels: Option<Vec<u32>>,
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// Channels of a picture.
    pub channels: usize,
    /// Passes over the set before this one.
    pub epoch: u32,
    /// Batches of this epoch before this one.
    pub index: usize,
    /// Bad pictures met while this batch was built.
    pub skipped: usize,
    /// How long [`Loader::next_batch`](crate::data::Loader::next_batch) waited for it.
    pub data_wait: Duration,
    pub(super) slots: Vec<Slot>,
    pub(super) failure: Option<Error>,
    pub(super) home: Option<SyncSender<Buffers>>,
}

impl Batch {
    /// How many pictures it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether it holds none, which does not happen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// One picture `[height, width, channels]`.
    #[must_use]
    pub fn picture(&self, index: usize) -> Option<&[u8]> {
        self.pixels.chunks_exact(self.height * self.width * self.channels).nth(index)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            let buffers = Buffers {
                pixels: std::mem::take(&mut self.pixels),
                samples: std::mem::take(&mut self.samples),
                labels: self.labels.take().unwrap_or_default(),
                slots: std::mem::take(&mut self.slots),
            };
            // Full, or nobody left to use it: then it is freed.
            let _ = home.try_send(buffers);
        }
    }
}

/// The memory of a batch, between two uses.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) pixels: Vec<u8>,
    pub(super) samples: Vec<u64>,
    pub(super) labels: Vec<u32>,
    pub(super) slots: Vec<Slot>,
}

/// What became of one place in a batch.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) sample: Option<usize>,
    /// Bad pictures that were tried here.
    pub(super) bad: Vec<(usize, Error)>,
    /// Anything that is not a matter of one picture.
    pub(super) fatal: Option<Error>,
}
