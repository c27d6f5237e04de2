//! The optimiser's moments on their way to a checkpoint and back.

use std::path::Path;

use safetensors::Dtype;

use crate::model::{Objective, download_part};
use crate::ops::{AdamWState, BUCKET, Backend, Communicator, Real};
use crate::train::Trainer;
use crate::weights::{TensorFile, write_f32, write_stream};
use crate::{Error, Result};

/// Both moments of all trained parameters, on the host.
#[derive(Debug)]
pub(crate) struct Moments<M> {
    first: Vec<M>,
    second: Vec<M>,
}

impl<B: Backend, O: Objective<B>> Trainer<B, O> {
    /// All moments, on process 0, where the processes keep a share of them each; nothing where each keeps all. Collective.
    pub(in crate::train) fn gather_moments(&self) -> Result<Option<Moments<B::Master>>> {
        let Some(part) = self.exchange.sharded else { return Ok(None) };
        let (backend, processes) = (self.model.backend(), &self.exchange.processes);
        processes.ready()?;
        let length = self.model.parameters().layout().trained();
        let kept = if processes.is_rank_0() { length } else { 0 };
        let gather = |share: &B::Buffer<B::Master>| -> Result<Vec<B::Master>> {
            let mut all = Vec::with_capacity(kept);
            let mut values = vec![B::Master::default(); BUCKET.min(part)];
            for owner in 0..processes.size() {
                let (start, end) = (length.min(owner * part), length.min((owner + 1) * part));
                for at in (start..end).step_by(BUCKET) {
                    let values = &mut values[..BUCKET.min(end - at)];
                    if processes.rank() == owner {
                        // SAFETY: a read, while the moments are borrowed.
                        let piece = unsafe { backend.alias(share, at - start, values.len())? };
                        backend.download(values, &piece)?;
                    }
                    processes.broadcast(bytemuck::cast_slice_mut(values), owner)?;
                    if processes.is_rank_0() {
                        all.extend_from_slice(values);
                    }
                }
            }
            Ok(all)
        };
        let gathered = gather(&self.optimizer.first)
            .and_then(|first| Ok(Moments { first, second: gather(&self.optimizer.second)? }))
            .inspect_err(|_| processes.break_off())?;
        Ok(processes.is_rank_0().then_some(gathered))
    }

    /// Writes the moments under the parameters' published names: `first_moment.NAME`, `second_moment.NAME`. Those that
    /// [`Trainer::gather_moments`] brought together, or else the device's.
    pub(crate) fn save_moments(&self, path: &Path, gathered: Option<&Moments<B::Master>>) -> Result<()> {
        let (backend, layout) = (self.model.backend(), self.model.parameters().layout());
        let trained: Vec<usize> =
            (0..layout.specs().len()).filter(|&index| layout.range(index).end <= layout.trained()).collect();
        let places: Vec<_> =
            [true, false].iter().flat_map(|&first| trained.iter().map(move |&index| (first, index))).collect();
        let entries = places
            .iter()
            .map(|&(first, index)| {
                let spec = &layout.specs()[index];
                let moment = if first { "first_moment" } else { "second_moment" };
                (format!("{moment}.{}", spec.name), Dtype::F32, spec.shape.clone())
            })
            .collect();
        write_stream(path, entries, |place, file| {
            let (first, index) = places[place];
            let range = layout.range(index);
            let values = match gathered {
                Some(gathered) => {
                    let all = if first { &gathered.first } else { &gathered.second };
                    all[range].iter().map(|&value| value.to_f64() as f32).collect()
                }
                None => {
                    let arena = if first { &self.optimizer.first } else { &self.optimizer.second };
                    download_part(backend, arena, range)?
                }
            };
            write_f32(file, &values)
        })
    }

    /// Reads what [`Trainer::save_moments`] wrote.
    pub(crate) fn read_moments(&self, path: &Path) -> Result<Moments<B::Master>> {
        let mut file = TensorFile::open(path)?;
        let layout = self.model.parameters().layout();
        let mut read = |moment: &str| -> Result<Vec<B::Master>> {
            let mut values = vec![B::Master::default(); layout.trained()];
            for (index, spec) in layout.specs().iter().enumerate() {
                let range = layout.range(index);
                if range.end > layout.trained() {
                    continue;
                }
                let name = format!("{moment}.{}", spec.name);
                let read = file.read_as_f32(&name)?;
                if read.len() != range.len() {
                    let problem = format!("{name} has {} numbers instead of {}", read.len(), range.len());
                    return Err(Error::checkpoint(path, problem));
                }
                for (value, read) in values[range].iter_mut().zip(read) {
                    *value = B::Master::from_f64(read.into());
                }
            }
            Ok(values)
        };
        Ok(Moments { first: read("first_moment")?, second: read("second_moment")? })
    }

    /// Goes on from moments behind `updates` updates.
    pub(crate) fn set_moments(&mut self, moments: &Moments<B::Master>, updates: u64) -> Result<()> {
        let (backend, share) = (self.model.backend(), self.exchange.share.clone());
        backend.upload(&mut self.optimizer.first, &moments.first[share.clone()])?;
        backend.upload(&mut self.optimizer.second, &moments.second[share])?;
        self.last = AdamWState { updates, ..AdamWState::default() };
        backend.upload(&mut self.optimizer.state, &[self.last])
    }

    /// Gives all processes their share of the moments that process 0 was given. Collective.
    pub(in crate::train) fn share_moments(&mut self, moments: Option<Moments<B::Master>>) -> Result<()> {
        let processes = self.exchange.processes.clone();
        let (backend, share) = (self.model.backend(), self.exchange.share.clone());
        let length = self.model.parameters().layout().trained();
        let (mut first, mut second) = moments.map_or_else(Default::default, |moments| (moments.first, moments.second));
        for (all, own) in [(&mut first, &mut self.optimizer.first), (&mut second, &mut self.optimizer.second)] {
            let mut values = vec![B::Master::default(); BUCKET.min(length)];
            for start in (0..length).step_by(BUCKET) {
                let end = length.min(start + BUCKET);
                let values = &mut values[..end - start];
                if processes.is_rank_0() {
                    values.copy_from_slice(&all[start..end]);
                }
                processes.broadcast(bytemuck::cast_slice_mut(values), 0)?;
                let (from, to) = (start.max(share.start), end.min(share.end));
                if from < to {
                    // SAFETY: the only handle to the moments that is in use, as the trainer is borrowed mutably.
                    let mut piece = unsafe { backend.alias(own, from - share.start, to - from)? };
                    backend.upload(&mut piece, &values[from - start..to - start])?;
                }
            }
        }
        Ok(())
    }
}
