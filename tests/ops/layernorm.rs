use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{LayerNorm, LayerNormShape, Write};

use crate::support::{buffer, check_gradient, close, dot, poisoned, random, read, same_on_any_threads, tolerance};

const EPSILON: f64 = 1e-6;

fn naive_forward(shape: LayerNormShape, x: &[f64], gamma: &[f64], beta: &[f64]) -> [Vec<f64>; 3] {
    let width = shape.width as f64;
    let [mut y, mut means, mut rstds] = [vec![], vec![], vec![]];
    for x in x.chunks(shape.width) {
        let mean = x.iter().sum::<f64>() / width;
        let rstd = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width + shape.epsilon).sqrt();
        y.extend((0..shape.width).map(|i| (x[i] - mean) * rstd * gamma[i] + beta[i]));
        means.push(mean);
        rstds.push(rstd);
    }
    [y, means, rstds]
}

fn forward<F: Float>(shape: LayerNormShape, x: &[f64], gamma: &[f64], beta: &[f64]) -> [Vec<f64>; 3] {
    let (x, gamma, beta) = (buffer(x), buffer(gamma), buffer(beta));
    same_on_any_threads(|| {
        let mut y = poisoned::<F>(shape.rows * shape.width);
        let (mut mean, mut rstd) = (poisoned(shape.rows), poisoned(shape.rows));
        Cpu::new().layernorm_forward(shape, &mut y, &mut mean, &mut rstd, &x, &gamma, &beta).unwrap();
        [read(&y), read(&mean), read(&rstd)]
    })
}

/// `dx`, `dgamma` and `dbeta`; the latter two on top of ones.
fn backward<F: Float>(
    shape: LayerNormShape,
    old: Option<&[f64]>,
    dy: &[f64],
    x: &[f64],
    gamma: &[f64],
) -> [Vec<f64>; 3] {
    let [_, mean, rstd] = naive_forward(shape, x, gamma, gamma);
    let (dy, x, gamma, mean, rstd) = (buffer(dy), buffer(x), buffer(gamma), buffer(&mean), buffer(&rstd));
    same_on_any_threads(|| {
        let (write, mut dx) = match old {
            Some(old) => (Write::Accumulate, buffer::<F>(old)),
            None => (Write::Assign, poisoned(shape.rows * shape.width)),
        };
        let ones = vec![1.0; shape.width];
        let (mut dgamma, mut dbeta) = (buffer(&ones), buffer(&ones));
        Cpu::new()
            .layernorm_backward(shape, write, &mut dx, &mut dgamma, &mut dbeta, &dy, &x, &mean, &rstd, &gamma)
            .unwrap();
        [read(&dx), read(&dgamma), read(&dbeta)]
    })
}

fn shapes() -> Vec<LayerNormShape> {
    let mut shapes = Vec::new();
    for (rows, width) in [
        (1, 1),
        (1, 8),
        (2, 10),
        (17, 16),
        (50, 40),
        (65, 64),
        (33, 80),
        (197, 128),
        (300, 7),
        (99, 33),
        (5, 768),
        (0, 8),
    ] {
        shapes.push(LayerNormShape { rows, width, epsilon: EPSILON });
    }
    shapes
}

#[test]
fn layernorm_forward_agrees_with_loops() {
    fn check<F: Float>(shape: LayerNormShape) {
        let x: Vec<f64> =
            random(1, shape.rows * shape.width).iter().map(|x| (3.0 * x + 0.5) as f32).map(f64::from).collect();
        let (gamma, beta) = (random(2, shape.width), random(3, shape.width));
        let found = forward::<F>(shape, &x, &gamma, &beta);
        let expected = naive_forward(shape, &x, &gamma, &beta);
        for (what, (found, expected)) in ["y", "mean", "rstd"].iter().zip(found.iter().zip(&expected)) {
            close(what, found, expected, 4.0 * tolerance::<F>(1));
        }
    }
    for shape in shapes() {
        check::<f32>(shape);
        check::<f64>(shape);
    }
}

#[test]
fn layernorm_backward_in_f32_agrees_with_f64_and_accumulates() {
    for shape in shapes() {
        let length = shape.rows * shape.width;
        let (x, dy, old, gamma) = (random(4, length), random(5, length), random(6, length), random(7, shape.width));
        let single = backward::<f32>(shape, None, &dy, &x, &gamma);
        let double = backward::<f64>(shape, None, &dy, &x, &gamma);
        // Two numbers that are close together make the reciprocal std, and with it all errors, large.
        let largest = naive_forward(shape, &x, &gamma, &gamma)[2].iter().fold(1.0, |a: f64, &b| a.max(b));
        for (what, (single, double)) in ["dx", "dgamma", "dbeta"].iter().zip(single.iter().zip(&double)) {
            close(what, single, double, largest * tolerance::<f32>(shape.rows));
        }
        let accumulated = backward::<f64>(shape, Some(&old), &dy, &x, &gamma);
        let expected: Vec<f64> = double[0].iter().zip(&old).map(|(dx, old)| dx + old).collect();
        close("accumulated", &accumulated[0], &expected, 1e-12);
    }
}

#[test]
fn layernorm_gradients_are_those_of_the_forward_pass() {
    for (rows, width) in [(1, 8), (3, 10), (40, 5), (2, 33)] {
        let shape = LayerNormShape { rows, width, epsilon: 1e-3 };
        let (x, dy) = (random(8, rows * width), random(9, rows * width));
        let (gamma, beta) = (random(10, width), random(11, width));
        let [dx, dgamma, dbeta] = backward::<f64>(shape, None, &dy, &x, &gamma);
        let less_one = |values: &[f64]| values.iter().map(|value| value - 1.0).collect::<Vec<_>>();
        check_gradient("dx", &x, &dx, |x| dot(&forward::<f64>(shape, x, &gamma, &beta)[0], &dy));
        check_gradient("dgamma", &gamma, &less_one(&dgamma), |gamma| {
            dot(&forward::<f64>(shape, &x, gamma, &beta)[0], &dy)
        });
        check_gradient("dbeta", &beta, &less_one(&dbeta), |beta| dot(&forward::<f64>(shape, &x, &gamma, beta)[0], &dy));
    }
}

#[test]
fn layernorm_of_a_large_offset_keeps_its_digits() {
    let shape = LayerNormShape { rows: 3, width: 768, epsilon: 1e-12 };
    let x: Vec<f64> = random(12, 3 * 768).iter().map(|x| f64::from((x + 300.0) as f32)).collect();
    let (gamma, beta) = (vec![1.0; 768], vec![0.0; 768]);
    let found = forward::<f32>(shape, &x, &gamma, &beta);
    close("y", &found[0], &naive_forward(shape, &x, &gamma, &beta)[0], 3e-4);
}

#[test]
fn layernorm_refuses_short_buffers() {
    let shape = LayerNormShape { rows: 100, width: 10, epsilon: EPSILON };
    let (short, long) = (|| buffer::<f32>(&[1.0]), || buffer::<f32>(&[1.0; 1000]));
    let cpu = Cpu::<f32>::new();
    let run = |y: &mut _, mean: &mut _, x: &_| cpu.layernorm_forward(shape, y, mean, &mut long(), x, &long(), &long());
    assert!(run(&mut long(), &mut long(), &long()).is_ok());
    assert!(run(&mut short(), &mut long(), &long()).is_err());
    assert!(run(&mut long(), &mut short(), &long()).is_err());
    assert!(run(&mut long(), &mut long(), &short()).is_err());
}
