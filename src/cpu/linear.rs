//! Linear layers: matrix products with bias, activation and residual behind each block.

use crate::Result;
use crate::cpu::gemm::{self, Matrix, Sizes};
use crate::cpu::math::vectorized;
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
        forward(op, shape, y, x, weight, bias, |_, _| ())
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
        forward(op, shape, y, x, weight, bias, |at, y| {
            for (y, &residual) in y.iter_mut().zip(&residual[at..]) {
                *y += residual;
            }
        })
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
        forward(op, shape, pre, x, weight, bias, |at, pre| {
            // SAFETY: as long as `pre`, of which nobody else has this part.
            let y = unsafe { y.part(at, at + pre.len()) };
            activate(activation, y, pre);
        })
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
            vectorized(|| activate(activation, y, &pre[from..to]));
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
        backward_input(op, shape, write, dx, dy, weight, |_, _| ())
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
        backward_input(op, shape, Write::Assign, dpre, dy, weight, |at, dpre| {
            multiply_by_derivative(activation, dpre, &pre[at..at + dpre.len()]);
        })
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
            let dbias = Shared::new(dbias);
            parallel::pieces(outputs, BIAS_COLUMNS, |from, to| {
                // SAFETY: pieces are disjoint and inside `outputs`.
                let dbias = unsafe { dbias.part(from, to) };
                vectorized(|| add_column_sums(dbias, &dy[from..], outputs, rows));
            });
        }
        Ok(())
    }
}

/// `y = x weightᵀ + bias`; then `finish(at, part)` for every part of a row of `y`, `at` elements from its start.
fn forward<F: Float>(
    op: &'static str,
    shape: LinearShape,
    y: &mut [F],
    x: &[F],
    weight: &[F],
    bias: Option<&CpuBuffer<F>>,
    finish: impl Fn(usize, &mut [F]) + Sync,
) -> Result<()> {
    let LinearShape { rows, inputs, outputs } = shape;
    let x = check::input(op, "x", x, &[rows, inputs])?;
    let weight = check::input(op, "weight", weight, &[outputs, inputs])?;
    let bias = bias.map(|bias| check::input(op, "bias", bias, &[outputs])).transpose()?;
    let sizes = Sizes { rows, columns: outputs, depth: inputs };
    let y = Shared::new(y);
    let (left, right) = (Matrix::rows(x.as_ptr(), inputs), Matrix::rows(weight.as_ptr(), inputs).transposed());
    let finish = |(row, last_row): (usize, usize), (column, last_column): (usize, usize)| {
        vectorized(|| {
            for row in row..last_row {
                // SAFETY: blocks are disjoint and inside `y`.
                let y = unsafe { y.part(row * outputs + column, row * outputs + last_column) };
                if let Some(bias) = bias {
                    for (y, &bias) in y.iter_mut().zip(&bias[column..]) {
                        *y += bias;
                    }
                }
                finish(row * outputs + column, y);
            }
        });
    };
    // SAFETY: the three slices have the sizes of the shape.
    unsafe { gemm::multiply(sizes, Write::Assign, &y, left, right, finish) }
}

/// `dx (+)= dy weight`; `finish` as in [`forward`].
fn backward_input<F: Float>(
    op: &'static str,
    shape: LinearShape,
    write: Write,
    dx: &mut [F],
    dy: &[F],
    weight: &[F],
    finish: impl Fn(usize, &mut [F]) + Sync,
) -> Result<()> {
    let LinearShape { rows, inputs, outputs } = shape;
    let dy = check::input(op, "dy", dy, &[rows, outputs])?;
    let weight = check::input(op, "weight", weight, &[outputs, inputs])?;
    let sizes = Sizes { rows, columns: inputs, depth: outputs };
    let dx = Shared::new(dx);
    let (left, right) = (Matrix::rows(dy.as_ptr(), outputs), Matrix::rows(weight.as_ptr(), inputs));
    let finish = |(row, last_row): (usize, usize), (column, last_column): (usize, usize)| {
        vectorized(|| {
            for row in row..last_row {
                let at = row * inputs + column;
                // SAFETY: blocks are disjoint and inside `dx`.
                finish(at, unsafe { dx.part(at, at + last_column - column) });
            }
        });
    };
    // SAFETY: the three slices have the sizes of the shape.
    unsafe { gemm::multiply(sizes, write, &dx, left, right, finish) }
}

/// Adds the sums over `rows` rows of `stride` elements to `sums`, in groups of rows so that rounding errors stay small.
#[inline(always)]
fn add_column_sums<F: Float>(sums: &mut [F], values: &[F], stride: usize, rows: usize) {
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

/// `y = activation(x)`.
#[inline(always)]
fn activate<F: Float>(activation: Activation, y: &mut [F], x: &[F]) {
    match activation {
        Activation::Gelu => map(y, x, |x| x * normal_distribution(x)),
        Activation::GeluTanh => map(y, x, |x| x * sigmoid(tanh_argument(x))),
        Activation::Relu => map(y, x, |x| if x < F::ZERO { F::ZERO } else { x }),
        Activation::Silu => map(y, x, |x| x * sigmoid(x)),
        Activation::QuickGelu => map(y, x, |x| x * sigmoid(F::from_f64(QUICK) * x)),
    }
}

/// `y *= activation'(x)`.
#[inline(always)]
fn multiply_by_derivative<F: Float>(activation: Activation, y: &mut [F], x: &[F]) {
    match activation {
        Activation::Gelu => scale(y, x, |x| {
            let density = (x * x * F::from_f64(-0.5)).exp() * F::from_f64(0.398_942_280_401_432_7);
            x.mul_add(density, normal_distribution(x))
        }),
        Activation::GeluTanh => scale(y, x, |x| {
            let x = within(x, F::from_f64(20.0));
            let s = sigmoid(tanh_argument(x));
            let inner = (x * x).mul_add(F::from_f64(6.0 * TANH_FACTOR * TANH_CUBE), F::from_f64(2.0 * TANH_FACTOR));
            (x * s * (F::ONE - s)).mul_add(inner, s)
        }),
        Activation::Relu => scale(y, x, |x| if x > F::ZERO { F::ONE } else { F::ZERO }),
        Activation::Silu => scale(y, x, |x| {
            let s = sigmoid(x);
            (x * s).mul_add(F::ONE - s, s)
        }),
        Activation::QuickGelu => scale(y, x, |x| {
            let s = sigmoid(F::from_f64(QUICK) * x);
            (F::from_f64(QUICK) * x * s).mul_add(F::ONE - s, s)
        }),
    }
}

#[inline(always)]
fn map<F: Float>(y: &mut [F], x: &[F], function: impl Fn(F) -> F) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = function(x);
    }
}

#[inline(always)]
fn scale<F: Float>(y: &mut [F], x: &[F], function: impl Fn(F) -> F) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y *= function(x);
    }
}

/// `sqrt(2 / pi)`.
const TANH_FACTOR: f64 = 0.797_884_560_802_865_4;
/// The coefficient of the cube in the tanh approximation.
const TANH_CUBE: f64 = 0.044_715;
/// The factor in the sigmoid approximation.
const QUICK: f64 = 1.702;

/// The normal distribution's cumulative function.
#[inline(always)]
fn normal_distribution<F: Float>(x: F) -> F {
    (x * F::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf().mul_add(F::from_f64(0.5), F::from_f64(0.5))
}

/// `2 u`, where the tanh approximation is `x (1 + tanh u) / 2`, which is `x sigmoid(2 u)`.
#[inline(always)]
fn tanh_argument<F: Float>(x: F) -> F {
    x * (x * x).mul_add(F::from_f64(2.0 * TANH_FACTOR * TANH_CUBE), F::from_f64(2.0 * TANH_FACTOR))
}

#[inline(always)]
fn sigmoid<F: Float>(x: F) -> F {
    F::ONE / (F::ONE + (-x).exp())
}

#[inline(always)]
fn within<F: Float>(x: F, bound: F) -> F {
    let x = if x > bound { bound } else { x };
    if x < -bound { -bound } else { x }
}
