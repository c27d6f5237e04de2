//! Passes of a training step as recorded work: launched as a whole, without the time that a device waits for single launches.

use crate::Result;
use crate::ops::Backend;

/// What the work of a pass depends on besides the contents of its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Forward and backward of a micro-batch.
    ForwardBackward {
        /// Inputs in it.
        size: usize,
        /// Terms of the whole step's loss.
        terms_in_step: usize,
    },
    /// Forward alone, with what it depends on as above.
    Forward {
        /// Inputs in it.
        size: usize,
        /// Terms of the whole step's loss.
        terms_in_step: usize,
    },
    /// A part of backward.
    Backward {
        /// Inputs in the micro-batch.
        size: usize,
        /// Its first stage.
        stage: usize,
    },
    /// The optimiser's update.
    Update,
    /// What follows from the weights of all processes once they have been exchanged.
    Exchanged,
}

/// The passes of a trainer that were seen so far.
#[derive(Debug)]
pub(crate) struct Passes<B: Backend> {
    enabled: bool,
    seen: Vec<(Pass, Option<B::Recording>)>,
}

/// More kinds of passes than a run has (a backward of ViT-H in parts has 43, twice where the last micro-batch is smaller); who has
/// more gets no recordings that are of use.
const MOST_SEEN: usize = 128;

impl<B: Backend> Passes<B> {
    pub fn new(enabled: bool) -> Self {
        Self { enabled, seen: Vec::new() }
    }

    pub fn enable(&mut self, enabled: bool) {
        *self = Self::new(enabled);
    }

    /// To be called before a buffer that passes use is dropped.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    /// Runs `work`: the first time as it is, the second time recorded, and from then on as that recording.
    ///
    /// # Safety
    /// Calls with the same pass do the same work on the same buffers, and those exist until [`Passes::forget`].
    pub unsafe fn run(&mut self, backend: &B, pass: Pass, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        if !self.enabled || !backend.records() {
            return work();
        }
        let Some(index) = self.seen.iter().position(|(seen, _)| *seen == pass) else {
            work()?;
            if self.seen.len() == MOST_SEEN {
                self.seen.clear();
            }
            self.seen.push((pass, None));
            return Ok(());
        };
        let recording = &mut self.seen[index].1;
        if let Some(recording) = recording {
            // SAFETY: the buffers are those of the recording, and the caller promises that they exist.
            if unsafe { backend.replay(recording)? } {
                return Ok(());
            }
        }
        let recorded = recording.insert(backend.record(&mut work)?);
        // SAFETY: as above.
        if unsafe { backend.replay(recorded)? } { Ok(()) } else { work() }
    }
}
