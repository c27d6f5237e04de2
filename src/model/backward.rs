//! The masked autoencoder backward, in stages that can be run one by one.
//!
//! ```text
//! 0                   loss, head and last norm of the decoder
//! 1 ..= D             the decoder's blocks, the last one first
//! D + 1               the way between decoder and encoder
//! D + 2 ..= D + E + 1 the encoder's blocks, the last one first
//! D + E + 2           the patch embedding
//! ```
//!
//! Stages finish the gradients of matrices from the end of the arena to its start, so that several processes can add up what
//! is finished while the rest is computed. Vectors lie behind the matrices and are all finished by the last stage.

use std::ops::Range;

use crate::model::autoencoder::MaeForPreTraining;
use crate::model::gradients::Gradients;
use crate::model::transformer;
use crate::model::workspace::{Purpose, Workspace};
use crate::nvtx::range;
use crate::ops::{Backend, LayerNormShape, LinearShape, TokensShape, Write};
use crate::{Error, Result};

impl<B: Backend> MaeForPreTraining<B> {
    /// Adds the gradients of the last forward pass in this workspace, of `batch` images. A pass may be made in several calls
    /// whose stages follow each other.
    pub(crate) fn backward_stages(
        &self,
        workspace: &mut Workspace<B>,
        batch: usize,
        gradients: &mut Gradients<B>,
        stages: Range<usize>,
    ) -> Result<()> {
        let _range = range(format_args!("backward"));
        let (decoder, encoder) = (self.config.decoder_num_hidden_layers, self.config.num_hidden_layers);
        for stage in stages {
            let _range = range(format_args!("{} backward", if stage <= decoder { "decoder" } else { "encoder" }));
            match stage {
                0 => self.backward_head(workspace, batch, gradients)?,
                _ if stage <= decoder => self.backward_decoder(workspace, batch, gradients, decoder - stage)?,
                _ if stage == decoder + 1 => self.backward_between(workspace, batch, gradients)?,
                _ if stage <= decoder + 1 + encoder => {
                    self.backward_encoder(workspace, batch, gradients, decoder + 1 + encoder - stage)?;
                }
                _ => self.backward_patches(workspace, batch, gradients)?,
            }
        }
        Ok(())
    }

    /// From the loss to the output of the decoder's last block.
    fn backward_head(&self, workspace: &mut Workspace<B>, batch: usize, gradients: &mut Gradients<B>) -> Result<()> {
        let (config, backend, layers) = (&self.config, &self.backend, &self.layers.decoder);
        let Workspace { shape, inputs, decoder: Some(decoder), flow: Some(flow), .. } = workspace else {
            return Err(cannot_train());
        };
        let (image, predicted) = (shape.image, shape.predicted());
        let width = config.decoder_hidden_size;
        let head = LinearShape { rows: batch * predicted, inputs: width, outputs: image.patch_length() };
        let into = &mut gradients.layers.decoder;
        backend.linear_backward_weight(
            head,
            &mut into.head.weight,
            into.head.bias.as_mut(),
            &decoder.dprediction,
            &decoder.normed,
        )?;
        backend.linear_backward_input(
            head,
            Write::Assign,
            &mut flow.normed,
            &decoder.dprediction,
            &layers.head.weight,
        )?;
        backend.layernorm_backward(
            LayerNormShape { rows: batch * predicted, width, epsilon: config.layer_norm_eps },
            Write::Assign,
            &mut flow.gathered,
            &mut into.norm.gamma,
            &mut into.norm.beta,
            &flow.normed,
            &decoder.gathered,
            &decoder.mean,
            &decoder.rstd,
            &layers.norm.gamma,
        )?;
        let selection = TokensShape { batch, patches: image.patches(), selected: predicted, width };
        let ids = if shape.purpose == Purpose::Train { &inputs.ids_hidden } else { &inputs.ids_all };
        backend.tokens_gather_backward(selection, &mut flow.decoder, &flow.gathered, ids)
    }

    /// One block of the decoder.
    fn backward_decoder(
        &self,
        workspace: &mut Workspace<B>,
        batch: usize,
        gradients: &mut Gradients<B>,
        layer: usize,
    ) -> Result<()> {
        let Workspace { shape, scratch, decoder: Some(decoder), flow: Some(flow), .. } = workspace else {
            return Err(cannot_train());
        };
        transformer::backward_block(
            &self.backend,
            shape.decoder(&self.config, batch)?,
            &self.layers.decoder.blocks,
            &mut gradients.layers.decoder.blocks,
            &mut decoder.stack,
            scratch,
            &mut flow.decoder,
            layer,
        )
    }

    /// From the input of the decoder's first block to the output of the encoder's last.
    fn backward_between(&self, workspace: &mut Workspace<B>, batch: usize, gradients: &mut Gradients<B>) -> Result<()> {
        let (config, backend) = (&self.config, &self.backend);
        let Workspace { shape, inputs, encoder, decoder: Some(decoder), flow: Some(flow), .. } = workspace else {
            return Err(cannot_train());
        };
        let (image, keep) = (shape.image, shape.keep);
        let width = config.decoder_hidden_size;
        let into = &mut gradients.layers.decoder;
        backend.tokens_unshuffle_backward(
            TokensShape { batch, patches: image.patches(), selected: keep, width },
            &mut decoder.embedded,
            &mut into.mask_token,
            &flow.decoder,
            &inputs.ids_restore,
        )?;
        let rows = batch * (1 + keep);
        let embed = LinearShape { rows, inputs: config.hidden_size, outputs: width };
        backend.linear_backward_weight(
            embed,
            &mut into.embed.weight,
            into.embed.bias.as_mut(),
            &decoder.embedded,
            &encoder.encoded,
        )?;
        backend.linear_backward_input(
            embed,
            Write::Assign,
            &mut flow.encoded,
            &decoder.embedded,
            &self.layers.decoder.embed.weight,
        )?;
        let into = &mut gradients.layers.encoder;
        backend.layernorm_backward(
            LayerNormShape { rows, width: config.hidden_size, epsilon: config.layer_norm_eps },
            Write::Assign,
            &mut flow.encoder,
            &mut into.norm.gamma,
            &mut into.norm.beta,
            &flow.encoded,
            encoder.stack.output(),
            &encoder.mean,
            &encoder.rstd,
            &self.layers.encoder.norm.gamma,
        )
    }

    /// One block of the encoder.
    fn backward_encoder(
        &self,
        workspace: &mut Workspace<B>,
        batch: usize,
        gradients: &mut Gradients<B>,
        layer: usize,
    ) -> Result<()> {
        let Workspace { shape, scratch, encoder, flow: Some(flow), .. } = workspace else {
            return Err(cannot_train());
        };
        transformer::backward_block(
            &self.backend,
            shape.encoder(&self.config, batch)?,
            &self.layers.encoder.blocks,
            &mut gradients.layers.encoder.blocks,
            &mut encoder.stack,
            scratch,
            &mut flow.encoder,
            layer,
        )
    }

    /// From the input of the encoder's first block to the weights of the patch embedding. The images themselves have no gradient.
    fn backward_patches(&self, workspace: &mut Workspace<B>, batch: usize, gradients: &mut Gradients<B>) -> Result<()> {
        let Workspace { shape, encoder, flow: Some(flow), .. } = workspace else {
            return Err(cannot_train());
        };
        let (image, keep, width) = (shape.image, shape.keep, self.config.hidden_size);
        let into = &mut gradients.layers.encoder;
        self.backend.tokens_assemble_backward(
            TokensShape { batch, patches: image.patches(), selected: keep, width },
            &mut encoder.patches,
            &mut into.class_token,
            &flow.encoder,
        )?;
        self.backend.linear_backward_weight(
            LinearShape { rows: batch * keep, inputs: image.patch_length(), outputs: width },
            &mut into.patch.weight,
            into.patch.bias.as_mut(),
            &encoder.patches,
            &encoder.rows,
        )
    }
}

fn cannot_train() -> Error {
    Error::Config("this workspace was made for inference and cannot train".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MaeConfig;
    use crate::cpu::Cpu;
    use crate::model::{ImageValues, Images, MaskedImages, Masking, WorkspaceShape};
    use crate::ops::Memory;
    use crate::random::RandomStream;

    /// What a stage has finished is what the whole pass has in the end, and what is not finished yet is another's.
    #[test]
    fn stages_finish_matrices_from_the_end_of_the_arena() -> Result<()> {
        let mut config = MaeConfig::tiny();
        config.image_size = (32, 32).into();
        let model = MaeForPreTraining::new(config, Cpu::<f32>::new(), 7)?;
        let image = model.config().image();
        let numbers = |seed: u64, count: usize| -> Vec<f32> {
            let mut stream = RandomStream::new(seed, 0, 0, 0);
            (0..count).map(|_| stream.next_f32()).collect()
        };
        let pixels = numbers(3, 2 * image.length());
        let values = ImageValues::Normalized(&pixels);
        let images = Images { batch: 2, channels: image.channels, height: 32, width: 32, values };
        let noise = numbers(4, 2 * image.patches());
        let batch = MaskedImages::new(model.config(), &images, &Masking::Noise { ratio: 0.5, noise: &noise })?;
        let shape = WorkspaceShape::of(&batch, Purpose::Train, None);
        let layout = model.parameters().layout();
        let pass = |stop_after: usize| -> Result<Vec<f32>> {
            let mut workspace = model.workspace(shape)?;
            let mut loss = model.backend.buffer(1)?;
            workspace.upload(&model.backend, &batch)?;
            model.forward_prepared(&mut workspace, 2, 2 * batch.mask.hidden(), &mut loss, None)?;
            let mut gradients = model.gradients()?;
            for stage in 0..stop_after {
                model.backward_stages(&mut workspace, 2, &mut gradients, stage..stage + 1)?;
            }
            gradients.download(&model.backend, layout)
        };
        let stages = layout.stages();
        let whole = pass(stages)?;
        let zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        assert!(!zero(&whole));
        let mut before = layout.matrices();
        for done in 0..=stages {
            let from = layout.finished_from(done);
            assert!(from <= before && (done < stages || from == 0), "{done}: {from}");
            let found = pass(done)?;
            assert_eq!(found[from..layout.matrices()], whole[from..layout.matrices()], "{done} stages");
            assert!(zero(&found[..from]), "{done} stages finish less than they write");
            before = from;
        }
        assert_eq!(pass(stages)?, whole);
        Ok(())
    }
}
