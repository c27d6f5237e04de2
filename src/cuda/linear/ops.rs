//! Linear layers as the model calls them.

use super::*;
use crate::cuda::backend::{Cuda, CudaBuffer};
use crate::ops::Linear;

impl<E: CudaElement> Cuda<E> {
    /// Lends a bias in the type that epilogues take.
    fn with_bias(
        &self,
        op: &'static str,
        outputs: usize,
        bias: Option<&CudaBuffer<f32>>,
        work: impl FnOnce(Option<&Slice<'_, E>>) -> Result<()>,
    ) -> crate::Result<()> {
        let Some(bias) = bias else { return Ok(work(None)?) };
        let bias = bias.input(op, "bias", &[outputs])?;
        if E::is_master() {
            return Ok(work(Some(&bias.reinterpret()))?);
        }
        self.with_scratch(outputs.div_ceil(2), |scratch| {
            let mut rounded = scratch.reinterpret();
            let mut rounded = rounded.range(0..outputs)?;
            bias_round(self.stream(), &mut rounded, &bias)?;
            Ok(work(Some(&rounded.as_slice().reinterpret()))?)
        })
    }
}

impl<E: CudaElement> Linear for Cuda<E> {
    fn linear_forward(
        &self,
        shape: LinearShape,
        y: &mut CudaBuffer<E>,
        x: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
        bias: Option<&CudaBuffer<f32>>,
    ) -> crate::Result<()> {
        let op = "linear_forward";
        let mut y = y.output(op, "y", &[shape.rows, shape.outputs])?;
        let x = x.input(op, "x", &[shape.rows, shape.inputs])?;
        let weight = weight.input(op, "weight", &[shape.outputs, shape.inputs])?;
        self.with_bias(op, shape.outputs, bias, |bias| {
            linear_forward(self.stream(), &mut y, Addend::Nothing, &x, &weight, bias, shape)
        })
    }

    fn linear_residual_forward(
        &self,
        shape: LinearShape,
        y: &mut CudaBuffer<E>,
        residual: &CudaBuffer<E>,
        x: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
        bias: Option<&CudaBuffer<f32>>,
    ) -> crate::Result<()> {
        let op = "linear_residual_forward";
        let mut y = y.output(op, "y", &[shape.rows, shape.outputs])?;
        let residual = residual.input(op, "residual", &[shape.rows, shape.outputs])?;
        let x = x.input(op, "x", &[shape.rows, shape.inputs])?;
        let weight = weight.input(op, "weight", &[shape.outputs, shape.inputs])?;
        self.with_bias(op, shape.outputs, bias, |bias| {
            linear_forward(self.stream(), &mut y, Addend::Matrix(&residual), &x, &weight, bias, shape)
        })
    }

    fn linear_activation_forward(
        &self,
        shape: LinearShape,
        activation: Activation,
        y: &mut CudaBuffer<E>,
        pre: &mut CudaBuffer<E>,
        x: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
        bias: Option<&CudaBuffer<f32>>,
    ) -> crate::Result<()> {
        let op = "linear_activation_forward";
        let mut y = y.output(op, "y", &[shape.rows, shape.outputs])?;
        let mut pre = pre.output(op, "pre", &[shape.rows, shape.outputs])?;
        let x = x.input(op, "x", &[shape.rows, shape.inputs])?;
        let weight = weight.input(op, "weight", &[shape.outputs, shape.inputs])?;
        self.with_bias(op, shape.outputs, bias, |bias| {
            linear_activation_forward(self.stream(), &mut y, &mut pre, &x, &weight, bias, shape, activation)
        })
    }

    fn activation_forward(
        &self,
        length: usize,
        activation: Activation,
        y: &mut CudaBuffer<E>,
        pre: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "activation_forward";
        let mut y = y.output(op, "y", &[length])?;
        let pre = pre.input(op, "pre", &[length])?;
        Ok(activation_forward(self.stream(), &mut y, &pre, activation)?)
    }

    fn linear_backward_input(
        &self,
        shape: LinearShape,
        write: Write,
        dx: &mut CudaBuffer<E>,
        dy: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "linear_backward_input";
        let mut dx = dx.output(op, "dx", &[shape.rows, shape.inputs])?;
        let dy = dy.input(op, "dy", &[shape.rows, shape.outputs])?;
        let weight = weight.input(op, "weight", &[shape.outputs, shape.inputs])?;
        Ok(linear_backward_input(self.stream(), &mut dx, &dy, &weight, shape, write)?)
    }

    fn linear_activation_backward_input(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut CudaBuffer<E>,
        dy: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
        pre: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "linear_activation_backward_input";
        let mut dpre = dpre.output(op, "dpre", &[shape.rows, shape.inputs])?;
        let dy = dy.input(op, "dy", &[shape.rows, shape.outputs])?;
        let weight = weight.input(op, "weight", &[shape.outputs, shape.inputs])?;
        let pre = pre.input(op, "pre", &[shape.rows, shape.inputs])?;
        Ok(linear_activation_backward_input(self.stream(), &mut dpre, &dy, &weight, &pre, shape, activation)?)
    }

    fn linear_activation_backward(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut CudaBuffer<E>,
        y: &mut CudaBuffer<E>,
        dbias: Option<&mut CudaBuffer<f32>>,
        dy: &CudaBuffer<E>,
        weight: &CudaBuffer<E>,
        pre: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "linear_activation_backward";
        let LinearShape { rows, inputs, outputs } = shape;
        let Some(dbias) = dbias else {
            self.activation_forward(rows.saturating_mul(inputs), activation, y, pre)?;
            return self.linear_activation_backward_input(shape, activation, dpre, dy, weight, pre);
        };
        let mut dpre = dpre.output(op, "dpre", &[rows, inputs])?;
        let mut y = y.output(op, "y", &[rows, inputs])?;
        let mut dbias = dbias.output(op, "dbias", &[inputs])?;
        let dy = dy.input(op, "dy", &[rows, outputs])?;
        let weight = weight.input(op, "weight", &[outputs, inputs])?;
        let pre = pre.input(op, "pre", &[rows, inputs])?;
        let (stream, scratch) = (self.stream(), bias_backward_scratch(rows, inputs));
        linear_backward_input(stream, &mut dpre, &dy, &weight, shape, Write::Assign)?;
        self.with_scratch(scratch, |scratch| {
            let (dpre, y, dbias) = (&mut dpre, &mut y, &mut dbias);
            Ok(activation_backward_bias(stream, dpre, y, dbias, scratch, &pre, rows, inputs, activation)?)
        })
    }

    fn linear_backward_weight(
        &self,
        shape: LinearShape,
        dweight: &mut CudaBuffer<f32>,
        dbias: Option<&mut CudaBuffer<f32>>,
        dy: &CudaBuffer<E>,
        x: &CudaBuffer<E>,
    ) -> crate::Result<()> {
        let op = "linear_backward_weight";
        let LinearShape { rows, inputs, outputs } = shape;
        let mut dweight = dweight.output(op, "dweight", &[outputs, inputs])?;
        let dy = dy.input(op, "dy", &[rows, outputs])?;
        let x = x.input(op, "x", &[rows, inputs])?;
        let dbias = dbias.map(|dbias| dbias.output(op, "dbias", &[outputs])).transpose()?;
        let stream = self.stream();
        let Some(mut dbias) = dbias else {
            return Ok(linear_backward_weight(stream, &mut dweight, &dy, &x, shape)?);
        };
        self.with_scratch(bias_backward_scratch(rows, outputs), |scratch| {
            linear_backward_weight(stream, &mut dweight, &dy, &x, shape)?;
            Ok(bias_backward(stream, &mut dbias, scratch, &dy, rows, outputs)?)
        })
    }
}
