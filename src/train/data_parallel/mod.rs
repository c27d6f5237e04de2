//! A trainer among several processes: gradients are added up while the last of them are computed, and the start is the same for
//! all.

pub(in crate::train) mod moments;

use std::ops::Range;

use crate::distributed::Processes;
use crate::model::{Gradients, Objective};
use crate::ops::{BUCKET, Backend, Communicator};
use crate::train::data_parallel::moments::Moments;
use crate::train::step::graphs::{Pass, Passes};
use crate::train::step::trainer::OptimizerState;
use crate::train::{OptimizerSettings, Trainer};
use crate::{Error, Result};

/// What each of several processes keeps a share of, instead of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(from = "bool", into = "bool")]
pub enum Sharding {
    /// Nothing: all processes keep all.
    #[default]
    Nothing,
    /// The optimiser's moments, 8 bytes per parameter (stage 1 of ZeRO, Rajbhandari et al., arXiv 1910.02054): each process updates
    /// its share of the weights and gives it to the others, the same bits as without. Gradients are added up whole, so that
    /// the exchange is half as large again.
    Optimizer,
}

impl From<bool> for Sharding {
    fn from(optimizer: bool) -> Self {
        if optimizer { Self::Optimizer } else { Self::Nothing }
    }
}

impl From<Sharding> for bool {
    fn from(sharding: Sharding) -> Self {
        sharding == Sharding::Optimizer
    }
}

/// Shares start at multiples of this, so that they are aligned as the arenas are.
const ALIGNMENT: usize = 64;

/// What the processes of a run exchange in a step, and when.
#[derive(Debug)]
pub(in crate::train) struct Exchange {
    pub processes: Processes,
    /// Whether anything is exchanged at all.
    pub together: bool,
    /// The trained parameters whose moments are here.
    pub share: Range<usize>,
    /// How many parameters each process has moments of, where they are shared out.
    pub sharded: Option<usize>,
    /// The parts of the gradients' arena that are added up at a time, in the order in which backward finishes them: matrices from
    /// their end to their start, then vectors.
    buckets: Vec<Range<usize>>,
    /// The parts of backward behind which more buckets are finished: their stages, and how many buckets are finished then.
    parts: Vec<(Range<usize>, usize)>,
}

/// A micro-batch that lies prepared in a workspace.
pub(in crate::train) struct MicroBatch<'a, O, W> {
    pub model: &'a O,
    pub workspace: &'a mut W,
    pub size: usize,
    pub terms_in_step: usize,
}

impl Exchange {
    /// With buckets of at most `bucket` numbers.
    pub fn new<B: Backend, O: Objective<B>>(
        model: &O,
        processes: &Processes,
        sharding: Sharding,
        bucket: usize,
    ) -> Result<Self> {
        let layout = model.parameters().layout();
        let (matrices, trained) = (layout.matrices(), layout.trained());
        let from_the_end = |part: Range<usize>| {
            let ends = (0..part.len()).step_by(bucket).map(move |skipped| part.end - skipped);
            ends.map(move |end| part.start.max(end.saturating_sub(bucket))..end)
        };
        let matrices_at_a_time: Vec<_> = from_the_end(0..matrices).collect();
        let mut buckets = matrices_at_a_time.clone();
        buckets.extend(from_the_end(matrices..trained));

        let (stages, mut parts, mut first, mut finished) = (layout.stages(), Vec::new(), 0, 0);
        for done in 1..=stages {
            let from = layout.finished_from(done);
            let now = matrices_at_a_time.iter().filter(|bucket| bucket.start >= from).count();
            if now > finished || done == stages {
                finished = if done == stages { buckets.len() } else { now };
                parts.push((first..done, finished));
                first = done;
            }
        }
        let sharded = match sharding {
            Sharding::Optimizer => Some(trained.div_ceil(processes.size()).next_multiple_of(ALIGNMENT)),
            Sharding::Nothing => None,
        };
        let share = match sharded {
            Some(part) => trained.min(processes.rank() * part)..trained.min((processes.rank() + 1) * part),
            None => 0..trained,
        };
        let together = processes.size() > 1;
        Ok(Self { processes: processes.clone(), together, share, sharded, buckets, parts })
    }

    /// Forward and backward of the last micro-batch of a step, and the sums over all processes: of the loss as soon as it is known,
    /// of gradients as soon as backward has finished them, from the end of their arena to its start.
    pub fn backward_and_sum<B: Backend, O: Objective<B>>(
        &self,
        work: MicroBatch<'_, O, O::Workspace>,
        gradients: &mut Gradients<B, O::Layers>,
        optimizer: &mut OptimizerState<B>,
        passes: &mut Passes<B>,
    ) -> Result<()> {
        let MicroBatch { model, workspace, size, terms_in_step } = work;
        let (backend, processes) = (model.backend(), &self.processes);
        let mut run = || -> Result<()> {
            // SAFETY: a pass depends on nothing else, and it is forgotten before a buffer of the workspace is dropped. Weights,
            // gradients and the optimiser's state live as long as the trainer.
            unsafe {
                passes.run(backend, Pass::Forward { size, terms_in_step }, || {
                    model.forward(workspace, size, terms_in_step, &mut optimizer.loss)
                })?;
            }
            backend.start_all_reduce(&mut optimizer.loss, processes)?;
            let mut sent = 0;
            for (stages, finished) in &self.parts {
                // SAFETY: as above.
                unsafe {
                    passes.run(backend, Pass::Backward { size, stage: stages.start }, || {
                        model.backward(workspace, size, gradients, stages.clone())
                    })?;
                }
                self.start_sums(backend, gradients, sent..*finished)?;
                sent = *finished;
            }
            backend.finish_all_reduces()
        };
        // The others would wait for what is missing.
        run().inspect_err(|_| processes.break_off())
    }

    /// Of an error that this process alone may have behind exchanges that were started: the others would wait for the next.
    pub fn ending<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|_| {
            if self.together {
                self.processes.break_off();
            }
        })
    }

    /// Starts the sums of some buckets.
    fn start_sums<B: Backend, L>(
        &self,
        backend: &B,
        gradients: &mut Gradients<B, L>,
        buckets: Range<usize>,
    ) -> Result<()> {
        self.buckets[buckets].iter().try_for_each(|bucket| {
            // SAFETY: the gradients are borrowed mutably, so no other handle to this part is in use. What is computed until the sums
            // are finished are the gradients of other parts.
            let mut part = unsafe { backend.alias(&gradients.arena, bucket.start, bucket.len())? };
            backend.start_all_reduce(&mut part, &self.processes)
        })
    }

    /// Gives all processes the weights that each of them has updated: `part` of the first `trained`.
    pub fn gather_weights<B: Backend>(
        &self,
        backend: &B,
        master: &B::Buffer<B::Master>,
        trained: usize,
        part: usize,
    ) -> Result<()> {
        // SAFETY: the caller has borrowed the weights mutably.
        let gathered = unsafe { backend.alias(master, 0, trained) }
            .and_then(|mut weights| backend.all_gather(&mut weights, part, &self.processes));
        gathered.inspect_err(|_| self.processes.break_off())
    }
}

impl<B: Backend, O: Objective<B>> Trainer<B, O> {
    /// A trainer that makes each step together with those of the other processes, each of which calls this. It joins the devices
    /// where they have a way of their own to each other. Collective.
    ///
    /// # Errors
    /// As [`Trainer::new`]; [`Error::Distributed`] where a process is gone, [`Error::Peer`] where one fails.
    pub fn together(
        model: O,
        settings: OptimizerSettings,
        micro_batch: usize,
        processes: &Processes,
        sharding: Sharding,
    ) -> Result<Self> {
        let trainer = Self::with_exchange(model, settings, micro_batch, processes, sharding);
        let mut trainer = processes.agree(trainer)?;
        let connected = trainer.model.backend().connect(processes).inspect_err(|_| processes.break_off())?;
        trainer.exchange.together |= connected;
        Ok(trainer)
    }

    /// Adds loss and gradients of the last part of a step, as [`Trainer::accumulate_batch`] does, and adds them up over all processes.
    /// Where each accumulated its part of a step, with the inputs of the whole step as `size_of_step`, all then have what one
    /// process has that accumulated all of it, and make the same update. Collective.
    ///
    /// Gradients are sent while backward computes the next ones, on a device that can do both.
    ///
    /// # Errors
    /// As [`Trainer::accumulate_batch`]; [`Error::Distributed`] where a process is gone, [`Error::Peer`] where one has failed.
    pub fn accumulate_batch_together(&mut self, batch: &O::Batch<'_>, size_of_step: usize) -> Result<()> {
        self.accumulate_part(batch, size_of_step, self.exchange.together)
    }

    /// Adds loss and gradients up over all processes once all parts of a step have been accumulated by [`Trainer::accumulate_batch`]: for
    /// those who want something of the gradients in between, and slower than [`Trainer::accumulate_batch_together`]. Collective.
    ///
    /// # Errors
    /// Device errors; [`Error::Distributed`] where a process is gone.
    pub fn all_reduce(&mut self) -> Result<()> {
        let Self { model, gradients, optimizer, exchange, .. } = self;
        if !exchange.together {
            return Ok(());
        }
        let backend = model.backend();
        let reduced = backend
            .start_all_reduce(&mut optimizer.loss, &exchange.processes)
            .and_then(|()| exchange.start_sums(backend, gradients, 0..exchange.buckets.len()))
            .and_then(|()| backend.finish_all_reduces());
        // The others would wait for the buckets that are missing.
        reduced.inspect_err(|_| exchange.processes.break_off())
    }

    /// How many gradients are added up at a time, 8 Mi (32 MB) unless told otherwise: fewer are sent earlier, more travel faster.
    /// The same on all processes.
    ///
    /// # Errors
    /// [`Error::Config`] for none.
    pub fn set_bucket(&mut self, gradients: usize) -> Result<()> {
        if gradients == 0 {
            return Err(Error::Config("a bucket needs at least one gradient".into()));
        }
        let Exchange { processes, together, sharded, .. } = &self.exchange;
        let sharding = if sharded.is_some() { Sharding::Optimizer } else { Sharding::Nothing };
        let exchange = Exchange::new(&self.model, processes, sharding, gradients)?;
        self.exchange = Exchange { together: *together, ..exchange };
        self.passes.forget();
        Ok(())
    }

    /// Whether this process has only a share of the moments, and needs the others to save them.
    #[must_use]
    pub fn shards_optimizer(&self) -> bool {
        self.exchange.sharded.is_some() && self.exchange.processes.size() > 1
    }

    /// Gives all the weights of process 0, and their share of its moments and its counters where it has any. Collective.
    ///
    /// # Errors
    /// As [`Trainer::all_reduce`].
    pub(in crate::train) fn start_together(
        &mut self,
        moments: Option<Moments<B::Master>>,
        has_moments: bool,
    ) -> Result<()> {
        let processes = self.exchange.processes.clone();
        if processes.size() == 1 {
            return Ok(());
        }
        let shared = self
            .share_weights(&processes)
            .and_then(|()| if has_moments { self.share_moments(moments) } else { Ok(()) });
        shared.and_then(|()| self.share_state(&processes)).inspect_err(|_| processes.break_off())
    }

    /// Whether all processes still have the same weights bit for bit, as the same updates give them on processors of one kind. Where
    /// they have not, all get those of process 0, so that they do not drift apart. Collective.
    ///
    /// # Errors
    /// As [`Trainer::all_reduce`].
    pub(in crate::train) fn stay_together(&mut self) -> Result<bool> {
        let processes = self.exchange.processes.clone();
        if processes.size() == 1 {
            return Ok(true);
        }
        let checksum = u64::from(processes.agree(self.checksum())?);
        let mut different = [f64::from(u8::from(processes.share_number(checksum)? != checksum))];
        processes.sum_f64(&mut different)?;
        let same = different == [0.0];
        if !same {
            self.share_all(&processes).inspect_err(|_| processes.break_off())?;
        }
        Ok(same)
    }

    /// Gives all processes everything that process 0 has: not the moments where each has its own share of them.
    fn share_all(&mut self, processes: &Processes) -> Result<()> {
        self.share_weights(processes)?;
        if self.exchange.sharded.is_none() {
            let backend = self.model.backend();
            processes.broadcast_buffer(backend, &mut self.optimizer.first)?;
            processes.broadcast_buffer(backend, &mut self.optimizer.second)?;
        }
        self.share_state(processes)
    }

    fn share_weights(&mut self, processes: &Processes) -> Result<()> {
        let Self { model, average, .. } = self;
        let (backend, parameters) = model.parameters_mut();
        processes.broadcast_buffer(backend, &mut parameters.master)?;
        parameters.refresh(backend)?;
        match average {
            Some(average) => processes.broadcast_buffer(backend, &mut average.weights),
            None => Ok(()),
        }
    }

    fn share_state(&mut self, processes: &Processes) -> Result<()> {
        processes.broadcast_buffer(self.model.backend(), &mut self.optimizer.state)?;
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

    /// Every gradient is sent once, when backward has finished it, and no stage of backward is left out.
    #[test]
    fn buckets_follow_backward() -> Result<()> {
        let mut config = MaeConfig::tiny();
        config.image_size = (32, 32).into();
        let model = MaeForPreTraining::new(config, Cpu::<f32>::new(), 0)?;
        let layout = model.parameters().layout();
        for bucket in [1000, 12_345, 100_000, 10_000_000] {
            let exchange = Exchange::new(&model, &Processes::single(), Sharding::Nothing, bucket)?;
            let mut sent = vec![0_u8; layout.trained()];
            let (mut stage, mut next) = (0, 0);
            for (stages, finished) in &exchange.parts {
                assert_eq!(stages.start, stage);
                stage = stages.end;
                let from = layout.finished_from(stage);
                for bucket in &exchange.buckets[next..*finished] {
                    assert!(
                        bucket.start >= from && (bucket.end <= layout.matrices() || from == 0),
                        "{bucket:?}, {from}"
                    );
                    sent[bucket.clone()].iter_mut().for_each(|times| *times += 1);
                }
                next = *finished;
            }
            assert_eq!((stage, next), (layout.stages(), exchange.buckets.len()));
            assert!(sent.iter().all(|&times| times == 1) && exchange.buckets.iter().all(|range| range.len() <= bucket));
            // Small ones leave with each stage that has a matrix to finish.
            assert!(bucket > 1000 || exchange.parts.len() + 1 >= layout.stages(), "{:?}", exchange.parts);
        }
        Ok(())
    }

    #[test]
    fn weights_that_drifted_apart_are_those_of_process_0_again() {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let process = |rank: usize| -> Result<_> {
            let address = "127.0.0.1".to_owned();
            let meeting = Meeting { rank, size: 2, local_rank: 0, local_size: 1, address, port, run: String::new() };
            let processes = Processes::join(&Launch::Tcp(meeting))?;
            let mut config = MaeConfig::tiny();
            config.image_size = (32, 32).into();
            // Weights of another seed, as if they had drifted.
            let model = MaeForPreTraining::new(config, Cpu::<f32>::new(), rank as u64)?;
            let mut trainer = Trainer::together(model, OptimizerSettings::default(), 1, &processes, Sharding::Nothing)?;
            trainer.keep_average(0.9)?;
            let before = trainer.checksum()?;
            let found = [trainer.stay_together()?, trainer.stay_together()?];
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
