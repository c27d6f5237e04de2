use proptest::prelude::*;
use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{ImageShape, Patchify, Pixels};
use vitmae::random::RandomStream;

use crate::support::{plain, poisoned, random, read, same_on_any_threads, shuffles};

/// The first `visible` patches of a shuffle, per sample.
pub fn some_ids(seed: u64, batch: usize, patches: usize, visible: usize) -> Vec<u32> {
    shuffles(seed, batch, patches).chunks(patches).flat_map(|ids| ids[..visible].to_vec()).collect()
}

fn naive(
    image: ImageShape,
    visible: usize,
    ids: &[u32],
    pixel: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let columns = image.width / image.patch_width;
    let mut rows = Vec::new();
    for (row, &id) in ids.iter().enumerate() {
        let (y, x) = (id as usize / columns * image.patch_height, id as usize % columns * image.patch_width);
        for c in 0..image.channels {
            for p in 0..image.patch_height {
                for q in 0..image.patch_width {
                    rows.push(pixel(row / visible, c, y + p, x + q));
                }
            }
        }
    }
    rows
}

fn check<F: Float>(image: ImageShape, batch: usize, visible: usize, seed: u64) {
    let ids = some_ids(seed, batch, image.patches(), visible);
    let ids_buffer = plain(&ids, 0);
    let length = batch * visible * image.patch_length();
    let values: Vec<f32> = random(seed, batch * image.length()).iter().map(|&value| value as f32).collect();
    let pixels = plain(&values, f32::NAN);
    let found = same_on_any_threads(|| {
        let mut rows = poisoned::<F>(length);
        Cpu::new()
            .patchify_visible_forward(image, batch, visible, &mut rows, Pixels::Normalized(&pixels), &ids_buffer)
            .unwrap();
        read(&rows)
    });
    let at = |b, c, y, x| ((b * image.channels + c) * image.height + y) * image.width + x;
    assert_eq!(found, naive(image, visible, &ids, |b, c, y, x| f64::from(values[at(b, c, y, x)])));

    let values: Vec<u8> =
        RandomStream::new(seed, 1, 1, 200).take(batch * image.length()).map(|word| word as u8).collect();
    let (pixels, mean) = (plain(&values, 0), [0.485_f32, 0.456, 0.406, 0.1, 0.2]);
    let std = [0.229_f32, 0.224, 0.225, 0.5, 0.25];
    let (mean_buffer, deviation_buffer) = (plain(&mean, 0.0), plain(&std, 0.0));
    let found = same_on_any_threads(|| {
        let mut rows = poisoned::<F>(length);
        let pixels = Pixels::Bytes { values: &pixels, mean: &mean_buffer, std: &deviation_buffer };
        Cpu::new().patchify_visible_forward(image, batch, visible, &mut rows, pixels, &ids_buffer).unwrap();
        read(&rows)
    });
    let at = |b, c, y, x| ((b * image.height + y) * image.width + x) * image.channels + c;
    let expected = naive(image, visible, &ids, |b, c, y, x| {
        f64::from((f32::from(values[at(b, c, y, x)]) / 255.0 - mean[c]) / std[c])
    });
    assert_eq!(found, expected);
}

#[test]
fn patchify_of_the_usual_image() {
    let image = ImageShape { channels: 3, height: 224, width: 224, patch_height: 16, patch_width: 16 };
    check::<f32>(image, 2, 49, 1);
    check::<f64>(image, 1, 196, 2);
}

#[test]
fn patchify_refuses_short_buffers_unknown_ids_and_images_that_do_not_divide() {
    let mut image = ImageShape { channels: 1, height: 4, width: 4, patch_height: 2, patch_width: 2 };
    let pixels = plain(&[0.0_f32; 16], 0.0);
    let mut rows = poisoned::<f32>(4);
    let mut run = |image, batch, ids: &[u32]| {
        let ids = plain(ids, 0);
        Cpu::<f32>::new().patchify_visible_forward(image, batch, 1, &mut rows, Pixels::Normalized(&pixels), &ids)
    };
    assert!(run(image, 1, &[3]).is_ok());
    assert!(run(image, 1, &[4]).is_err());
    assert!(run(image, 100, &[0; 100]).is_err());
    image.patch_width = 3;
    assert!(run(image, 1, &[0]).is_err());
    image.patch_width = 0;
    assert!(run(image, 1, &[0]).is_err());
}

proptest! {
    #[test]
    fn patchify_agrees_with_its_definition(
        channels in 1_usize..6,
        rows in 1_usize..6,
        columns in 1_usize..6,
        patch_height in 1_usize..9,
        patch_width in 1_usize..9,
        batch in 1_usize..4,
        share in 0.0..=1.0_f64,
        seed in any::<u64>(),
    ) {
        let image =
            ImageShape { channels, height: rows * patch_height, width: columns * patch_width, patch_height, patch_width };
        let visible = (share * (rows * columns) as f64) as usize;
        check::<f32>(image, batch, visible, seed);
        check::<f64>(image, batch, visible, seed);
    }
}
