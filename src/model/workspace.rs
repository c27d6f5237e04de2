//! Everything a forward and a backward pass write to, allocated once for a batch and an image size.

use crate::config::MaeConfig;
use crate::model::images::{ImageValues, Images};
use crate::model::masking::{MaskedImages, Masking};
use crate::model::plan::Allocator;
use crate::model::positions::{PositionInterpolation, interpolate_flat, interpolate_grid};
use crate::model::transformer::{Keep, Scratch, StackActivations, StackShape};
use crate::ops::{Backend, Element, ImageShape, MaskingShape, Pixels, Real};
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
    pub(crate) fn trains(self) -> bool {
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

    /// Room for the pixels, of type `T`.
    pub(crate) fn pixels<T: Element, A: Allocator>(&self, memory: &A) -> Result<A::Buffer<T>> {
        memory.buffer(self.batch * self.image.length())
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
pub(crate) struct Inputs<A: Allocator> {
    pub normalized: Option<A::Buffer<f32>>,
    pub bytes: Option<A::Buffer<u8>>,
    pub mean: A::Buffer<f32>,
    pub std: A::Buffer<f32>,
    pub noise: A::Buffer<f32>,
    pub samples: A::Buffer<u64>,
    pub ids_keep: A::Buffer<u32>,
    pub ids_hidden: A::Buffer<u32>,
    pub ids_restore: A::Buffer<u32>,
    pub mask: A::Buffer<f32>,
    /// `0..L` for each image.
    pub ids_all: A::Buffer<u32>,
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

fn upload_to<B: Backend, T: Element>(
    backend: &B,
    buffer: &mut Option<B::Buffer<T>>,
    shape: &WorkspaceShape,
    values: &[T],
) -> Result<()> {
    let buffer = match buffer {
        Some(buffer) => buffer,
        None => buffer.insert(shape.pixels(backend)?),
    };
    backend.upload(buffer, values)
}

/// The encoder's tensors around its stack.
#[derive(Debug)]
pub(crate) struct EncoderActivations<A: Allocator> {
    /// `[B * keep, C * P * Q]`.
    pub rows: A::Buffer<A::Element>,
    /// `[B * keep, D]`; in backward its gradient.
    pub patches: A::Buffer<A::Element>,
    pub stack: StackActivations<A>,
    pub mean: A::Buffer<A::Master>,
    pub rstd: A::Buffer<A::Master>,
    /// The last hidden state, `[B, 1 + keep, D]`.
    pub encoded: A::Buffer<A::Element>,
}

/// The decoder's tensors around its stack.
#[derive(Debug)]
pub(crate) struct DecoderActivations<A: Allocator> {
    /// `[B * (1 + keep), Dd]`; in backward its gradient.
    pub embedded: A::Buffer<A::Element>,
    pub stack: StackActivations<A>,
    /// The tokens to predict from, `[B * n, Dd]`.
    pub gathered: A::Buffer<A::Element>,
    pub mean: A::Buffer<A::Master>,
    pub rstd: A::Buffer<A::Master>,
    pub normed: A::Buffer<A::Element>,
    /// `[B * n, P * Q * C]`.
    pub prediction: A::Buffer<A::Element>,
    pub dprediction: A::Buffer<A::Element>,
    pub patch_loss: A::Buffer<A::Master>,
}

/// Gradients that flow between the parts.
#[derive(Debug)]
pub(crate) struct Flow<A: Allocator> {
    /// `[B, 1 + keep, D]`: of the encoder's stream.
    pub encoder: A::Buffer<A::Element>,
    /// `[B, 1 + keep, D]`: of the last hidden state.
    pub encoded: A::Buffer<A::Element>,
    /// `[B, 1 + L, Dd]`: of the decoder's stream.
    pub decoder: A::Buffer<A::Element>,
    /// `[B * n, Dd]`: of the gathered tokens, before and after the norm.
    pub gathered: A::Buffer<A::Element>,
    pub normed: A::Buffer<A::Element>,
}

/// Position tables of another image size.
#[derive(Debug)]
pub(crate) struct Positions<A: Allocator> {
    pub encoder: A::Buffer<A::Master>,
    pub decoder: Option<A::Buffer<A::Master>>,
}

/// The activations of a model for up to [`WorkspaceShape::batch`] images at a time.
#[derive(Debug)]
pub struct Workspace<A: Allocator> {
    pub(crate) shape: WorkspaceShape,
    pub(crate) inputs: Inputs<A>,
    pub(crate) scratch: Scratch<A>,
    pub(crate) encoder: EncoderActivations<A>,
    pub(crate) decoder: Option<DecoderActivations<A>>,
    pub(crate) flow: Option<Flow<A>>,
    pub(crate) positions: Option<Positions<A>>,
}

impl<A: Allocator> Workspace<A> {
    /// Takes all buffers from `memory`.
    pub(crate) fn build(memory: &A, config: &MaeConfig, shape: WorkspaceShape) -> Result<Self> {
        let WorkspaceShape { batch, image, keep, purpose, .. } = shape;
        let (patches, predicted) = (image.patches(), shape.predicted());
        let (width, decoder_width) = (config.hidden_size, config.decoder_hidden_size);
        let patch_length = image.patch_length();
        let trains = purpose.trains();
        let decodes = purpose != Purpose::Encode;
        let encoder_shape = shape.encoder(config, batch)?;
        let decoder_shape = shape.decoder(config, batch)?;
        let features = |numbers: usize| memory.buffer(numbers);
        Ok(Self {
            shape,
            inputs: Inputs {
                normalized: None,
                bytes: None,
                mean: memory.buffer(image.channels)?,
                std: memory.buffer(image.channels)?,
                noise: memory.buffer(batch * patches)?,
                samples: memory.buffer(batch)?,
                ids_keep: memory.buffer(batch * keep)?,
                ids_hidden: memory.buffer(batch * (patches - keep))?,
                ids_restore: memory.buffer(batch * patches)?,
                mask: memory.buffer(batch * patches)?,
                ids_all: memory.buffer(batch * patches)?,
                host_samples: Vec::with_capacity(batch),
            },
            scratch: Scratch::new(memory, &[encoder_shape, decoder_shape][..if decodes { 2 } else { 1 }], trains)?,
            encoder: EncoderActivations {
                rows: features(batch * keep * patch_length)?,
                patches: features(batch * keep * width)?,
                stack: StackActivations::new(memory, encoder_shape, config.num_hidden_layers, shape.kept())?,
                mean: memory.buffer(encoder_shape.rows())?,
                rstd: memory.buffer(encoder_shape.rows())?,
                encoded: features(encoder_shape.rows() * width)?,
            },
            decoder: decodes
                .then(|| -> Result<_> {
                    let rows = batch * predicted;
                    Ok(DecoderActivations {
                        embedded: features(encoder_shape.rows() * decoder_width)?,
                        stack: StackActivations::new(
                            memory,
                            decoder_shape,
                            config.decoder_num_hidden_layers,
                            shape.kept(),
                        )?,
                        gathered: features(rows * decoder_width)?,
                        mean: memory.buffer(rows)?,
                        rstd: memory.buffer(rows)?,
                        normed: features(rows * decoder_width)?,
                        prediction: features(rows * patch_length)?,
                        dprediction: features(rows * patch_length)?,
                        patch_loss: memory.buffer(rows)?,
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
}

impl<B: Backend> Workspace<B> {
    pub(crate) fn new(backend: &B, config: &MaeConfig, shape: WorkspaceShape) -> Result<Self> {
        let mut workspace = backend.in_one_allocation(|backend| Self::build(backend, config, shape))?;
        let patches = shape.image.patches();
        let ids: Vec<u32> = (0..shape.batch * patches).map(|i| (i % patches) as u32).collect();
        backend.upload(&mut workspace.inputs.ids_all, &ids)?;
        Ok(workspace)
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
