//! The naive computation in bf16: every op in f64 on the CPU, its activations rounded to bf16 behind it, weights rounded before.
//!
//! No kernel can be expected to be better than about this; how much worse one is, is what tests bound.

use half::bf16;
use vitmae::Result;
use vitmae::cpu::{Cpu, CpuBuffer};
use vitmae::ops::*;

type Numbers = CpuBuffer<f64>;

/// A CPU whose activations and working weights hold bf16 numbers.
#[derive(Debug, Default)]
pub struct Rounding(Cpu<f64>);

fn round(numbers: &mut Numbers) {
    numbers.iter_mut().for_each(|number| *number = bf16::from_f64(*number).to_f64());
}

/// The same pixels for the CPU inside.
fn inner(pixels: Pixels<'_, Rounding>) -> Pixels<'_, Cpu<f64>> {
    match pixels {
        Pixels::Normalized(values) => Pixels::Normalized(values),
        Pixels::Bytes { values, mean, std } => Pixels::Bytes { values, mean, std },
    }
}

impl Memory for Rounding {
    type Element = f64;
    type Master = f64;
    type Buffer<T: Element> = CpuBuffer<T>;

    fn buffer<T: Element>(&self, length: usize) -> Result<CpuBuffer<T>> {
        self.0.buffer(length)
    }

    unsafe fn alias<T: Element>(&self, buffer: &CpuBuffer<T>, offset: usize, length: usize) -> Result<CpuBuffer<T>> {
        // SAFETY: the caller's promise.
        unsafe { self.0.alias(buffer, offset, length) }
    }

    unsafe fn working_copy(&self, _master: &Numbers, length: usize) -> Result<Numbers> {
        self.0.buffer(length)
    }

    fn refresh(&self, working: &mut Numbers, master: &Numbers) -> Result<()> {
        let length = working.len();
        working.copy_from_slice(&master[..length]);
        round(working);
        Ok(())
    }

    fn length<T: Element>(&self, buffer: &CpuBuffer<T>) -> usize {
        buffer.len()
    }

    fn upload<T: Element>(&self, to: &mut CpuBuffer<T>, from: &[T]) -> Result<()> {
        self.0.upload(to, from)
    }

    fn download<T: Element>(&self, to: &mut [T], from: &CpuBuffer<T>) -> Result<()> {
        self.0.download(to, from)
    }

    fn zero<T: Element>(&self, buffer: &mut CpuBuffer<T>) -> Result<()> {
        self.0.zero(buffer)
    }
}

impl Collectives for Rounding {}

impl Record for Rounding {
    type Recording = <Cpu<f64> as Record>::Recording;

    fn records(&self) -> bool {
        false
    }

    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Recording> {
        self.0.record(work)
    }

    unsafe fn replay(&self, recording: &Self::Recording) -> Result<bool> {
        // SAFETY: the caller's promise.
        unsafe { self.0.replay(recording) }
    }
}

impl PatchMasking for Rounding {
    fn masking_from_noise(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CpuBuffer<u32>,
        ids_hidden: &mut CpuBuffer<u32>,
        ids_restore: &mut CpuBuffer<u32>,
        mask: &mut CpuBuffer<f32>,
        noise: &CpuBuffer<f32>,
    ) -> Result<()> {
        self.0.masking_from_noise(shape, ids_keep, ids_hidden, ids_restore, mask, noise)
    }

    fn masking_random(
        &self,
        shape: MaskingShape,
        ids_keep: &mut CpuBuffer<u32>,
        ids_hidden: &mut CpuBuffer<u32>,
        ids_restore: &mut CpuBuffer<u32>,
        mask: &mut CpuBuffer<f32>,
        random: RandomMask,
        samples: &CpuBuffer<u64>,
    ) -> Result<()> {
        self.0.masking_random(shape, ids_keep, ids_hidden, ids_restore, mask, random, samples)
    }
}

impl Patchify for Rounding {
    fn patchify_visible_forward(
        &self,
        image: ImageShape,
        batch: usize,
        visible: usize,
        rows: &mut Numbers,
        pixels: Pixels<'_, Self>,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.patchify_visible_forward(image, batch, visible, rows, inner(pixels), ids)?;
        round(rows);
        Ok(())
    }
}

impl Linear for Rounding {
    fn linear_forward(
        &self,
        shape: LinearShape,
        y: &mut Numbers,
        x: &Numbers,
        weight: &Numbers,
        bias: Option<&Numbers>,
    ) -> Result<()> {
        self.0.linear_forward(shape, y, x, weight, bias)?;
        round(y);
        Ok(())
    }

    fn linear_residual_forward(
        &self,
        shape: LinearShape,
        y: &mut Numbers,
        residual: &Numbers,
        x: &Numbers,
        weight: &Numbers,
        bias: Option<&Numbers>,
    ) -> Result<()> {
        self.0.linear_residual_forward(shape, y, residual, x, weight, bias)?;
        round(y);
        Ok(())
    }

    fn linear_activation_forward(
        &self,
        shape: LinearShape,
        activation: Activation,
        y: &mut Numbers,
        pre: &mut Numbers,
        x: &Numbers,
        weight: &Numbers,
        bias: Option<&Numbers>,
    ) -> Result<()> {
        self.0.linear_activation_forward(shape, activation, y, pre, x, weight, bias)?;
        round(y);
        round(pre);
        Ok(())
    }

    fn activation_forward(&self, length: usize, activation: Activation, y: &mut Numbers, pre: &Numbers) -> Result<()> {
        self.0.activation_forward(length, activation, y, pre)?;
        round(y);
        Ok(())
    }

    fn linear_backward_input(
        &self,
        shape: LinearShape,
        write: Write,
        dx: &mut Numbers,
        dy: &Numbers,
        weight: &Numbers,
    ) -> Result<()> {
        self.0.linear_backward_input(shape, write, dx, dy, weight)?;
        round(dx);
        Ok(())
    }

    fn linear_activation_backward_input(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut Numbers,
        dy: &Numbers,
        weight: &Numbers,
        pre: &Numbers,
    ) -> Result<()> {
        self.0.linear_activation_backward_input(shape, activation, dpre, dy, weight, pre)?;
        round(dpre);
        Ok(())
    }

    fn linear_activation_backward(
        &self,
        shape: LinearShape,
        activation: Activation,
        dpre: &mut Numbers,
        y: &mut Numbers,
        dbias: Option<&mut Numbers>,
        dy: &Numbers,
        weight: &Numbers,
        pre: &Numbers,
    ) -> Result<()> {
        self.0.linear_activation_backward(shape, activation, dpre, y, dbias, dy, weight, pre)?;
        round(dpre);
        round(y);
        Ok(())
    }

    fn linear_backward_weight(
        &self,
        shape: LinearShape,
        dweight: &mut Numbers,
        dbias: Option<&mut Numbers>,
        dy: &Numbers,
        x: &Numbers,
    ) -> Result<()> {
        self.0.linear_backward_weight(shape, dweight, dbias, dy, x)
    }
}

impl Tokens for Rounding {
    fn tokens_assemble_forward(
        &self,
        shape: TokensShape,
        x: &mut Numbers,
        patches: &Numbers,
        class_token: &Numbers,
        positions: &Numbers,
        ids_keep: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.tokens_assemble_forward(shape, x, patches, class_token, positions, ids_keep)?;
        round(x);
        Ok(())
    }

    fn tokens_assemble_backward(
        &self,
        shape: TokensShape,
        dpatches: &mut Numbers,
        dclass_token: &mut Numbers,
        dx: &Numbers,
    ) -> Result<()> {
        self.0.tokens_assemble_backward(shape, dpatches, dclass_token, dx)?;
        round(dpatches);
        Ok(())
    }

    fn tokens_unshuffle_forward(
        &self,
        shape: TokensShape,
        y: &mut Numbers,
        x: &Numbers,
        mask_token: &Numbers,
        positions: &Numbers,
        ids_restore: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.tokens_unshuffle_forward(shape, y, x, mask_token, positions, ids_restore)?;
        round(y);
        Ok(())
    }

    fn tokens_unshuffle_backward(
        &self,
        shape: TokensShape,
        dx: &mut Numbers,
        dmask_token: &mut Numbers,
        dy: &Numbers,
        ids_restore: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.tokens_unshuffle_backward(shape, dx, dmask_token, dy, ids_restore)?;
        round(dx);
        Ok(())
    }

    fn tokens_gather_forward(
        &self,
        shape: TokensShape,
        y: &mut Numbers,
        x: &Numbers,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.tokens_gather_forward(shape, y, x, ids)?;
        round(y);
        Ok(())
    }

    fn tokens_gather_backward(
        &self,
        shape: TokensShape,
        dx: &mut Numbers,
        dy: &Numbers,
        ids: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.tokens_gather_backward(shape, dx, dy, ids)?;
        round(dx);
        Ok(())
    }
}

impl LayerNorm for Rounding {
    fn layernorm_forward(
        &self,
        shape: LayerNormShape,
        y: &mut Numbers,
        mean: &mut Numbers,
        rstd: &mut Numbers,
        x: &Numbers,
        gamma: &Numbers,
        beta: &Numbers,
    ) -> Result<()> {
        self.0.layernorm_forward(shape, y, mean, rstd, x, gamma, beta)?;
        round(y);
        Ok(())
    }

    fn layernorm_backward(
        &self,
        shape: LayerNormShape,
        write: Write,
        dx: &mut Numbers,
        dgamma: &mut Numbers,
        dbeta: &mut Numbers,
        dy: &Numbers,
        x: &Numbers,
        mean: &Numbers,
        rstd: &Numbers,
        gamma: &Numbers,
    ) -> Result<()> {
        self.0.layernorm_backward(shape, write, dx, dgamma, dbeta, dy, x, mean, rstd, gamma)?;
        round(dx);
        Ok(())
    }
}

impl Attention for Rounding {
    fn attention_forward(
        &self,
        shape: AttentionShape,
        out: &mut Numbers,
        log_sum_exp: &mut Numbers,
        qkv: &Numbers,
    ) -> Result<()> {
        self.0.attention_forward(shape, out, log_sum_exp, qkv)?;
        round(out);
        Ok(())
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        dqkv: &mut Numbers,
        dout: &Numbers,
        qkv: &Numbers,
        log_sum_exp: &Numbers,
    ) -> Result<()> {
        self.0.attention_backward(shape, dqkv, dout, qkv, log_sum_exp)?;
        round(dqkv);
        Ok(())
    }

    fn attention_probabilities(
        &self,
        shape: AttentionShape,
        probabilities: &mut Numbers,
        qkv: &Numbers,
        log_sum_exp: &Numbers,
    ) -> Result<()> {
        self.0.attention_probabilities(shape, probabilities, qkv, log_sum_exp)?;
        round(probabilities);
        Ok(())
    }
}

impl Loss for Rounding {
    fn loss_forward_backward(
        &self,
        shape: LossShape,
        loss: &mut Numbers,
        patch_loss: &mut Numbers,
        dprediction: &mut Numbers,
        prediction: &Numbers,
        pixels: Pixels<'_, Self>,
        ids: &CpuBuffer<u32>,
        mask: &CpuBuffer<f32>,
    ) -> Result<()> {
        self.0.loss_forward_backward(shape, loss, patch_loss, dprediction, prediction, inner(pixels), ids, mask)?;
        round(dprediction);
        Ok(())
    }
}

impl AdamW for Rounding {
    fn gradient_norm(&self, length: usize, norm: &mut Numbers, gradient: &Numbers) -> Result<()> {
        self.0.gradient_norm(length, norm, gradient)
    }

    fn adamw_step(
        &self,
        settings: AdamWSettings,
        state: &mut CpuBuffer<AdamWState>,
        master: &mut Numbers,
        working: &mut Numbers,
        first_moment: &mut Numbers,
        second_moment: &mut Numbers,
        gradient: &Numbers,
        norm: &Numbers,
        loss: Option<&Numbers>,
        learning_rate: &CpuBuffer<f64>,
    ) -> Result<()> {
        self.0.adamw_step(
            settings,
            state,
            master,
            working,
            first_moment,
            second_moment,
            gradient,
            norm,
            loss,
            learning_rate,
        )?;
        self.refresh(working, master)
    }

    fn weights_average(&self, length: usize, decay: f64, average: &mut Numbers, master: &Numbers) -> Result<()> {
        self.0.weights_average(length, decay, average, master)
    }
}

impl CrossEntropy for Rounding {
    fn cross_entropy_forward_backward(
        &self,
        shape: CrossEntropyShape,
        loss: &mut Numbers,
        row_loss: &mut Numbers,
        dlogits: &mut Numbers,
        logits: &Numbers,
        labels: &CpuBuffer<u32>,
    ) -> Result<()> {
        self.0.cross_entropy_forward_backward(shape, loss, row_loss, dlogits, logits, labels)?;
        round(dlogits);
        Ok(())
    }
}
