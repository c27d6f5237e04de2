//! A trainer among several processes: gradients are added up between backward and update, and the start is the same for all.

use crate::Result;
use crate::distributed::{BUCKET, Processes};
use crate::ops::Backend;
use crate::train::Trainer;

impl<B: Backend> Trainer<B> {
    /// Adds loss and gradients up over all processes, between [`Trainer::accumulate`] and [`Trainer::launch_update`]. Where each
    /// accumulated its part of a step, with the images of the whole step as `images_in_step`, all then have what one process has
    /// that accumulated all of it, and make the same update. Collective.
    ///
    /// Gradients go in buckets from the end of their arena to its start.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`](crate::Error::Distributed) where a process is gone.
    pub fn all_reduce(&mut self, processes: &Processes) -> Result<()> {
        if processes.size() == 1 {
            return Ok(());
        }
        let backend = self.model.backend();
        let arena = &self.gradients.arena;
        let length = self.model.parameters().layout().trained();
        let reduced = backend.all_reduce(&mut self.optimizer.loss, processes).and_then(|()| {
            (0..length).step_by(BUCKET).rev().try_for_each(|start| {
                // SAFETY: `self` is borrowed mutably, so no handle to the gradients is in use but this one.
                let mut bucket = unsafe { backend.alias(arena, start, BUCKET.min(length - start))? };
                backend.all_reduce(&mut bucket, processes)
            })
        });
        // The others would wait for the buckets that are missing.
        reduced.inspect_err(|_| processes.break_off())
    }

    /// Gives all processes the weights, their average, the moments and counters of process 0, and joins their devices. Collective.
    ///
    /// # Errors
    /// As [`Trainer::all_reduce`].
    pub(super) fn start_together(&mut self, processes: &Processes) -> Result<()> {
        if processes.size() == 1 {
            return Ok(());
        }
        let Self { model, optimizer, average, .. } = self;
        let (backend, parameters) = model.parameters_mut();
        let shared = backend
            .connect(processes)
            .and_then(|()| processes.broadcast_buffer(backend, &mut parameters.master))
            .and_then(|()| parameters.refresh(backend))
            .and_then(|()| processes.broadcast_buffer(backend, &mut optimizer.first))
            .and_then(|()| processes.broadcast_buffer(backend, &mut optimizer.second))
            .and_then(|()| processes.broadcast_buffer(backend, &mut optimizer.state))
            .and_then(|()| match average {
                Some(average) => processes.broadcast_buffer(backend, &mut average.weights),
                None => Ok(()),
            });
        shared.inspect_err(|_| processes.break_off())?;
        self.last = self.state()?;
        Ok(())
    }
}
