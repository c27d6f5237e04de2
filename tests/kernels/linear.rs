//! Linear layers against the CPU backend in f64.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{Activation, Element, Linear, LinearShape, Memory, Write};

use super::emulated::linear::{activation_backward, bias_backward, bias_backward_scratch};
use super::emulated::{Cuda, CudaBuffer, CudaElement, SEEDS, device};
use super::reference::{ARITHMETIC, as_close_as_naive};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::QuickGelu];

/// `n` numbers with mean 0 and standard deviation 1 that look random; every call with another seed.
pub fn random(n: usize, seed: u32) -> Vec<f64> {
    let words = (0..n.div_ceil(4) as u32).flat_map(|block| rand_philox::philox4x32_10([block, 0, 0, 0], [seed, 11]));
    words.take(n).map(|word| (f64::from(word) / f64::from(u32::MAX) - 0.5) * 12f64.sqrt()).collect()
}

pub fn rounded<E: CudaElement>(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&value| E::from_f64(value).to_f64()).collect()
}

/// A buffer with poison before, after and, for an output, in it.
pub struct Padded<T: Element> {
    whole: CudaBuffer<T>,
    pub part: CudaBuffer<T>,
    shift: usize,
    length: usize,
}

const MARGIN: usize = 5;

impl<T: CudaElement> Padded<T> {
    /// Content that starts `shift` elements after an aligned address.
    pub fn new<E: CudaElement>(device: &Cuda<E>, values: &[f64], shift: usize) -> Self {
        let length = values.len();
        let mut all = vec![T::from_f64(f64::NAN); length + shift + MARGIN];
        all.iter_mut().skip(shift).zip(values).for_each(|(to, &value)| *to = T::from_f64(value));
        let mut whole = device.buffer(all.len()).expect("reserved");
        device.upload(&mut whole, &all).expect("uploaded");
        // SAFETY: the two are used one at a time.
        let part = unsafe { device.alias(&whole, shift, length) }.expect("inside");
        Self { whole, part, shift, length }
    }

    pub fn output<E: CudaElement>(device: &Cuda<E>, length: usize, shift: usize) -> Self {
        Self::new(device, &vec![f64::NAN; length], shift)
    }

    /// The content; the poison around it is still there.
    pub fn read<E: CudaElement>(&self, device: &Cuda<E>, what: &str) -> Vec<f64> {
        let mut all = vec![T::default(); self.length + self.shift + MARGIN];
        device.download(&mut all, &self.whole).expect("downloaded");
        let all: Vec<f64> = all.into_iter().map(T::to_f64).collect();
        let (before, rest) = all.split_at(self.shift);
        let (values, after) = rest.split_at(self.length);
        assert!(before.iter().chain(after).all(|value| value.is_nan()), "{what}: written outside");
        values.to_vec()
    }
}

/// The same content for the reference.
fn reference(values: &[f64]) -> <Cpu<f64> as Memory>::Buffer<f64> {
    let cpu = Cpu::<f64>::new();
    let mut buffer = cpu.buffer(values.len()).expect("reserved");
    cpu.upload(&mut buffer, values).expect("uploaded");
    buffer
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    // A NaN is larger than everything.
    values.fold(0.0, |most, value| if value <= most { most } else { value })
}

/// The error is at most `times` that of a naive computation in the same precision, plus a rounding of f32 sums.
#[track_caller]
fn assert_close(found: &[f64], naive: &[f64], exact: &[f64], times: f64, what: &str) {
    as_close_as_naive(what, [found, naive, exact], times, ARITHMETIC, 0.0);
}

/// Every op of a layer of one shape; buffers start `shift` elements after an aligned address.
fn check_layer<E: CudaElement>(device: &Cuda<E>, shape: LinearShape, activation: Activation, shift: usize) {
    let cpu = Cpu::<f64>::new();
    let LinearShape { rows, inputs, outputs } = shape;
    let what = |op: &str| format!("{op}, {}, {shape:?}, {activation:?}, shift {shift}", std::any::type_name::<E>());
    let element = |n, seed| rounded::<E>(&random(n, seed));
    let (x, weight, residual) = (element(rows * inputs, 1), element(outputs * inputs, 2), element(rows * outputs, 3));
    let (dy, pre_in) = (element(rows * outputs, 4), element(rows * inputs, 5));
    let bias: Vec<f64> = rounded::<f32>(&random(outputs, 6));
    let weight: Vec<f64> = rounded::<E>(&weight.iter().map(|w| w / (inputs as f64).sqrt()).collect::<Vec<_>>());
    let place = |values: &[f64]| Padded::<E>::new(device, values, shift);
    let (dx_, dweight_before, dbias_before) =
        (element(rows * inputs, 7), random(outputs * inputs, 8), random(outputs, 9));
    let (dweight_before, dbias_before) = (rounded::<f32>(&dweight_before), rounded::<f32>(&dbias_before));
    let on_device = (place(&x), place(&weight), place(&residual), place(&dy), place(&pre_in));
    let (x_d, weight_d, residual_d, dy_d, pre_d) =
        (&on_device.0.part, &on_device.1.part, &on_device.2.part, &on_device.3.part, &on_device.4.part);
    let bias_d = Padded::<f32>::new(device, &bias, shift);
    let (x_r, weight_r, bias_r) = (reference(&x), reference(&weight), reference(&bias));
    let bias_naive = reference(&rounded::<E>(&bias));
    let (residual_r, dy_r, pre_r) = (reference(&residual), reference(&dy), reference(&pre_in));
    let output = |length: usize| Padded::<E>::output(device, length, shift);
    let zeros = |length: usize| reference(&vec![0.0; length]);

    for bias in [true, false] {
        let what = |op: &str| format!("{}, bias {bias}", what(op));
        let (bias_d, bias_r) = (bias.then_some(&bias_d.part), bias.then_some(&bias_r));
        let bias_naive = bias.then_some(&bias_naive);
        let mut y = output(rows * outputs);
        device.linear_forward(shape, &mut y.part, x_d, weight_d, bias_d).expect("no fault");
        let (mut exact, mut naive) = (zeros(rows * outputs), zeros(rows * outputs));
        cpu.linear_forward(shape, &mut exact, &x_r, &weight_r, bias_r).expect("right");
        cpu.linear_forward(shape, &mut naive, &x_r, &weight_r, bias_naive).expect("right");
        let naive = rounded::<E>(&naive);
        assert_close(&y.read(device, "y"), &naive, &exact, 2.0, &what("linear_forward"));

        let mut y = output(rows * outputs);
        device.linear_residual_forward(shape, &mut y.part, residual_d, x_d, weight_d, bias_d).expect("no fault");
        let mut exact = zeros(rows * outputs);
        cpu.linear_residual_forward(shape, &mut exact, &residual_r, &x_r, &weight_r, bias_r).expect("right");
        let sums: Vec<f64> = naive.iter().zip(&residual).map(|(y, residual)| y + residual).collect();
        assert_close(&y.read(device, "y"), &rounded::<E>(&sums), &exact, 2.0, &what("linear_residual_forward"));

        let (mut y, mut pre) = (output(rows * outputs), output(rows * outputs));
        device
            .linear_activation_forward(shape, activation, &mut y.part, &mut pre.part, x_d, weight_d, bias_d)
            .expect("no fault");
        let (mut exact, mut exact_pre) = (zeros(rows * outputs), zeros(rows * outputs));
        cpu.linear_activation_forward(shape, activation, &mut exact, &mut exact_pre, &x_r, &weight_r, bias_r)
            .expect("right");
        assert_close(&pre.read(device, "pre"), &naive, &exact_pre, 2.0, &what("linear_activation_forward, pre"));
        let mut activated = zeros(rows * outputs);
        cpu.activation_forward(rows * outputs, activation, &mut activated, &reference(&naive)).expect("right");
        let activated = rounded::<E>(&activated);
        assert_close(&y.read(device, "y"), &activated, &exact, 2.0, &what("linear_activation_forward, y"));
    }

    let mut exact = zeros(rows * inputs);
    cpu.linear_backward_input(shape, Write::Assign, &mut exact, &dy_r, &weight_r).expect("right");
    let naive = rounded::<E>(&exact);
    let mut dx = output(rows * inputs);
    device.linear_backward_input(shape, Write::Assign, &mut dx.part, dy_d, weight_d).expect("no fault");
    assert_close(&dx.read(device, "dx"), &naive, &exact, 3.0, &what("linear_backward_input"));

    let mut dx = place(&dx_);
    device.linear_backward_input(shape, Write::Accumulate, &mut dx.part, dy_d, weight_d).expect("no fault");
    let mut exact_sum = reference(&dx_);
    cpu.linear_backward_input(shape, Write::Accumulate, &mut exact_sum, &dy_r, &weight_r).expect("right");
    let sums: Vec<f64> = naive.iter().zip(&dx_).map(|(dx, before)| dx + before).collect();
    let found = dx.read(device, "dx");
    assert_close(&found, &rounded::<E>(&sums), &exact_sum, 3.0, &what("linear_backward_input, accumulated"));

    let mut dpre = output(rows * inputs);
    device
        .linear_activation_backward_input(shape, activation, &mut dpre.part, dy_d, weight_d, pre_d)
        .expect("no fault");
    let mut exact = zeros(rows * inputs);
    cpu.linear_activation_backward_input(shape, activation, &mut exact, &dy_r, &weight_r, &pre_r).expect("right");
    let slopes = slopes(activation, &pre_in);
    let naive: Vec<f64> = naive.iter().zip(&slopes).map(|(dx, slope)| dx * slope).collect();
    let found = dpre.read(device, "dpre");
    assert_close(&found, &rounded::<E>(&naive), &exact, 3.0, &what("linear_activation_backward_input"));

    for bias in [true, false] {
        let what = |op: &str| format!("{}, bias {bias}", what(op));
        let (mut dpre, mut y) = (output(rows * inputs), output(rows * inputs));
        let bias_before = rounded::<f32>(&random(inputs, 10));
        let mut dbias = Padded::<f32>::new(device, &bias_before, shift);
        let dbias_d = bias.then_some(&mut dbias.part);
        device
            .linear_activation_backward(shape, activation, &mut dpre.part, &mut y.part, dbias_d, dy_d, weight_d, pre_d)
            .expect("no fault");
        let found = dpre.read(device, "dpre");
        assert_close(&found, &rounded::<E>(&naive), &exact, 3.0, &what("linear_activation_backward, dpre"));
        let mut exact_y = zeros(rows * inputs);
        cpu.activation_forward(rows * inputs, activation, &mut exact_y, &pre_r).expect("right");
        let naive_y = rounded::<E>(&exact_y);
        assert_close(&y.read(device, "y"), &naive_y, &exact_y, 2.0, &what("linear_activation_backward, y"));
        let sum = |matrix: &[f64], j: usize| (0..rows).map(|r| matrix[r * inputs + j]).sum::<f64>();
        let sums = |matrix: &[f64]| (0..inputs).map(|j| bias_before[j] + sum(matrix, j)).collect::<Vec<f64>>();
        let (exact_sums, naive_sums) = (sums(&exact), sums(&rounded::<E>(&naive)));
        let (exact_sums, naive_sums) =
            if bias { (exact_sums, naive_sums) } else { (bias_before.clone(), bias_before.clone()) };
        let found = dbias.read(device, "dbias");
        // A sum of few numbers may be exact by chance: allow the rounding of one of them.
        let unit = if size_of::<E>() == 2 { 1.0 / 256.0 } else { 2e-6 };
        let slack = unit * largest(exact.iter().map(|value| value.abs()));
        for ((found, naive), exact) in found.iter().zip(&naive_sums).zip(&exact_sums) {
            let (error, allowed) = ((found - exact).abs(), 3.0 * (naive - exact).abs() + slack * rows as f64);
            assert!(error <= allowed, "{}: {found}, expected {exact}", what("linear_activation_backward, dbias"));
        }
    }

    let mut dweight = Padded::<f32>::new(device, &dweight_before, shift);
    let mut dbias = Padded::<f32>::new(device, &dbias_before, shift);
    device.linear_backward_weight(shape, &mut dweight.part, Some(&mut dbias.part), dy_d, x_d).expect("no fault");
    let (mut exact, mut exact_bias) = (reference(&dweight_before), reference(&dbias_before));
    cpu.linear_backward_weight(shape, &mut exact, Some(&mut exact_bias), &dy_r, &x_r).expect("right");
    // Gradients are f32 whatever the factors are, so the naive computation is only the rounding of the sum.
    let found = dweight.read(device, "dweight");
    assert_close(&found, &rounded::<f32>(&exact), &exact, 3.0, &what("linear_backward_weight"));
    let found = dbias.read(device, "dbias");
    assert_close(&found, &rounded::<f32>(&exact_bias), &exact_bias, 3.0, &what("linear_backward_weight, bias"));
    // Once more without a bias: the same again.
    device.linear_backward_weight(shape, &mut dweight.part, None, dy_d, x_d).expect("no fault");
    cpu.linear_backward_weight(shape, &mut exact, None, &dy_r, &x_r).expect("right");
    let found = dweight.read(device, "dweight");
    assert_close(&found, &rounded::<f32>(&exact), &exact, 3.0, &what("linear_backward_weight, twice"));
}

/// The derivatives of an activation, from the reference: a layer with the identity as its weight.
fn slopes(activation: Activation, x: &[f64]) -> Vec<f64> {
    let cpu = Cpu::<f64>::new();
    let shape = LinearShape { rows: x.len(), inputs: 1, outputs: 1 };
    let (one, ones) = (reference(&[1.0]), reference(&vec![1.0; x.len()]));
    let mut slopes = reference(&vec![0.0; x.len()]);
    cpu.linear_activation_backward_input(shape, activation, &mut slopes, &ones, &one, &reference(x)).expect("right");
    slopes.to_vec()
}

fn shape(rows: usize, inputs: usize, outputs: usize) -> LinearShape {
    LinearShape { rows, inputs, outputs }
}

#[test]
fn linear_matches_cpu() {
    let shapes =
        [shape(1, 8, 8), shape(5, 24, 16), shape(50, 48, 40), shape(17, 20, 12), shape(3, 7, 5), shape(2, 1, 1)];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (half, full) = (Cuda::<bf16>::new(device.stream()), Cuda::<f32>::new(device.stream()));
        for (index, shape) in shapes.into_iter().enumerate() {
            // Both forms of GELU everywhere, the others in turn.
            for activation in [Activation::Gelu, Activation::GeluTanh, ACTIVATIONS[2 + index % 3]] {
                check_layer(&half, shape, activation, 0);
                check_layer(&full, shape, activation, 0);
            }
        }
        for shift in [1, 2, 8] {
            check_layer(&half, shapes[1], Activation::GeluTanh, shift);
            check_layer(&full, shapes[1], Activation::Gelu, shift);
        }
    }
}

/// Forward and backward of an activation on given numbers.
fn check_activation<E: CudaElement>(device: &Cuda<E>, activation: Activation, x: &[f64], shift: usize) {
    let cpu = Cpu::<f64>::new();
    let x = rounded::<E>(x);
    let what = format!("{activation:?}, {}, {} numbers, shift {shift}", std::any::type_name::<E>(), x.len());
    let pre = Padded::<E>::new(device, &x, shift);
    let mut y = Padded::<E>::output(device, x.len(), shift);
    device.activation_forward(x.len(), activation, &mut y.part, &pre.part).expect("no fault");
    let mut exact = reference(&vec![0.0; x.len()]);
    cpu.activation_forward(x.len(), activation, &mut exact, &reference(&x)).expect("right");
    let found = y.read(device, &what);
    // Each number by itself: one rounding to the element type, and 4e-7 of the argument for the function in f32.
    let unit = if size_of::<E>() == 2 { 1.0 / 256.0 } else { 1.0 / (1u32 << 24) as f64 };
    for ((&x, found), exact) in x.iter().zip(found).zip(exact.iter()) {
        let allowed = unit * exact.abs() + 4e-7 * x.abs() + 1e-37;
        assert!((found - exact).abs() <= allowed, "{what}: f({x}) is {found}, expected {exact}");
    }

    let gradients = rounded::<E>(&random(x.len(), 21));
    let mut dpre = Padded::<E>::new(device, &gradients, shift);
    activation_backward(device.stream(), &mut dpre.part.slice_mut(), &pre.part.slice(), activation).expect("no fault");
    let found = dpre.read(device, &what);
    let slopes = slopes(activation, &x);
    for (index, found) in found.into_iter().enumerate() {
        let (x, slope, gradient) = (x[index], slopes[index], gradients[index]);
        let allowed = gradient.abs() * (unit * slope.abs() + 1e-6) + 1e-37;
        let exact = gradient * slope;
        assert!((found - exact).abs() <= allowed, "{what}: {gradient} f'({x}) is {found}, expected {exact}");
    }
}

#[test]
fn activations_match_cpu_from_end_to_end() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (half, full) = (Cuda::<bf16>::new(device.stream()), Cuda::<f32>::new(device.stream()));
        // Several blocks with a tail; every tail; unaligned; nothing.
        let many: Vec<f64> = random(9011, 20).into_iter().map(|x| 3.0 * x).collect();
        let lengths = [0, 1, 3, 4, 7, 8, 9, 31, 257, 4096];
        for activation in ACTIVATIONS {
            check_activation(&half, activation, &many, 0);
            check_activation(&full, activation, &many, 0);
            if seed > 1 {
                continue;
            }
            for length in lengths {
                check_activation(&half, activation, &many[..length], 0);
                check_activation(&full, activation, &many[..length], 0);
            }
            check_activation(&half, activation, &many, 1);
            check_activation(&full, activation, &many[..5000], 3);
            // Far out, and close to zero.
            let far: Vec<f64> = (-40..=40).flat_map(|i| [f64::from(i) / 4.0, 250.0 * f64::from(i)]).collect();
            let near: Vec<f64> = (0..200).map(|i| 1e-6 * f64::from(i * i)).flat_map(|x| [x, -x]).collect();
            for numbers in [far, near] {
                check_activation(&half, activation, &numbers, 0);
                check_activation(&full, activation, &numbers, 0);
            }
        }
    }
}

#[test]
fn activations_keep_nan_and_infinity() {
    let Some(device) = device(0) else { return };
    let device = Cuda::<f32>::new(device.stream());
    for activation in ACTIVATIONS {
        let pre = Padded::<f32>::new(&device, &[f64::NAN, f64::INFINITY, 1e30, -1e30], 0);
        let mut y = Padded::<f32>::output(&device, 4, 0);
        device.activation_forward(4, activation, &mut y.part, &pre.part).expect("no fault");
        let y = y.read(&device, "y");
        // ReLU as a comparison keeps a NaN too.
        assert!(y[0].is_nan(), "{activation:?}: {y:?}");
        assert_eq!((y[1], y[2] as f32, y[3]), (f64::INFINITY, 1e30, 0.0), "{activation:?}");
    }
}

#[test]
fn bias_gradients_match_cpu_and_repeat_bitwise() {
    let cases = [(1, 8), (31, 40), (33, 264), (300, 520), (8200, 8), (64, 7), (129, 130), (10, 1)];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (half, full) = (Cuda::<bf16>::new(device.stream()), Cuda::<f32>::new(device.stream()));
        for (rows, columns) in cases {
            for shift in [0, 1] {
                check_bias::<bf16>(&half, rows, columns, shift);
                check_bias::<f32>(&full, rows, columns, shift);
            }
        }
    }
}

fn check_bias<E: CudaElement>(device: &Cuda<E>, rows: usize, columns: usize, shift: usize) {
    let what = format!("{rows} x {columns}, {}, shift {shift}", std::any::type_name::<E>());
    let dy = rounded::<E>(&random(rows * columns, 31));
    let before = rounded::<f32>(&random(columns, 32));
    let dy_d = Padded::<E>::new(device, &dy, shift);
    let run = || {
        let mut dbias = Padded::<f32>::new(device, &before, shift);
        let mut scratch = device.stream().uninitialised::<f32>(bias_backward_scratch(rows, columns)).expect("reserved");
        let mut scratch = scratch.as_mut_slice();
        bias_backward(device.stream(), &mut dbias.part.slice_mut(), &mut scratch, &dy_d.part.slice(), rows, columns)
            .expect("no fault");
        dbias.read(device, &what)
    };
    let found = run();
    let exact: Vec<f64> =
        (0..columns).map(|j| before[j] + (0..rows).map(|r| dy[r * columns + j]).sum::<f64>()).collect();
    let naive = rounded::<f32>(&exact);
    assert_close(&found, &naive, &exact, 3.0, &what);
    let again = run();
    assert!(found.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
}

#[test]
fn linear_refuses_short_buffers() {
    let Some(device) = device(0) else { return };
    let device = Cuda::<bf16>::new(device.stream());
    let buffer = |length| device.buffer::<bf16>(length).expect("reserved");
    let (x, weight, bias) = (buffer(12), buffer(20), device.buffer::<f32>(5).expect("reserved"));
    let mut y = buffer(15);
    let good = shape(3, 4, 5);
    device.linear_forward(good, &mut y, &x, &weight, Some(&bias)).expect("fits");
    device.linear_forward(shape(0, 4, 5), &mut y, &x, &weight, Some(&bias)).expect("no rows, no work");
    let mut refused = |shape: LinearShape| {
        let error = device.linear_forward(shape, &mut y, &x, &weight, Some(&bias)).expect_err("refused");
        error.to_string()
    };
    assert!(refused(shape(4, 4, 5)).contains("y"));
    assert!(refused(shape(3, 5, 5)).contains("x"));
    assert!(refused(shape(2, 4, 6)).contains("weight"));
    assert!(refused(shape(usize::MAX, 4, 5)).contains("y"));
}
