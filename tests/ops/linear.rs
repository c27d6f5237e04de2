use vitmae::cpu::{Cpu, CpuBuffer, Float};
use vitmae::ops::{Activation, Linear, LinearShape, Write};

use crate::support::{buffer, check_gradient, close, dot, poisoned, random, read, same_on_any_threads, tolerance};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::QuickGelu];

/// Sizes around the blocks of the implementation and far from them.
const SIZES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (2, 3, 5),
    (6, 16, 16),
    (7, 17, 33),
    (1, 768, 40),
    (50, 64, 192),
    (17, 8, 10),
    (65, 80, 128),
    (97, 257, 31),
    (130, 300, 65),
    (3, 1100, 9),
    (300, 40, 513),
    (197, 128, 100),
    (5, 513, 385),
    (0, 4, 4),
];

/// `f(i, j)` for all rows and columns.
fn matrix(rows: usize, columns: usize, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..rows * columns).map(|index| f(index / columns, index % columns)).collect()
}

fn shape((rows, inputs, outputs): (usize, usize, usize)) -> LinearShape {
    LinearShape { rows, inputs, outputs }
}

/// Random x, weight, bias, and something of the size of y.
fn inputs(shape: LinearShape, seed: u64) -> [Vec<f64>; 4] {
    let LinearShape { rows, inputs, outputs } = shape;
    [
        random(seed, rows * inputs),
        random(seed + 1, outputs * inputs),
        random(seed + 2, outputs),
        random(seed + 3, rows * outputs),
    ]
}

fn naive_forward(shape: LinearShape, x: &[f64], weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let n = shape.inputs;
    matrix(shape.rows, shape.outputs, |i, j| {
        dot(&x[i * n..][..n], &weight[j * n..][..n]) + bias.map_or(0.0, |bias| bias[j])
    })
}

fn naive_activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => 0.5 * x * erfc(-x / 2.0_f64.sqrt()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// The complementary error function by its power series or its continued fraction.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - std::f64::consts::FRAC_2_SQRT_PI * sum;
    }
    let fraction = (1..200).rev().fold(0.0, |rest, n| f64::from(n) / 2.0 / (x + rest));
    (-x * x).exp() / ((x + fraction) * std::f64::consts::PI.sqrt())
}

fn all_forward<F: Float>(size: (usize, usize, usize)) {
    let shape = shape(size);
    let [x, weight, bias, residual] = inputs(shape, 10);
    let (x_, weight_, bias_, residual_) =
        (buffer::<F>(&x), buffer::<F>(&weight), buffer::<F>(&bias), buffer::<F>(&residual));
    let length = shape.rows * shape.outputs;
    let with_bias = naive_forward(shape, &x, &weight, Some(&bias));
    let tolerance = tolerance::<F>(shape.inputs);
    let run = |op: &(dyn Fn(&mut CpuBuffer<F>) -> vitmae::Result<()> + Sync)| {
        same_on_any_threads(|| {
            let mut y = poisoned::<F>(length);
            op(&mut y).unwrap();
            read(&y)
        })
    };
    let y = run(&|y| Cpu::new().linear_forward(shape, y, &x_, &weight_, None));
    close("y", &y, &naive_forward(shape, &x, &weight, None), tolerance);
    let y = run(&|y| Cpu::new().linear_forward(shape, y, &x_, &weight_, Some(&bias_)));
    close("y + bias", &y, &with_bias, tolerance);
    let y = run(&|y| Cpu::new().linear_residual_forward(shape, y, &residual_, &x_, &weight_, Some(&bias_)));
    let expected: Vec<f64> = with_bias.iter().zip(&residual).map(|(y, residual)| y + residual).collect();
    close("residual", &y, &expected, tolerance);
    let (pre, y) = same_on_any_threads(|| {
        let (mut y, mut pre) = (poisoned::<F>(length), poisoned::<F>(length));
        let activation = Activation::Gelu;
        Cpu::new().linear_activation_forward(shape, activation, &mut y, &mut pre, &x_, &weight_, Some(&bias_)).unwrap();
        (read(&pre), read(&y))
    });
    close("pre", &pre, &with_bias, tolerance);
    let expected: Vec<f64> = with_bias.iter().map(|&x| naive_activation(Activation::Gelu, x)).collect();
    close("activated", &y, &expected, tolerance.max(1e-11) * 2.0);
}

fn all_backward<F: Float>(size: (usize, usize, usize)) {
    let shape = shape(size);
    let LinearShape { rows, inputs: n, outputs } = shape;
    let [x, weight, bias, dy] = inputs(shape, 20);
    let (pre, before) = (random(30, rows * n), random(32, n));
    let (x_, weight_, dy_, pre_) = (buffer::<F>(&x), buffer::<F>(&weight), buffer::<F>(&dy), buffer::<F>(&pre));
    let dx = matrix(rows, n, |i, j| (0..outputs).map(|k| dy[i * outputs + k] * weight[k * n + j]).sum());
    let tolerance_x = tolerance::<F>(outputs);
    let found = same_on_any_threads(|| {
        let mut dx = poisoned::<F>(rows * n);
        Cpu::new().linear_backward_input(shape, Write::Assign, &mut dx, &dy_, &weight_).unwrap();
        read(&dx)
    });
    close("dx", &found, &dx, tolerance_x);
    let found = same_on_any_threads(|| {
        let mut dx = buffer::<F>(&pre);
        Cpu::new().linear_backward_input(shape, Write::Accumulate, &mut dx, &dy_, &weight_).unwrap();
        read(&dx)
    });
    let expected: Vec<f64> = dx.iter().zip(&pre).map(|(dx, old)| dx + old).collect();
    close("dx accumulated", &found, &expected, tolerance_x);
    for activation in ACTIVATIONS {
        let found = same_on_any_threads(|| {
            let mut dpre = poisoned::<F>(rows * n);
            Cpu::new().linear_activation_backward_input(shape, activation, &mut dpre, &dy_, &weight_, &pre_).unwrap();
            read(&dpre)
        });
        let slope = |x: f64| {
            if activation == Activation::Relu {
                return f64::from(u8::from(x > 0.0));
            }
            let at = |x| naive_activation(activation, x);
            (8.0 * (at(x + 1e-4) - at(x - 1e-4)) - (at(x + 2e-4) - at(x - 2e-4))) / 12e-4
        };
        let expected: Vec<f64> = dx.iter().zip(&pre).map(|(dx, &pre)| dx * slope(pre)).collect();
        close("dpre", &found, &expected, tolerance_x.max(1e-9) * 4.0);
        let [found, y, dbias] = same_on_any_threads(|| {
            let (mut dpre, mut y, mut dbias) = (poisoned::<F>(rows * n), poisoned::<F>(rows * n), buffer::<F>(&before));
            let sums = Some(&mut dbias);
            Cpu::new()
                .linear_activation_backward(shape, activation, &mut dpre, &mut y, sums, &dy_, &weight_, &pre_)
                .unwrap();
            [read(&dpre), read(&y), read(&dbias)]
        });
        close("dpre, with y and dbias", &found, &expected, tolerance_x.max(1e-9) * 4.0);
        let expected_y: Vec<f64> = pre.iter().map(|&pre| naive_activation(activation, pre)).collect();
        close("y again", &y, &expected_y, tolerance_x.max(1e-9) * 4.0);
        let sum = |j: usize| before[j] + (0..rows).map(|i| expected[i * n + j]).sum::<f64>();
        let expected: Vec<f64> = (0..n).map(sum).collect();
        close("dbias of the layer before", &dbias, &expected, tolerance_x.max(1e-9) * 4.0 * rows as f64);
    }
    let tolerance_w = tolerance::<F>(rows);
    let old = random(31, outputs * n);
    let dweight =
        matrix(outputs, n, |i, j| old[i * n + j] + (0..rows).map(|k| dy[k * outputs + i] * x[k * n + j]).sum::<f64>());
    let dbias: Vec<f64> = (0..outputs).map(|i| bias[i] + (0..rows).map(|k| dy[k * outputs + i]).sum::<f64>()).collect();
    let (found, found_bias) = same_on_any_threads(|| {
        let (mut dweight, mut dbias) = (buffer::<F>(&old), buffer::<F>(&bias));
        Cpu::new().linear_backward_weight(shape, &mut dweight, Some(&mut dbias), &dy_, &x_).unwrap();
        (read(&dweight), read(&dbias))
    });
    close("dweight", &found, &dweight, tolerance_w);
    close("dbias", &found_bias, &dbias, tolerance_w);
    let found = same_on_any_threads(|| {
        let mut dweight = buffer::<F>(&old);
        Cpu::new().linear_backward_weight(shape, &mut dweight, None, &dy_, &x_).unwrap();
        read(&dweight)
    });
    close("dweight alone", &found, &dweight, tolerance_w);
}

#[test]
fn linear_forward_agrees_with_loops() {
    for size in SIZES {
        all_forward::<f32>(size);
        all_forward::<f64>(size);
    }
}

#[test]
fn linear_backward_agrees_with_loops() {
    for size in SIZES {
        all_backward::<f32>(size);
        all_backward::<f64>(size);
    }
}

#[test]
fn linear_agrees_with_loops_over_many_blocks() {
    all_forward::<f32>((403, 770, 390));
    all_backward::<f32>((403, 390, 300));
    all_backward::<f32>((1210, 70, 90));
}

/// Everything in one chain: `z = dot(weights, activation(x wᵀ + b) + residual)` against its gradients.
#[test]
fn linear_gradients_are_those_of_the_forward_pass() {
    for activation in ACTIVATIONS {
        let shape = LinearShape { rows: 5, inputs: 7, outputs: 6 };
        let [x, weight, bias, dz] = inputs(shape, 40);
        let cpu = Cpu::<f64>::new();
        let forward = |x: &[f64], weight: &[f64], bias: &[f64]| {
            let (mut y, mut pre) = (poisoned(30), poisoned(30));
            let (x, weight, bias) = (buffer(x), buffer(weight), buffer(bias));
            cpu.linear_activation_forward(shape, activation, &mut y, &mut pre, &x, &weight, Some(&bias)).unwrap();
            (dot(&read(&y), &dz), read(&pre))
        };
        let (_, pre) = forward(&x, &weight, &bias);
        // The derivative of the activation alone: through an identity matrix.
        let identity = matrix(6, 6, |i, j| f64::from(u8::from(i == j)));
        let square = LinearShape { rows: 5, inputs: 6, outputs: 6 };
        let mut dpre = poisoned(30);
        cpu.linear_activation_backward_input(
            square,
            activation,
            &mut dpre,
            &buffer(&dz),
            &buffer(&identity),
            &buffer(&pre),
        )
        .unwrap();
        let mut dx = poisoned(35);
        cpu.linear_backward_input(shape, Write::Assign, &mut dx, &dpre, &buffer(&weight)).unwrap();
        let (mut dweight, mut dbias) = (buffer(&[0.0; 42]), buffer(&[0.0; 6]));
        cpu.linear_backward_weight(shape, &mut dweight, Some(&mut dbias), &dpre, &buffer(&x)).unwrap();
        check_gradient("dx", &x, &read(&dx), |x| forward(x, &weight, &bias).0);
        check_gradient("dweight", &weight, &read(&dweight), |weight| forward(&x, weight, &bias).0);
        check_gradient("dbias", &bias, &read(&dbias), |bias| forward(&x, &weight, bias).0);
        let mut y = poisoned(30);
        cpu.activation_forward(30, activation, &mut y, &buffer(&pre)).unwrap();
        assert_eq!(dot(&read(&y), &dz), forward(&x, &weight, &bias).0);
    }
}

#[test]
fn linear_residual_gradients_are_those_of_the_forward_pass() {
    let shape = LinearShape { rows: 5, inputs: 7, outputs: 6 };
    let [x, weight, bias, dz] = inputs(shape, 60);
    let residual = random(64, 30);
    let cpu = Cpu::<f64>::new();
    let forward = |residual: &[f64], x: &[f64], weight: &[f64], bias: &[f64]| {
        let (residual, x, weight, bias) = (buffer(residual), buffer(x), buffer(weight), buffer(bias));
        let mut y = poisoned(30);
        cpu.linear_residual_forward(shape, &mut y, &residual, &x, &weight, Some(&bias)).unwrap();
        dot(&read(&y), &dz)
    };
    let mut dx = poisoned(35);
    cpu.linear_backward_input(shape, Write::Assign, &mut dx, &buffer(&dz), &buffer(&weight)).unwrap();
    let (mut dweight, mut dbias) = (buffer(&[0.0; 42]), buffer(&[0.0; 6]));
    cpu.linear_backward_weight(shape, &mut dweight, Some(&mut dbias), &buffer(&dz), &buffer(&x)).unwrap();
    // The residual's gradient is that of the output, which a stack hands on as it is.
    check_gradient("dresidual", &residual, &dz, |residual| forward(residual, &x, &weight, &bias));
    check_gradient("dx", &x, &read(&dx), |x| forward(&residual, x, &weight, &bias));
    check_gradient("dweight", &weight, &read(&dweight), |weight| forward(&residual, &x, weight, &bias));
    check_gradient("dbias", &bias, &read(&dbias), |bias| forward(&residual, &x, &weight, bias));
}

/// `z = dot(dy, activation(pre + bias) weightᵀ)`, whose gradients for `pre` and the layer before's bias come in one call.
#[test]
fn linear_activation_backward_has_the_gradients_of_the_forward_pass() {
    for activation in ACTIVATIONS {
        let shape = LinearShape { rows: 5, inputs: 7, outputs: 6 };
        let [pre, weight, _, dy] = inputs(shape, 70);
        let cpu = Cpu::<f64>::new();
        let forward = |pre: &[f64], bias: &[f64]| {
            let pre: Vec<f64> = pre.iter().enumerate().map(|(i, pre)| pre + bias[i % 7]).collect();
            let (mut activated, mut y) = (poisoned(35), poisoned(30));
            cpu.activation_forward(35, activation, &mut activated, &buffer(&pre)).unwrap();
            cpu.linear_forward(shape, &mut y, &activated, &buffer(&weight), None).unwrap();
            (dot(&read(&y), &dy), read(&activated))
        };
        let before = random(75, 7);
        let (mut dpre, mut y, mut dbias) = (poisoned(35), poisoned(35), buffer(&before));
        let (dy_, weight_, pre_) = (buffer(&dy), buffer(&weight), buffer(&pre));
        cpu.linear_activation_backward(shape, activation, &mut dpre, &mut y, Some(&mut dbias), &dy_, &weight_, &pre_)
            .unwrap();
        check_gradient("dpre", &pre, &read(&dpre), |pre| forward(pre, &[0.0; 7]).0);
        let added: Vec<f64> = read(&dbias).iter().zip(&before).map(|(after, before)| after - before).collect();
        check_gradient("dbias", &[0.0; 7], &added, |bias| forward(&pre, bias).0);
        close("y", &read(&y), &forward(&pre, &[0.0; 7]).1, 1e-14);
    }
}

/// Numbers of all sizes, at which f32 activations and their derivatives are held against f64.
fn wide() -> Vec<f64> {
    let mut values: Vec<f64> = (-40_000..40_000).map(|i| f64::from(i) * 3e-4 + 1.3e-5).collect();
    values.extend(random(50, 5000).iter().map(|x| x * 100.0));
    values.extend([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 1e18, -1e18]);
    values.into_iter().map(|value| f64::from(value as f32)).collect()
}

#[test]
fn activations_in_f32_are_accurate_everywhere() {
    let x = wide();
    for activation in ACTIVATIONS {
        let mut y = poisoned::<f32>(x.len());
        Cpu::new().activation_forward(x.len(), activation, &mut y, &buffer(&x)).unwrap();
        for (&x, y) in x.iter().zip(read(&y)) {
            let expected = naive_activation(activation, x);
            let error = (y - expected).abs() / x.abs().max(1.0);
            assert!(error < 5e-7, "{activation:?}({x}) = {y}, not {expected}");
        }
    }
}

#[test]
fn derivatives_of_activations_in_f32_are_accurate_everywhere() {
    let pre = wide();
    let shape = LinearShape { rows: pre.len(), inputs: 1, outputs: 1 };
    for activation in ACTIVATIONS {
        fn run<F: Float>(shape: LinearShape, activation: Activation, pre: &[f64]) -> Vec<f64> {
            let mut dpre = poisoned::<F>(pre.len());
            let (dy, one) = (buffer(&vec![1.0; pre.len()]), buffer(&[1.0]));
            Cpu::new().linear_activation_backward_input(shape, activation, &mut dpre, &dy, &one, &buffer(pre)).unwrap();
            read(&dpre)
        }
        let (single, double) = (run::<f32>(shape, activation, &pre), run::<f64>(shape, activation, &pre));
        for ((&x, single), double) in pre.iter().zip(single).zip(double) {
            let error = (single - double).abs() / x.abs().max(1.0);
            assert!(error < 5e-7, "{activation:?}'({x}) = {single}, not {double}");
        }
    }
}

#[test]
fn linear_refuses_short_buffers() {
    let cpu = Cpu::<f32>::new();
    let shape = LinearShape { rows: 100, inputs: 10, outputs: 20 };
    let (short, long) = (|| buffer::<f32>(&[1.0]), || buffer::<f32>(&[1.0; 2000]));
    assert!(cpu.linear_forward(shape, &mut short(), &long(), &long(), None).is_err());
    assert!(cpu.linear_forward(shape, &mut long(), &short(), &long(), None).is_err());
    assert!(cpu.linear_forward(shape, &mut long(), &long(), &short(), None).is_err());
    let message = cpu.linear_residual_forward(shape, &mut long(), &short(), &long(), &long(), None).unwrap_err();
    assert_eq!(
        message.to_string(),
        "linear_residual_forward: residual: expected at least [100, 20] elements, found 38"
    );
    assert!(cpu.linear_backward_input(shape, Write::Assign, &mut long(), &short(), &long()).is_err());
    assert!(cpu.linear_backward_weight(shape, &mut short(), None, &long(), &long()).is_err());
    let huge = LinearShape { rows: usize::MAX, inputs: 3, outputs: 3 };
    assert!(cpu.linear_forward(huge, &mut long(), &long(), &long(), None).is_err());
}
