//! The parameters of a model, declared once: published name, shape, initial values and group.
//!
//! A [`Builder`] walks the declaration and makes of it what is needed: the list of all parameters, their number, or a tree of
//! handles to their places in an arena. The order of the declaration within each group is the order in the arena.

use std::fmt::Arguments;

use crate::config::MaeConfig;

/// The part of the arena that a parameter lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The weight of a linear layer or of the patch embedding. Weight decay applies to it.
    Matrix,
    /// A bias, a weight or bias of a LayerNorm, or a token.
    Vector,
    /// A fixed table of positions, which is not trained.
    Table,
}

/// The values that a parameter of a fresh model has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform within `±sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio 2010). `fan_in` is the product of all dimensions but
    /// the first; convolutions are seen as linear layers.
    Xavier {
        /// Outputs of the whole matrix: three times those of the parameter for query, key and value, which are one matrix.
        fan_out: usize,
    },
    /// Normally distributed around 0.
    Normal {
        /// The standard deviation.
        std: f64,
    },
    /// One value everywhere.
    Constant(f32),
    /// Sines and cosines of the patches' places in the grid.
    SinCos,
}

const ZERO: Init = Init::Constant(0.0);
const ONE: Init = Init::Constant(1.0);
const TOKEN: Init = Init::Normal { std: 0.02 };

/// The published name of the encoder's position table `[1, 1 + L, D]`.
pub const ENCODER_POSITIONS: &str = "vit.embeddings.position_embeddings";
/// The published name of the decoder's position table `[1, 1 + L, D]`.
pub const DECODER_POSITIONS: &str = "decoder.decoder_pos_embed";

/// A linear layer: weight `[outputs, inputs]`, bias `[outputs]`.
#[derive(Debug)]
pub struct LinearLayer<M, V> {
    pub weight: M,
    pub bias: Option<V>,
}

/// A LayerNorm: both `[width]`.
#[derive(Debug)]
pub struct NormLayer<V> {
    pub gamma: V,
    pub beta: V,
}

/// A pre-norm transformer block.
#[derive(Debug)]
pub struct BlockLayers<M, V> {
    pub norm1: NormLayer<V>,
    /// Query, key and value as one `[3 D, D]` matrix.
    pub qkv: LinearLayer<M, V>,
    pub projection: LinearLayer<M, V>,
    pub norm2: NormLayer<V>,
    pub expand: LinearLayer<M, V>,
    pub contract: LinearLayer<M, V>,
}

/// Everything before the decoder. `T` is `()` in a tree of gradients: position tables have none.
#[derive(Debug)]
pub struct EncoderLayers<M, V, T> {
    /// `[D, C * P * Q]`.
    pub patch: LinearLayer<M, V>,
    pub class_token: V,
    pub positions: T,
    pub blocks: Vec<BlockLayers<M, V>>,
    pub norm: NormLayer<V>,
}

/// The decoder.
#[derive(Debug)]
pub struct DecoderLayers<M, V, T> {
    pub embed: LinearLayer<M, V>,
    pub mask_token: V,
    pub positions: T,
    pub blocks: Vec<BlockLayers<M, V>>,
    pub norm: NormLayer<V>,
    /// `[P * Q * C, D]`.
    pub head: LinearLayer<M, V>,
}

/// Encoder and decoder.
#[derive(Debug)]
pub struct AutoencoderLayers<M, V, T> {
    pub encoder: EncoderLayers<M, V, T>,
    pub decoder: DecoderLayers<M, V, T>,
}

/// What walks a declaration, and what it makes of each parameter.
pub trait Builder: Sized {
    type Matrix;
    type Vector;
    type Table;
    type Error;

    /// Matrices of one shape, `[outputs, inputs..]` each, that lie side by side and are one matrix for the model.
    fn matrix(&mut self, names: &[Arguments<'_>], shape: &[usize]) -> Result<Self::Matrix, Self::Error>;

    /// Vectors of one shape that lie side by side and are one vector for the model.
    fn vector(&mut self, names: &[Arguments<'_>], shape: &[usize], init: Init) -> Result<Self::Vector, Self::Error>;

    /// A position table.
    fn table(&mut self, name: &str, shape: &[usize]) -> Result<Self::Table, Self::Error>;

    /// Here starts a stage: the matrices from here to the next stage get their gradients in one stage of backward, which runs
    /// the stages from the last to the first.
    fn stage(&mut self) {}

    /// Makes the parts of a stack.
    fn repeat<T>(
        &mut self,
        times: usize,
        mut part: impl FnMut(&mut Self, usize) -> Result<T, Self::Error>,
    ) -> Result<Vec<T>, Self::Error> {
        (0..times).map(|index| part(self, index)).collect()
    }

    /// A linear layer with a bias.
    fn linear(&mut self, name: Arguments<'_>, shape: &[usize]) -> Result<Linear<Self>, Self::Error> {
        Ok(LinearLayer {
            weight: self.matrix(&[format_args!("{name}.weight")], shape)?,
            bias: Some(self.vector(&[format_args!("{name}.bias")], &shape[..1], ZERO)?),
        })
    }

    /// A LayerNorm.
    fn norm(&mut self, name: Arguments<'_>, width: usize) -> Result<NormLayer<Self::Vector>, Self::Error> {
        Ok(NormLayer {
            gamma: self.vector(&[format_args!("{name}.weight")], &[width], ONE)?,
            beta: self.vector(&[format_args!("{name}.bias")], &[width], ZERO)?,
        })
    }
}

type Linear<B> = LinearLayer<<B as Builder>::Matrix, <B as Builder>::Vector>;
type Block<B> = BlockLayers<<B as Builder>::Matrix, <B as Builder>::Vector>;
type Encoder<B> = EncoderLayers<<B as Builder>::Matrix, <B as Builder>::Vector, <B as Builder>::Table>;
type Decoder<B> = DecoderLayers<<B as Builder>::Matrix, <B as Builder>::Vector, <B as Builder>::Table>;
type Autoencoder<B> = AutoencoderLayers<<B as Builder>::Matrix, <B as Builder>::Vector, <B as Builder>::Table>;

/// A block whose parameters' names start with `name`.
fn block<B: Builder>(
    build: &mut B,
    name: Arguments<'_>,
    width: usize,
    mlp_width: usize,
    qkv_bias: bool,
) -> Result<Block<B>, B::Error> {
    build.stage();
    let packed = format_args!("{name}.attention.attention");
    Ok(BlockLayers {
        norm1: build.norm(format_args!("{name}.layernorm_before"), width)?,
        qkv: LinearLayer {
            weight: build.matrix(
                &[
                    format_args!("{packed}.query.weight"),
                    format_args!("{packed}.key.weight"),
                    format_args!("{packed}.value.weight"),
                ],
                &[width, width],
            )?,
            bias: if qkv_bias {
                let names = &[
                    format_args!("{packed}.query.bias"),
                    format_args!("{packed}.key.bias"),
                    format_args!("{packed}.value.bias"),
                ];
                Some(build.vector(names, &[width], ZERO)?)
            } else {
                None
            },
        },
        projection: build.linear(format_args!("{name}.attention.output.dense"), &[width, width])?,
        norm2: build.norm(format_args!("{name}.layernorm_after"), width)?,
        expand: build.linear(format_args!("{name}.intermediate.dense"), &[mlp_width, width])?,
        contract: build.linear(format_args!("{name}.output.dense"), &[width, mlp_width])?,
    })
}

/// The encoder.
pub fn encoder<B: Builder>(build: &mut B, config: &MaeConfig) -> Result<Encoder<B>, B::Error> {
    let (image, width, mlp_width) = (config.image(), config.hidden_size, config.intermediate_size);
    let patch = [width, image.channels, image.patch_height, image.patch_width];
    build.stage();
    Ok(EncoderLayers {
        patch: build.linear(format_args!("vit.embeddings.patch_embeddings.projection"), &patch)?,
        class_token: build.vector(&[format_args!("vit.embeddings.cls_token")], &[1, 1, width], TOKEN)?,
        positions: build.table(ENCODER_POSITIONS, &[1, config.patches().saturating_add(1), width])?,
        blocks: build.repeat(config.num_hidden_layers, |build, layer| {
            block(build, format_args!("vit.encoder.layer.{layer}"), width, mlp_width, config.qkv_bias)
        })?,
        norm: build.norm(format_args!("vit.layernorm"), width)?,
    })
}

/// The encoder, then the decoder.
pub fn autoencoder<B: Builder>(build: &mut B, config: &MaeConfig) -> Result<Autoencoder<B>, B::Error> {
    Ok(AutoencoderLayers { encoder: encoder(build, config)?, decoder: decoder(build, config)? })
}

fn decoder<B: Builder>(build: &mut B, config: &MaeConfig) -> Result<Decoder<B>, B::Error> {
    let (image, width, mlp_width) = (config.image(), config.decoder_hidden_size, config.decoder_intermediate_size);
    // Sizes that `MaeConfig::validate` refuses are counted, too.
    let pixels = [image.channels, image.patch_height, image.patch_width].into_iter().fold(1, usize::saturating_mul);
    build.stage();
    let embed = build.linear(format_args!("decoder.decoder_embed"), &[width, config.hidden_size])?;
    let mask_token = build.vector(&[format_args!("decoder.mask_token")], &[1, 1, width], TOKEN)?;
    let positions = build.table(DECODER_POSITIONS, &[1, config.patches().saturating_add(1), width])?;
    let blocks = build.repeat(config.decoder_num_hidden_layers, |build, layer| {
        block(build, format_args!("decoder.decoder_layers.{layer}"), width, mlp_width, config.qkv_bias)
    })?;
    let norm = build.norm(format_args!("decoder.decoder_norm"), width)?;
    build.stage();
    let head = build.linear(format_args!("decoder.decoder_pred"), &[pixels, width])?;
    Ok(DecoderLayers { embed, mask_token, positions, blocks, norm, head })
}
