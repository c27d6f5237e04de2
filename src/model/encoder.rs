//! The encoder alone: features of all patches, or of the visible ones.

use std::path::Path;

use crate::Result;
use crate::config::{MaeConfig, declare};
use crate::model::images::Images;
use crate::model::masking::{MaskedImages, Masking};
use crate::model::parameters::{EncoderWeights, Matrix, Parameters, Vector};
use crate::model::positions::PositionInterpolation;
use crate::model::transformer::{self, Observer};
use crate::model::workspace::{Purpose, Workspace, WorkspaceShape};
use crate::nvtx::range;
use crate::ops::{AttentionShape, Backend, LayerNormShape, LinearShape, Real, TokensShape};
use crate::weights::{Checkpoint, Parts};

/// What an encoder made of a batch of images.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Images `B`.
    pub batch: usize,
    /// Tokens `1 + keep` of each: the class token, then the visible patches.
    pub tokens: usize,
    /// Features `D`.
    pub width: usize,
    /// 1 for a hidden patch, 0 for a visible one, `[B, L]`.
    pub mask: Vec<f32>,
    /// Where each patch is in the shuffled order, whose first `keep` are visible, `[B, L]`.
    pub ids_restore: Vec<u32>,
    /// The last hidden state, after the final LayerNorm, `[B, 1 + keep, D]`.
    pub last_hidden_state: Vec<f32>,
    /// Where asked for: the residual stream before each block and after the last, each `[B, 1 + keep, D]`.
    pub hidden_states: Vec<Vec<f32>>,
    /// Where asked for: each block's attention, `[B, H, 1 + keep, 1 + keep]`.
    pub attentions: Vec<Vec<f32>>,
}

/// What to return besides the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// The encoder's hidden states.
    pub hidden_states: bool,
    /// The encoder's attention maps.
    pub attentions: bool,
}

/// An encoder of its own, such as one whose decoder was thrown away.
#[derive(Debug)]
pub struct MaeEncoder<B: Backend> {
    config: MaeConfig,
    backend: B,
    parameters: Parameters<B>,
    layers: EncoderWeights<B>,
}

impl<B: Backend> MaeEncoder<B> {
    /// Loads the encoder from a checkpoint of an encoder or of a whole autoencoder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint), [`Error::Io`](crate::Error::Io) and [`Error::Config`](crate::Error::Config) for what cannot be read or does not fit together.
    pub fn from_pretrained(path: impl AsRef<Path>, backend: B) -> Result<Self> {
        Self::from_checkpoint(&mut Checkpoint::open(path.as_ref())?, backend)
    }

    /// The same from an open checkpoint.
    ///
    /// # Errors
    /// As [`MaeEncoder::from_pretrained`].
    pub fn from_checkpoint(checkpoint: &mut Checkpoint, backend: B) -> Result<Self> {
        let config = checkpoint.require_config()?.clone();
        config.validate()?;
        let mut parameters = Parameters::zeroed(&backend, &config, Parts::EncoderOnly)?;
        parameters.load(&backend, checkpoint)?;
        let layers = declare::encoder(&mut parameters.handles(&backend), &config)?;
        Ok(Self { config, backend, parameters, layers })
    }

    /// The model's configuration.
    #[must_use]
    pub fn config(&self) -> &MaeConfig {
        &self.config
    }

    /// Names and places of the parameters.
    #[must_use]
    pub fn parameters(&self) -> &Parameters<B> {
        &self.parameters
    }

    /// The encoder as its users see it.
    #[must_use]
    pub fn view(&self) -> EncoderView<'_, B> {
        EncoderView { config: &self.config, backend: &self.backend, layers: &self.layers }
    }
}

/// An encoder, of a [`MaeEncoder`] or of a [`MaeForPreTraining`](crate::model::MaeForPreTraining).
#[derive(Debug)]
pub struct EncoderView<'m, B: Backend> {
    pub(crate) config: &'m MaeConfig,
    pub(crate) backend: &'m B,
    pub(crate) layers: &'m EncoderWeights<B>,
}

impl<B: Backend> EncoderView<'_, B> {
    /// Features of all patches: no masking, so the same images always give the same result.
    ///
    /// # Errors
    /// Those of images that do not fit the model.
    pub fn encode(&self, images: &Images<'_>) -> Result<Encoded> {
        self.encode_with(images, None, Extras::default())
    }

    /// The same with hidden states and attention maps, and for images of another size than the config's.
    ///
    /// # Errors
    /// As [`EncoderView::encode`].
    pub fn encode_with(
        &self,
        images: &Images<'_>,
        interpolation: Option<PositionInterpolation>,
        extras: Extras,
    ) -> Result<Encoded> {
        self.encode_masked(images, &Masking::None, interpolation, extras)
    }

    /// Features of the visible patches alone, as the autoencoder's decoder gets them: those of one image in the order in
    /// which [`Encoded::ids_restore`] counts them.
    ///
    /// # Errors
    /// As [`EncoderView::encode`], and those of noise that does not fit the images.
    pub fn encode_masked(
        &self,
        images: &Images<'_>,
        masking: &Masking<'_>,
        interpolation: Option<PositionInterpolation>,
        extras: Extras,
    ) -> Result<Encoded> {
        let batch = MaskedImages::new(self.config, images, masking)?;
        self.encode_batch(&mut self.workspace_for(&batch, interpolation)?, &batch, extras)
    }

    /// Room to encode all patches of batches as large as this one, many times.
    ///
    /// # Errors
    /// As [`EncoderView::encode`].
    pub fn workspace(&self, images: &Images<'_>, interpolation: Option<PositionInterpolation>) -> Result<Workspace<B>> {
        self.workspace_masked(images, &Masking::None, interpolation)
    }

    /// Room to encode the patches of batches as large as this one of which as many are visible, many times.
    ///
    /// # Errors
    /// As [`EncoderView::encode_masked`].
    pub fn workspace_masked(
        &self,
        images: &Images<'_>,
        masking: &Masking<'_>,
        interpolation: Option<PositionInterpolation>,
    ) -> Result<Workspace<B>> {
        self.workspace_for(&MaskedImages::new(self.config, images, masking)?, interpolation)
    }

    fn workspace_for(
        &self,
        batch: &MaskedImages<'_>,
        interpolation: Option<PositionInterpolation>,
    ) -> Result<Workspace<B>> {
        let shape = WorkspaceShape::of(batch, Purpose::Encode, interpolation);
        let mut workspace = Workspace::new(self.backend, self.config, shape)?;
        workspace.place(self.backend, self.config, &self.layers.positions, None)?;
        Ok(workspace)
    }

    /// Encodes the visible patches in a workspace from [`EncoderView::workspace`], or, where patches are hidden, from
    /// [`EncoderView::workspace_masked`].
    ///
    /// # Errors
    /// As [`EncoderView::encode_masked`], and [`Error::Shape`](crate::Error::Shape) where the images are not what the workspace was made for.
    pub fn encode_in(
        &self,
        workspace: &mut Workspace<B>,
        images: &Images<'_>,
        masking: &Masking<'_>,
        extras: Extras,
    ) -> Result<Encoded> {
        self.encode_batch(workspace, &MaskedImages::new(self.config, images, masking)?, extras)
    }

    fn encode_batch(&self, workspace: &mut Workspace<B>, images: &MaskedImages<'_>, extras: Extras) -> Result<Encoded> {
        let batch = images.mask.batch;
        let mut collector = Collector::new(self.backend, extras);
        workspace.upload(self.backend, images)?;
        self.forward_prepared(workspace, batch, collector.as_mut().map(|c| c as &mut dyn Observer<B>))?;
        let tokens = 1 + workspace.shape.keep;
        let width = self.config.hidden_size;
        let last_hidden_state = download_elements(self.backend, &workspace.encoder.encoded, batch * tokens * width)?;
        let (hidden_states, attentions) =
            collector.map_or_else(Default::default, |collector| (collector.hidden_states, collector.attentions));
        let patches = batch * workspace.shape.image.patches();
        let (mut mask, mut ids_restore) = (vec![0.0; patches], vec![0; patches]);
        self.backend.download(&mut mask, &workspace.inputs.mask)?;
        self.backend.download(&mut ids_restore, &workspace.inputs.ids_restore)?;
        Ok(Encoded { batch, tokens, width, mask, ids_restore, last_hidden_state, hidden_states, attentions })
    }

    /// Runs the encoder on `batch` images that are prepared; the result is in `workspace.encoder.encoded`. Work of the device
    /// alone.
    pub(crate) fn forward_prepared(
        &self,
        workspace: &mut Workspace<B>,
        batch: usize,
        observer: Option<&mut dyn Observer<B>>,
    ) -> Result<()> {
        let _range = range(format_args!("encoder forward"));
        let Self { config, backend, layers } = *self;
        let Workspace { shape, inputs, scratch, encoder, positions, .. } = workspace;
        let (image, keep, width) = (shape.image, shape.keep, config.hidden_size);
        backend.patchify_visible_forward(image, batch, keep, &mut encoder.rows, inputs.pixels()?, &inputs.ids_keep)?;
        backend.linear_forward(
            LinearShape { rows: batch * keep, inputs: image.patch_length(), outputs: width },
            &mut encoder.patches,
            &encoder.rows,
            &layers.patch.weight,
            layers.patch.bias.as_ref(),
        )?;
        backend.tokens_assemble_forward(
            TokensShape { batch, patches: image.patches(), selected: keep, width },
            encoder.stack.input_mut(),
            &encoder.patches,
            &layers.class_token,
            positions.as_ref().map_or(&layers.positions, |positions| &positions.encoder),
            &inputs.ids_keep,
        )?;
        let stack = shape.encoder(config, batch)?;
        transformer::forward(backend, stack, &layers.blocks, &mut encoder.stack, scratch, observer)?;
        backend.layernorm_forward(
            LayerNormShape { rows: stack.rows(), width, epsilon: config.layer_norm_eps },
            &mut encoder.encoded,
            &mut encoder.mean,
            &mut encoder.rstd,
            encoder.stack.output(),
            &layers.norm.gamma,
            &layers.norm.beta,
        )
    }
}

/// The first `length` activations as f32.
pub(crate) fn download_elements<B: Backend>(backend: &B, from: &Matrix<B>, length: usize) -> Result<Vec<f32>> {
    let mut values = vec![B::Element::default(); length];
    backend.download(&mut values, from)?;
    Ok(values.into_iter().map(|value| value.to_f64() as f32).collect())
}

/// Brings hidden states and attention maps to the host while a stack runs.
pub(crate) struct Collector<'b, B> {
    backend: &'b B,
    extras: Extras,
    pub hidden_states: Vec<Vec<f32>>,
    pub attentions: Vec<Vec<f32>>,
}

impl<'b, B: Backend> Collector<'b, B> {
    pub fn new(backend: &'b B, extras: Extras) -> Option<Self> {
        (extras != Extras::default()).then(|| Self {
            backend,
            extras,
            hidden_states: Vec::new(),
            attentions: Vec::new(),
        })
    }
}

impl<B: Backend> Observer<B> for Collector<'_, B> {
    fn hidden_state(&mut self, length: usize, stream: &Matrix<B>) -> Result<()> {
        if self.extras.hidden_states {
            self.hidden_states.push(download_elements(self.backend, stream, length)?);
        }
        Ok(())
    }

    fn attention(&mut self, shape: AttentionShape, qkv: &Matrix<B>, log_sum_exp: &Vector<B>) -> Result<()> {
        if self.extras.attentions {
            let length = shape.batch * shape.heads * shape.tokens * shape.tokens;
            let mut probabilities = self.backend.buffer(length)?;
            self.backend.attention_probabilities(shape, &mut probabilities, qkv, log_sum_exp)?;
            self.attentions.push(download_elements(self.backend, &probabilities, length)?);
        }
        Ok(())
    }
}
