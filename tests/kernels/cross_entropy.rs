//! Softmax cross-entropy against the CPU in f64.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{CrossEntropy, CrossEntropyShape};

use super::emulated::cross_entropy::{CrossEntropyOutput, cross_entropy_forward_backward};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, device};
use super::reference::{Bench, close, close_masters, random};

/// Loss (on top of 0.25), row losses and gradient.
fn run<B: CrossEntropy>(
    bench: &Bench<'_, B>,
    shape: CrossEntropyShape,
    logits: &[f64],
    labels: &[u32],
) -> [Vec<f64>; 3] {
    let (mut loss, mut row_loss) = (bench.masters(&[0.25]), bench.masters(&vec![f64::NAN; shape.rows]));
    let mut dlogits = bench.poisoned(shape.rows * shape.classes);
    let (logits, labels) = (bench.elements(logits), bench.ids(labels));
    bench
        .backend
        .cross_entropy_forward_backward(shape, &mut loss, &mut row_loss, &mut dlogits, &logits, &labels)
        .expect("no fault");
    [bench.read_masters(&loss), bench.read_masters(&row_loss), bench.read(&dlogits)]
}

fn labels(shape: CrossEntropyShape) -> Vec<u32> {
    (0..shape.rows as u32).map(|row| (row * 7 + 3) % shape.classes as u32).collect()
}

fn check<E: CudaElement>(device: &Cuda<E>, shape: CrossEntropyShape, shift: usize) {
    let logits: Vec<f64> = random(1, shape.rows * shape.classes).into_iter().map(|x| 8.0 * x).collect();
    let labels = labels(shape);
    let [loss, row_loss, dlogits] = run(&Bench { backend: device, shift }, shape, &logits, &labels);
    let expected = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &logits, &labels);
    let what = format!("{shape:?}, shift {shift}");
    close_masters(&format!("loss, {what}"), &loss, &expected[0]);
    close_masters(&format!("row loss, {what}"), &row_loss, &expected[1]);
    close::<Cuda<E>>(&format!("gradient, {what}"), &dlogits, &expected[2], 2.0);
}

#[test]
fn cross_entropy_agrees_with_the_cpu() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (single, half) = (Cuda::<f32>::new(device.stream()), Cuda::<bf16>::new(device.stream()));
        for (rows, classes) in [(1, 1), (5, 10), (3, 33), (9, 264), (2, 1000), (2, 1001)] {
            for smoothing in [0.0, 0.1] {
                let shape = CrossEntropyShape { rows, classes, smoothing, scale: 0.3 };
                for shift in [0, 1] {
                    check(&single, shape, shift);
                    check(&half, shape, shift);
                }
            }
        }
        // Hundreds of rows: the sum of their losses takes several rounds.
        check(&single, CrossEntropyShape { rows: 1100, classes: 3, smoothing: 0.1, scale: 1e-3 }, 0);
    }
}

#[test]
fn cross_entropy_takes_extreme_logits_on_the_device() {
    let shape = CrossEntropyShape { rows: 3, classes: 40, smoothing: 0.0, scale: 1.0 };
    let mut logits = vec![-1e4; 120];
    // Far ahead; far behind; infinitely far behind, all of what some lanes see.
    logits[7] = 1e4;
    logits[40..80].fill(1e4);
    logits[44] = -1e4;
    logits[80..120].fill(f64::NEG_INFINITY);
    logits[82..84].fill(3.0);
    let labels = [7, 4, 2];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<f32>::new(device.stream());
        let [_, row_loss, dlogits] = run(&Bench { backend: &device, shift: 0 }, shape, &logits, &labels);
        let expected = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &logits, &labels);
        close_masters("row loss", &row_loss, &expected[1]);
        close::<Cuda<f32>>("gradient", &dlogits, &expected[2], 2.0);
    }
}

#[test]
fn a_label_that_is_no_class_gives_nan() {
    let Some(device) = device(2) else { return };
    let device = Cuda::<bf16>::new(device.stream());
    let shape = CrossEntropyShape { rows: 3, classes: 8, smoothing: 0.1, scale: 1.0 };
    let [loss, row_loss, dlogits] =
        run(&Bench { backend: &device, shift: 0 }, shape, &random(1, 24), &[0, 8, u32::MAX]);
    assert!(loss[0].is_nan());
    assert_eq!(row_loss.iter().map(|loss| loss.is_nan()).collect::<Vec<_>>(), [false, true, true]);
    assert!(dlogits.iter().enumerate().all(|(index, value)| value.is_nan() == (index >= 8)));
}

#[test]
fn cross_entropy_refuses_other_lengths() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let floats = |len| stream.zeros::<f32>(len).expect("reserved");
    let (mut loss, mut row_loss, mut dlogits, logits) = (floats(1), floats(2), floats(6), floats(6));
    let labels = stream.zeros::<u32>(2).expect("reserved");
    let mut run = |shape| {
        let mut output = CrossEntropyOutput {
            loss: loss.as_mut_slice(),
            row_loss: row_loss.as_mut_slice(),
            dlogits: dlogits.as_mut_slice(),
        };
        cross_entropy_forward_backward(&stream, &mut output, &logits.as_slice(), &labels.as_slice(), shape)
    };
    let good = CrossEntropyShape { rows: 2, classes: 3, smoothing: 0.1, scale: 1.0 };
    run(good).expect("no fault");
    let mut refused = |shape| {
        let error = run(shape).expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(refused(CrossEntropyShape { classes: 0, ..good }).contains("classes is 0"));
    assert!(refused(CrossEntropyShape { classes: 4, ..good }).contains("length of logits is 6, expected 8"));
    assert!(refused(CrossEntropyShape { rows: 1, classes: 6, ..good }).contains("length of row_loss is 2, expected 1"));
    assert!(refused(CrossEntropyShape { rows: usize::MAX, ..good }).contains("rows"));
}
