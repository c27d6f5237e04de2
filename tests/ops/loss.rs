use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{ImageShape, Loss, LossShape, Pixels};
use vitmae::random::RandomStream;

use crate::patchify::some_ids;
use crate::support::{buffer, check_gradient, close, plain, poisoned, random, read, same_on_any_threads};

/// What one run needs besides the prediction.
struct Case {
    shape: LossShape,
    values: Vec<f32>,
    ids: Vec<u32>,
    mask: Vec<f32>,
}

impl Case {
    fn new(image: ImageShape, batch: usize, predicted: usize, norm_pix_loss: bool, hidden_only: bool) -> Self {
        let patches = image.patches();
        let ids = some_ids(1, batch, patches, predicted);
        let mut mask: Vec<f32> =
            RandomStream::new(2, 0, 0, 200).take(batch * patches).map(|word| (word % 2) as f32).collect();
        if hidden_only {
            mask.fill(0.0);
            ids.iter().enumerate().for_each(|(row, &id)| mask[row / predicted * patches + id as usize] = 1.0);
        }
        let hidden = mask.iter().sum::<f32>().max(1.0);
        let values = random(3, batch * image.length()).iter().map(|&value| value as f32).collect();
        let shape = LossShape { image, batch, predicted, norm_pix_loss, scale: 1.0 / f64::from(hidden) };
        Self { shape, values, ids, mask }
    }

    fn numbers(&self) -> usize {
        self.ids.len() * self.shape.image.patch_length()
    }

    /// Loss (added to 0.25), loss of each patch, gradient.
    fn run<F: Float>(&self, prediction: &[f64]) -> [Vec<f64>; 3] {
        let (pixels, ids, mask) = (plain(&self.values, f32::NAN), plain(&self.ids, 0), plain(&self.mask, 0.0));
        let prediction = buffer(prediction);
        same_on_any_threads(|| {
            let (mut loss, mut patches) = (buffer::<F>(&[0.25]), poisoned(self.ids.len()));
            let mut gradient = poisoned(self.numbers());
            let pixels = Pixels::Normalized(&pixels);
            Cpu::new()
                .loss_forward_backward(
                    self.shape,
                    &mut loss,
                    &mut patches,
                    &mut gradient,
                    &prediction,
                    pixels,
                    &ids,
                    &mask,
                )
                .unwrap();
            [read(&loss), read(&patches), read(&gradient)]
        })
    }

    /// By the definition; the sum of the patches' losses, unscaled, and each patch's loss.
    fn naive(&self, prediction: &[f64]) -> [Vec<f64>; 3] {
        let LossShape { image, predicted, norm_pix_loss, scale, .. } = self.shape;
        let (length, columns) = (image.patch_length(), image.width / image.patch_width);
        let (mut losses, mut gradient) = (vec![], vec![]);
        for (row, &id) in self.ids.iter().enumerate() {
            let (sample, id) = (row / predicted, id as usize);
            let (y, x) = (id / columns * image.patch_height, id % columns * image.patch_width);
            let mut target = Vec::new();
            for p in 0..image.patch_height {
                for q in 0..image.patch_width {
                    for c in 0..image.channels {
                        let index = ((sample * image.channels + c) * image.height + y + p) * image.width + x + q;
                        target.push(f64::from(self.values[index]));
                    }
                }
            }
            if norm_pix_loss {
                let mean = target.iter().sum::<f64>() / length as f64;
                let variance = target.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (length - 1) as f64;
                target.iter_mut().for_each(|t| *t = (*t - mean) / (variance + 1e-6).sqrt());
            }
            let hidden = f64::from(self.mask[sample * image.patches() + id]);
            let errors: Vec<f64> = (0..length).map(|i| prediction[row * length + i] - target[i]).collect();
            losses.push(hidden * errors.iter().map(|e| e * e).sum::<f64>() / length as f64);
            gradient.extend(errors.iter().map(|e| hidden * scale * 2.0 * e / length as f64));
        }
        [vec![0.25 + scale * losses.iter().sum::<f64>()], losses, gradient]
    }
}

fn cases() -> Vec<Case> {
    let small = ImageShape { channels: 3, height: 8, width: 12, patch_height: 4, patch_width: 2 };
    let odd = ImageShape { channels: 5, height: 9, width: 21, patch_height: 3, patch_width: 7 };
    let usual = ImageShape { channels: 3, height: 96, width: 64, patch_height: 16, patch_width: 16 };
    let mut cases = Vec::new();
    for norm in [false, true] {
        for hidden_only in [false, true] {
            cases.push(Case::new(small, 2, 5, norm, hidden_only));
            cases.push(Case::new(odd, 3, 9, norm, hidden_only));
            cases.push(Case::new(usual, 1, 18, norm, hidden_only));
        }
    }
    cases
}

#[test]
fn loss_agrees_with_its_definition() {
    for case in cases() {
        let prediction = random(4, case.numbers());
        let expected = case.naive(&prediction);
        for (what, (found, expected)) in
            ["loss", "patches", "gradient"].iter().zip(case.run::<f32>(&prediction).iter().zip(&expected))
        {
            close(what, found, expected, 3e-6);
        }
        for (what, (found, expected)) in
            ["loss", "patches", "gradient"].iter().zip(case.run::<f64>(&prediction).iter().zip(&expected))
        {
            close(what, found, expected, 1e-13);
        }
    }
}

#[test]
fn loss_gradient_is_that_of_the_loss() {
    for case in cases() {
        let prediction = random(5, case.numbers());
        let gradient = case.run::<f64>(&prediction)[2].clone();
        check_gradient("dprediction", &prediction, &gradient, |prediction| case.run::<f64>(prediction)[0][0]);
    }
}

#[test]
fn loss_of_bytes_is_that_of_normalized_pixels() {
    let image = ImageShape { channels: 3, height: 8, width: 8, patch_height: 4, patch_width: 4 };
    let mut case = Case::new(image, 2, 3, true, true);
    let bytes: Vec<u8> = RandomStream::new(6, 0, 0, 200).take(2 * image.length()).map(|word| word as u8).collect();
    let (mean, std) = ([0.5_f32, 0.4, 0.3], [0.25_f32, 0.2, 0.3]);
    for index in 0..case.values.len() {
        let (sample, c, place) = (index / 192, index / 64 % 3, index % 64);
        let byte = bytes[sample * 192 + place * 3 + c];
        case.values[index] = (f32::from(byte) / 255.0 - mean[c]) / std[c];
    }
    let prediction = random(7, case.numbers());
    let (mut loss, mut patches) = (buffer::<f32>(&[0.25]), poisoned(case.ids.len()));
    let mut gradient = poisoned(case.numbers());
    let (values, mean, std) = (plain(&bytes, 0), plain(&mean, 0.0), plain(&std, 0.0));
    Cpu::new()
        .loss_forward_backward(
            case.shape,
            &mut loss,
            &mut patches,
            &mut gradient,
            &buffer(&prediction),
            Pixels::Bytes { values: &values, mean: &mean, std: &std },
            &plain(&case.ids, 0),
            &plain(&case.mask, 0.0),
        )
        .unwrap();
    assert_eq!([read(&loss), read(&patches), read(&gradient)], case.run::<f32>(&prediction));
}

#[test]
fn loss_with_nothing_hidden_is_zero() {
    let image = ImageShape { channels: 1, height: 4, width: 4, patch_height: 2, patch_width: 2 };
    let mut case = Case::new(image, 1, 4, true, true);
    case.mask.fill(0.0);
    case.shape.scale = 0.0;
    let [loss, patches, gradient] = case.run::<f32>(&random(8, 16));
    assert_eq!(loss, [0.25]);
    assert_eq!(patches, [0.0; 4]);
    assert_eq!(gradient, [0.0; 16]);
}
