//! The masked autoencoder: encoder, decoder and loss, forward and backward.

use std::path::Path;

use crate::config::MaeConfig;
use crate::config::declare::{self, AutoencoderLayers};
use crate::model::encoder::{Collector, EncoderView, Extras, download_elements};
use crate::model::gradients::Gradients;
use crate::model::images::Images;
use crate::model::initialize;
use crate::model::masking::{MaskedImages, Masking};
use crate::model::objective::Objective;
use crate::model::parameters::{AutoencoderWeights, Parameters, Vector};
use crate::model::positions::{PositionInterpolation, interpolate_grid};
use crate::model::transformer::{self, Observer};
use crate::model::workspace::{Purpose, Workspace, WorkspaceShape};

use crate::nvtx::range;
use crate::ops::{Backend, LayerNormShape, LinearShape, LossShape, Real, TokensShape};
use crate::weights::{Checkpoint, Group, Parts};
use crate::{Error, Result};

/// A masked autoencoder for pre-training (`ViTMAEForPreTraining` in transformers).
#[derive(Debug)]
pub struct MaeForPreTraining<B: Backend> {
    pub(super) config: MaeConfig,
    pub(super) backend: B,
    pub(super) parameters: Parameters<B>,
    pub(super) layers: AutoencoderWeights<B>,
}

/// What [`MaeForPreTraining::forward`] returns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reconstruction {
    /// Images `B`.
    pub batch: usize,
    /// Patches `L` of an image.
    pub patches: usize,
    /// Visible patches of an image.
    pub keep: usize,
    /// The loss over hidden patches; 0 where nothing is hidden.
    pub loss: f64,
    /// Predicted pixels of every patch, `[B, L, P * Q * C]` in the order (p, q, c).
    pub logits: Vec<f32>,
    /// `[B, L]`: 0 = visible, 1 = hidden.
    pub mask: Vec<f32>,
    /// `[B, L]`: the rank of each patch in the shuffle.
    pub ids_restore: Vec<u32>,
    /// The encoder's last hidden state, `[B, 1 + keep, D]`.
    pub last_hidden_state: Vec<f32>,
    /// Where asked for: as in [`Encoded`](crate::model::Encoded).
    pub hidden_states: Vec<Vec<f32>>,
    /// Where asked for: as in [`Encoded`](crate::model::Encoded).
    pub attentions: Vec<Vec<f32>>,
}

impl<B: Backend> MaeForPreTraining<B> {
    /// A fresh model, initialised as the original implementation does, from a seed.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that cannot work; [`Error::Device`] when there is not enough memory.
    pub fn new(config: MaeConfig, backend: B, seed: u64) -> Result<Self> {
        config.validate()?;
        let mut parameters = Parameters::zeroed(&backend, &config, Parts::All)?;
        initialize::initialize(&mut parameters, &backend, &config, seed)?;
        Self::with_parameters(config, backend, parameters)
    }

    /// Loads a checkpoint: a folder with `config.json` and `model.safetensors` (or shards with an index), or a weights file
    /// with `config.json` beside it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Io`] and [`Error::Config`] for what cannot be read or does not fit together.
    pub fn from_pretrained(path: impl AsRef<Path>, backend: B) -> Result<Self> {
        Self::from_checkpoint(&mut Checkpoint::open(path.as_ref())?, backend)
    }

    /// The same from an open checkpoint.
    ///
    /// # Errors
    /// As [`MaeForPreTraining::from_pretrained`].
    pub fn from_checkpoint(checkpoint: &mut Checkpoint, backend: B) -> Result<Self> {
        let config = checkpoint.require_config()?.clone();
        config.validate()?;
        let mut parameters = Parameters::zeroed(&backend, &config, Parts::All)?;
        parameters.load(&backend, checkpoint)?;
        Self::with_parameters(config, backend, parameters)
    }

    /// Loads a checkpoint's weights into a model of another configuration, to train on: other image sizes (the position
    /// tables are interpolated), mask ratios and losses. Everything that decides the other weights' shapes must be the same.
    ///
    /// # Errors
    /// As [`MaeForPreTraining::from_pretrained`].
    pub fn from_pretrained_as(path: impl AsRef<Path>, config: MaeConfig, backend: B) -> Result<Self> {
        config.validate()?;
        let mut checkpoint = Checkpoint::open(path.as_ref())?;
        let (old, new) = (checkpoint.require_config()?.image().grid(), config.image().grid());
        let mut wanted = config.clone();
        wanted.image_size = checkpoint.require_config()?.image_size;
        wanted.patch_size = checkpoint.require_config()?.patch_size;
        let specs = crate::weights::parameters(&wanted, Parts::All);
        let mut parameters = Parameters::zeroed(&backend, &config, Parts::All)?;
        checkpoint.read_into(&specs, |index, values| {
            if specs[index].group == Group::Table && old != new {
                let width = specs[index].shape.last().copied().unwrap_or(1);
                return parameters.set(&backend, index, &interpolate_grid(values, width, old, new));
            }
            let expected = parameters.layout().specs()[index].shape.clone();
            if expected != specs[index].shape {
                return Err(Error::checkpoint(
                    path.as_ref(),
                    format!("{} has shape {:?}; this model needs {expected:?}", specs[index].name, specs[index].shape),
                ));
            }
            parameters.set(&backend, index, values)
        })?;
        parameters.refresh(&backend)?;
        Self::with_parameters(config, backend, parameters)
    }

    fn with_parameters(config: MaeConfig, backend: B, parameters: Parameters<B>) -> Result<Self> {
        let layers = declare::autoencoder(&mut parameters.handles(&backend), &config)?;
        Ok(Self { config, backend, parameters, layers })
    }

    /// Writes `config.json` and `model.safetensors` under the published names into a folder, each atomically.
    ///
    /// # Errors
    /// [`Error::Io`]; what the folder held before stays whole.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_with(folder.as_ref(), &self.parameters.master)
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &MaeConfig {
        &self.config
    }

    /// What the model runs on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Names and places of the parameters.
    #[must_use]
    pub fn parameters(&self) -> &Parameters<B> {
        &self.parameters
    }

    /// The values of a parameter by its published name.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model does not have; device errors.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>> {
        self.parameters.get(&self.backend, self.index_of(name)?)
    }

    /// Replaces the values of a parameter.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that the model does not have, [`Error::Shape`] for another number of values.
    pub fn set_parameter(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let index = self.index_of(name)?;
        let expected = self.parameters.layout().range(index).len();
        if values.len() != expected {
            return Err(Error::shape("set_parameter", name, expected, values.len()));
        }
        self.parameters.set(&self.backend, index, values)?;
        self.parameters.refresh(&self.backend)
    }

    fn index_of(&self, name: &str) -> Result<usize> {
        let index = self.parameters.layout().index(name);
        index.ok_or_else(|| Error::Config(format!("the model has no parameter called {name}")))
    }

    /// The encoder, for features.
    #[must_use]
    pub fn encoder(&self) -> EncoderView<'_, B> {
        EncoderView { config: &self.config, backend: &self.backend, layers: &self.layers.encoder }
    }

    /// Zeroed gradients for this model.
    ///
    /// # Errors
    /// [`Error::Device`] when there is not enough memory.
    pub fn gradients(&self) -> Result<Gradients<B>> {
        Gradients::new(&self.backend, self.parameters.layout(), |handles| declare::autoencoder(handles, &self.config))
    }

    /// Room for passes of the given shape.
    ///
    /// # Errors
    /// [`Error::Config`] for an image that does not fit the model, [`Error::Device`] when there is not enough memory.
    pub fn workspace(&self, shape: WorkspaceShape) -> Result<Workspace<B>> {
        shape.image.check()?;
        let mut workspace = Workspace::new(&self.backend, &self.config, shape)?;
        let AutoencoderLayers { encoder, decoder } = &self.layers;
        workspace.place(&self.backend, &self.config, &encoder.positions, Some(&decoder.positions))?;
        Ok(workspace)
    }

    fn workspace_for(
        &self,
        batch: &MaskedImages<'_>,
        purpose: Purpose,
        interpolation: Option<PositionInterpolation>,
    ) -> Result<Workspace<B>> {
        self.workspace(WorkspaceShape::of(batch, purpose, interpolation))
    }

    /// Hides patches, predicts all of them and compares the hidden ones with the pixels.
    ///
    /// # Errors
    /// Those of images and noise that do not fit the model.
    pub fn forward(&self, images: &Images<'_>, masking: &Masking<'_>) -> Result<Reconstruction> {
        self.forward_with(images, masking, None, Extras::default())
    }

    /// The same with hidden states and attention maps, and for images of another size than the config's.
    ///
    /// # Errors
    /// As [`MaeForPreTraining::forward`].
    pub fn forward_with(
        &self,
        images: &Images<'_>,
        masking: &Masking<'_>,
        interpolation: Option<PositionInterpolation>,
        extras: Extras,
    ) -> Result<Reconstruction> {
        let batch = MaskedImages::new(&self.config, images, masking)?;
        self.reconstruct(&mut self.workspace_for(&batch, Purpose::Predict, interpolation)?, &batch, extras)
    }

    /// As [`MaeForPreTraining::forward_with`], and the gradient of the loss for every trained parameter.
    ///
    /// # Errors
    /// As [`MaeForPreTraining::forward`].
    pub fn forward_backward(
        &self,
        images: &Images<'_>,
        masking: &Masking<'_>,
        interpolation: Option<PositionInterpolation>,
        extras: Extras,
    ) -> Result<(Reconstruction, Gradients<B>)> {
        self.config.check_trainable()?;
        let batch = MaskedImages::new(&self.config, images, masking)?;
        let mut workspace = self.workspace_for(&batch, Purpose::Inspect, interpolation)?;
        let result = self.reconstruct(&mut workspace, &batch, extras)?;
        let mut gradients = self.gradients()?;
        self.backward_stages(&mut workspace, images.batch, &mut gradients, 0..self.parameters.layout().stages())?;
        Ok((result, gradients))
    }

    /// Forward in a workspace that predicts every patch ([`Purpose::Predict`] or [`Purpose::Inspect`]).
    ///
    /// # Errors
    /// As [`MaeForPreTraining::forward`].
    pub fn reconstruct_in(
        &self,
        workspace: &mut Workspace<B>,
        images: &Images<'_>,
        masking: &Masking<'_>,
        extras: Extras,
    ) -> Result<Reconstruction> {
        self.reconstruct(workspace, &MaskedImages::new(&self.config, images, masking)?, extras)
    }

    fn reconstruct(
        &self,
        workspace: &mut Workspace<B>,
        images: &MaskedImages<'_>,
        extras: Extras,
    ) -> Result<Reconstruction> {
        let backend = &self.backend;
        let shape = workspace.shape;
        let (batch, patches, keep) = (images.mask.batch, shape.image.patches(), shape.keep);
        if shape.predicted() != patches {
            return Err(Error::Config("a workspace for training predicts hidden patches only".into()));
        }
        let mut collector = Collector::new(backend, extras);
        let observer = collector.as_mut().map(|collector| collector as &mut dyn Observer<B>);
        let mut loss = backend.buffer(1)?;
        workspace.upload(backend, images)?;
        self.forward_prepared(workspace, batch, batch * (patches - keep), &mut loss, observer)?;
        let (hidden_states, attentions) =
            collector.map_or_else(Default::default, |collector| (collector.hidden_states, collector.attentions));
        let Some(decoder) = &workspace.decoder else { return Err(no_decoder()) };
        let mut mask = vec![0.0; batch * patches];
        backend.download(&mut mask, &workspace.inputs.mask)?;
        let mut ids_restore = vec![0; batch * patches];
        backend.download(&mut ids_restore, &workspace.inputs.ids_restore)?;
        let logits = batch * patches * shape.image.patch_length();
        let hidden = batch * (1 + keep) * self.config.hidden_size;
        let mut loss_value = [B::Master::default()];
        backend.download(&mut loss_value, &loss)?;
        Ok(Reconstruction {
            batch,
            patches,
            keep,
            loss: loss_value[0].to_f64(),
            logits: download_elements(backend, &decoder.prediction, logits)?,
            mask,
            ids_restore,
            last_hidden_state: download_elements(backend, &workspace.encoder.encoded, hidden)?,
            hidden_states,
            attentions,
        })
    }

    /// Runs encoder, decoder and loss on `batch` images that are prepared: work of the device alone. Results stay in the workspace
    /// and the loss is added to `loss` `[1]`. `hidden_in_step` is the number of hidden patches of all micro-batches whose losses
    /// are to add up to the mean.
    pub(crate) fn forward_prepared(
        &self,
        workspace: &mut Workspace<B>,
        batch: usize,
        hidden_in_step: usize,
        loss: &mut Vector<B>,
        observer: Option<&mut dyn Observer<B>>,
    ) -> Result<()> {
        let _range = range(format_args!("forward"));
        self.encoder().forward_prepared(workspace, batch, observer)?;
        let _range = range(format_args!("decoder and loss forward"));
        let (config, backend, layers) = (&self.config, &self.backend, &self.layers.decoder);
        let Workspace { shape, inputs, scratch, encoder, decoder: Some(decoder), positions, .. } = workspace else {
            return Err(no_decoder());
        };
        let (image, predicted) = (shape.image, shape.predicted());
        let encoder_rows = batch * (1 + shape.keep);
        let width = config.decoder_hidden_size;
        backend.linear_forward(
            LinearShape { rows: encoder_rows, inputs: config.hidden_size, outputs: width },
            &mut decoder.embedded,
            &encoder.encoded,
            &layers.embed.weight,
            layers.embed.bias.as_ref(),
        )?;
        backend.tokens_unshuffle_forward(
            TokensShape { batch, patches: image.patches(), selected: shape.keep, width },
            decoder.stack.input_mut(),
            &decoder.embedded,
            &layers.mask_token,
            positions.as_ref().and_then(|positions| positions.decoder.as_ref()).unwrap_or(&layers.positions),
            &inputs.ids_restore,
        )?;
        let stack = shape.decoder(config, batch)?;
        transformer::forward(backend, stack, &layers.blocks, &mut decoder.stack, scratch, None)?;
        let ids = if shape.purpose == Purpose::Train { &inputs.ids_hidden } else { &inputs.ids_all };
        let selection = TokensShape { batch, patches: image.patches(), selected: predicted, width };
        backend.tokens_gather_forward(selection, &mut decoder.gathered, decoder.stack.output(), ids)?;
        backend.layernorm_forward(
            LayerNormShape { rows: batch * predicted, width, epsilon: config.layer_norm_eps },
            &mut decoder.normed,
            &mut decoder.mean,
            &mut decoder.rstd,
            &decoder.gathered,
            &layers.norm.gamma,
            &layers.norm.beta,
        )?;
        backend.linear_forward(
            LinearShape { rows: batch * predicted, inputs: width, outputs: image.patch_length() },
            &mut decoder.prediction,
            &decoder.normed,
            &layers.head.weight,
            layers.head.bias.as_ref(),
        )?;
        backend.loss_forward_backward(
            LossShape {
                image,
                batch,
                predicted,
                norm_pix_loss: config.norm_pix_loss,
                scale: if hidden_in_step == 0 { 0.0 } else { 1.0 / hidden_in_step as f64 },
            },
            loss,
            &mut decoder.patch_loss,
            &mut decoder.dprediction,
            &decoder.prediction,
            inputs.pixels()?,
            ids,
            &inputs.mask,
        )
    }
}

fn no_decoder() -> Error {
    Error::Config("this workspace was made for the encoder alone".into())
}
