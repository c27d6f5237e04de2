//! Patchify against its definition.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{ImageShape, Patchify, Pixels, Real};

use super::emulated::patchify::{BytePixels, PatchifyShape};
use super::emulated::patchify::{patchify_visible_forward_bytes, patchify_visible_forward_f32};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, Stream, device};

const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// `n` words that look random.
fn words(n: usize, seed: u32) -> Vec<u32> {
    (0..n.div_ceil(4) as u32)
        .flat_map(|block| rand_philox::philox4x32_10([block, 0, 0, 0], [seed, 9]))
        .take(n)
        .collect()
}

fn shape(batch: usize, channels: usize, image: [usize; 2], patch: [usize; 2], keep: usize) -> PatchifyShape {
    let ([height, width], [patch_height, patch_width]) = (image, patch);
    let image = ImageShape { channels, height, width, patch_height, patch_width };
    PatchifyShape { image, batch, keep }
}

/// Distinct patches per image, in some order.
fn ids(shape: PatchifyShape) -> Vec<u32> {
    let mut ids = Vec::new();
    for sample in 0..shape.batch {
        let noise = words(shape.image.patches(), sample as u32);
        let mut order: Vec<u32> = (0..shape.image.patches() as u32).collect();
        order.sort_by_key(|&patch| noise[patch as usize]);
        ids.extend(&order[..shape.keep]);
    }
    ids
}

/// Rows by the definition; `value` takes (sample, channel, y, x).
fn expected(shape: PatchifyShape, ids: &[u32], value: impl Fn(usize, usize, usize, usize) -> f32) -> Vec<f32> {
    let image = shape.image;
    let (_, grid_width) = image.grid();
    let mut rows = Vec::new();
    for (row, &id) in ids.iter().enumerate() {
        let (py, px) = (id as usize / grid_width, id as usize % grid_width);
        for channel in 0..image.channels {
            for p in 0..image.patch_height {
                for q in 0..image.patch_width {
                    let inside = (id as usize) < image.patches();
                    let (y, x) = (py * image.patch_height + p, px * image.patch_width + q);
                    rows.push(if inside { value(row / shape.keep, channel, y, x) } else { f32::NAN });
                }
            }
        }
    }
    rows
}

/// An element type with its rounding and its bits.
trait Checked: CudaElement {
    fn round(value: f32) -> Self;
    fn bits(self) -> u32;
}

impl Checked for f32 {
    fn round(value: f32) -> Self {
        value
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { self.to_bits() }
    }
}

impl Checked for bf16 {
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn bits(self) -> u32 {
        if self.is_nan() { u32::MAX } else { self.to_bits().into() }
    }
}

fn assert_same<T: Checked>(found: &[T], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.bits(), T::round(expected).bits(), "{what}: element {index}, expected {expected}");
    }
}

/// Runs both kernels for an element type; the buffers start `shift` elements after an aligned address.
fn check<T: Checked>(stream: &Stream, shape: PatchifyShape, ids: &[u32], shift: usize) {
    let what = format!("{shape:?}, shift {shift}");
    let PatchifyShape { image: ImageShape { channels, height, width, .. }, batch, .. } = shape;
    let pixels = batch * channels * height * width;
    let at =
        |sample: usize, channel: usize, y: usize, x: usize| ((sample * channels + channel) * height + y) * width + x;
    let ids_keep = stream.upload(ids).expect("uploaded");
    let elements = shape.batch * shape.keep * shape.image.patch_length();
    let mut rows = stream.uninitialised::<T>(elements + shift).expect("reserved");

    let bytes: Vec<u8> = words(pixels + shift, 5).into_iter().map(|word| word as u8).collect();
    let mean: Vec<f32> = (0..channels).map(|channel| MEAN[channel % 3]).collect();
    let std: Vec<f32> = (0..channels).map(|channel| DEVIATION[channel % 3]).collect();
    let normalised = |sample: usize, channel: usize, y: usize, x: usize| {
        let byte = bytes[shift + ((sample * height + y) * width + x) * channels + channel];
        (f32::from(byte) / 255.0 - mean[channel]) / std[channel]
    };
    let buffers = (stream.upload(&bytes), stream.upload(&mean), stream.upload(&std));
    let (byte_buffer, mean_buffer, deviation_buffer) =
        (buffers.0.expect("uploaded"), buffers.1.expect("uploaded"), buffers.2.expect("uploaded"));
    let whole = byte_buffer.as_slice();
    let input = BytePixels {
        pixels: whole.range(shift..pixels + shift).expect("inside"),
        mean: mean_buffer.as_slice(),
        std: deviation_buffer.as_slice(),
    };
    {
        let mut all = rows.as_mut_slice();
        let mut rows = all.range(shift..elements + shift).expect("inside");
        patchify_visible_forward_bytes(stream, &mut rows, &input, &ids_keep.as_slice(), shape).expect("no fault");
        let found = stream.download(&rows.as_slice()).expect("downloaded");
        assert_same(&found, &expected(shape, ids, normalised), &format!("bytes, {what}"));
        stream.fill(&mut rows, 0xff).expect("filled");
    }

    let floats: Vec<f32> = words(pixels + shift, 6).into_iter().map(|word| word as i32 as f32 / 1e9).collect();
    let buffer = stream.upload(&floats).expect("uploaded");
    let whole = buffer.as_slice();
    let input = whole.range(shift..pixels + shift).expect("inside");
    let mut all = rows.as_mut_slice();
    let mut rows = all.range(shift..elements + shift).expect("inside");
    patchify_visible_forward_f32(stream, &mut rows, &input, &ids_keep.as_slice(), shape).expect("no fault");
    let found = stream.download(&rows.as_slice()).expect("downloaded");
    let value = |sample, channel, y, x| floats[shift + at(sample, channel, y, x)];
    assert_same(&found, &expected(shape, ids, value), &format!("f32, {what}"));
}

#[test]
fn patchify_writes_the_visible_patches() {
    let shapes = [
        // The usual: whole 16-byte words in, whole vectors out.
        shape(2, 3, [64, 48], [16, 16], 3),
        // 14 pixels: lines at any even address, rows that are no multiple of a vector.
        shape(3, 3, [42, 56], [14, 14], 5),
        shape(1, 3, [28, 28], [14, 14], 1),
        // Rectangles, one and many channels, odd everything.
        shape(2, 1, [12, 20], [4, 5], 6),
        shape(2, 4, [6, 10], [3, 2], 9),
        shape(1, 5, [7, 9], [7, 3], 2),
        shape(2, 1, [5, 7], [1, 1], 35),
        shape(3, 2, [8, 8], [8, 8], 1),
        shape(1, 13, [16, 8], [2, 8], 7),
        // Patches too large for shared memory.
        shape(1, 21, [64, 64], [64, 64], 1),
        shape(1, 40, [48, 96], [48, 32], 2),
    ];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        for shape in shapes {
            let ids = ids(shape);
            check::<f32>(&stream, shape, &ids, 0);
            check::<bf16>(&stream, shape, &ids, 0);
        }
        // Buffers that start anywhere.
        for shape in [shapes[0], shapes[1], shapes[3]] {
            for shift in [1, 2, 4, 7, 8, 15] {
                check::<f32>(&stream, shape, &ids(shape), shift);
                check::<bf16>(&stream, shape, &ids(shape), shift);
            }
        }
    }
}

#[test]
fn an_id_that_is_no_patch_gives_a_row_of_nan() {
    let Some(device) = device(2) else { return };
    for shape in [shape(2, 3, [32, 32], [16, 16], 3), shape(2, 3, [28, 28], [14, 14], 3)] {
        let ids = [3, 4, 0, u32::MAX, 1, 1 << 31];
        check::<f32>(&device.stream(), shape, &ids, 0);
        check::<bf16>(&device.stream(), shape, &ids, 0);
    }
}

#[test]
fn normalising_has_the_bits_of_two_divisions() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    // All 256 values in each of three channels, under the constants that people use.
    let shape = shape(1, 3, [16, 16], [16, 16], 1);
    let bytes: Vec<u8> = (0..=255).flat_map(|value| [value; 3]).collect();
    let constants = [
        (MEAN, DEVIATION),
        ([0.5; 3], [0.5; 3]),
        ([0.0; 3], [1.0; 3]),
        ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]),
        ([0.491_4, 0.482_2, 0.446_5], [0.247_0, 0.243_5, 0.261_6]),
        ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143]),
    ];
    for (mean, std) in constants {
        let pixels = stream.upload(&bytes).expect("uploaded");
        let (means, deviations) = (stream.upload(&mean).expect("uploaded"), stream.upload(&std).expect("uploaded"));
        let ids = stream.upload(&[0u32]).expect("uploaded");
        let mut rows = stream.uninitialised::<f32>(768).expect("reserved");
        let input = BytePixels { pixels: pixels.as_slice(), mean: means.as_slice(), std: deviations.as_slice() };
        patchify_visible_forward_bytes(&stream, &mut rows.as_mut_slice(), &input, &ids.as_slice(), shape)
            .expect("no fault");
        let found = stream.download(&rows.as_slice()).expect("downloaded");
        for (index, found) in found.into_iter().enumerate() {
            let (channel, byte) = (index / 256, index % 256);
            let expected = (byte as f32 / 255.0 - mean[channel]) / std[channel];
            assert_eq!(found.to_bits(), expected.to_bits(), "{byte} with {} and {}", mean[channel], std[channel]);
        }
    }
}

/// The rows of bytes and of normalised pixels through the contract, from buffers that are longer than they need be.
fn as_a_backend<M: Patchify>(device: &M, shape: PatchifyShape, ids: &[u32]) -> [Vec<f64>; 2] {
    let PatchifyShape { image, batch, keep } = shape;
    let upload = |values: &[f32]| {
        let mut buffer = device.buffer(values.len() + 3).expect("reserved");
        device.upload(&mut buffer, values).expect("uploaded");
        buffer
    };
    let bytes: Vec<u8> = words(batch * image.length(), 5).into_iter().map(|word| word as u8).collect();
    let floats: Vec<f32> = words(batch * image.length(), 6).into_iter().map(|word| word as i32 as f32 / 1e9).collect();
    let mut values = device.buffer(bytes.len() + 3).expect("reserved");
    device.upload(&mut values, &bytes).expect("uploaded");
    let mut id_buffer = device.buffer(ids.len() + 3).expect("reserved");
    device.upload(&mut id_buffer, ids).expect("uploaded");
    let (floats, mean, std) = (upload(&floats), upload(&MEAN), upload(&DEVIATION));
    let pixels = [Pixels::Bytes { values: &values, mean: &mean, std: &std }, Pixels::Normalized(&floats)];
    pixels.map(|pixels| {
        let mut found = vec![M::Element::default(); batch * keep * image.patch_length()];
        let mut rows = device.buffer(found.len() + 3).expect("reserved");
        device.patchify_visible_forward(image, batch, keep, &mut rows, pixels, &id_buffer).expect("no fault");
        device.download(&mut found, &rows).expect("downloaded");
        found.into_iter().map(M::Element::to_f64).collect()
    })
}

#[test]
fn patchify_is_what_the_cpu_does() {
    let Some(device) = device(3) else { return };
    for shape in [shape(2, 3, [42, 56], [14, 14], 5), shape(2, 3, [32, 16], [16, 8], 4)] {
        let ids = ids(shape);
        let expected = as_a_backend(&Cpu::<f32>::new(), shape, &ids);
        assert_eq!(as_a_backend(&Cuda::<f32>::new(device.stream()), shape, &ids), expected, "{shape:?}");
        let found = as_a_backend(&Cuda::<bf16>::new(device.stream()), shape, &ids);
        let rounded: [Vec<f64>; 2] =
            expected.map(|rows| rows.into_iter().map(|value| bf16::from_f64(value).to_f64()).collect());
        assert_eq!(found, rounded, "{shape:?}");
    }
}

#[test]
fn patchify_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = shape(2, 3, [32, 32], [16, 16], 2);
    let pixels = stream.zeros::<f32>(2 * 3 * 32 * 32).expect("reserved");
    let ids = stream.zeros::<u32>(4).expect("reserved");
    let mut rows = stream.zeros::<f32>(4 * 768).expect("reserved");
    let with = |image| PatchifyShape { image, ..good };
    let mut refused = |shape: PatchifyShape| {
        let mut rows = rows.as_mut_slice();
        let result = patchify_visible_forward_f32(&stream, &mut rows, &pixels.as_slice(), &ids.as_slice(), shape);
        let error = result.expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(
        refused(with(ImageShape { patch_width: 15, ..good.image }))
            .contains("image width modulo patch width is 2, expected 0")
    );
    assert!(refused(with(ImageShape { patch_height: 0, ..good.image })).contains("patch height is 0"));
    assert!(refused(with(ImageShape { height: 0, ..good.image })).contains("image height is 0"));
    assert!(
        refused(with(ImageShape { channels: 4, ..good.image })).contains("length of pixels is 6144, expected 8192")
    );
    assert!(refused(PatchifyShape { keep: 3, ..good }).contains("length of ids_keep is 4, expected 6"));
    assert!(refused(with(ImageShape { channels: usize::MAX, ..good.image })).contains("channels"));
    assert!(
        refused(with(ImageShape { height: 16 << 16, width: 16 << 16, ..good.image })).contains("pixels of an image")
    );
    assert!(refused(PatchifyShape { batch: 1 << 31, ..good }).contains("batch"));

    let none = PatchifyShape { keep: 0, ..good };
    let mut nothing = stream.zeros::<f32>(0).expect("reserved");
    let no_ids = stream.zeros::<u32>(0).expect("reserved");
    patchify_visible_forward_f32(&stream, &mut nothing.as_mut_slice(), &pixels.as_slice(), &no_ids.as_slice(), none)
        .expect("no work");
}
