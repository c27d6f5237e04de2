//! Matrix products in row-major terms: what a [`Driver`](super::launch::Driver) is asked to multiply, and the checks before it.
//!
//! ```text
//! output = epilogue(left right + addend)        left [rows, depth], right [depth, columns], output [rows, columns]
//! ```
//!
//! Sums are kept in f32 whatever the elements are, with one rounding at the end. No TF32: f32 products are f32 throughout.

use half::bf16;

use super::error::{CudaError, Result};
use super::launch::{DeviceId, MAX_32_BIT, Slice, SliceMut, Stream, within};

/// The type of a matrix's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GemmType {
    /// 32-bit floating point.
    F32,
    /// bfloat16.
    Bf16,
}

impl GemmType {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A number that matrices consist of: `f32` or [`bf16`].
pub trait GemmElement: bytemuck::Pod + sealed::Sealed {
    /// Its type.
    const TYPE: GemmType;
}

impl GemmElement for f32 {
    const TYPE: GemmType = GemmType::F32;
}

impl GemmElement for bf16 {
    const TYPE: GemmType = GemmType::Bf16;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// How a factor lies in memory: in rows of `stride` elements, as it is or as its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Whether memory holds the transpose.
    pub transposed: bool,
    /// Elements from one row in memory to the next.
    pub stride: usize,
}

impl Layout {
    /// As it is, in rows of `stride` elements.
    #[must_use]
    pub fn rows(stride: usize) -> Self {
        Self { transposed: false, stride }
    }

    /// As its transpose, which has rows of `stride` elements.
    #[must_use]
    pub fn transposed(stride: usize) -> Self {
        Self { transposed: true, stride }
    }
}

/// Sizes and layouts of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// Rows of the output and of the left factor.
    pub rows: usize,
    /// Columns of the output and of the right factor.
    pub columns: usize,
    /// Columns of the left factor, rows of the right one.
    pub depth: usize,
    /// The left factor, `[rows, depth]`.
    pub left: Layout,
    /// The right factor, `[depth, columns]`.
    pub right: Layout,
    /// Elements from one row of the output to the next, and of every other matrix `[rows, columns]`.
    pub output_stride: usize,
}

/// What is added to a product before its epilogue.
#[derive(Debug)]
pub enum Addend<'a, O> {
    /// Nothing; the output's old content is not read.
    Nothing,
    /// What the output holds.
    Output,
    /// Another matrix of the output's layout.
    Matrix(&'a Slice<'a, O>),
}

/// What happens to a sum before it is rounded and stored.
#[derive(Debug)]
pub enum Epilogue<'a, O> {
    /// Nothing.
    Nothing,
    /// A bias `[columns]` is added to every row.
    Bias(&'a Slice<'a, O>),
    /// A bias is added, the result is stored in `pre` (in the output's layout), and GELU in its tanh form is applied.
    /// `pre` starts at a multiple of 16 bytes and the output's stride is a multiple of 8 elements.
    BiasGeluTanh {
        /// `[columns]`.
        bias: &'a Slice<'a, O>,
        /// What GELU is applied to, for backward.
        pre: SliceMut<'a, O>,
    },
}

/// [`Epilogue`] without its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EpilogueKind {
    /// [`Epilogue::Nothing`].
    Nothing,
    /// [`Epilogue::Bias`].
    Bias,
    /// [`Epilogue::BiasGeluTanh`].
    BiasGeluTanh,
}

/// Everything about a product but where its matrices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmDescription {
    /// Sizes and layouts.
    pub gemm: Gemm,
    /// Elements of the factors.
    pub input: GemmType,
    /// Elements of everything else.
    pub output: GemmType,
    /// Whether there is an addend.
    pub adds: bool,
    /// What happens to the sums.
    pub epilogue: EpilogueKind,
}

/// Where the matrices of a product are; 0 for what its description does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GemmAddresses {
    /// The output.
    pub output: u64,
    /// The left factor.
    pub left: u64,
    /// The right factor.
    pub right: u64,
    /// The addend; may be the output.
    pub addend: u64,
    /// The bias.
    pub bias: u64,
    /// The values before the activation.
    pub pre: u64,
}

/// A product as a column-major library sees it: `d [m, n] = op(a) [m, k] op(b) [k, n]`.
///
/// A row-major matrix is the transpose of the column-major one in the same memory, so the library computes the output's
/// transpose: `a` is the right factor, `b` the left one, and features lie along `m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnMajor {
    /// Rows of `d` and of `op(a)`.
    pub m: usize,
    /// Columns of `d` and of `op(b)`.
    pub n: usize,
    /// Columns of `op(a)`, rows of `op(b)`.
    pub k: usize,
    /// The right factor.
    pub a: ColumnMajorMatrix,
    /// The left factor.
    pub b: ColumnMajorMatrix,
    /// The output.
    pub d: ColumnMajorMatrix,
}

/// A matrix in column-major memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnMajorMatrix {
    /// Rows in memory.
    pub rows: usize,
    /// Columns in memory.
    pub columns: usize,
    /// Elements from one column in memory to the next.
    pub leading_dimension: usize,
    /// Whether the product takes the transpose of what is in memory.
    pub transposed: bool,
}

impl Gemm {
    /// The same product for a column-major library.
    #[must_use]
    pub fn column_major(&self) -> ColumnMajor {
        let Self { rows, columns, depth, left, right, output_stride } = *self;
        let matrix = |layout: Layout, rows, columns| {
            let (rows, columns) = if layout.transposed { (columns, rows) } else { (rows, columns) };
            // In memory: `rows` rows of `columns` elements, which are columns of `rows` elements to the library.
            ColumnMajorMatrix {
                rows: columns,
                columns: rows,
                leading_dimension: layout.stride,
                transposed: layout.transposed,
            }
        };
        ColumnMajor {
            m: columns,
            n: rows,
            k: depth,
            a: matrix(right, depth, columns),
            b: matrix(left, rows, depth),
            d: matrix(Layout::rows(output_stride), rows, columns),
        }
    }
}

/// Elements from the first to the last of a matrix in memory, both included.
pub(super) fn span(layout: Layout, rows: usize, columns: usize) -> usize {
    let (rows, columns) = if layout.transposed { (columns, rows) } else { (rows, columns) };
    match (rows, columns) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1).saturating_mul(layout.stride).saturating_add(columns),
    }
}

impl Stream {
    /// Multiplies matrices: `output = epilogue(left right + addend)`.
    ///
    /// An output without elements is no work. The matrices may lie in longer slices.
    ///
    /// Errors: sizes outside 1 to 2³¹ - 1, a stride shorter than a row, a slice that is too short or on another device, an
    /// epilogue's alignment; and on a GPU, no algorithm for this combination or a failed launch.
    pub fn gemm<I: GemmElement, O: GemmElement>(
        &self,
        gemm: Gemm,
        output: &mut SliceMut<'_, O>,
        left: &Slice<'_, I>,
        right: &Slice<'_, I>,
        addend: Addend<'_, O>,
        epilogue: Epilogue<'_, O>,
    ) -> Result<()> {
        const OP: &str = "gemm";
        let Gemm { rows, columns, depth, output_stride, .. } = gemm;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        for (what, size) in [("rows", rows), ("columns", columns), ("depth", depth)] {
            within(OP, what, size as u64, 1..=MAX_32_BIT)?;
        }
        let output_layout = Layout::rows(output_stride);
        let mut argument = 0;
        let mut check =
            |what: &'static str, layout: Layout, rows: usize, columns: usize, length: usize, of: DeviceId| {
                let width = if layout.transposed { rows } else { columns };
                within(OP, "stride", layout.stride as u64, width as u64..=MAX_32_BIT)?;
                within(OP, what, length as u64, span(layout, rows, columns) as u64..=u64::MAX)?;
                if of != self.device() {
                    return Err(CudaError::WrongDevice { op: OP, argument });
                }
                argument += 1;
                Ok(())
            };
        let (output_address, output_length, output_device) = output.place();
        check("length of the output", output_layout, rows, columns, output_length, output_device)?;
        let (left_address, length, device) = left.place();
        check("length of the left factor", gemm.left, rows, depth, length, device)?;
        let (right_address, length, device) = right.place();
        check("length of the right factor", gemm.right, depth, columns, length, device)?;
        let mut matrix = |what, (address, length, device): (u64, usize, DeviceId)| {
            check(what, output_layout, rows, columns, length, device).map(|()| address)
        };
        let addend = match addend {
            Addend::Nothing => 0,
            Addend::Output => output_address,
            Addend::Matrix(addend) => matrix("length of the addend", addend.place())?,
        };
        let (kind, bias, pre) = match &epilogue {
            Epilogue::Nothing => (EpilogueKind::Nothing, None, 0),
            Epilogue::Bias(bias) => (EpilogueKind::Bias, Some((bias.place(), columns)), 0),
            Epilogue::BiasGeluTanh { bias, pre } => {
                let pre = matrix("length of the activation's input", pre.place())?;
                (EpilogueKind::BiasGeluTanh, Some((bias.place(), columns)), pre)
            }
        };
        if pre != 0 {
            within(OP, "stride of the activation's input modulo 8", (output_stride % 8) as u64, 0..=0)?;
            within(OP, "address of the activation's input modulo 16", pre % 16, 0..=0)?;
        }
        let bias = match bias {
            None => 0,
            Some(((address, length, device), needed)) => {
                check("length of the bias", Layout::rows(needed), 1, needed, length, device)?;
                address
            }
        };
        let description = GemmDescription { gemm, input: I::TYPE, output: O::TYPE, adds: addend != 0, epilogue: kind };
        let addresses =
            GemmAddresses { output: output_address, left: left_address, right: right_address, addend, bias, pre };
        // SAFETY: every matrix lies in its slice, on this device; the borrows keep what is written apart from the rest.
        unsafe { self.driver().gemm(&description, &addresses) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements of a row-major factor as the product sees them.
    fn row_major(memory: &[f64], layout: Layout, row: usize, column: usize) -> f64 {
        let (row, column) = if layout.transposed { (column, row) } else { (row, column) };
        memory[row * layout.stride + column]
    }

    /// Elements of a column-major factor as the library's product sees them.
    fn column_major(memory: &[f64], matrix: ColumnMajorMatrix, row: usize, column: usize) -> f64 {
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        assert!(row < matrix.rows && column < matrix.columns);
        memory[column * matrix.leading_dimension + row]
    }

    #[test]
    fn the_column_major_view_is_the_same_product() {
        let (rows, columns, depth) = (3, 5, 4);
        for (left, right) in [(false, false), (false, true), (true, false), (true, true)] {
            let layout = |transposed, rows: usize, columns: usize| Layout {
                transposed,
                stride: 2 + if transposed { rows } else { columns },
            };
            let (left, right) = (layout(left, rows, depth), layout(right, depth, columns));
            let gemm = Gemm { rows, columns, depth, left, right, output_stride: columns + 1 };
            let numbers = |length: usize, step: f64| (0..length).map(|i| (i as f64 * step).sin()).collect::<Vec<_>>();
            let left_memory = numbers(span(left, rows, depth), 0.7);
            let right_memory = numbers(span(right, depth, columns), 1.3);

            let view = gemm.column_major();
            assert_eq!((view.m, view.n, view.k), (columns, rows, depth));
            assert!(!view.d.transposed && (view.d.rows, view.d.columns) == (columns, rows));
            for row in 0..rows {
                for column in 0..columns {
                    let expected: f64 = (0..depth)
                        .map(|i| row_major(&left_memory, left, row, i) * row_major(&right_memory, right, i, column))
                        .sum();
                    let found: f64 = (0..depth)
                        .map(|i| {
                            column_major(&right_memory, view.a, column, i) * column_major(&left_memory, view.b, i, row)
                        })
                        .sum();
                    assert_eq!(found, expected);
                    // Element (row, column) of the output is element (column, row) of `d`, at the same place.
                    assert_eq!(row * gemm.output_stride + column, row * view.d.leading_dimension + column);
                }
            }
        }
    }

    #[test]
    fn a_linear_layer_is_transposed_times_plain_to_the_library() {
        // y [rows, outputs] = x [rows, inputs] weightᵀ, weight [outputs, inputs]: the layout that libraries like best.
        let (rows, inputs, outputs) = (50, 768, 2304);
        let gemm = Gemm {
            rows,
            columns: outputs,
            depth: inputs,
            left: Layout::rows(inputs),
            right: Layout::transposed(inputs),
            output_stride: outputs,
        };
        let view = gemm.column_major();
        let matrix = |rows, columns, leading_dimension, transposed| ColumnMajorMatrix {
            rows,
            columns,
            leading_dimension,
            transposed,
        };
        assert_eq!(view.a, matrix(inputs, outputs, inputs, true));
        assert_eq!(view.b, matrix(inputs, rows, inputs, false));
        assert_eq!(view.d, matrix(outputs, rows, outputs, false));
    }

    #[test]
    fn spans_end_with_the_last_element() {
        assert_eq!(span(Layout::rows(10), 3, 4), 24);
        assert_eq!(span(Layout::transposed(10), 3, 4), 33);
        assert_eq!(span(Layout::rows(10), 0, 4), 0);
    }
}
