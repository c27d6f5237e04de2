//! The layers of the model as a tree of handles, in the shape of the published parameter names.
//!
//! The same tree holds weights (`M` = working matrices, `V` = master vectors) and gradients (both masters), so that backward
//! reads one and writes the other.

use crate::Result;
use crate::config::MaeConfig;

/// A linear layer: weight `[outputs, inputs]`, bias `[outputs]`.
#[derive(Debug)]
pub(crate) struct LinearLayer<M, V> {
    pub weight: M,
    pub bias: Option<V>,
}

/// A LayerNorm: both `[width]`.
#[derive(Debug)]
pub(crate) struct NormLayer<V> {
    pub gamma: V,
    pub beta: V,
}

/// A pre-norm transformer block.
#[derive(Debug)]
pub(crate) struct BlockLayers<M, V> {
    pub norm1: NormLayer<V>,
    /// Query, key and value as one `[3 D, D]` matrix.
    pub qkv: LinearLayer<M, V>,
    pub projection: LinearLayer<M, V>,
    pub norm2: NormLayer<V>,
    pub expand: LinearLayer<M, V>,
    pub contract: LinearLayer<M, V>,
}

/// Everything before the decoder.
#[derive(Debug)]
pub(crate) struct EncoderLayers<M, V> {
    /// `[D, C * P * Q]`.
    pub patch: LinearLayer<M, V>,
    pub class_token: V,
    pub blocks: Vec<BlockLayers<M, V>>,
    pub norm: NormLayer<V>,
}

/// The decoder.
#[derive(Debug)]
pub(crate) struct DecoderLayers<M, V> {
    pub embed: LinearLayer<M, V>,
    pub mask_token: V,
    pub blocks: Vec<BlockLayers<M, V>>,
    pub norm: NormLayer<V>,
    /// `[P * Q * C, D]`.
    pub head: LinearLayer<M, V>,
}

/// Where the handles of a tree come from: a name per published parameter; several that lie side by side make one handle.
pub(crate) trait Handles {
    type Matrix;
    type Vector;
    fn matrix(&self, names: &[String]) -> Result<Self::Matrix>;
    fn vector(&self, names: &[String]) -> Result<Self::Vector>;

    /// The linear layer whose parameters are called `name.weight` and `name.bias`.
    fn linear(&self, name: &str) -> Result<LinearLayer<Self::Matrix, Self::Vector>> {
        Ok(LinearLayer {
            weight: self.matrix(&[format!("{name}.weight")])?,
            bias: Some(self.vector(&[format!("{name}.bias")])?),
        })
    }

    /// The LayerNorm whose parameters are called `name.weight` and `name.bias`.
    fn norm(&self, name: &str) -> Result<NormLayer<Self::Vector>> {
        Ok(NormLayer {
            gamma: self.vector(&[format!("{name}.weight")])?,
            beta: self.vector(&[format!("{name}.bias")])?,
        })
    }

    /// The block whose parameters' names start with `name`.
    fn block(&self, name: &str, qkv_bias: bool) -> Result<BlockLayers<Self::Matrix, Self::Vector>> {
        let packed =
            |what: &str| ["query", "key", "value"].map(|part| format!("{name}.attention.attention.{part}.{what}"));
        Ok(BlockLayers {
            norm1: self.norm(&format!("{name}.layernorm_before"))?,
            qkv: LinearLayer {
                weight: self.matrix(&packed("weight"))?,
                bias: if qkv_bias { Some(self.vector(&packed("bias"))?) } else { None },
            },
            projection: self.linear(&format!("{name}.attention.output.dense"))?,
            norm2: self.norm(&format!("{name}.layernorm_after"))?,
            expand: self.linear(&format!("{name}.intermediate.dense"))?,
            contract: self.linear(&format!("{name}.output.dense"))?,
        })
    }

    fn encoder(&self, config: &MaeConfig) -> Result<EncoderLayers<Self::Matrix, Self::Vector>> {
        Ok(EncoderLayers {
            patch: self.linear("vit.embeddings.patch_embeddings.projection")?,
            class_token: self.vector(&["vit.embeddings.cls_token".into()])?,
            blocks: (0..config.num_hidden_layers)
                .map(|layer| self.block(&format!("vit.encoder.layer.{layer}"), config.qkv_bias))
                .collect::<Result<_>>()?,
            norm: self.norm("vit.layernorm")?,
        })
    }

    fn decoder(&self, config: &MaeConfig) -> Result<DecoderLayers<Self::Matrix, Self::Vector>> {
        Ok(DecoderLayers {
            embed: self.linear("decoder.decoder_embed")?,
            mask_token: self.vector(&["decoder.mask_token".into()])?,
            blocks: (0..config.decoder_num_hidden_layers)
                .map(|layer| self.block(&format!("decoder.decoder_layers.{layer}"), config.qkv_bias))
                .collect::<Result<_>>()?,
            norm: self.norm("decoder.decoder_norm")?,
            head: self.linear("decoder.decoder_pred")?,
        })
    }
}
