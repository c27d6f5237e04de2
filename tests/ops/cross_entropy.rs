use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{CrossEntropy, CrossEntropyShape, Memory};

use crate::support::{buffer, check_gradient, close, plain, poisoned, random, read, same_on_any_threads, tolerance};

/// Loss (added to 0.25), loss of each row, gradient.
fn run<F: Float>(shape: CrossEntropyShape, logits: &[f64], labels: &[u32]) -> [Vec<f64>; 3] {
    let (logits, labels) = (buffer::<F>(logits), plain(labels, 0));
    same_on_any_threads(|| {
        let mut loss = buffer::<F>(&[0.25]);
        let (mut row_loss, mut dlogits) = (poisoned(shape.rows), poisoned(shape.rows * shape.classes));
        Cpu::new()
            .cross_entropy_forward_backward(shape, &mut loss, &mut row_loss, &mut dlogits, &logits, &labels)
            .unwrap();
        [read(&loss), read(&row_loss), read(&dlogits)]
    })
}

/// By the definition: the loss and the gradient of each row.
fn naive(shape: CrossEntropyShape, logits: &[f64], labels: &[u32]) -> (Vec<f64>, Vec<f64>) {
    let CrossEntropyShape { classes, smoothing, scale, .. } = shape;
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &label) in logits.chunks(classes).zip(labels) {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        let mut loss = 0.0;
        for (class, x) in row.iter().enumerate() {
            let hit = if class == label as usize { 1.0 - smoothing } else { 0.0 };
            let target = hit + smoothing / classes as f64;
            loss -= target * (x - largest - sum.ln());
            gradient.push(scale * ((x - largest).exp() / sum - target));
        }
        losses.push(loss);
    }
    (losses, gradient)
}

fn labels(shape: CrossEntropyShape) -> Vec<u32> {
    (0..shape.rows as u32).map(|row| (row * 7 + 3) % shape.classes as u32).collect()
}

#[test]
fn cross_entropy_agrees_with_its_definition() {
    for (rows, classes) in [(1, 1), (1, 2), (5, 10), (3, 33), (20, 100), (2, 1001)] {
        for smoothing in [0.0, 0.1, 1.0] {
            let shape = CrossEntropyShape { rows, classes, smoothing, scale: 0.3 };
            let logits: Vec<f64> = random(1, rows * classes).iter().map(|x| 4.0 * x).collect();
            let labels = labels(shape);
            let (losses, gradient) = naive(shape, &logits, &labels);
            let loss = 0.25 + 0.3 * losses.iter().sum::<f64>();
            fn hold<F: Float>(found: [Vec<f64>; 3], loss: f64, losses: &[f64], gradient: &[f64]) {
                close("loss", &found[0], &[loss], tolerance::<F>(gradient.len()));
                close("row loss", &found[1], losses, tolerance::<F>(gradient.len()));
                close("gradient", &found[2], gradient, tolerance::<F>(4));
            }
            hold::<f64>(run::<f64>(shape, &logits, &labels), loss, &losses, &gradient);
            hold::<f32>(run::<f32>(shape, &logits, &labels), loss, &losses, &gradient);
        }
    }
}

#[test]
fn cross_entropy_gradient_agrees_with_differences() {
    let shape = CrossEntropyShape { rows: 3, classes: 7, smoothing: 0.2, scale: 0.5 };
    let (logits, labels) = (random(2, 21), labels(shape));
    let [_, _, gradient] = run::<f64>(shape, &logits, &labels);
    check_gradient("logits", &logits, &gradient, |logits| run::<f64>(shape, logits, &labels)[0][0]);
}

/// `torch.nn.functional.cross_entropy(x, y, label_smoothing=s)` in f64 (torch 2.x).
#[test]
fn cross_entropy_agrees_with_pytorch() {
    let logits = [1.0, -2.0, 0.5, 3.0, 0.25, 0.25, -1.5, -0.75, 20.0, -30.0, 4.0, 19.0];
    let expected = [
        (0.0, [2.7022534476793516, 0.9328148080891754, 50.31326176978803], PLAIN),
        (0.1, [2.689753447679352, 1.0015648080891755, 46.98826176978803], SMOOTHED),
    ];
    for (smoothing, losses, gradient) in expected {
        let shape = CrossEntropyShape { rows: 3, classes: 4, smoothing, scale: 1.0 / 3.0 };
        let [loss, row_loss, dlogits] = run::<f64>(shape, &logits, &[2, 0, 1]);
        close("loss", &loss, &[0.25 + losses.iter().sum::<f64>() / 3.0], 1e-14);
        close("row loss", &row_loss, &losses, 1e-14);
        close("gradient", &dlogits, &gradient, 1e-14);
    }
}

const PLAIN: [f64; 12] = [
    0.03685125012057974,
    0.001834715709194557,
    -0.3109819202864628,
    0.2722959544566885,
    -0.20218510700548487,
    0.13114822632784845,
    0.02279014446552171,
    0.04824673621211473,
    0.2436861728286544,
    -0.3333333333333333,
    2.74232660359402e-08,
    0.0896471330814129,
];

const SMOOTHED: [f64; 12] = [
    0.028517916787246415,
    -0.006498617624138776,
    -0.28598192028646285,
    0.2639626211233553,
    -0.17718510700548487,
    0.12281489299451515,
    0.014456811132188385,
    0.03991340287878141,
    0.23535283949532115,
    -0.30833333333333335,
    -0.008333305910067297,
    0.08131379974807959,
];

#[test]
fn cross_entropy_takes_extreme_logits() {
    let shape = CrossEntropyShape { rows: 3, classes: 3, smoothing: 0.0, scale: 1.0 };
    let logits = [1e4, -1e4, 0.0, -1e4, 1e4, 1e4, f64::NEG_INFINITY, 3.0, 3.0];
    let [_, row_loss, dlogits] = run::<f32>(shape, &logits, &[0, 0, 1]);
    close("row loss", &row_loss, &[0.0, 2e4 + 2f64.ln(), 2f64.ln()], 1e-6);
    close("gradient", &dlogits, &[0.0, 0.0, 0.0, -1.0, 0.5, 0.5, 0.0, -0.5, 0.5], 1e-6);
}

#[test]
fn cross_entropy_refuses_what_does_not_fit() {
    let shape = CrossEntropyShape { rows: 2, classes: 3, smoothing: 0.1, scale: 1.0 };
    let zeros = |length| Cpu::<f32>::new().buffer::<f32>(length).unwrap();
    let run = |shape, row_loss: usize, logits: usize, labels: &[u32]| {
        let (mut loss, mut row_loss) = (buffer(&[0.0]), zeros(row_loss));
        let (logits, labels) = (zeros(logits), plain(labels, 0));
        Cpu::new().cross_entropy_forward_backward(shape, &mut loss, &mut row_loss, &mut zeros(6), &logits, &labels)
    };
    assert!(run(shape, 2, 6, &[0, 2]).is_ok());
    assert!(run(shape, 1, 6, &[0, 2]).is_err());
    assert!(run(shape, 2, 5, &[0, 2]).is_err());
    assert!(run(shape, 2, 6, &[0, 3]).is_err());
    assert!(run(CrossEntropyShape { classes: 0, ..shape }, 2, 6, &[0, 0]).is_err());
    assert!(run(CrossEntropyShape { rows: usize::MAX, ..shape }, 2, 6, &[0, 0]).is_err());
}
