//! Tokens against the CPU in f64.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{Tokens, TokensShape};

use super::emulated::tokens::{tokens_gather_forward, tokens_unshuffle_backward, tokens_unshuffle_backward_partials};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, Stream, device};
use super::reference::{Bench, close, close_masters, random, shuffles};

/// What all six ops read, of a shape.
struct Inputs {
    /// `[B, n, D]`, `[B, 1 + n, D]` and `[B, 1 + L, D]`.
    patches: Vec<f64>,
    short: Vec<f64>,
    whole: Vec<f64>,
    /// `[D]`, and `[1 + L, D]`.
    token: Vec<f64>,
    positions: Vec<f64>,
    ids_restore: Vec<u32>,
    /// The first `n` of each shuffle.
    ids: Vec<u32>,
}

impl Inputs {
    fn new(shape: TokensShape) -> Self {
        let TokensShape { batch, patches, selected, width } = shape;
        let shuffles = shuffles(6, batch, patches);
        let mut ids_restore = vec![0; batch * patches];
        for (shuffle, restore) in shuffles.iter().zip(ids_restore.chunks_mut(patches.max(1))) {
            shuffle.iter().enumerate().for_each(|(rank, &patch)| restore[patch as usize] = rank as u32);
        }
        // Masters are f32: digits that bf16 does not hold must survive until the one rounding.
        let fine = |values: Vec<f64>| values.into_iter().map(|value| value * (1.0 + 1.0 / 1024.0)).collect();
        Self {
            patches: random(1, batch * selected * width),
            short: random(2, batch * (1 + selected) * width),
            whole: random(3, batch * (1 + patches) * width),
            token: fine(random(4, width)),
            positions: fine(random(5, (1 + patches) * width)),
            ids_restore,
            ids: shuffles.iter().flat_map(|shuffle| &shuffle[..selected]).copied().collect(),
        }
    }
}

/// What the ops write.
struct Outputs {
    assembled: Vec<f64>,
    dpatches: Vec<f64>,
    dclass_token: Vec<f64>,
    unshuffled: Vec<f64>,
    dshort: Vec<f64>,
    dmask_token: Vec<f64>,
    gathered: Vec<f64>,
    dwhole: Vec<f64>,
}

fn run<B: Tokens>(bench: &Bench<'_, B>, shape: TokensShape, inputs: &Inputs) -> Outputs {
    let backend = bench.backend;
    let TokensShape { batch, patches, selected, width } = shape;
    let poisoned = |rows: usize| bench.poisoned(rows * width);
    let [patch_rows, short, whole] =
        [&inputs.patches, &inputs.short, &inputs.whole].map(|values| bench.elements(values));
    let (token, positions) = (bench.masters(&inputs.token), bench.masters(&inputs.positions));
    let (ids, ids_restore) = (bench.ids(&inputs.ids), bench.ids(&inputs.ids_restore));

    let mut assembled = poisoned(batch * (1 + selected));
    backend
        .tokens_assemble_forward(shape, &mut assembled, &patch_rows, &token, &positions, &ids)
        .expect("assemble forward");
    // Parameter gradients accumulate on what is there.
    let [mut dclass_token, mut dmask_token] = [(); 2].map(|()| bench.masters(&inputs.token));
    let mut dpatches = poisoned(batch * selected);
    backend.tokens_assemble_backward(shape, &mut dpatches, &mut dclass_token, &short).expect("assemble backward");

    let mut unshuffled = poisoned(batch * (1 + patches));
    backend
        .tokens_unshuffle_forward(shape, &mut unshuffled, &short, &token, &positions, &ids_restore)
        .expect("unshuffle forward");
    let mut dshort = poisoned(batch * (1 + selected));
    backend
        .tokens_unshuffle_backward(shape, &mut dshort, &mut dmask_token, &whole, &ids_restore)
        .expect("unshuffle backward");

    let mut gathered = poisoned(batch * selected);
    backend.tokens_gather_forward(shape, &mut gathered, &whole, &ids).expect("gather forward");
    let mut dwhole = poisoned(batch * (1 + patches));
    backend.tokens_gather_backward(shape, &mut dwhole, &patch_rows, &ids).expect("gather backward");
    Outputs {
        assembled: bench.read(&assembled),
        dpatches: bench.read(&dpatches),
        dclass_token: bench.read_masters(&dclass_token),
        unshuffled: bench.read(&unshuffled),
        dshort: bench.read(&dshort),
        dmask_token: bench.read_masters(&dmask_token),
        gathered: bench.read(&gathered),
        dwhole: bench.read(&dwhole),
    }
}

fn check<E: CudaElement>(stream: &Stream, shape: TokensShape, shift: usize) {
    let inputs = Inputs::new(shape);
    let expected = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, shape, &inputs);
    let backend = Cuda::<E>::new(stream.clone());
    let bench = Bench { backend: &backend, shift };
    let found = run(&bench, shape, &inputs);
    let what = format!("{shape:?}, shift {shift}, {} bytes", size_of::<E>());
    // One rounding: no more than it costs.
    close::<Cuda<E>>(&format!("assembled, {what}"), &found.assembled, &expected.assembled, 1.0);
    close::<Cuda<E>>(&format!("unshuffled, {what}"), &found.unshuffled, &expected.unshuffled, 1.0);
    // Copies.
    assert_eq!(found.dpatches, expected.dpatches, "dpatches, {what}");
    assert_eq!(found.dshort, expected.dshort, "dx of unshuffle, {what}");
    assert_eq!(found.gathered, expected.gathered, "gathered, {what}");
    assert_eq!(found.dwhole, expected.dwhole, "dx of gather, {what}");
    close_masters(&format!("dclass_token, {what}"), &found.dclass_token, &expected.dclass_token);
    close_masters(&format!("dmask_token, {what}"), &found.dmask_token, &expected.dmask_token);
    let again = run(&bench, shape, &inputs);
    assert_eq!(again.dclass_token, found.dclass_token, "twice the same, {what}");
    assert_eq!(again.dmask_token, found.dmask_token, "twice the same, {what}");
}

fn shape(batch: usize, patches: usize, selected: usize, width: usize) -> TokensShape {
    TokensShape { batch, patches, selected, width }
}

#[test]
fn tokens_match_the_cpu() {
    let shapes = [
        // One, some and all patches selected; none.
        shape(1, 1, 1, 8),
        shape(3, 16, 4, 64),
        shape(2, 9, 9, 40),
        shape(5, 7, 0, 32),
        // More than one chunk of tokens, batches that are no multiple of four, more tokens than one turn of the slabs.
        shape(2, 65, 17, 24),
        shape(9, 196, 49, 8),
        // Several tiles of columns, the last one not full.
        shape(2, 10, 3, 512),
        shape(3, 5, 2, 264),
        // No whole vectors.
        shape(2, 12, 5, 33),
        shape(4, 33, 8, 7),
        shape(1, 40, 13, 1),
        shape(0, 4, 2, 16),
    ];
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        for shape in shapes {
            check::<bf16>(&stream, shape, 0);
            check::<f32>(&stream, shape, 0);
        }
        // Buffers that start anywhere.
        check::<bf16>(&stream, shape(3, 16, 4, 64), 1);
        check::<f32>(&stream, shape(3, 16, 4, 64), 2);
    }
}

#[test]
fn an_id_that_is_no_patch_reads_and_writes_nothing_else() {
    let Some(device) = device(2) else { return };
    for width in [8, 5] {
        let shape = shape(2, 6, 2, width);
        let mut inputs = Inputs::new(shape);
        inputs.ids = vec![6, 2, 4, u32::MAX];
        let backend = Cuda::<f32>::new(device.stream());
        let bench = Bench { backend: &backend, shift: 0 };
        let outputs = run(&bench, shape, &inputs);
        let nan_rows = |rows: &[f64]| -> Vec<bool> {
            rows.chunks(width).map(|row| row.iter().all(|value| value.is_nan())).collect()
        };
        assert_eq!(nan_rows(&outputs.assembled), [false, true, false, false, false, true]);
        assert_eq!(nan_rows(&outputs.gathered), [true, false, false, true]);
        let filled: Vec<usize> =
            (0..14).filter(|row| outputs.dwhole[row * width..][..width].iter().any(|&value| value != 0.0)).collect();
        assert_eq!(filled, [3, 7 + 5]);
        assert!(outputs.dwhole.iter().all(|value| !value.is_nan()));
    }
}

#[test]
fn tokens_refuse_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = shape(2, 6, 3, 8);
    let x = stream.zeros::<f32>(2 * 7 * 8).expect("reserved");
    let ids = stream.zeros::<u32>(6).expect("reserved");
    let mut y = stream.zeros::<f32>(2 * 3 * 8).expect("reserved");
    let mut refused = |shape: TokensShape| {
        let result = tokens_gather_forward(&stream, &mut y.as_mut_slice(), &x.as_slice(), &ids.as_slice(), shape);
        let error = result.expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(refused(TokensShape { width: 0, ..good }).contains("number of features is 0"));
    assert!(refused(TokensShape { selected: 2, ..good }).contains("length of y is 48, expected 32"));
    assert!(refused(TokensShape { patches: 7, ..good }).contains("length of x is 112, expected 128"));
    refused(TokensShape { batch: usize::MAX, ..good });
    refused(TokensShape { patches: usize::MAX, ..good });
    refused(TokensShape { batch: 1 << 20, patches: 1 << 20, ..good });

    let unshuffle = |shape: TokensShape, partials: usize| {
        let mut dx = stream.zeros::<f32>(2 * 4 * 8)?;
        let (mut token, mut partials) = (stream.zeros::<f32>(8)?, stream.zeros::<f32>(partials)?);
        let restore = stream.upload(&[0u32, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0])?;
        let (mut dx, mut token, mut partials) = (dx.as_mut_slice(), token.as_mut_slice(), partials.as_mut_slice());
        tokens_unshuffle_backward(
            &stream,
            &mut dx,
            &mut token,
            &mut partials,
            &x.as_slice(),
            &restore.as_slice(),
            shape,
        )
    };
    let partials = tokens_unshuffle_backward_partials(&stream, good);
    unshuffle(good, partials).expect("no fault");
    assert!(unshuffle(good, partials - 1).expect_err("refused").to_string().contains("length of partials"));
    let error = unshuffle(TokensShape { selected: 7, ..good }, partials).expect_err("refused");
    assert!(error.to_string().contains("selected patches is 7, expected 0 to 6"), "{error}");

    // Through the backend: an error of the library, before anything could overflow.
    let backend = Cuda::<bf16>::new(stream.clone());
    let bench = Bench { backend: &backend, shift: 0 };
    let (mut y, x, ids) = (bench.poisoned(8), bench.poisoned(8), bench.ids(&[0]));
    for shape in [good, TokensShape { patches: usize::MAX, selected: usize::MAX, ..good }] {
        backend.tokens_gather_forward(shape, &mut y, &x, &ids).expect_err("refused");
    }
}
