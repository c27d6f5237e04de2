//! Matrix products with what surrounds them: bias, activation, residual.

use crate::Result;
use crate::ops::{Activation, Cost, Memory, Write};

/// Sizes of a linear layer: `rows` vectors from `inputs` to `outputs` features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of x, and of the weight.
    pub inputs: usize,
    /// Columns of y, rows of the weight.
    pub outputs: usize,
}

impl LinearShape {
    /// One of the three products of a layer (forward, input gradient, weight gradient): all have the same cost.
    #[must_use]
    pub fn cost(&self, element_bytes: usize) -> Cost {
        let Self { rows, inputs, outputs } = *self;
        Cost {
            bytes: ((rows * inputs + inputs * outputs + rows * outputs) * element_bytes) as u64,
            flops: 2 * (rows * inputs * outputs) as u64,
        }
    }
}

/// Linear layers: `weight` is `[outputs, inputs]`, `bias` `[outputs]`, x `[rows, inputs]`, y `[rows, outputs]`.
pub trait Linear: Memory {
    /// `y = x weightᵀ + bias`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for short buffers; the same holds for every op here.
    fn linear_forward(
        &self,
        shape: LinearShape,
        y: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        bias: Option<&Self::Buffer<Self::Master>>,
    ) -> Result<()>;

    /// `y = residual + x weightᵀ + bias`, with `residual` `[rows, outputs]`.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    fn linear_residual_forward(
        &self,
        shape: LinearShape,
        y: &mut Self::Buffer<Self::Element>,
        residual: &Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        bias: Option<&Self::Buffer<Self::Master>>,
    ) -> Result<()>;

    /// `pre = x weightᵀ + bias` (saved for backward) and `y = activation(pre)`.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    #[expect(clippy::too_many_arguments, reason = "two outputs and three inputs")]
    fn linear_activation_forward(
        &self,
        shape: LinearShape,
        activation: Activation,
        y: &mut Self::Buffer<Self::Element>,
        pre: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        bias: Option<&Self::Buffer<Self::Master>>,
    ) -> Result<()>;

    /// `y = activation(pre)` for `length` numbers: recomputes in backward what forward did not keep.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    fn activation_forward(
        &self,
        length: usize,
        activation: Activation,
        y: &mut Self::Buffer<Self::Element>,
        pre: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// `dx (+)= dy weight`.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    fn linear_backward_input(
        &self,
        shape: LinearShape,
        write: Write,
        dx: &mut Self::Buffer<Self::Element>,
        dy: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// `dpre = (dy weight) * activation'(pre)`: the input gradient of a layer whose input was `activation(pre)`, with
    /// `pre` `[rows, inputs]`.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    fn linear_activation_backward_input(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut Self::Buffer<Self::Element>,
        dy: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        pre: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// Everything that backward needs of an activation between two layers: `dpre = (dy weight) * activation'(pre)`;
    /// `y = activation(pre)` again, for this layer's weight gradient; and `dbias += sum over rows of dpre`, `[inputs]`, the
    /// bias gradient of the layer before, which is then not asked for again.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    #[expect(clippy::too_many_arguments, reason = "three outputs and three inputs")]
    fn linear_activation_backward(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut Self::Buffer<Self::Element>,
        y: &mut Self::Buffer<Self::Element>,
        dbias: Option<&mut Self::Buffer<Self::Master>>,
        dy: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        pre: &Self::Buffer<Self::Element>,
    ) -> Result<()>;

    /// `dweight += dyᵀ x` and `dbias += sum over rows of dy`.
    ///
    /// # Errors
    /// As [`Linear::linear_forward`].
    fn linear_backward_weight(
        &self,
        shape: LinearShape,
        dweight: &mut Self::Buffer<Self::Master>,
        dbias: Option<&mut Self::Buffer<Self::Master>>,
        dy: &Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
    ) -> Result<()>;
}
