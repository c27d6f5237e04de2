//! Linear layers: matrix products with bias, activation and residual behind each block.

use crate::Result;
use crate::cpu::activation::{activate, multiply_by_slope};
use crate::cpu::gemm::{self, Matrix, Range, Sizes};
use crate::cpu::math::{add, vectorized};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::{Cpu, CpuBuffer, Float, check};
use crate::ops::{Activation, Linear, LinearShape, Write};

/// Elements of a piece of an elementwise pass.
const PIECE: usize = 1 << 14;
/// Columns of a piece of the bias's gradient.
const BIAS_COLUMNS: usize = 64;
/// Rows that are summed up before they are added to the rest.
const BIAS_ROWS: usize = 64;

impl<F: Float> Linear for Cpu<F> {
    fn linear_forward(
        &self,
        shape: LinearShape,
        y: &mut CpuBuffer<F>,
        x: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
        bias: Option<&CpuBuffer<F>>,
    ) -> Result<()> {
        let op = "linear_forward";
        let y = check::output(op, "y", y, &[shape.rows, shape.outputs])?;
        forward(op, shape, y, x, weight, bias, Last::Nothing)
    }

    fn linear_residual_forward(
        &self,
        shape: LinearShape,
        y: &mut CpuBuffer<F>,
        residual: &CpuBuffer<F>,
        x: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
        bias: Option<&CpuBuffer<F>>,
    ) -> Result<()> {
        let op = "linear_residual_forward";
        let y = check::output(op, "y", y, &[shape.rows, shape.outputs])?;
        let residual = check::input(op, "residual", residual, &[shape.rows, shape.outputs])?;
        forward(op, shape, y, x, weight, bias, Last::Residual(residual))
    }

    fn linear_activation_forward(
        &self,
        shape: LinearShape,
        activation: Activation,
        y: &mut CpuBuffer<F>,
        pre: &mut CpuBuffer<F>,
        x: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
        bias: Option<&CpuBuffer<F>>,
    ) -> Result<()> {
        let op = "linear_activation_forward";
        let y = Shared::new(check::output(op, "y", y, &[shape.rows, shape.outputs])?);
        let pre = check::output(op, "pre", pre, &[shape.rows, shape.outputs])?;
        forward(op, shape, pre, x, weight, bias, Last::Activation(activation, &y))
    }

    fn activation_forward(
        &self,
        length: usize,
        activation: Activation,
        y: &mut CpuBuffer<F>,
        pre: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "activation_forward";
        let y = Shared::new(check::output(op, "y", y, &[length])?);
        let pre = check::input(op, "pre", pre, &[length])?;
        parallel::pieces(length, PIECE, |from, to| {
            // SAFETY: pieces are disjoint and inside `length`.
            let y = unsafe { y.part(from, to) };
            activate(activation, y, &pre[from..to]);
        });
        Ok(())
    }

    fn linear_backward_input(
        &self,
        shape: LinearShape,
        write: Write,
        dx: &mut CpuBuffer<F>,
        dy: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "linear_backward_input";
        let dx = check::output(op, "dx", dx, &[shape.rows, shape.inputs])?;
        backward_input(op, shape, write, dx, dy, weight, None)
    }

    fn linear_activation_backward_input(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut CpuBuffer<F>,
        dy: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
        pre: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "linear_activation_backward_input";
        let dpre = check::output(op, "dpre", dpre, &[shape.rows, shape.inputs])?;
        let pre = check::input(op, "pre", pre, &[shape.rows, shape.inputs])?;
        backward_input(op, shape, Write::Assign, dpre, dy, weight, Some((activation, pre)))
    }

    fn linear_activation_backward(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut CpuBuffer<F>,
        y: &mut CpuBuffer<F>,
        dbias: Option<&mut CpuBuffer<F>>,
        dy: &CpuBuffer<F>,
        weight: &CpuBuffer<F>,
        pre: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "linear_activation_backward";
        let LinearShape { rows, inputs, .. } = shape;
        let dbias = dbias.map(|dbias| check::output(op, "dbias", dbias, &[inputs])).transpose()?;
        self.activation_forward(rows.saturating_mul(inputs), activation, y, pre)?;
        self.linear_activation_backward_input(shape, activation, dpre, dy, weight, pre)?;
        if let Some(dbias) = dbias {
            bias_backward(dbias, dpre, rows);
        }
        Ok(())
    }

    fn linear_backward_weight(
        &self,
        shape: LinearShape,
        dweight: &mut CpuBuffer<F>,
        dbias: Option<&mut CpuBuffer<F>>,
        dy: &CpuBuffer<F>,
        x: &CpuBuffer<F>,
    ) -> Result<()> {
        let op = "linear_backward_weight";
        let LinearShape { rows, inputs, outputs } = shape;
        let dweight = check::output(op, "dweight", dweight, &[outputs, inputs])?;
        let dbias = dbias.map(|dbias| check::output(op, "dbias", dbias, &[outputs])).transpose()?;
        let dy = check::input(op, "dy", dy, &[rows, outputs])?;
        let x = check::input(op, "x", x, &[rows, inputs])?;
        let sizes = Sizes { rows: outputs, columns: inputs, depth: rows };
        let left = Matrix::rows(dy.as_ptr(), outputs).transposed();
        let right = Matrix::rows(x.as_ptr(), inputs);
        // SAFETY: the three slices have the sizes of the shape.
        unsafe { gemm::multiply(sizes, Write::Accumulate, &Shared::new(dweight), left, right, |_, _| ())? };
        if let Some(dbias) = dbias {
            bias_backward(dbias, dy, rows);
        }
        Ok(())
    }
}

/// `dbias += sum over rows of dy`, with as many columns as `dbias` has.
fn bias_backward<F: Float>(dbias: &mut [F], dy: &[F], rows: usize) {
    let columns = dbias.len();
    let dbias = Shared::new(dbias);
    parallel::pieces(columns, BIAS_COLUMNS, |from, to| {
        // SAFETY: pieces are disjoint and inside `columns`.
        let dbias = unsafe { dbias.part(from, to) };
        add_column_sums(dbias, &dy[from.min(dy.len())..], columns, rows);
    });
}

/// What follows the bias in a forward pass.
#[derive(Clone, Copy)]
enum Last<'a, F> {
    Nothing,
    /// Is added.
    Residual(&'a [F]),
    /// Is applied and written there.
    Activation(Activation, &'a Shared<'a, F>),
}

/// `y = x weightᵀ + bias`, and what follows it.
fn forward<F: Float>(
    op: &'static str,
    shape: LinearShape,
    y: &mut [F],
    x: &[F],
    weight: &[F],
    bias: Option<&CpuBuffer<F>>,
    last: Last<'_, F>,
) -> Result<()> {
    let LinearShape { rows, inputs, outputs } = shape;
    let x = check::input(op, "x", x, &[rows, inputs])?;
    let weight = check::input(op, "weight", weight, &[outputs, inputs])?;
    let bias = bias.map(|bias| check::input(op, "bias", bias, &[outputs])).transpose()?;
    let sizes = Sizes { rows, columns: outputs, depth: inputs };
    let y = Shared::new(y);
    let (left, right) = (Matrix::rows(x.as_ptr(), inputs), Matrix::rows(weight.as_ptr(), inputs).transposed());
    let finish = |(row, last_row): Range, (column, last_column): Range| {
        for row in row..last_row {
            let (from, to) = (row * outputs + column, row * outputs + last_column);
            // SAFETY: blocks are disjoint and inside `y`.
            let y = unsafe { y.part(from, to) };
            if let Some(bias) = bias {
                add(&mut *y, &bias[column..last_column]);
            }
            match last {
                Last::Nothing => (),
                Last::Residual(residual) => add(y, &residual[from..to]),
                // SAFETY: as for `y`.
                Last::Activation(activation, out) => activate(activation, unsafe { out.part(from, to) }, y),
            }
        }
    };
    // SAFETY: the three slices have the sizes of the shape.
    unsafe { gemm::multiply(sizes, Write::Assign, &y, left, right, finish) }
}

/// `dx (+)= dy weight`, times the derivative of an activation at its input.
fn backward_input<F: Float>(
    op: &'static str,
    shape: LinearShape,
    write: Write,
    dx: &mut [F],
    dy: &[F],
    weight: &[F],
    activation: Option<(Activation, &[F])>,
) -> Result<()> {
    let LinearShape { rows, inputs, outputs } = shape;
    let dy = check::input(op, "dy", dy, &[rows, outputs])?;
    let weight = check::input(op, "weight", weight, &[outputs, inputs])?;
    let sizes = Sizes { rows, columns: inputs, depth: outputs };
    let dx = Shared::new(dx);
    let (left, right) = (Matrix::rows(dy.as_ptr(), outputs), Matrix::rows(weight.as_ptr(), inputs));
    let finish = |(row, last_row): Range, (column, last_column): Range| {
        let Some((activation, pre)) = activation else { return };
        for row in row..last_row {
            let (from, to) = (row * inputs + column, row * inputs + last_column);
            // SAFETY: blocks are disjoint and inside `dx`.
            multiply_by_slope(activation, unsafe { dx.part(from, to) }, &pre[from..to]);
        }
    };
    // SAFETY: the three slices have the sizes of the shape.
    unsafe { gemm::multiply(sizes, write, &dx, left, right, finish) }
}

vectorized! {
    /// Adds the sums over `rows` rows of `stride` elements to `sums`, in groups of rows so that rounding errors stay small.
    fn add_column_sums<'a, F: Float>(sums: &'a mut [F], values: &'a [F], stride: usize, rows: usize) {
        let mut group = [F::ZERO; BIAS_COLUMNS];
        let group = &mut group[..sums.len()];
        for first in (0..rows).step_by(BIAS_ROWS) {
            group.fill(F::ZERO);
            for row in first..rows.min(first + BIAS_ROWS) {
                for (sum, &value) in group.iter_mut().zip(&values[row * stride..]) {
                    *sum += value;
                }
            }
            for (sum, &part) in sums.iter_mut().zip(&*group) {
                *sum += part;
            }
        }
    }
}
