//! Matrix products: layouts, checks, and what the emulator's see.

use super::emulated::gemm::{Addend, Epilogue, Gemm, GemmElement, Layout};
use super::emulated::{Cuda, CudaError, device, emulator_itself};
use super::linear::{Padded, random, rounded};

/// A product by its definition, in f64.
fn multiplied(gemm: Gemm, left: &[f64], right: &[f64]) -> Vec<f64> {
    let at = |memory: &[f64], layout: Layout, row: usize, column: usize| {
        let (row, column) = if layout.transposed { (column, row) } else { (row, column) };
        memory[row * layout.stride + column]
    };
    let sum = |row, column| {
        (0..gemm.depth).map(|i| at(left, gemm.left, row, i) * at(right, gemm.right, i, column)).sum::<f64>()
    };
    (0..gemm.rows).flat_map(|row| (0..gemm.columns).map(move |column| (row, column))).map(|(r, c)| sum(r, c)).collect()
}

#[test]
fn products_follow_their_layouts() {
    let Some(device) = device(0) else { return };
    let device = Cuda::<f32>::new(device.stream());
    let (rows, columns, depth) = (6, 5, 9);
    for (left_transposed, right_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
        let layout =
            |transposed, rows, columns| Layout { transposed, stride: 3 + if transposed { rows } else { columns } };
        let gemm = Gemm {
            rows,
            columns,
            depth,
            left: layout(left_transposed, rows, depth),
            right: layout(right_transposed, depth, columns),
            output_stride: columns + 2,
        };
        let (left, right) = (rounded::<f32>(&random(12 * 12, 41)), rounded::<f32>(&random(12 * 12, 42)));
        let (left_d, right_d) = (Padded::<f32>::new(&device, &left, 0), Padded::<f32>::new(&device, &right, 0));
        let mut output = Padded::<f32>::output(&device, rows * (columns + 2) - 2, 0);
        device
            .stream()
            .gemm(
                gemm,
                &mut output.part.slice_mut(),
                &left_d.part.slice(),
                &right_d.part.slice(),
                Addend::Nothing,
                Epilogue::Nothing,
            )
            .expect("no fault");
        let output = output.read(&device, "output");
        let expected = multiplied(gemm, &left, &right);
        for row in 0..rows {
            for column in 0..columns {
                let (found, expected) = (output[row * (columns + 2) + column], expected[row * columns + column]);
                assert!((found - expected).abs() < 1e-5, "{gemm:?}, {row}, {column}: {found}, expected {expected}");
            }
            // What is between the rows of the output is not written.
            assert!(row + 1 == rows || output[row * (columns + 2) + columns].is_nan());
        }
    }
}

#[test]
fn products_refuse_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let good = Gemm { rows: 4, columns: 6, depth: 5, left: Layout::rows(5), right: Layout::rows(6), output_stride: 6 };
    fn refused<O: GemmElement>(stream: &super::emulated::Stream, gemm: Gemm, epilogue: Option<usize>) -> String {
        let (left, right) = (stream.zeros::<f32>(20).expect("reserved"), stream.zeros::<f32>(30).expect("reserved"));
        let mut output = stream.zeros::<O>(24).expect("reserved");
        let bias = stream.zeros::<O>(epilogue.unwrap_or(0)).expect("reserved");
        let bias = bias.as_slice();
        let epilogue = if epilogue.is_some() { Epilogue::Bias(&bias) } else { Epilogue::Nothing };
        let (left, right) = (left.as_slice(), right.as_slice());
        let result = stream.gemm(gemm, &mut output.as_mut_slice(), &left, &right, Addend::Nothing, epilogue);
        let error = result.expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    }
    let refused_f32 = |gemm, epilogue| refused::<f32>(&stream, gemm, epilogue);
    assert!(refused_f32(Gemm { rows: 5, ..good }, None).contains("length of the output is 24, expected 30"));
    assert!(refused_f32(Gemm { depth: 0, ..good }, None).contains("depth is 0"));
    assert!(refused_f32(Gemm { depth: 6, left: Layout::rows(6), ..good }, None).contains("length of the left factor"));
    assert!(refused_f32(Gemm { left: Layout::rows(4), ..good }, None).contains("stride is 4, expected 5"));
    assert!(refused_f32(Gemm { right: Layout::rows(7), ..good }, None).contains("length of the right factor is 30"));
    assert!(refused_f32(Gemm { output_stride: 5, ..good }, None).contains("stride is 5"));
    assert!(refused_f32(Gemm { rows: 1 << 31, ..good }, None).contains("rows"));
    assert!(refused_f32(good, Some(5)).contains("length of the bias is 5"));
}

#[test]
fn the_emulators_products_check_their_memory() {
    let Some(emulator) = emulator_itself(0) else { return };
    let stream = emulator.stream();
    let gemm = Gemm { rows: 2, columns: 2, depth: 2, left: Layout::rows(2), right: Layout::rows(2), output_stride: 2 };
    let unwritten = stream.uninitialised::<f32>(4).expect("reserved");
    let right = stream.zeros::<f32>(4).expect("reserved");
    let mut output = stream.zeros::<f32>(4).expect("reserved");
    let (left, right) = (unwritten.as_slice(), right.as_slice());
    let result = stream.gemm(gemm, &mut output.as_mut_slice(), &left, &right, Addend::Nothing, Epilogue::Nothing);
    let message = result.expect_err("a fault").to_string();
    assert!(message.contains("memory that nothing wrote: byte 0 of buffer 0 (16 bytes)"), "{message}");
}
