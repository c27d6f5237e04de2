//! The reconstruction loss against the CPU in f64.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{ImageShape, Loss, LossShape, Pixels};

use super::emulated::loss::{LossInput, LossOutput, loss_forward_backward_f32};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, device};
use super::reference::{Bench, close, close_masters, random, shuffles};

const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f64; 3] = [0.229, 0.224, 0.225];

fn shape(batch: usize, channels: usize, image: [usize; 2], patch: [usize; 2], predicted: usize) -> LossShape {
    let ([height, width], [patch_height, patch_width]) = (image, patch);
    let image = ImageShape { channels, height, width, patch_height, patch_width };
    LossShape { image, batch, predicted, norm_pix_loss: false, scale: 0.3 }
}

/// Pixels and predictions of a batch.
struct Inputs {
    bytes: Vec<u8>,
    floats: Vec<f32>,
    prediction: Vec<f64>,
    ids: Vec<u32>,
    /// Most predicted patches are hidden.
    mask: Vec<f32>,
}

impl Inputs {
    fn new(shape: LossShape, seed: u64) -> Self {
        let LossShape { image, batch, predicted, .. } = shape;
        let patches = image.patches();
        let pixels = random(seed, batch * image.length());
        let ids = shuffles(seed, batch, patches).into_iter().flat_map(|ids| ids[..predicted].to_vec()).collect();
        Self {
            bytes: pixels.iter().map(|pixel| (128.0 + 128.0 * pixel) as u8).collect(),
            floats: pixels.iter().map(|&pixel| 2.0 * pixel as f32).collect(),
            prediction: random(seed + 1, batch * predicted * image.patch_length()),
            ids,
            mask: (0..batch * patches).map(|patch| if patch % 5 == 3 { 0.0 } else { 1.0 }).collect(),
        }
    }
}

/// Loss (on top of 0.25), patch losses and gradient.
type Losses = [Vec<f64>; 3];

fn run<B: Loss>(bench: &Bench<'_, B>, shape: LossShape, inputs: &Inputs, bytes: bool) -> Losses {
    let LossShape { image, batch, predicted, .. } = shape;
    let rows = batch * predicted;
    let mut loss = bench.masters(&[0.25]);
    let mut patch_loss = bench.masters(&vec![f64::NAN; rows]);
    let mut dprediction = bench.poisoned(rows * image.patch_length());
    let prediction = bench.elements(&inputs.prediction);
    let (ids, mask) = (bench.ids(&inputs.ids), bench.plain(&inputs.mask));
    let constants = |values: [f64; 3]| -> Vec<f32> { (0..image.channels).map(|c| values[c % 3] as f32).collect() };
    let (mean, std) = (bench.plain(&constants(MEAN)), bench.plain(&constants(DEVIATION)));
    let (values, floats) = (bench.plain(&inputs.bytes), bench.plain(&inputs.floats));
    let pixels = match bytes {
        true => Pixels::Bytes { values: &values, mean: &mean, std: &std },
        false => Pixels::Normalized(&floats),
    };
    bench
        .backend
        .loss_forward_backward(shape, &mut loss, &mut patch_loss, &mut dprediction, &prediction, pixels, &ids, &mask)
        .expect("no fault");
    [bench.read_masters(&loss), bench.read_masters(&patch_loss), bench.read(&dprediction)]
}

fn check<E: CudaElement>(device: &Cuda<E>, shape: LossShape, seed: u64, shift: usize) {
    let inputs = Inputs::new(shape, seed);
    for norm_pix_loss in [false, true] {
        let shape = LossShape { norm_pix_loss, ..shape };
        for bytes in [true, false] {
            let what = format!("{shape:?}, shift {shift}, bytes {bytes}");
            let [loss, patch_loss, dprediction] = run(&Bench { backend: device, shift }, shape, &inputs, bytes);
            let expected = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &inputs, bytes);
            close_masters(&format!("loss, {what}"), &loss, &expected[0]);
            close_masters(&format!("patch loss, {what}"), &patch_loss, &expected[1]);
            close::<Cuda<E>>(&format!("gradient, {what}"), &dprediction, &expected[2], 2.0);
        }
    }
}

#[test]
fn loss_agrees_with_the_cpu() {
    let shapes = [
        // The usual: vectors of eight, in registers.
        shape(2, 3, [32, 48], [16, 16], 4),
        // Rows that are no multiple of eight, lines at any even address.
        shape(1, 3, [28, 42], [14, 14], 5),
        // Odd everything: no vectors.
        shape(2, 1, [12, 20], [4, 5], 6),
        shape(2, 5, [6, 9], [3, 3], 5),
        shape(3, 1, [3, 2], [1, 1], 6),
        // More than fits in registers, with and without vectors; many channels.
        shape(1, 3, [32, 64], [32, 32], 2),
        shape(1, 13, [18, 18], [9, 9], 3),
        // One vector for some lanes, none for others.
        shape(2, 4, [8, 4], [4, 2], 3),
        shape(1, 3, [8, 8], [4, 4], 1),
    ];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (single, half) = (Cuda::<f32>::new(device.stream()), Cuda::<bf16>::new(device.stream()));
        for shape in shapes {
            check(&single, shape, seed, 0);
            check(&half, shape, seed, 0);
        }
        // Buffers that start anywhere.
        for shift in [1, 4, 8] {
            check(&single, shapes[0], seed, shift);
            check(&half, shapes[0], seed, shift);
            check(&half, shapes[1], seed, shift);
        }
    }
}

#[test]
fn two_losses_are_the_same_bits() {
    let shape = LossShape { norm_pix_loss: true, ..shape(9, 3, [32, 32], [16, 16], 3) };
    let inputs = Inputs::new(shape, 5);
    let mut all = Vec::new();
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<bf16>::new(device.stream());
        all.push(run(&Bench { backend: &device, shift: 0 }, shape, &inputs, true));
    }
    assert!(all.iter().all(|losses| *losses == all[0]));
}

#[test]
fn a_flat_patch_has_a_target_of_almost_zero() {
    let shape = LossShape { norm_pix_loss: true, ..shape(1, 3, [32, 32], [16, 16], 2) };
    let mut inputs = Inputs::new(shape, 5);
    inputs.bytes.fill(200);
    inputs.floats.fill(0.7);
    inputs.mask.fill(1.0);
    let Some(device) = device(0) else { return };
    let device = Cuda::<f32>::new(device.stream());
    // Bytes have another value in each channel, so only floats are flat.
    let [_, patch_loss, _] = run(&Bench { backend: &device, shift: 0 }, shape, &inputs, false);
    let (patches, _) = inputs.prediction.as_chunks::<768>();
    for (found, prediction) in patch_loss.iter().zip(patches) {
        // The variance is 1e-6 and rounding: what is left of the target is a thousand times the mean's last place.
        let expected = prediction.iter().map(|value| value * value).sum::<f64>() / 768.0;
        assert!((found - expected).abs() < 1e-3, "{found} instead of {expected}");
    }
}

#[test]
fn an_id_that_is_no_patch_gives_nan() {
    let shape = shape(1, 3, [32, 32], [16, 16], 3);
    let mut inputs = Inputs::new(shape, 1);
    inputs.ids[1] = 4;
    inputs.mask.fill(1.0);
    let Some(device) = device(2) else { return };
    let device = Cuda::<bf16>::new(device.stream());
    let [loss, patch_loss, dprediction] = run(&Bench { backend: &device, shift: 0 }, shape, &inputs, true);
    assert!(loss[0].is_nan() && patch_loss[1].is_nan());
    assert!(patch_loss[0].is_finite() && patch_loss[2].is_finite());
    for (row, gradient) in dprediction.as_chunks::<768>().0.iter().enumerate() {
        assert!(gradient.iter().all(|value| value.is_nan() == (row == 1)));
    }
}

#[test]
fn loss_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = shape(2, 3, [32, 32], [16, 16], 3);
    let floats = |len| stream.zeros::<f32>(len).expect("reserved");
    let (mut loss, mut patch_loss, mut dprediction) = (floats(1), floats(6), floats(6 * 768));
    let (prediction, pixels, mask) = (floats(6 * 768), floats(2 * 3 * 32 * 32), floats(8));
    let ids = stream.zeros::<u32>(6).expect("reserved");
    let mut run = |shape| {
        let mut output = LossOutput {
            loss: loss.as_mut_slice(),
            patch_loss: patch_loss.as_mut_slice(),
            dprediction: dprediction.as_mut_slice(),
        };
        let input = LossInput { prediction: prediction.as_slice(), ids: ids.as_slice(), mask: mask.as_slice() };
        loss_forward_backward_f32(&stream, &mut output, &input, &pixels.as_slice(), shape)
    };
    run(good).expect("no fault");
    let mut refused = |shape| {
        let error = run(shape).expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    let with = |image| LossShape { image, ..good };
    assert!(refused(with(ImageShape { patch_width: 15, ..good.image })).contains("image width modulo patch width"));
    assert!(refused(with(ImageShape { patch_height: 0, ..good.image })).contains("patch height is 0"));
    assert!(refused(with(ImageShape { channels: 1, ..good.image })).contains("length of pixels"));
    assert!(refused(LossShape { predicted: 4, ..good }).contains("length of ids is 6, expected 8"));
    assert!(refused(LossShape { batch: usize::MAX, ..good }).contains("number of rows"));
}
