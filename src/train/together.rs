//! A trainer among several processes: gradients are added up between backward and update, and the start is the same for all.

use crate::Result;
use crate::distributed::{BUCKET, Processes};
use crate::ops::{Backend, Communicator};
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

    /// Joins the processes' devices and gives all the weights of process 0, and its moments and counters where it has any. Collective.
    ///
    /// # Errors
    /// As [`Trainer::all_reduce`].
    pub(super) fn start_together(&mut self, processes: &Processes, has_moments: bool) -> Result<()> {
        if processes.size() == 1 {
            return Ok(());
        }
        let joined = self.model.backend().connect(processes).and_then(|()| self.share(processes, has_moments));
        joined.inspect_err(|_| processes.break_off())
    }

    /// Whether all processes still have the same weights bit for bit, as the same updates give them on processors of one kind. Where
    /// they have not, all get those of process 0, so that they do not drift apart. Collective.
    ///
    /// # Errors
    /// As [`Trainer::all_reduce`].
    pub(super) fn stay_together(&mut self, processes: &Processes) -> Result<bool> {
        if processes.size() == 1 {
            return Ok(true);
        }
        let checksum = self.checksum();
        processes.ready()?;
        let checksum = u64::from(checksum?);
        let mut different = [f64::from(u8::from(processes.share_number(checksum)? != checksum))];
        processes.sum_f64(&mut different)?;
        let same = different == [0.0];
        if !same {
            self.share(processes, true).inspect_err(|_| processes.break_off())?;
        }
        Ok(same)
    }

    /// Gives all processes the weights, their average, and, where there are any, the moments and counters of process 0.
    fn share(&mut self, processes: &Processes, has_moments: bool) -> Result<()> {
        let Self { model, optimizer, average, .. } = self;
        let (backend, parameters) = model.parameters_mut();
        processes.broadcast_buffer(backend, &mut parameters.master)?;
        parameters.refresh(backend)?;
        if let Some(average) = average {
            processes.broadcast_buffer(backend, &mut average.weights)?;
        }
        if has_moments {
            processes.broadcast_buffer(backend, &mut optimizer.first)?;
            processes.broadcast_buffer(backend, &mut optimizer.second)?;
        }
        processes.broadcast_buffer(backend, &mut optimizer.state)?;
        self.last = self.state()?;
        Ok(())
    }

    /// A checksum of the weights.
    fn checksum(&self) -> Result<u32> {
        let (backend, master) = (self.model.backend(), &self.model.parameters().master);
        let length = backend.length(master);
        let mut values = vec![B::Master::default(); length.min(BUCKET)];
        (0..length).step_by(BUCKET).try_fold(0, |checksum, start| {
            let values = &mut values[..BUCKET.min(length - start)];
            // SAFETY: a read, while the weights are borrowed.
            let part = unsafe { backend.alias(master, start, values.len())? };
            backend.download(values, &part)?;
            Ok(crc32c::crc32c_append(checksum, bytemuck::cast_slice(values)))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::config::MaeConfig;
    use crate::cpu::Cpu;
    use crate::distributed::{Launch, Meeting};
    use crate::model::MaeForPreTraining;
    use crate::train::OptimizerSettings;

    #[test]
    fn weights_that_drifted_apart_are_those_of_process_0_again() {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let process = |rank: usize| -> Result<_> {
            let address = "127.0.0.1".to_owned();
            let meeting = Meeting { rank, size: 2, local_rank: 0, local_size: 1, address, port };
            let processes = Processes::join(&Launch::Tcp(meeting))?;
            let mut config = MaeConfig::tiny();
            config.image_size = (32, 32).into();
            // Weights of another seed, as if they had drifted.
            let model = MaeForPreTraining::new(config, Cpu::<f32>::new(), rank as u64)?;
            let mut trainer = Trainer::new(model, OptimizerSettings::default(), 1)?;
            trainer.keep_average(0.9)?;
            let before = trainer.checksum()?;
            let found = [trainer.stay_together(&processes)?, trainer.stay_together(&processes)?];
            let average = trainer.average.as_ref().map(|average| average.weights.to_vec());
            Ok((before, found, trainer.checksum()?, average))
        };
        let [first, second] = std::thread::scope(|scope| {
            [0, 1].map(|rank| scope.spawn(move || process(rank))).map(|thread| thread.join().expect("no panic"))
        });
        let (first, second) = (first.expect("process 0"), second.expect("process 1"));
        assert_ne!(first.0, second.0);
        assert_eq!((first.1, second.1), ([false, true], [false, true]));
        assert_eq!(first.0, first.2);
        assert_eq!((first.2, first.3), (second.2, second.3));
    }
}
