//! Every matrix product of a training step, by the CPU backend and by the `gemm` crate, on all cores, taking turns.
//!
//! Prints a Markdown table: median GFLOP/s of both and the median of the ratios of neighbouring calls. The argument is the
//! number of turns, 15 unless given.

use std::error::Error;
use std::time::Instant;

use vitmae::cpu::Cpu;
use vitmae::random::RandomStream;
use vitmae::ops::{Linear, LinearShape, Memory, Write};

/// `out[rows, columns] (+)= left[rows, depth] right[depth, columns]`; a transposed factor is stored the other way round.
struct Product {
    name: &'static str,
    rows: usize,
    columns: usize,
    depth: usize,
    left_transposed: bool,
    right_transposed: bool,
    accumulate: bool,
}

fn random(seed: u64, length: usize) -> Vec<f32> {
    let mut stream = RandomStream::new(seed, 0, length as u64, 200);
    (0..length).map(|_| (f64::from(stream.next_u32()) / f64::from(u32::MAX) - 0.5) as f32).collect()
}

/// What the `gemm` crate is asked for.
fn peer(product: &Product, out: &mut [f32], left: &[f32], right: &[f32]) {
    let Product { rows, columns, depth, .. } = *product;
    let strides = |transposed: bool, height: usize, width: usize| {
        if transposed { (1, height as isize) } else { (width as isize, 1) }
    };
    let (left_row, left_column) = strides(product.left_transposed, rows, depth);
    let (right_row, right_column) = strides(product.right_transposed, depth, columns);
    assert!(out.len() == rows * columns && left.len() == rows * depth && right.len() == depth * columns);
    // SAFETY: the slices are as long as the sizes and strides say.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            out.as_mut_ptr(),
            1,
            columns as isize,
            product.accumulate,
            left.as_ptr(),
            left_column,
            left_row,
            right.as_ptr(),
            right_column,
            right_row,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let turns = std::env::args().nth(1).map_or(Ok(15), |argument| argument.parse::<usize>())?;
    let cpu = Cpu::<f32>::new();
    println!("| layer | product | rows x columns x depth | ours, GFLOP/s | gemm, GFLOP/s | ratio |");
    println!("|---|---|---|---:|---:|---:|");
    let mut ratios = Vec::new();
    // Batch 16: rows of the encoder with a quarter of the patches, of the encoder with all, and of the decoder.
    for (part, rows, width) in [("masked encoder", 800, 768), ("whole encoder", 3152, 768), ("decoder", 3152, 512)] {
        for (layer, inputs, outputs) in [
            ("qkv", width, 3 * width),
            ("projection", width, width),
            ("mlp in", width, 4 * width),
            ("mlp out", 4 * width, width),
        ] {
            let shape = LinearShape { rows, inputs, outputs };
            let x = random(1, rows * inputs);
            let weight = random(2, outputs * inputs);
            let dy = random(3, rows * outputs);
            let upload = |values: &[f32]| -> vitmae::Result<_> {
                let mut buffer = cpu.buffer(values.len())?;
                cpu.upload(&mut buffer, values)?;
                Ok(buffer)
            };
            let (bx, bweight, bdy) = (upload(&x)?, upload(&weight)?, upload(&dy)?);
            let product = |name, rows, columns, depth, left_transposed, right_transposed, accumulate| Product {
                name,
                rows,
                columns,
                depth,
                left_transposed,
                right_transposed,
                accumulate,
            };
            for (product, left, right) in [
                (product("forward", rows, outputs, inputs, false, true, false), &x, &weight),
                (product("input gradient", rows, inputs, outputs, false, false, false), &dy, &weight),
                (product("weight gradient", outputs, inputs, rows, true, false, true), &dy, &x),
            ] {
                let elements = product.rows * product.columns;
                let mut ours = cpu.buffer(elements)?;
                cpu.zero(&mut ours)?;
                let mut theirs = vec![0.0_f32; elements];
                let call = |out: &mut _| match product.name {
                    "forward" => cpu.linear_forward(shape, out, &bx, &bweight, None),
                    "input gradient" => cpu.linear_backward_input(shape, Write::Assign, out, &bdy, &bweight),
                    _ => cpu.linear_backward_weight(shape, out, None, &bdy, &bx),
                };
                call(&mut ours)?;
                peer(&product, &mut theirs, left, right);
                let mut values = vec![0.0_f32; elements];
                cpu.download(&mut values, &ours)?;
                let most = theirs.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                let error = values.iter().zip(&theirs).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
                if error > 1e-4 * most {
                    return Err(format!("{part} {layer} {}: they differ by {error} of {most}", product.name).into());
                }
                let flops = 2.0 * product.rows as f64 * product.columns as f64 * product.depth as f64;
                let (mut own, mut other, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
                for turn in 0..turns {
                    let mut times = [0.0; 2];
                    for half in 0..2 {
                        let which = (turn + half) % 2;
                        let start = Instant::now();
                        if which == 0 {
                            call(&mut ours)?;
                        } else {
                            peer(&product, &mut theirs, left, right);
                        }
                        times[which] = start.elapsed().as_secs_f64();
                    }
                    own.push(flops / times[0] / 1e9);
                    other.push(flops / times[1] / 1e9);
                    pairs.push(times[1] / times[0]);
                }
                let ratio = median(pairs);
                ratios.push(ratio);
                let Product { name, rows, columns, depth, .. } = product;
                println!(
                    "| {part} {layer} | {name} | {rows} x {columns} x {depth} | {:.0} | {:.0} | {ratio:.2} |",
                    median(own),
                    median(other)
                );
            }
        }
    }
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    println!("\nRatios: median {:.2}, least {least:.2}.", median(ratios));
    Ok(())
}
