//! Sequences of tokens: copies of rows with something added.

use crate::Result;
use crate::cpu::math::{add, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check, scratch};
use crate::ops::{Tokens, TokensShape};

/// Tokens of a block.
const ROWS: usize = 32;

impl<F: Float> Tokens for Cpu<F> {
    fn tokens_assemble_forward(
        &self,
        shape: TokensShape,
        x: &mut CpuBuffer<F>,
        patches: &CpuBuffer<F>,
        class_token: &CpuBuffer<F>,
        positions: &CpuBuffer<F>,
        ids_keep: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "tokens_assemble_forward";
        let Sizes { batch, selected, tokens, short, width } = Sizes::new(op, shape)?;
        let x = check::output(op, "x", x, &[batch, short, width])?;
        let patches = check::input(op, "patches", patches, &[batch, selected, width])?;
        let class_token = check::input(op, "class_token", class_token, &[width])?;
        let positions = check::input(op, "positions", positions, &[tokens, width])?;
        let ids_keep = check::input(op, "ids_keep", ids_keep, &[batch, selected])?;
        check::ids(op, "ids_keep", ids_keep, shape.patches)?;
        rows(x, width, |row, x| match (row / short, row % short) {
            (_, 0) => add_two(x, class_token, &positions[..width]),
            (sample, token) => {
                let patch = sample * selected + token - 1;
                let position = &positions[(1 + ids_keep[patch] as usize) * width..];
                add_two(x, &patches[patch * width..], position);
            }
        });
        Ok(())
    }

    fn tokens_assemble_backward(
        &self,
        shape: TokensShape,
        dpatches: &mut CpuBuffer<F>,
        dclass_token: &mut CpuBuffer<F>,
        dx: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "tokens_assemble_backward";
        let Sizes { batch, selected, short, width, .. } = Sizes::new(op, shape)?;
        let dpatches = check::output(op, "dpatches", dpatches, &[batch, selected, width])?;
        let dclass_token = check::output(op, "dclass_token", dclass_token, &[width])?;
        let dx = check::input(op, "dx", dx, &[batch, short, width])?;
        rows(dpatches, width, |row, dpatch| {
            let token = row / selected * short + 1 + row % selected;
            dpatch.copy_from_slice(&dx[token * width..][..width]);
        });
        for sample in 0..batch {
            add(&mut *dclass_token, &dx[sample * short * width..]);
        }
        Ok(())
    }

    fn tokens_unshuffle_forward(
        &self,
        shape: TokensShape,
        y: &mut CpuBuffer<F>,
        x: &CpuBuffer<F>,
        mask_token: &CpuBuffer<F>,
        positions: &CpuBuffer<F>,
        ids_restore: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "tokens_unshuffle_forward";
        let Sizes { batch, selected, tokens, short, width } = Sizes::new(op, shape)?;
        let y = check::output(op, "y", y, &[batch, tokens, width])?;
        let x = check::input(op, "x", x, &[batch, short, width])?;
        let mask_token = check::input(op, "mask_token", mask_token, &[width])?;
        let positions = check::input(op, "positions", positions, &[tokens, width])?;
        let ids_restore = check::input(op, "ids_restore", ids_restore, &[batch, shape.patches])?;
        rows(y, width, |row, y| {
            let (sample, token) = (row / tokens, row % tokens);
            let source = match token {
                0 => Some(0),
                _ => visible(ids_restore[sample * shape.patches + token - 1], selected),
            };
            let source = source.map_or(mask_token, |token| &x[(sample * short + token) * width..]);
            add_two(y, source, &positions[token * width..]);
        });
        Ok(())
    }

    fn tokens_unshuffle_backward(
        &self,
        shape: TokensShape,
        dx: &mut CpuBuffer<F>,
        dmask_token: &mut CpuBuffer<F>,
        dy: &CpuBuffer<F>,
        ids_restore: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "tokens_unshuffle_backward";
        let Sizes { batch, selected, tokens, short, width } = Sizes::new(op, shape)?;
        let dx = Shared::new(check::output(op, "dx", dx, &[batch, short, width])?);
        let dmask_token = check::output(op, "dmask_token", dmask_token, &[width])?;
        let dy = check::input(op, "dy", dy, &[batch, tokens, width])?;
        let ids_restore = check::input(op, "ids_restore", ids_restore, &[batch, shape.patches])?;
        scratch::with(check::product(op, "partial sums", &[batch, width])?, |sums: &mut [F]| {
            let shared = Shared::new(&mut *sums);
            parallel::blocks(batch, |sample, _| {
                // SAFETY: each sample has its own rows and its own sum.
                let (dx, sum) = unsafe {
                    (
                        dx.part(sample * short * width, (sample + 1) * short * width),
                        shared.part(sample * width, (sample + 1) * width),
                    )
                };
                let dy = &dy[sample * tokens * width..][..tokens * width];
                let ids_restore = &ids_restore[sample * shape.patches..][..shape.patches];
                dx[..width].copy_from_slice(&dy[..width]);
                sum.fill(F::ZERO);
                for (patch, &rank) in ids_restore.iter().enumerate() {
                    let dy = &dy[(1 + patch) * width..][..width];
                    match visible(rank, selected) {
                        Some(token) => dx[token * width..][..width].copy_from_slice(dy),
                        None => add(&mut *sum, dy),
                    }
                }
            });
            for sample in 0..batch {
                add(&mut *dmask_token, &sums[sample * width..]);
            }
        })
    }

    fn tokens_gather_forward(
        &self,
        shape: TokensShape,
        y: &mut CpuBuffer<F>,
        x: &CpuBuffer<F>,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "tokens_gather_forward";
        let Sizes { batch, selected, tokens, width, .. } = Sizes::new(op, shape)?;
        let y = check::output(op, "y", y, &[batch, selected, width])?;
        let x = check::input(op, "x", x, &[batch, tokens, width])?;
        let ids = check::input(op, "ids", ids, &[batch, selected])?;
        check::ids(op, "ids", ids, shape.patches)?;
        rows(y, width, |row, y| {
            let token = row / selected * tokens + 1 + ids[row] as usize;
            y.copy_from_slice(&x[token * width..][..width]);
        });
        Ok(())
    }

    fn tokens_gather_backward(
        &self,
        shape: TokensShape,
        dx: &mut CpuBuffer<F>,
        dy: &CpuBuffer<F>,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "tokens_gather_backward";
        let Sizes { batch, selected, tokens, width, .. } = Sizes::new(op, shape)?;
        let dx = Shared::new(check::output(op, "dx", dx, &[batch, tokens, width])?);
        let dy = check::input(op, "dy", dy, &[batch, selected, width])?;
        let ids = check::input(op, "ids", ids, &[batch, selected])?;
        check::ids(op, "ids", ids, shape.patches)?;
        parallel::blocks(batch, |sample, _| {
            // SAFETY: each sample has its own rows.
            let dx = unsafe { dx.part(sample * tokens * width, (sample + 1) * tokens * width) };
            dx.fill(F::ZERO);
            for row in sample * selected..(sample + 1) * selected {
                let token = 1 + ids[row] as usize;
                dx[token * width..][..width].copy_from_slice(&dy[row * width..][..width]);
            }
        });
        Ok(())
    }
}

/// A shape's sizes with those that follow from it.
struct Sizes {
    batch: usize,
    selected: usize,
    /// Tokens of the whole sequence.
    tokens: usize,
    /// Tokens of the selected patches and the class token.
    short: usize,
    width: usize,
}

impl Sizes {
    fn new(op: &'static str, shape: TokensShape) -> Result<Self> {
        let TokensShape { batch, patches, selected, width } = shape;
        // Checked here once, so that nothing below can overflow.
        check::product(op, "x", &[batch, patches.max(selected).saturating_add(1), width])?;
        Ok(Self { batch, selected, tokens: 1 + patches, short: 1 + selected, width })
    }
}

/// Where the token of a visible patch is among the selected ones.
#[inline(always)]
fn visible(rank: u32, selected: usize) -> Option<usize> {
    ((rank as usize) < selected).then_some(1 + rank as usize)
}

/// Calls `work(row, content)` for every row of `width` elements.
fn rows<F: Float>(out: &mut [F], width: usize, work: impl Fn(usize, &mut [F]) + Sync) {
    let count = out.len().checked_div(width).unwrap_or(0);
    let out = Shared::new(out);
    parallel::pieces(count, ROWS, |from, to| {
        for row in from..to {
            // SAFETY: each row is written once, and inside the output.
            work(row, unsafe { out.part(row * width, (row + 1) * width) });
        }
    });
}

vectorized! {
    fn add_two<'a, F: Float>(sum: &'a mut [F], first: &'a [F], second: &'a [F]) {
        for ((sum, &first), &second) in sum.iter_mut().zip(first).zip(second) {
            *sum = first + second;
        }
    }
}
