//! Launchers of `kernels/patchify.cu`: visible patches of images as rows for the patch embedding.

use super::backend::{Cuda, CudaBuffer};
use super::element::CudaElement;
use super::embedded::Kernel;
use super::error::Result;
use super::launch::{Argument, Divider, Grid, MAX_32_BIT, Slice, SliceMut, Stream, exactly, product, within};
use crate::ops::{ImageShape, Patchify, Pixels};

const THREADS: u32 = 128;

/// Elements that a block writes, about: enough to keep its threads busy for a few rounds and to spread over all
/// multiprocessors, and little enough shared memory for many blocks on each.
const TILE_ELEMENTS: usize = 6144;

/// Most shared memory that a block takes; every GPU has it without asking.
const MAX_SHARED_BYTES: u64 = 48 << 10;

/// Shape of a patchify: images and patches may be rectangular.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchifyShape {
    /// The images and their patches.
    pub image: ImageShape,
    /// Images, B.
    pub batch: usize,
    /// Visible patches per image.
    pub keep: usize,
}

/// Pixels that are still bytes, and how to normalise them: `(v / 255 - mean[c]) / std[c]`.
#[derive(Debug)]
pub struct BytePixels<'a> {
    /// `[B, H, W, C]`, interleaved.
    pub pixels: Slice<'a, u8>,
    /// `[C]`.
    pub mean: Slice<'a, f32>,
    /// `[C]`, no zeros.
    pub std: Slice<'a, f32>,
}

/// Writes the visible patches `ids_keep` `[B, keep]` of byte images as normalised rows `[B · keep, C · ph · pw]`.
///
/// Errors: a shape outside the limits, a buffer of another length or device, a failed launch. An id that is no patch gives
/// a row of NaN.
pub fn patchify_visible_forward_bytes<T: CudaElement>(
    stream: &Stream,
    rows: &mut SliceMut<'_, T>,
    input: &BytePixels<'_>,
    ids_keep: &Slice<'_, u32>,
    shape: PatchifyShape,
) -> Result<()> {
    const OP: &str = "patchify_visible_forward_bytes";
    let (parameters, grid) = check::<T>(OP, rows, input.pixels.len(), ids_keep, shape, Some(&input.pixels))?;
    exactly(OP, "length of mean", input.mean.len() as u64, shape.image.channels as u64)?;
    exactly(OP, "length of std", input.std.len() as u64, shape.image.channels as u64)?;
    let arguments = [
        rows.argument(),
        input.pixels.argument(),
        ids_keep.argument(),
        input.mean.argument(),
        input.std.argument(),
        Argument::value(&parameters),
    ];
    // SAFETY: patchify_visible_forward_u8_*(T*, const u8*, const u32*, const float*, const float*, PatchifyShape); lengths
    // were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("patchify_visible_forward_u8") }, grid, &arguments) }
}

/// Writes the visible patches `ids_keep` `[B, keep]` of normalised images `[B, C, H, W]` as rows `[B · keep, C · ph · pw]`.
///
/// Errors: as [`patchify_visible_forward_bytes`].
pub fn patchify_visible_forward_f32<T: CudaElement>(
    stream: &Stream,
    rows: &mut SliceMut<'_, T>,
    pixels: &Slice<'_, f32>,
    ids_keep: &Slice<'_, u32>,
    shape: PatchifyShape,
) -> Result<()> {
    const OP: &str = "patchify_visible_forward_f32";
    let (parameters, grid) = check::<T>(OP, rows, pixels.len(), ids_keep, shape, None)?;
    let arguments = [rows.argument(), pixels.argument(), ids_keep.argument(), Argument::value(&parameters)];
    // SAFETY: patchify_visible_forward_f32_*(T*, const float*, const u32*, PatchifyShape); lengths were checked.
    unsafe { stream.launch(const { Kernel::of::<T>("patchify_visible_forward_f32") }, grid, &arguments) }
}

impl<E: CudaElement> Patchify for Cuda<E> {
    fn patchify_visible_forward(
        &self,
        image: ImageShape,
        batch: usize,
        visible: usize,
        rows: &mut CudaBuffer<E>,
        pixels: Pixels<'_, Self>,
        ids: &CudaBuffer<u32>,
    ) -> crate::Result<()> {
        let op = "patchify_visible_forward";
        image.check()?;
        let shape = PatchifyShape { image, batch, keep: visible };
        let ImageShape { channels, height, width, .. } = image;
        let mut rows = rows.output(op, "rows", &[batch, visible, image.patch_length()])?;
        let ids = ids.input(op, "ids", &[batch, visible])?;
        let sizes = [batch, channels, height, width];
        match pixels {
            Pixels::Normalized(pixels) => {
                let pixels = pixels.input(op, "pixels", &sizes)?;
                patchify_visible_forward_f32(self.stream(), &mut rows, &pixels, &ids, shape)?;
            }
            Pixels::Bytes { values, mean, std } => {
                let pixels = values.input(op, "pixels", &sizes)?;
                let mean = mean.input(op, "mean", &[channels])?;
                let std = std.input(op, "std", &[channels])?;
                let input = BytePixels { pixels, mean, std };
                patchify_visible_forward_bytes(self.stream(), &mut rows, &input, &ids, shape)?;
            }
        }
        Ok(())
    }
}

/// `PatchifyShape` of kernels/patchify.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PatchifyParameters {
    rows: u32,
    batch: u32,
    channels: u32,
    height: u32,
    width: u32,
    patches: u32,
    tile: u32,
    keep: Divider,
    grid_width: Divider,
    row_length: Divider,
    patch_area: Divider,
    patch_width: Divider,
    patch_height: Divider,
    words: Divider,
    staged: u32,
}

/// Checks limits and lengths, and lays out the launch. `bytes`: the pixels, where they are to be staged.
fn check<T: CudaElement>(
    op: &'static str,
    rows: &SliceMut<'_, T>,
    pixels: usize,
    ids_keep: &Slice<'_, u32>,
    shape: PatchifyShape,
    bytes: Option<&Slice<'_, u8>>,
) -> Result<(PatchifyParameters, Grid)> {
    let PatchifyShape { image: size, batch, keep } = shape;
    let ImageShape { channels, height, width, patch_height, patch_width } = size;
    let sizes = [("channels", channels), ("patch height", patch_height), ("patch width", patch_width)];
    for (what, size) in sizes {
        within(op, what, size as u64, 1..=MAX_32_BIT)?;
    }
    within(op, "image height", height as u64, patch_height as u64..=MAX_32_BIT)?;
    within(op, "image width", width as u64, patch_width as u64..=MAX_32_BIT)?;
    exactly(op, "image height modulo patch height", (height % patch_height) as u64, 0)?;
    exactly(op, "image width modulo patch width", (width % patch_width) as u64, 0)?;
    within(op, "batch", batch as u64, 0..=MAX_32_BIT)?;
    let image = product(op, "pixels of an image", &[channels, height, width], MAX_32_BIT)? as usize;
    let row_count = product(op, "number of rows", &[batch, keep], MAX_32_BIT)?;
    let row_length = size.patch_length();
    exactly(op, "length of pixels", pixels as u64, product(op, "pixels", &[batch, image], u64::MAX)?)?;
    exactly(op, "length of ids_keep", ids_keep.len() as u64, row_count)?;
    let elements = product(op, "length of rows", &[row_count as usize, row_length], u64::MAX)?;
    exactly(op, "length of rows", rows.len() as u64, elements)?;

    let tile = rows_per_tile(row_length, 16 / size_of::<T>());
    product(op, "elements of a tile", &[tile, row_length], MAX_32_BIT)?;
    let line_bytes = patch_width * channels;
    let whole_words =
        bytes.is_some_and(|bytes| bytes.is_aligned_16()) && line_bytes % 16 == 0 && (width * channels) % 16 == 0;
    // An unaligned line of n bytes touches up to n / 16 + 2 words, less what alignment rules out.
    let words = if whole_words { line_bytes / 16 } else { (line_bytes + 14) / 16 + 1 };
    let lines = (tile * patch_height) as u64;
    let staged_bytes = lines * (8 + 16 * words as u64);
    let staged = staged_bytes <= MAX_SHARED_BYTES;
    let shared_bytes = match bytes {
        Some(_) if staged => staged_bytes,
        Some(_) => lines * 8,
        None => tile as u64 * 8,
    };
    within(op, "shared memory for a patch, in bytes", shared_bytes, 0..=MAX_SHARED_BYTES)?;
    let divider = |divisor: usize| Divider::new(divisor as u32);
    let parameters = PatchifyParameters {
        rows: row_count as u32,
        batch: batch as u32,
        channels: channels as u32,
        height: height as u32,
        width: width as u32,
        patches: size.patches() as u32,
        tile: tile as u32,
        keep: divider(keep),
        grid_width: divider(width / patch_width),
        row_length: divider(row_length),
        patch_area: divider(patch_height * patch_width),
        patch_width: divider(patch_width),
        patch_height: divider(patch_height),
        words: divider(words),
        staged: staged.into(),
    };
    let blocks = row_count.div_ceil(tile as u64) as u32;
    Ok((parameters, Grid { blocks, threads: THREADS, shared_bytes: shared_bytes as u32 }))
}

/// Rows per block: about [`TILE_ELEMENTS`], and a whole number of vectors of `vector` elements, so that every tile starts
/// on a 16-byte boundary. `vector` is a power of two.
fn rows_per_tile(row_length: usize, vector: usize) -> usize {
    let common = 1 << row_length.trailing_zeros().min(vector.trailing_zeros());
    let step = vector / common;
    let wanted = TILE_ELEMENTS / row_length / step * step;
    wanted.clamp(step, 256.max(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_hold_whole_vectors() {
        for row_length in [1, 2, 3, 12, 588, 768, 1000, 3072, 12_289, 1 << 20] {
            for vector in [4, 8] {
                let tile = rows_per_tile(row_length, vector);
                assert!(tile > 0 && (tile * row_length).is_multiple_of(vector), "{row_length} {vector} {tile}");
            }
        }
        assert_eq!(rows_per_tile(768, 8), 8);
    }
}
