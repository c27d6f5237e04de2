//! Which patches are visible: a stable sort of noise per sample.

use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{MaskingShape, PatchMasking, RandomMask};
use crate::random::{MASKING_STREAM, RandomStream};
use crate::{Error, Result};

impl<F: Float> PatchMasking for Cpu<F> {
    fn masking_from_noise(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CpuBuffer<u32>,
        ids_hidden: &mut CpuBuffer<u32>,
        ids_restore: &mut CpuBuffer<u32>,
        mask: &mut CpuBuffer<f32>,
        noise: &CpuBuffer<f32>,
    ) -> Result<()> {
        let op = "masking_from_noise";
        let noise = check::input(op, "noise", noise, &[shape.batch, shape.patches])?;
        rank(op, shape, ids_keep, ids_hidden, ids_restore, mask, |sample, patches| {
            for (patch, &noise) in patches.iter_mut().zip(&noise[sample * shape.patches..]) {
                *patch = u64::from(key(noise)) << 32;
            }
        })
    }

    fn masking_random(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CpuBuffer<u32>,
        ids_hidden: &mut CpuBuffer<u32>,
        ids_restore: &mut CpuBuffer<u32>,
        mask: &mut CpuBuffer<f32>,
        random: RandomMask,
        samples: &CpuBuffer<u64>,
    ) -> Result<()> {
        let op = "masking_random";
        let samples = check::input(op, "samples", samples, &[shape.batch])?;
        rank(op, shape, ids_keep, ids_hidden, ids_restore, mask, |sample, patches| {
            let words = RandomStream::new(random.seed, random.epoch, samples[sample], MASKING_STREAM);
            for (patch, word) in patches.iter_mut().zip(words) {
                *patch = u64::from(word >> 8) << 32;
            }
        })
    }
}

/// Sorts patches by the keys that `fill(sample, patches)` puts into the high halves, and writes what follows from it.
fn rank(
    op: &'static str,
    shape: MaskingShape,
    ids_keep: &mut [u32],
    ids_hidden: &mut [u32],
    ids_restore: &mut [u32],
    mask: &mut [f32],
    fill: impl Fn(usize, &mut [u64]) + Sync,
) -> Result<()> {
    let MaskingShape { batch, patches, keep } = shape;
    let hidden = patches
        .checked_sub(keep)
        .ok_or_else(|| Error::shape(op, "keep", format!("at most {patches} patches"), keep))?;
    if u32::try_from(patches).is_err() {
        return Err(Error::shape(op, "patches", "a number that fits in 32 bits", patches));
    }
    let ids_keep = Shared::new(check::output(op, "ids_keep", ids_keep, &[batch, keep])?);
    let ids_hidden = Shared::new(check::output(op, "ids_hidden", ids_hidden, &[batch, hidden])?);
    let ids_restore = Shared::new(check::output(op, "ids_restore", ids_restore, &[batch, patches])?);
    let mask = Shared::new(check::output(op, "mask", mask, &[batch, patches])?);
    scratch::with(parallel::workers(batch) * patches, |order: &mut [u64]| {
        let order = Shared::new(order);
        parallel::blocks(batch, |sample, worker| {
            // SAFETY: each sample has its own outputs, each worker its own room to sort in.
            let (order, ids_keep, ids_hidden, ids_restore, mask) = unsafe {
                (
                    order.part(worker * patches, (worker + 1) * patches),
                    ids_keep.part(sample * keep, (sample + 1) * keep),
                    ids_hidden.part(sample * hidden, (sample + 1) * hidden),
                    ids_restore.part(sample * patches, (sample + 1) * patches),
                    mask.part(sample * patches, (sample + 1) * patches),
                )
            };
            fill(sample, order);
            // The patch's number in the low half makes all keys different, and the sort stable.
            for (patch, key) in order.iter_mut().enumerate() {
                *key |= patch as u64;
            }
            order.sort_unstable();
            for (rank, &key) in order.iter().enumerate() {
                let patch = key as u32;
                ids_restore[patch as usize] = rank as u32;
                if rank < keep {
                    ids_keep[rank] = patch;
                    mask[patch as usize] = 0.0;
                } else {
                    ids_hidden[rank - keep] = patch;
                    mask[patch as usize] = 1.0;
                }
            }
        });
    })
}

/// An integer that sorts as the number does; zeros are equal, and NaN comes last.
fn key(noise: f32) -> u32 {
    if noise.is_nan() {
        return u32::MAX;
    }
    let bits = (noise + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}
