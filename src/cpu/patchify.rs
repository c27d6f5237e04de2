//! Pictures to rows of patches, for the embedding and for the loss's targets.

use crate::Result;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check};
use crate::ops::{ImageShape, Patchify, Pixels};

/// Patches of a block.
const ROWS: usize = 8;

impl<F: Float> Patchify for Cpu<F> {
    fn patchify_visible_forward(
        &self,
        image: ImageShape,
        batch: usize,
        visible: usize,
        rows: &mut CpuBuffer<F>,
        pixels: Pixels<'_, Self>,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        let op = "patchify_visible_forward";
        let pictures = Pictures::new(op, image, batch, pixels)?;
        let length = image.patch_length();
        let rows = Shared::new(check::output(op, "rows", rows, &[batch, visible, length])?);
        let ids = check::input(op, "ids", ids, &[batch, visible])?;
        check::ids(op, "ids", ids, image.patches())?;
        parallel::pieces(batch * visible, ROWS, |from, to| {
            for (row, &patch) in (from..to).zip(&ids[from..]) {
                // SAFETY: each row is written once, and inside the output.
                let out = unsafe { rows.part(row * length, (row + 1) * length) };
                pictures.patch_by_channel(row / visible, patch as usize, out);
            }
        });
        Ok(())
    }
}

/// Checked pictures.
pub(super) struct Pictures<'a> {
    image: ImageShape,
    pixels: Source<'a>,
}

enum Source<'a> {
    Normalized(&'a [f32]),
    Bytes { values: &'a [u8], mean: &'a [f32], deviation: &'a [f32] },
}

impl<'a> Pictures<'a> {
    pub(super) fn new<F: Float>(
        op: &'static str,
        image: ImageShape,
        batch: usize,
        pixels: Pixels<'a, Cpu<F>>,
    ) -> Result<Self> {
        image.check()?;
        let ImageShape { channels, height, width, .. } = image;
        let sizes = [batch, channels, height, width];
        let pixels = match pixels {
            Pixels::Normalized(values) => Source::Normalized(check::input(op, "pixels", values, &sizes)?),
            Pixels::Bytes { values, mean, deviation } => Source::Bytes {
                values: check::input(op, "pixels", values, &sizes)?,
                mean: check::input(op, "mean", mean, &[channels])?,
                deviation: check::input(op, "deviation", deviation, &[channels])?,
            },
        };
        Ok(Self { image, pixels })
    }

    /// The numbers of a patch in the order (c, p, q).
    fn patch_by_channel<F: Float>(&self, sample: usize, patch: usize, out: &mut [F]) {
        let ImageShape { patch_height, patch_width, .. } = self.image;
        let area = patch_height * patch_width;
        for (channel, out) in out.chunks_exact_mut(area).enumerate() {
            for (p, out) in out.chunks_exact_mut(patch_width).enumerate() {
                self.line(sample, patch, p, channel, out.iter_mut());
            }
        }
    }

    /// The numbers of a patch in the order (p, q, c).
    pub(super) fn patch_by_pixel<F: Float>(&self, sample: usize, patch: usize, out: &mut [F]) {
        let ImageShape { channels, patch_width, .. } = self.image;
        for (p, out) in out.chunks_exact_mut(patch_width * channels).enumerate() {
            for channel in 0..channels {
                self.line(sample, patch, p, channel, out[channel..].iter_mut().step_by(channels));
            }
        }
    }

    /// One channel of row `p` of a patch.
    #[inline(always)]
    fn line<'o, F: Float>(
        &self,
        sample: usize,
        patch: usize,
        p: usize,
        channel: usize,
        out: impl Iterator<Item = &'o mut F>,
    ) {
        let ImageShape { channels, height, width, patch_height, patch_width } = self.image;
        let across = width / patch_width;
        let (y, x) = (patch / across * patch_height + p, patch % across * patch_width);
        match self.pixels {
            Source::Normalized(values) => {
                let values = &values[((sample * channels + channel) * height + y) * width + x..];
                for (out, &value) in out.zip(values) {
                    *out = F::from_f32(value);
                }
            }
            Source::Bytes { values, mean, deviation } => {
                let values = &values[((sample * height + y) * width + x) * channels + channel..];
                let (mean, deviation) = (mean[channel], deviation[channel]);
                for (out, &value) in out.zip(values.iter().step_by(channels)) {
                    *out = F::from_f32((f32::from(value) / 255.0 - mean) / deviation);
                }
            }
        }
    }
}
