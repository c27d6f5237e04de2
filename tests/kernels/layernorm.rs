//! LayerNorm against the CPU in f64.

use std::collections::BTreeMap;

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{LayerNorm, LayerNormShape, Memory, Write};

use super::emulated::launch::Limits;
use super::emulated::layernorm::{LayerNormGradients, LayerNormSaved, layernorm_backward};
use super::emulated::layernorm::{LayerNormOutput, layernorm_backward_partials, layernorm_forward};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, Stream, device, kernels_folder};
use super::listing::Listing;
use super::reference::{Bench, close, close_masters, random};

fn shape(rows: usize, width: usize) -> LayerNormShape {
    LayerNormShape { rows, width, epsilon: 1e-6 }
}

/// Every path: registers of one to five units, full and not; rows read again by vectors; element by element.
const WIDTHS: [usize; 17] = [1, 7, 8, 40, 192, 200, 256, 384, 512, 520, 768, 1000, 1024, 1280, 1283, 1288, 1536];

/// Inputs of a LayerNorm.
struct Inputs {
    x: Vec<f64>,
    gamma: Vec<f64>,
    beta: Vec<f64>,
    dy: Vec<f64>,
    /// What dx holds before.
    old: Vec<f64>,
}

impl Inputs {
    fn new(shape: LayerNormShape, offset: f64) -> Self {
        let LayerNormShape { rows, width, .. } = shape;
        let near_one = |values: Vec<f64>| values.into_iter().map(|value| 1.0 + value / 2.0).collect();
        Self {
            x: random(1, rows * width).into_iter().map(|value| value + offset).collect(),
            gamma: near_one(random(2, width)),
            beta: random(3, width),
            dy: random(4, rows * width),
            old: random(5, rows * width),
        }
    }
}

/// `y`, `mean` and `rstd`.
fn forward<B: LayerNorm>(bench: &Bench<'_, B>, shape: LayerNormShape, inputs: &Inputs) -> [Vec<f64>; 3] {
    let mut y = bench.poisoned(shape.rows * shape.width);
    let [mut mean, mut rstd] = [(); 2].map(|()| bench.masters(&vec![f64::NAN; shape.rows]));
    let (x, gamma, beta) = (bench.elements(&inputs.x), bench.masters(&inputs.gamma), bench.masters(&inputs.beta));
    bench.backend.layernorm_forward(shape, &mut y, &mut mean, &mut rstd, &x, &gamma, &beta).expect("no fault");
    [bench.read(&y), bench.read_masters(&mean), bench.read_masters(&rstd)]
}

/// `dx`, `dgamma` and `dbeta`, the latter two on top of betas.
fn backward<B: LayerNorm>(
    bench: &Bench<'_, B>,
    shape: LayerNormShape,
    write: Write,
    inputs: &Inputs,
    statistics: &[Vec<f64>; 2],
) -> [Vec<f64>; 3] {
    let mut dx = match write {
        Write::Assign => bench.poisoned(shape.rows * shape.width),
        Write::Accumulate => bench.elements(&inputs.old),
    };
    let [mut dgamma, mut dbeta] = [(); 2].map(|()| bench.masters(&inputs.beta));
    let (dy, x, gamma) = (bench.elements(&inputs.dy), bench.elements(&inputs.x), bench.masters(&inputs.gamma));
    let [mean, rstd] = statistics.each_ref().map(|values| bench.masters(values));
    bench
        .backend
        .layernorm_backward(shape, write, &mut dx, &mut dgamma, &mut dbeta, &dy, &x, &mean, &rstd, &gamma)
        .expect("no fault");
    [bench.read(&dx), bench.read_masters(&dgamma), bench.read_masters(&dbeta)]
}

fn check_forward<E: CudaElement>(stream: &Stream, shape: LayerNormShape, shift: usize) {
    let inputs = Inputs::new(shape, 0.25);
    let [y, mean, rstd] = forward(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &inputs);
    let backend = Cuda::<E>::new(stream.clone());
    let found = forward(&Bench { backend: &backend, shift }, shape, &inputs);
    let what = format!("{shape:?}, shift {shift}, {} bytes", size_of::<E>());
    close::<Cuda<E>>(&format!("y, {what}"), &found[0], &y, 2.0);
    close_masters(&format!("mean, {what}"), &found[1], &mean);
    close_masters(&format!("rstd, {what}"), &found[2], &rstd);
}

fn check_backward<E: CudaElement>(stream: &Stream, shape: LayerNormShape, write: Write, shift: usize) {
    let inputs = Inputs::new(shape, 0.25);
    let reference = Bench { backend: &Cpu::<f64>::new(), shift: 0 };
    let [_, mean, rstd] = forward(&reference, shape, &inputs);
    // As the device holds them.
    let statistics = [mean, rstd].map(|values| values.into_iter().map(|value| f64::from(value as f32)).collect());
    let [dx, dgamma, dbeta] = backward(&reference, shape, write, &inputs, &statistics);
    let backend = Cuda::<E>::new(stream.clone());
    let bench = Bench { backend: &backend, shift };
    let found = backward(&bench, shape, write, &inputs, &statistics);
    let what = format!("{shape:?}, {write:?}, shift {shift}, {} bytes", size_of::<E>());
    close::<Cuda<E>>(&format!("dx, {what}"), &found[0], &dx, 3.0);
    close_masters(&format!("dgamma, {what}"), &found[1], &dgamma);
    close_masters(&format!("dbeta, {what}"), &found[2], &dbeta);
    // The scratch memory holds other numbers now.
    assert_eq!(found, backward(&bench, shape, write, &inputs, &statistics), "{what}: twice the same");
}

#[test]
fn layernorm_forward_matches_the_cpu_at_every_width() {
    for (seed, rows) in SEEDS.into_iter().zip([1, 5, 17, 34]) {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        for width in WIDTHS {
            check_forward::<bf16>(&stream, shape(rows, width), 0);
            check_forward::<f32>(&stream, shape(rows, width), 0);
        }
        check_forward::<bf16>(&stream, shape(3, 64), 1);
        check_forward::<f32>(&stream, shape(3, 64), 2);
        check_forward::<bf16>(&stream, shape(0, 64), 0);
    }
}

#[test]
fn layernorm_backward_matches_the_cpu_at_every_width() {
    // 16 blocks at most on the emulator: from 65 rows on, or 257 on the narrowest path, warps take more than one turn.
    for (seed, rows) in SEEDS.into_iter().zip([1, 5, 70, 2]) {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        for width in WIDTHS {
            check_backward::<bf16>(&stream, shape(rows, width), Write::Accumulate, 0);
            check_backward::<f32>(&stream, shape(rows, width), Write::Assign, 0);
        }
        for (rows, width) in [(300, 40), (197, 264), (3, 768)] {
            check_backward::<bf16>(&stream, shape(rows, width), Write::Assign, 0);
            check_backward::<f32>(&stream, shape(rows, width), Write::Accumulate, 0);
        }
        check_backward::<bf16>(&stream, shape(3, 64), Write::Accumulate, 1);
        check_backward::<f32>(&stream, shape(3, 64), Write::Assign, 2);
        check_backward::<bf16>(&stream, shape(0, 64), Write::Assign, 0);
    }
}

/// Blocks of each kernel that a multiprocessor of an architecture holds, by the report on what the compiler made of them.
fn blocks_at_once(architecture: &str) -> BTreeMap<String, u32> {
    let report = std::fs::read_to_string(kernels_folder().join("REPORT.md")).expect("kernels/REPORT.md");
    let mut blocks = BTreeMap::new();
    let (mut kernel, mut column) = ("", 0);
    for line in report.lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        if let Some(name) = line.strip_prefix("### ") {
            kernel = name.trim_matches('`');
        } else if cells.get(1) == Some(&"architecture") {
            column = cells.iter().position(|&cell| cell == "blocks, occupancy").expect("a column of blocks");
        } else if cells.get(1) == Some(&architecture) {
            let count = cells[column].split(',').next().expect("blocks, occupancy");
            blocks.insert(kernel.to_string(), count.parse().expect("a number of blocks"));
        }
    }
    blocks
}

/// Blocks per multiprocessor that the launcher gives to the backward kernel of a width, and the kernel's name.
fn blocks_launched<E: CudaElement>(width: usize) -> (String, u32) {
    let multiprocessors = 132;
    let listing = Listing::new(Limits { shared_bytes: 227 << 10, multiprocessors });
    let backend = Cuda::<E>::new(listing.stream());
    // More than fill the GPU on every path.
    let shape = shape(10_000, width);
    let matrix = || backend.buffer::<E>(shape.rows * width).expect("an address");
    let vector = |length| backend.buffer::<f32>(length).expect("an address");
    let (mut dx, dy, x, mean, rstd) = (matrix(), matrix(), matrix(), vector(shape.rows), vector(shape.rows));
    let (mut dgamma, mut dbeta, gamma) = (vector(width), vector(width), vector(width));
    backend
        .layernorm_backward(shape, Write::Assign, &mut dx, &mut dgamma, &mut dbeta, &dy, &x, &mean, &rstd, &gamma)
        .expect("launched");
    let mut kernels = listing.symbols().into_iter().filter(|symbol| symbol.starts_with("layernorm_backward_dx"));
    let symbol = kernels.next().expect("a kernel");
    let blocks = listing.grid(symbol).expect("launched").blocks;
    assert!(kernels.next().is_none() && blocks.is_multiple_of(multiprocessors), "{symbol}: {blocks} blocks");
    (symbol.to_string(), blocks / multiprocessors)
}

#[test]
fn a_backward_has_the_blocks_that_a_multiprocessor_holds() {
    // Tuned for sm_90a; elsewhere one more or less, which costs time and nothing else.
    let reports = [("sm_90a", 0), ("sm_80", 1), ("sm_86", 1), ("sm_89", 1), ("sm_100", 1), ("sm_120", 1)];
    for (architecture, slack) in reports {
        let held = blocks_at_once(architecture);
        for width in [1288, 256, 512, 768, 1024, 1280] {
            for (kernel, launched) in [blocks_launched::<f32>(width), blocks_launched::<bf16>(width)] {
                // The widest path needs few registers; more than four blocks make no more loads, only more partial sums.
                let expected = held.get(&kernel).unwrap_or_else(|| panic!("{kernel} is not in the report")).min(&4);
                assert!(
                    launched.abs_diff(*expected) <= slack,
                    "{kernel} on {architecture}: {launched}, not {expected}"
                );
            }
        }
    }
}

#[test]
fn layernorm_has_the_same_bits_in_every_order_of_threads() {
    fn outputs<E: CudaElement>(stream: Stream, shape: LayerNormShape) -> [Vec<f64>; 6] {
        let inputs = Inputs::new(shape, 0.25);
        let backend = Cuda::<E>::new(stream);
        let bench = Bench { backend: &backend, shift: 0 };
        let [y, mean, rstd] = forward(&bench, shape, &inputs);
        let statistics = [mean, rstd];
        let [dx, dgamma, dbeta] = backward(&bench, shape, Write::Accumulate, &inputs, &statistics);
        let [mean, rstd] = statistics;
        [y, mean, rstd, dx, dgamma, dbeta]
    }
    for (rows, width) in [(5, 768), (70, 264)] {
        let mut first = None;
        for seed in SEEDS {
            let Some(device) = device(seed) else { return };
            let (stream, shape) = (device.stream(), shape(rows, width));
            check_forward::<bf16>(&stream, shape, 0);
            check_backward::<bf16>(&stream, shape, Write::Accumulate, 0);
            check_forward::<f32>(&stream, shape, 0);
            check_backward::<f32>(&stream, shape, Write::Accumulate, 0);
            let found = (outputs::<bf16>(stream.clone(), shape), outputs::<f32>(stream, shape));
            assert!(*first.get_or_insert(found.clone()) == found, "{shape:?}, seed {seed}");
        }
    }
}

#[test]
fn a_large_mean_costs_no_digits_of_the_variance() {
    let Some(device) = device(0) else { return };
    let backend = Cuda::<f32>::new(device.stream());
    for width in [384, 1283, 1536] {
        let shape = shape(3, width);
        // The mean of squares less the square of the mean would be off by several percent here.
        let inputs = Inputs::new(shape, 1000.0);
        let [y, ..] = forward(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &inputs);
        let [found, ..] = forward(&Bench { backend: &backend, shift: 0 }, shape, &inputs);
        let worst = found.iter().zip(&y).fold(0.0, |worst: f64, (found, y)| worst.max((found - y).abs()));
        assert!(worst < 1e-3, "{width}: {worst}");
    }
}

#[test]
fn a_constant_row_is_beta() {
    let Some(device) = device(0) else { return };
    let backend = Cuda::<bf16>::new(device.stream());
    let shape = LayerNormShape { rows: 2, width: 96, epsilon: 1e-12 };
    let mut inputs = Inputs::new(shape, 0.0);
    inputs.x.fill(0.5);
    let [y, mean, rstd] = forward(&Bench { backend: &backend, shift: 0 }, shape, &inputs);
    assert!(y.chunks(96).all(|y| y == inputs.beta));
    assert_eq!(mean, [0.5; 2]);
    close_masters("rstd", &rstd, &[1e6; 2]);
}

#[test]
fn layernorm_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = shape(6, 32);
    let matrix = || stream.zeros::<f32>(6 * 32).expect("reserved");
    let vector = |len| stream.zeros::<f32>(len).expect("reserved");
    let (x, gamma, beta) = (matrix(), vector(32), vector(32));
    let (mut y, mut mean, mut rstd) = (matrix(), vector(6), vector(6));
    let mut refused = |shape: LayerNormShape| {
        let mut output = LayerNormOutput { y: y.as_mut_slice(), mean: mean.as_mut_slice(), rstd: rstd.as_mut_slice() };
        let result = layernorm_forward(&stream, &mut output, &x.as_slice(), &gamma.as_slice(), &beta.as_slice(), shape);
        let error = result.expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(refused(shape(7, 32)).contains("length of y is 192, expected 224"));
    assert!(refused(shape(12, 16)).contains("length of mean is 6, expected 12"));
    assert!(refused(shape(6, 0)).contains("number of features is 0"));
    refused(shape(6, 1 << 30));
    refused(shape(1 << 31, 32));
    refused(shape(usize::MAX, 32));

    let partials = layernorm_backward_partials(&stream, good);
    let run = |partials: usize, dbeta: usize| {
        let (mut dx, mut dgamma) = (matrix(), vector(32));
        let (mut dbeta, mut partials) = (vector(dbeta), vector(partials));
        let (dy, mean, rstd) = (matrix(), vector(6), vector(6));
        let mut gradients = LayerNormGradients {
            dx: dx.as_mut_slice(),
            dgamma: dgamma.as_mut_slice(),
            dbeta: dbeta.as_mut_slice(),
            partials: partials.as_mut_slice(),
        };
        let saved = LayerNormSaved {
            dy: dy.as_slice(),
            x: x.as_slice(),
            mean: mean.as_slice(),
            rstd: rstd.as_slice(),
            gamma: gamma.as_slice(),
        };
        layernorm_backward(&stream, &mut gradients, &saved, Write::Assign, good)
    };
    run(partials, 32).expect("no fault");
    assert!(run(partials - 1, 32).expect_err("refused").to_string().contains("length of partials is 127"));
    assert!(run(partials, 31).expect_err("refused").to_string().contains("length of dbeta is 31, expected 32"));

    // Through the backend: the same as an error of the library.
    let backend = Cuda::<f32>::new(stream.clone());
    let bench = Bench { backend: &backend, shift: 0 };
    let inputs = Inputs::new(good, 0.0);
    let (mut y, mut mean, mut rstd) = (bench.poisoned(192), bench.masters(&[0.0]), bench.masters(&[0.0; 6]));
    let (x, gamma, beta) = (bench.elements(&inputs.x), bench.masters(&inputs.gamma), bench.masters(&inputs.beta));
    let large = shape(400, 32);
    let error = backend.layernorm_forward(large, &mut y, &mut mean, &mut rstd, &x, &gamma, &beta);
    assert!(matches!(error, Err(vitmae::Error::Shape { op: "layernorm_forward", .. })), "{error:?}");
}
