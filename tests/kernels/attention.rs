//! Attention against the CPU in f64.

use std::collections::BTreeSet;

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{Attention, AttentionShape, Memory, OPS};

use super::common::dot;
use super::emulated::attention::{attention_backward, attention_forward};
use super::emulated::launch::Limits;
use super::emulated::{
    Cuda, CudaElement, CudaError, MULTIPROCESSORS, Options, SEEDS, Stream, TestDevice, device, device_with,
};
use super::listing::Listing;
use super::reference::{Bench, as_close_as_naive, random};

fn shape(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, tokens, heads, head_dim }
}

/// A shape, and what it is run on.
struct Run {
    shape: AttentionShape,
    kilobytes: u32,
    bf16: bool,
    f32: bool,
}

/// What arithmetic in f32 may cost, as a share of the largest number: scores in f32, and the exponentials of them. The most that was
/// seen on the emulator is 2.3e-6, of probabilities in f32.
const SLACK: f64 = 5e-6;

/// Lengths of the short sequences.
const SHORT: usize = 65;

/// The longest sequences that the emulator has time to try in every order of threads, by bytes of an element: matrix instructions
/// are one step to it, and the f32 kernels many.
fn every_order(bytes: usize) -> usize {
    if bytes == 2 { 300 } else { SHORT }
}

/// Shapes for every kernel: lengths of all kinds of tiles, and heads narrower than, as wide as and between them. The smallest
/// GPU's shared memory for short sequences, which fit into it, and the largest's for long ones.
fn runs() -> Vec<Run> {
    let mut runs = Vec::new();
    let run = |shape: AttentionShape, bf16, f32| Run {
        shape,
        kilobytes: if shape.tokens > 100 { 227 } else { 99 },
        bf16,
        f32,
    };
    for (index, tokens) in [1, 2, 17, 50, 65].into_iter().enumerate() {
        for (column, head_dim) in [8, 16, 32, 40, 64, 80, 128].into_iter().enumerate() {
            let f32 = head_dim < 64 || (index + column) % 2 == 0;
            runs.push(run(shape(1 + index % 2, tokens, 2 - index % 2, head_dim), true, f32));
        }
    }
    for head_dim in [24, 48, 72, 88, 120] {
        runs.extend([17, 130].map(|tokens| run(shape(1, tokens, 1, head_dim), true, tokens == 17)));
    }
    for tokens in [197, 257, 300, 785] {
        for head_dim in [8, 16, 32, 40, 64, 80, 128] {
            // f32 has the same kernels at every shape, and the emulator is slow at them.
            runs.push(run(shape(1, tokens, 1, head_dim), true, head_dim == 8 || (tokens < 300 && head_dim % 16 == 0)));
        }
    }
    // From 321 tokens on heads do not stay in shared memory.
    runs.extend([100, 330].map(|tokens| run(shape(1, tokens, 1, 64), true, false)));
    // 99 KB are what consumer GPUs have; with 74 KB, every width takes the kernels that need least.
    for (kilobytes, shape) in [
        (99, shape(1, 197, 1, 64)),
        (99, shape(1, 257, 1, 32)),
        (99, shape(1, 257, 1, 80)),
        (99, shape(1, 65, 2, 128)),
        (74, shape(1, 197, 1, 32)),
        (74, shape(1, 130, 1, 64)),
    ] {
        runs.push(Run { shape, kilobytes, bf16: true, f32: false });
    }
    runs
}

/// Tokens by features of one head.
type Rows = Vec<Vec<f64>>;

/// Element `(row, column)` of a head's rows in memory, as its place in the whole.
fn place(shape: AttentionShape, parts: usize, sample: usize, head: usize, part: usize, token: usize) -> usize {
    (((sample * shape.tokens + token) * parts + part) * shape.heads + head) * shape.head_dim
}

/// Inputs of attention. `spread`: queries and keys reach to plus and minus this.
struct Inputs {
    qkv: Vec<f64>,
    dout: Vec<f64>,
}

impl Inputs {
    fn new(shape: AttentionShape, spread: f64) -> Self {
        let numbers = shape.batch * shape.tokens * shape.width();
        let mut qkv = random(1, 3 * numbers);
        for (index, value) in qkv.iter_mut().enumerate() {
            if index / shape.width() % 3 < 2 {
                *value *= spread;
            }
        }
        Self { qkv, dout: random(2, numbers) }
    }

    fn rows(&self, shape: AttentionShape, sample: usize, head: usize) -> [Rows; 4] {
        let row = |values: &[f64], start: usize| values[start..start + shape.head_dim].to_vec();
        let part = |part| {
            (0..shape.tokens).map(|token| row(&self.qkv, place(shape, 3, sample, head, part, token))).collect::<Rows>()
        };
        let dout = (0..shape.tokens).map(|token| row(&self.dout, place(shape, 1, sample, head, 0, token))).collect();
        [part(0), part(1), part(2), dout]
    }
}

/// What attention writes.
#[derive(Clone, PartialEq, Debug)]
struct Outputs {
    out: Vec<f64>,
    log_sum_exp: Vec<f64>,
    dqkv: Vec<f64>,
    probabilities: Vec<f64>,
}

/// Whether probabilities are asked for: one kernel gives them at every shape, and it takes the emulator longer than all others.
fn shows(shape: AttentionShape) -> bool {
    shape.tokens <= 130 || shape.head_dim <= 16
}

/// Gives all three ops to a backend: their outputs on it.
fn give<B: Attention>(bench: &Bench<'_, B>, shape: AttentionShape, inputs: &Inputs) -> Given<B> {
    let AttentionShape { batch, tokens, heads, .. } = shape;
    let numbers = batch * tokens * shape.width();
    let (qkv, dout) = (bench.elements(&inputs.qkv), bench.elements(&inputs.dout));
    let (mut out, mut dqkv) = (bench.poisoned(numbers), bench.poisoned(3 * numbers));
    let mut log_sum_exp = bench.masters(&vec![f64::NAN; batch * heads * tokens]);
    let mut probabilities = bench.poisoned(if shows(shape) { batch * heads * tokens * tokens } else { 0 });
    let backend = bench.backend;
    backend.attention_forward(shape, &mut out, &mut log_sum_exp, &qkv).expect("no fault");
    backend.attention_backward(shape, &mut dqkv, &dout, &qkv, &log_sum_exp).expect("no fault");
    if shows(shape) {
        backend.attention_probabilities(shape, &mut probabilities, &qkv, &log_sum_exp).expect("no fault");
    }
    Given { out, log_sum_exp, dqkv, probabilities }
}

/// [`Outputs`] on a backend.
struct Given<B: Memory> {
    out: B::Buffer<B::Element>,
    log_sum_exp: B::Buffer<B::Master>,
    dqkv: B::Buffer<B::Element>,
    probabilities: B::Buffer<B::Element>,
}

fn run<B: Attention>(bench: &Bench<'_, B>, shape: AttentionShape, inputs: &Inputs) -> Outputs {
    let given = give(bench, shape, inputs);
    Outputs {
        out: bench.read(&given.out),
        log_sum_exp: bench.read_masters(&given.log_sum_exp),
        dqkv: bench.read(&given.dqkv),
        probabilities: bench.read(&given.probabilities),
    }
}

/// The same by the definition, with every tensor rounded to the element type: what nobody can blame a kernel for.
fn naive<E: CudaElement>(shape: AttentionShape, inputs: &Inputs) -> Outputs {
    let round = |value: f64| E::from_f64(value).to_f64();
    let AttentionShape { batch, tokens, heads, .. } = shape;
    let mut outputs = Outputs {
        out: vec![0.0; inputs.dout.len()],
        log_sum_exp: Vec::new(),
        dqkv: vec![0.0; inputs.qkv.len()],
        probabilities: Vec::new(),
    };
    for (sample, head) in (0..batch).flat_map(|sample| (0..heads).map(move |head| (sample, head))) {
        let [q, k, v, dout] = inputs.rows(shape, sample, head);
        let at = |part, token| place(shape, 3, sample, head, part, token);
        for i in 0..tokens {
            let scores: Vec<f64> = k.iter().map(|k| dot(&q[i], k) * shape.scale()).collect();
            let largest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
            let log_sum_exp = largest + scores.iter().map(|score| (score - largest).exp()).sum::<f64>().ln();
            let p: Vec<f64> = scores.iter().map(|score| (score - log_sum_exp).exp()).collect();
            let dp: Vec<f64> = v.iter().map(|v| dot(&dout[i], v)).collect();
            let delta = dot(&p, &dp);
            let ds: Vec<f64> = p.iter().zip(&dp).map(|(p, dp)| round(p * (dp - delta))).collect();
            let p: Vec<f64> = p.into_iter().map(round).collect();
            // to += factor * from
            let add = |to: &mut [f64], factor: f64, from: &[f64]| {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
            };
            for j in 0..tokens {
                add(&mut outputs.out[place(shape, 1, sample, head, 0, i)..], p[j], &v[j]);
                add(&mut outputs.dqkv[at(0, i)..], ds[j] * shape.scale(), &k[j]);
                add(&mut outputs.dqkv[at(1, j)..], ds[j] * shape.scale(), &q[i]);
                add(&mut outputs.dqkv[at(2, j)..], p[j], &dout[i]);
            }
            outputs.log_sum_exp.push(log_sum_exp);
            if shows(shape) {
                outputs.probabilities.extend(p);
            }
        }
    }
    outputs.out.iter_mut().chain(&mut outputs.dqkv).for_each(|value| *value = round(*value));
    outputs
}

/// Queries', keys' or values' part of dqkv.
fn part(shape: AttentionShape, dqkv: &[f64], which: usize) -> Vec<f64> {
    dqkv.chunks_exact(shape.width()).skip(which).step_by(3).flatten().copied().collect()
}

fn check<E: CudaElement>(stream: &Stream, shape: AttentionShape, spread: f64, slack: f64) {
    check_all::<E>(std::slice::from_ref(stream), shape, spread, slack);
}

/// The same on several streams: right on the first, and the same bits on the others.
fn check_all<E: CudaElement>(streams: &[Stream], shape: AttentionShape, spread: f64, slack: f64) {
    let inputs = Inputs::new(shape, spread);
    let exact = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &inputs);
    let naive = naive::<E>(shape, &inputs);
    let run_on = |stream: &Stream| run(&Bench { backend: &Cuda::<E>::new(stream.clone()), shift: 0 }, shape, &inputs);
    let found = run_on(&streams[0]);
    let what = format!("{shape:?}, {} bytes, spread {spread}", size_of::<E>());
    for (index, stream) in streams.iter().enumerate().skip(1) {
        // No assert_eq: the message would be all numbers.
        assert!(run_on(stream) == found, "{what}: other bits in order {index}");
    }
    as_close_as_naive(&format!("out, {what}"), [&found.out, &naive.out, &exact.out], 2.0, slack, 0.0);
    let statistics = [&found.log_sum_exp, &naive.log_sum_exp, &exact.log_sum_exp].map(Vec::as_slice);
    as_close_as_naive(&format!("log-sum-exp, {what}"), statistics, 1.0, 1e-6, 0.0);
    let probabilities = [&found.probabilities, &naive.probabilities, &exact.probabilities].map(Vec::as_slice);
    as_close_as_naive(&format!("probabilities, {what}"), probabilities, 2.0, slack, 0.0);
    for (which, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
        let [found, naive, exact] = [&found, &naive, &exact].map(|outputs| part(shape, &outputs.dqkv, which));
        // Where one key takes all, gradients of scores cancel to nothing, but for the rounding of the log-sum-exp.
        let uncancelled = if which < 2 { spread * shape.scale() * (shape.head_dim as f64).sqrt() } else { 0.0 };
        as_close_as_naive(&format!("{name}, {what}"), [&found, &naive, &exact], 3.0, slack, uncancelled);
    }
}

/// An emulator whose blocks have as much shared memory as those of some GPU.
fn with_shared_memory(seed: u64, kilobytes: u32) -> Option<TestDevice> {
    device_with(Options { seed, shared_bytes: kilobytes << 10 })
}

/// Checks an element type at the shapes of which `of` is true, in every order of threads where there is time, else in two.
fn check_runs<E: CudaElement>(of: impl Fn(&Run) -> bool) {
    let mut checked = 0;
    for (index, run) in runs().into_iter().filter(|run| of(run)).enumerate() {
        let two = [SEEDS[index % 2], SEEDS[2 + index % 2]];
        let seeds = if run.shape.tokens <= every_order(size_of::<E>()) { &SEEDS[..] } else { &two[..] };
        let devices: Option<Vec<_>> = seeds.iter().map(|&seed| with_shared_memory(seed, run.kilobytes)).collect();
        let Some(devices) = devices else { return };
        let streams: Vec<_> = devices.iter().map(TestDevice::stream).collect();
        check_all::<E>(&streams, run.shape, 4.0, SLACK);
        checked += 1;
    }
    assert!(checked > 0);
}

#[test]
fn bf16_attention_matches_the_cpu_at_every_short_shape() {
    check_runs::<bf16>(|run| run.bf16 && run.shape.tokens <= SHORT);
}

#[test]
#[ignore = "second tier: long shapes"]
fn bf16_attention_matches_the_cpu_at_every_long_shape() {
    check_runs::<bf16>(|run| run.bf16 && run.shape.tokens > SHORT);
}

#[test]
fn f32_attention_matches_the_cpu_at_every_short_shape() {
    check_runs::<f32>(|run| run.f32 && run.shape.tokens <= SHORT);
}

#[test]
#[ignore = "second tier: long shapes"]
fn f32_attention_matches_the_cpu_at_every_long_shape() {
    check_runs::<f32>(|run| run.f32 && run.shape.tokens > SHORT);
}

#[test]
fn the_shapes_reach_every_attention_kernel() {
    let mut launched = BTreeSet::new();
    for of in runs() {
        // The limits that the shapes are run with, on the emulator and on a GPU.
        let listing = Listing::new(Limits { shared_bytes: of.kilobytes << 10, multiprocessors: MULTIPROCESSORS });
        let inputs = Inputs::new(of.shape, 1.0);
        if of.bf16 {
            give(&Bench { backend: &Cuda::<bf16>::new(listing.stream()), shift: 0 }, of.shape, &inputs);
        }
        if of.f32 {
            give(&Bench { backend: &Cuda::<f32>::new(listing.stream()), shift: 0 }, of.shape, &inputs);
        }
        launched.append(&mut listing.symbols());
    }
    let family = OPS.iter().filter(|op| op.name.starts_with("attention_"));
    let expected: BTreeSet<&str> = family.flat_map(|op| op.symbols()).collect();
    assert_eq!(launched, expected);
}

#[test]
fn f32_attention_fits_into_less_shared_memory() {
    let Some(device) = with_shared_memory(2, 99) else { return };
    check::<f32>(&device.stream(), shape(1, 33, 1, 128), 4.0, SLACK);
}

#[test]
fn f32_attention_takes_heads_of_any_width() {
    let Some(device) = device(3) else { return };
    for head_dim in [1, 7, 100, 127] {
        check::<f32>(&device.stream(), shape(2, 33, 1, head_dim), 2.0, SLACK);
    }
}

#[test]
fn attention_survives_extreme_scores() {
    let Some(device) = device(2) else { return };
    for shape in [shape(1, 50, 1, 64), shape(1, 65, 1, 80), shape(1, 97, 1, 32), shape(1, 70, 1, 128)] {
        // Up to about ten thousand. A score in f32 is then known to a thousandth, and so is a probability relative to itself.
        // The most that was seen on the emulator is 1.4e-3.
        let (spread, slack) = (128.0, 5e-3);
        check::<bf16>(&device.stream(), shape, spread, slack);
        check::<f32>(&device.stream(), shape, spread, slack);
    }
}

#[test]
#[ignore = "second tier: long shapes"]
fn long_sequences_are_attended_to_piece_by_piece() {
    let Some(device) = device(3) else { return };
    check::<bf16>(&device.stream(), shape(1, 577, 1, 16), 4.0, SLACK);
    let shape = shape(1, 1025, 1, 8);
    let inputs = Inputs::new(shape, 4.0);
    let forward = |bench: &Bench<'_, Cuda<bf16>>| {
        let mut out = bench.poisoned(inputs.dout.len());
        let mut log_sum_exp = bench.masters(&vec![f64::NAN; shape.tokens]);
        let qkv = bench.elements(&inputs.qkv);
        bench.backend.attention_forward(shape, &mut out, &mut log_sum_exp, &qkv).expect("no fault");
        (bench.read(&out), bench.read_masters(&log_sum_exp))
    };
    let reference = Bench { backend: &Cpu::<f64>::new(), shift: 0 };
    let exact = run(&reference, shape, &inputs);
    let naive = naive::<bf16>(shape, &inputs);
    let (out, log_sum_exp) = forward(&Bench { backend: &Cuda::new(device.stream()), shift: 0 });
    as_close_as_naive("out", [&out, &naive.out, &exact.out], 2.0, SLACK, 0.0);
    as_close_as_naive("log-sum-exp", [&log_sum_exp, &naive.log_sum_exp, &exact.log_sum_exp], 1.0, 1e-6, 0.0);
}

#[test]
fn attention_has_the_same_bits_in_every_order_of_threads() {
    for shape in [shape(2, 50, 2, 64), shape(1, 65, 1, 80), shape(1, 100, 1, 32), shape(1, 90, 1, 128)] {
        let inputs = Inputs::new(shape, 4.0);
        let mut first = None;
        for seed in SEEDS.into_iter().chain(SEEDS) {
            let Some(device) = device(seed) else { return };
            let found = run(&Bench { backend: &Cuda::<bf16>::new(device.stream()), shift: 0 }, shape, &inputs);
            assert_eq!(*first.get_or_insert(found.clone()), found, "{shape:?}, seed {seed}");
        }
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = shape(2, 5, 2, 8);
    let mut qkv = stream.zeros::<bf16>(2 * 5 * 3 * 16 + 8).expect("reserved");
    let out = stream.zeros::<bf16>(2 * 5 * 16).expect("reserved");
    let mut log_sum_exp = stream.zeros::<f32>(2 * 2 * 5).expect("reserved");
    let mut refused = |shape: AttentionShape, from: usize| {
        let (mut to, from) = (stream.zeros::<bf16>(2 * 5 * 16).expect("reserved"), from..from + 2 * 5 * 3 * 16);
        let qkv = qkv.as_slice();
        let qkv = qkv.range(from).expect("inside");
        let result = attention_forward(&stream, &mut to.as_mut_slice(), &mut log_sum_exp.as_mut_slice(), &qkv, shape);
        let error = result.expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(
        refused(AttentionShape { head_dim: 12, ..good }, 0).contains("12, expected a multiple of 8; f32 takes any")
    );
    assert!(refused(AttentionShape { head_dim: 136, ..good }, 0).contains("136, expected 1 to 128"));
    assert!(refused(AttentionShape { head_dim: 0, ..good }, 0).contains("features of a head is 0"));
    assert!(refused(AttentionShape { tokens: 6, ..good }, 0).contains("length of qkv is 480, expected 576"));
    assert!(refused(AttentionShape { batch: 1 << 40, ..good }, 0).contains("batch"));
    let tokens = refused(AttentionShape { batch: 1 << 16, tokens: 1 << 16, ..good }, 0);
    assert!(tokens.contains("number of tokens is 4294967296, expected at most 2147483647"), "{tokens}");
    assert!(refused(AttentionShape { tokens: 1 << 30, ..good }, 0).contains("number of tokens is 2147483648"));
    assert!(refused(AttentionShape { tokens: 1 << 29, heads: 1 << 30, ..good }, 0).contains("length of qkv"));
    assert!(refused(good, 4).contains("alignment of qkv is 8, expected at least 16"));

    let input = stream.zeros::<bf16>(2 * 5 * 3 * 16).expect("reserved");
    let mut short = qkv.as_mut_slice();
    let mut short = short.range(0..479).expect("inside");
    let statistics = log_sum_exp.as_slice();
    let result = attention_backward(&stream, &mut short, &out.as_slice(), &input.as_slice(), &statistics, good);
    assert!(result.expect_err("refused").to_string().contains("length of dqkv is 479, expected 480"));

    // Nothing to do.
    let backend = Cuda::<bf16>::new(stream.clone());
    for shape in [shape(0, 5, 2, 8), shape(2, 0, 2, 8), shape(2, 5, 0, 8)] {
        run(&Bench { backend: &backend, shift: 0 }, shape, &Inputs::new(shape, 1.0));
    }
}
