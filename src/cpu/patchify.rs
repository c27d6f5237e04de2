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

/// Channels of the usual picture, for which there are faster loops.
const COLORS: usize = 3;

/// Checked pictures.
pub(super) struct Pictures<'a> {
    image: ImageShape,
    pixels: Source<'a>,
    /// What the bytes of each colour become.
    table: [[f32; 256]; COLORS],
}

enum Source<'a> {
    Normalized(&'a [f32]),
    Bytes { values: &'a [u8], mean: &'a [f32], std: &'a [f32] },
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
        let mut table = [[0.0; 256]; COLORS];
        let pixels = match pixels {
            Pixels::Normalized(values) => Source::Normalized(check::input(op, "pixels", values, &sizes)?),
            Pixels::Bytes { values, mean, std } => {
                let values = check::input(op, "pixels", values, &sizes)?;
                let mean = check::input(op, "mean", mean, &[channels])?;
                let std = check::input(op, "std", std, &[channels])?;
                for ((table, &mean), &std) in table.iter_mut().zip(mean).zip(std) {
                    for (byte, number) in (0..=u8::MAX).zip(table) {
                        *number = normalized(byte, mean, std);
                    }
                }
                Source::Bytes { values, mean, std }
            }
        };
        Ok(Self { image, pixels, table })
    }

    /// The numbers of a patch in the order (c, p, q).
    fn patch_by_channel<F: Float>(&self, sample: usize, patch: usize, out: &mut [F]) {
        let ImageShape { channels, patch_height, patch_width, .. } = self.image;
        let lines = out.chunks_exact_mut(patch_width).enumerate();
        for (line, out) in lines {
            let (channel, p) = (line / patch_height, line % patch_height);
            match self.pixels {
                Source::Bytes { values, .. } if channels == COLORS => {
                    let (values, _) = values[self.interleaved(sample, patch, p)..].as_chunks::<COLORS>();
                    let table = &self.table[channel];
                    for (out, value) in out.iter_mut().zip(values) {
                        *out = F::from_f32(table[value[channel] as usize]);
                    }
                }
                _ => self.line(sample, patch, p, channel, out.iter_mut()),
            }
        }
    }

    /// The numbers of a patch in the order (p, q, c).
    pub(super) fn patch_by_pixel<F: Float>(&self, sample: usize, patch: usize, out: &mut [F]) {
        let ImageShape { channels, patch_width, .. } = self.image;
        for (p, out) in out.chunks_exact_mut(patch_width * channels).enumerate() {
            if channels != COLORS {
                for channel in 0..channels {
                    self.line(sample, patch, p, channel, out[channel..].iter_mut().step_by(channels));
                }
                continue;
            }
            let (out, _) = out.as_chunks_mut::<COLORS>();
            match self.pixels {
                Source::Normalized(values) => {
                    let [r, g, b] = [0, 1, 2].map(|channel| &values[self.planar(sample, patch, p, channel)..]);
                    for (((out, &r), &g), &b) in out.iter_mut().zip(r).zip(g).zip(b) {
                        *out = [r, g, b].map(F::from_f32);
                    }
                }
                Source::Bytes { values, .. } => {
                    let (values, _) = values[self.interleaved(sample, patch, p)..].as_chunks::<COLORS>();
                    let [red, green, blue] = &self.table;
                    for (out, &[r, g, b]) in out.iter_mut().zip(values) {
                        *out = [red[r as usize], green[g as usize], blue[b as usize]].map(F::from_f32);
                    }
                }
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
        match self.pixels {
            Source::Normalized(values) => {
                for (out, &value) in out.zip(&values[self.planar(sample, patch, p, channel)..]) {
                    *out = F::from_f32(value);
                }
            }
            Source::Bytes { values, mean, std } => {
                let values = &values[self.interleaved(sample, patch, p) + channel..];
                for (out, &value) in out.zip(values.iter().step_by(self.image.channels)) {
                    *out = F::from_f32(normalized(value, mean[channel], std[channel]));
                }
            }
        }
    }

    /// The pixel at which row `p` of a patch starts.
    fn pixel(&self, patch: usize, p: usize) -> (usize, usize) {
        let ImageShape { width, patch_height, patch_width, .. } = self.image;
        let across = width / patch_width;
        (patch / across * patch_height + p, patch % across * patch_width)
    }

    /// Where it is in `[B, C, H, W]`.
    fn planar(&self, sample: usize, patch: usize, p: usize, channel: usize) -> usize {
        let ImageShape { channels, height, width, .. } = self.image;
        let (y, x) = self.pixel(patch, p);
        ((sample * channels + channel) * height + y) * width + x
    }

    /// Where it is in `[B, H, W, C]`.
    fn interleaved(&self, sample: usize, patch: usize, p: usize) -> usize {
        let ImageShape { channels, height, width, .. } = self.image;
        let (y, x) = self.pixel(patch, p);
        ((sample * height + y) * width + x) * channels
    }
}

/// What the model sees of a byte; each operation rounds to f32, in every precision.
fn normalized(byte: u8, mean: f32, std: f32) -> f32 {
    (f32::from(byte) / 255.0 - mean) / std
}
