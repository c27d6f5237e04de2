//! Everything a forward and a backward pass write to, allocated once for a batch and an image size.

use crate::config::MaeConfig;
use crate::model::images::{ImageValues, Images};
use crate::model::masking::{MaskedImages, Masking};
use crate::model::positions::{PositionInterpolation, interpolate_flat, interpolate_grid};
use crate::model::transformer::{Keep, Scratch, StackActivations, StackShape};
use crate::ops::{Backend, ImageShape, MaskingShape, Pixels, Real};
use crate::{Error, Result};

/// What a workspace is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The encoder alone, forward.
    Encode,
    /// Encoder and decoder forward, every patch predicted.
    Predict,
    /// Forward and backward, hidden patches predicted: what the loss needs.
    Train,
    /// Forward and backward, every patch predicted: gradients for somebody who wants the predictions too.
    Inspect,
}

impl Purpose {
    fn trains(self) -> bool {
        matches!(self, Self::Train | Self::Inspect)
    }
}

/// Sizes that a workspace is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceShape {
    /// The most images at a time.
    pub batch: usize,
    /// The images.
    pub image: ImageShape,
    /// Visible patches of each.
    pub keep: usize,
    /// What for.
    pub purpose: Purpose,
    /// Where positions come from when the image is not as large as the config's; an error where that is `None`.
    pub interpolation: Option<PositionInterpolation>,
    /// Whether backward computes the blocks' activations again instead of keeping them: less memory, a third more time, the
    /// same results.
    pub recompute: bool,
}

impl WorkspaceShape {
    /// What it takes to have all of a batch in a workspace.
    pub(crate) fn of(batch: &MaskedImages<'_>, purpose: Purpose, interpolation: Option<PositionInterpolation>) -> Self {
        let MaskedImages { image, mask: MaskingShape { batch, keep, .. }, .. } = *batch;
        Self { batch, image, keep, purpose, interpolation, recompute: false }
    }

    /// What the stacks keep for backward.
    pub(crate) fn kept(&self) -> Keep {
        match (self.purpose.trains(), self.recompute) {
            (false, _) => Keep::Nothing,
            (true, true) => Keep::Inputs,
            (true, false) => Keep::Everything,
        }
    }

    pub(crate) fn predicted(&self) -> usize {
        match self.purpose {
            Purpose::Encode => 0,
            Purpose::Train => self.image.patches() - self.keep,
            Purpose::Predict | Purpose::Inspect => self.image.patches(),
        }
    }

    pub(crate) fn encoder(&self, config: &MaeConfig, batch: usize) -> Result<StackShape> {
        Ok(StackShape {
            batch,
            tokens: 1 + self.keep,
            width: config.hidden_size,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            activation: config.activation()?,
            epsilon: config.layer_norm_eps,
        })
    }

    pub(crate) fn decoder(&self, config: &MaeConfig, batch: usize) -> Result<StackShape> {
        Ok(StackShape {
            batch,
            tokens: 1 + self.image.patches(),
            width: config.decoder_hidden_size,
            heads: config.decoder_num_attention_heads,
            mlp_width: config.decoder_intermediate_size,
            activation: config.activation()?,
            epsilon: config.layer_norm_eps,
        })
    }
}

/// What the images of a batch look like on the device, and which patches of them are hidden.
#[derive(Debug)]
pub(crate) struct Inputs<B: Backend> {
    pub normalized: Option<B::Buffer<f32>>,
    pub bytes: Option<B::Buffer<u8>>,
    pub mean: B::Buffer<f32>,
    pub std: B::Buffer<f32>,
    pub noise: B::Buffer<f32>,
    pub samples: B::Buffer<u64>,
    pub ids_keep: B::Buffer<u32>,
    pub ids_hidden: B::Buffer<u32>,
    pub ids_restore: B::Buffer<u32>,
    pub mask: B::Buffer<f32>,
    /// `0..L` for each image.
    pub ids_all: B::Buffer<u32>,
    host_samples: Vec<u64>,
}

impl<B: Backend> Inputs<B> {
    /// The uploaded pixels.
    pub fn pixels(&self) -> Result<Pixels<'_, B>> {
        match (&self.normalized, &self.bytes) {
            (Some(values), _) => Ok(Pixels::Normalized(values)),
            (None, Some(values)) => Ok(Pixels::Bytes { values, mean: &self.mean, std: &self.std }),
            (None, None) => Err(Error::Config("a workspace was used before images were given to it".into())),
        }
    }

    /// Copies the images to the device. The first call with another kind of values allocates their buffer.
    fn upload(&mut self, backend: &B, shape: &WorkspaceShape, images: &Images<'_>) -> Result<()> {
        match images.values {
            ImageValues::Normalized(values) => {
                self.bytes = None;
                upload_to(backend, &mut self.normalized, shape, values)
            }
            ImageValues::Bytes { values, mean, std } => {
                self.normalized = None;
                backend.upload(&mut self.mean, mean)?;
                backend.upload(&mut self.std, std)?;
                upload_to(backend, &mut self.bytes, shape, values)
            }
        }
    }

    /// Decides which patches are hidden.
    fn mask(&mut self, backend: &B, shape: MaskingShape, masking: &Masking<'_>) -> Result<()> {
        let Self { ids_keep, ids_hidden, ids_restore, mask, .. } = self;
        match *masking {
            Masking::None => {
                // No noise, no shuffle: every patch is kept, in place.
                let ids: Vec<u32> = (0..shape.batch * shape.patches).map(|i| (i % shape.patches) as u32).collect();
                backend.upload(ids_keep, &ids)?;
                backend.upload(ids_restore, &ids)?;
                backend.zero(mask)
            }
            Masking::Noise { noise, .. } => {
                backend.upload(&mut self.noise, noise)?;
                backend.masking_from_noise(shape, ids_keep, ids_hidden, ids_restore, mask, &self.noise)
            }
            Masking::Random { random, samples, first, .. } => {
                let samples = match samples {
                    Some(samples) => samples,
                    None => {
                        self.host_samples.clear();
                        self.host_samples.extend(first..first + shape.batch as u64);
                        &self.host_samples
                    }
                };
                backend.upload(&mut self.samples, samples)?;
                backend.masking_random(shape, ids_keep, ids_hidden, ids_restore, mask, random, &self.samples)
            }
        }
    }
}

fn upload_to<B: Backend, T: crate::ops::Element>(
    backend: &B,
    buffer: &mut Option<B::Buffer<T>>,
    shape: &WorkspaceShape,
    values: &[T],
) -> Result<()> {
    let buffer = match buffer {
        Some(buffer) => buffer,
        None => buffer.insert(backend.buffer(shape.batch * shape.image.length())?),
    };
    backend.upload(buffer, values)
}

/// The encoder's tensors around its stack.
#[derive(Debug)]
pub(crate) struct EncoderActivations<B: Backend> {
    /// `[B * keep, C * P * Q]`.
    pub rows: B::Buffer<B::Element>,
    /// `[B * keep, D]`; in backward its gradient.
    pub patches: B::Buffer<B::Element>,
    pub stack: StackActivations<B>,
    pub mean: B::Buffer<B::Master>,
    pub rstd: B::Buffer<B::Master>,
    /// The last hidden state, `[B, 1 + keep, D]`.
    pub encoded: B::Buffer<B::Element>,
}

/// The decoder's tensors around its stack.
#[derive(Debug)]
pub(crate) struct DecoderActivations<B: Backend> {
    /// `[B * (1 + keep), Dd]`; in backward its gradient.
    pub embedded: B::Buffer<B::Element>,
    pub stack: StackActivations<B>,
    /// The tokens to predict from, `[B * n, Dd]`.
    pub gathered: B::Buffer<B::Element>,
    pub mean: B::Buffer<B::Master>,
    pub rstd: B::Buffer<B::Master>,
    pub normed: B::Buffer<B::Element>,
    /// `[B * n, P * Q * C]`.
    pub prediction: B::Buffer<B::Element>,
    pub dprediction: B::Buffer<B::Element>,
    pub patch_loss: B::Buffer<B::Master>,
}

/// Gradients that flow between the parts.
#[derive(Debug)]
pub(crate) struct Flow<B: Backend> {
    /// `[B, 1 + keep, D]`: of the encoder's stream.
    pub encoder: B::Buffer<B::Element>,
    /// `[B, 1 + keep, D]`: of the last hidden state.
    pub encoded: B::Buffer<B::Element>,
    /// `[B, 1 + L, Dd]`: of the decoder's stream.
    pub decoder: B::Buffer<B::Element>,
    /// `[B * n, Dd]`: of the gathered tokens, before and behind the norm.
    pub gathered: B::Buffer<B::Element>,
    pub normed: B::Buffer<B::Element>,
}

/// Position tables of another image size.
#[derive(Debug)]
pub(crate) struct Positions<B: Backend> {
    pub encoder: B::Buffer<B::Master>,
    pub decoder: Option<B::Buffer<B::Master>>,
}

/// The activations of a model for up to [`WorkspaceShape::batch`] images at a time.
#[derive(Debug)]
pub struct Workspace<B: Backend> {
    pub(crate) shape: WorkspaceShape,
    pub(crate) inputs: Inputs<B>,
    pub(crate) scratch: Scratch<B>,
    pub(crate) encoder: EncoderActivations<B>,
    pub(crate) decoder: Option<DecoderActivations<B>>,
    pub(crate) flow: Option<Flow<B>>,
    pub(crate) positions: Option<Positions<B>>,
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn new(backend: &B, config: &MaeConfig, shape: WorkspaceShape) -> Result<Self> {
        backend.in_one_allocation(|backend| Self::build(backend, config, shape))
    }

    fn build(backend: &B, config: &MaeConfig, shape: WorkspaceShape) -> Result<Self> {
        let WorkspaceShape { batch, image, keep, purpose, .. } = shape;
        let (patches, predicted) = (image.patches(), shape.predicted());
        let (width, decoder_width) = (config.hidden_size, config.decoder_hidden_size);
        let patch_length = image.patch_length();
        let trains = purpose.trains();
        let decodes = purpose != Purpose::Encode;
        let encoder_shape = shape.encoder(config, batch)?;
        let decoder_shape = shape.decoder(config, batch)?;
        let features = |numbers: usize| backend.buffer(numbers);
        let ids_all: Vec<u32> = (0..batch * patches).map(|i| (i % patches) as u32).collect();
        let mut all = backend.buffer(ids_all.len())?;
        backend.upload(&mut all, &ids_all)?;
        Ok(Self {
            shape,
            inputs: Inputs {
                normalized: None,
                bytes: None,
                mean: backend.buffer(image.channels)?,
                std: backend.buffer(image.channels)?,
                noise: backend.buffer(batch * patches)?,
                samples: backend.buffer(batch)?,
                ids_keep: backend.buffer(batch * keep)?,
                ids_hidden: backend.buffer(batch * (patches - keep))?,
                ids_restore: backend.buffer(batch * patches)?,
                mask: backend.buffer(batch * patches)?,
                ids_all: all,
                host_samples: Vec::with_capacity(batch),
            },
            scratch: Scratch::new(backend, &[encoder_shape, decoder_shape][..if decodes { 2 } else { 1 }], trains)?,
            encoder: EncoderActivations {
                rows: features(batch * keep * patch_length)?,
                patches: features(batch * keep * width)?,
                stack: StackActivations::new(backend, encoder_shape, config.num_hidden_layers, shape.kept())?,
                mean: backend.buffer(encoder_shape.rows())?,
                rstd: backend.buffer(encoder_shape.rows())?,
                encoded: features(encoder_shape.rows() * width)?,
            },
            decoder: decodes
                .then(|| -> Result<_> {
                    let rows = batch * predicted;
                    Ok(DecoderActivations {
                        embedded: features(encoder_shape.rows() * decoder_width)?,
                        stack: StackActivations::new(
                            backend,
                            decoder_shape,
                            config.decoder_num_hidden_layers,
                            shape.kept(),
                        )?,
                        gathered: features(rows * decoder_width)?,
                        mean: backend.buffer(rows)?,
                        rstd: backend.buffer(rows)?,
                        normed: features(rows * decoder_width)?,
                        prediction: features(rows * patch_length)?,
                        dprediction: features(rows * patch_length)?,
                        patch_loss: backend.buffer(rows)?,
                    })
                })
                .transpose()?,
            flow: trains
                .then(|| -> Result<_> {
                    Ok(Flow {
                        encoder: features(encoder_shape.rows() * width)?,
                        encoded: features(encoder_shape.rows() * width)?,
                        decoder: features(decoder_shape.rows() * decoder_width)?,
                        gathered: features(batch * predicted * decoder_width)?,
                        normed: features(batch * predicted * decoder_width)?,
                    })
                })
                .transpose()?,
            positions: None,
        })
    }

    /// The sizes it was made for.
    #[must_use]
    pub fn shape(&self) -> &WorkspaceShape {
        &self.shape
    }

    /// Brings images to the device and decides which of their patches are hidden.
    pub(crate) fn upload(&mut self, backend: &B, batch: &MaskedImages<'_>) -> Result<()> {
        let Self { shape, inputs, .. } = self;
        let MaskedImages { images, masking, image, mask } = batch;
        if *image != shape.image || mask.keep != shape.keep || images.batch > shape.batch {
            return Err(Error::shape(
                "workspace",
                "images",
                format!("at most {} of {:?}, {} patches visible", shape.batch, shape.image, shape.keep),
                format!("{} of {image:?}, {} patches visible", images.batch, mask.keep),
            ));
        }
        inputs.upload(backend, shape, images)?;
        inputs.mask(backend, *mask, masking)
    }

    /// Interpolates the position tables where the image is not as large as the config's.
    pub(crate) fn place(
        &mut self,
        backend: &B,
        config: &MaeConfig,
        encoder: &B::Buffer<B::Master>,
        decoder: Option<&B::Buffer<B::Master>>,
    ) -> Result<()> {
        let (old, new) = (config.image().grid(), self.shape.image.grid());
        if old == new {
            return Ok(());
        }
        let Some(interpolation) = self.shape.interpolation else {
            let (model, image) = (config.image(), self.shape.image);
            return Err(Error::Config(format!(
                "the model was made for images of {}x{} pixels and these have {}x{}: resize them or ask for interpolated \
                 positions",
                model.height, model.width, image.height, image.width
            )));
        };
        let resample = |table: &B::Buffer<B::Master>, width: usize, flat: bool| -> Result<B::Buffer<B::Master>> {
            let mut masters = vec![B::Master::default(); (1 + old.0 * old.1) * width];
            backend.download(&mut masters, table)?;
            let values: Vec<f32> = masters.into_iter().map(|value| value.to_f64() as f32).collect();
            let values = if flat {
                interpolate_flat(&values, width, old.0 * old.1, new.0 * new.1)
            } else {
                interpolate_grid(&values, width, old, new)
            };
            let masters: Vec<B::Master> = values.into_iter().map(|value| B::Master::from_f64(value.into())).collect();
            let mut buffer = backend.buffer(masters.len())?;
            backend.upload(&mut buffer, &masters)?;
            Ok(buffer)
        };
        self.positions = Some(Positions {
            encoder: resample(encoder, config.hidden_size, false)?,
            decoder: match decoder {
                Some(table) => {
                    let flat = interpolation == PositionInterpolation::Transformers;
                    Some(resample(table, config.decoder_hidden_size, flat)?)
                }
                None => None,
            },
        });
        Ok(())
    }
}
