//! A model's sizes and settings: transformers' `ViTMAEConfig`, read from and written to `config.json`.

mod activation;
mod cost;
pub(crate) mod declare;
mod image;
mod json;
mod presets;
mod size;
mod validate;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use activation::Activation;
pub use cost::Flops;
pub use image::{ImageShape, visible_patches};
pub use presets::PRESETS;
pub use size::Size;

use crate::{Error, Result};

/// The largest `config.json` that is read: real ones have a few kilobytes.
const MAX_BYTES: u64 = 16 << 20;

/// The configuration of a masked autoencoder, under the names of transformers' `ViTMAEConfig`.
///
/// The defaults are those of transformers and are what a field gets that `config.json` leaves out. Serde knows the fields;
/// [`MaeConfig::from_json`] also checks them.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct MaeConfig {
    /// Features of the encoder's tokens `D`.
    pub hidden_size: usize,
    /// Blocks of the encoder.
    pub num_hidden_layers: usize,
    /// Attention heads of the encoder; they divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Features between the two layers of the encoder's MLPs.
    pub intermediate_size: usize,
    /// The function between these layers, in encoder and decoder: see [`MaeConfig::activation`].
    pub hidden_act: String,
    /// Dropout after embeddings, projections and MLPs; training needs 0 (see [`MaeConfig::check_trainable`]).
    pub hidden_dropout_prob: f64,
    /// Dropout of attention probabilities; likewise.
    pub attention_probs_dropout_prob: f64,
    /// Standard deviation that transformers draws fresh weights with. Kept, not used: initialisation is the original's.
    pub initializer_range: f64,
    /// Added to the variance in every LayerNorm: 1e-12 in transformers' default, 1e-6 in the original code.
    pub layer_norm_eps: f64,
    /// Pixels of an image.
    pub image_size: Size,
    /// Pixels of a patch.
    pub patch_size: Size,
    /// Channels `C` of an image.
    pub num_channels: usize,
    /// Whether queries, keys and values have a bias, in encoder and decoder.
    pub qkv_bias: bool,
    /// Attention heads of the decoder; they divide `decoder_hidden_size`.
    pub decoder_num_attention_heads: usize,
    /// Features of the decoder's tokens.
    pub decoder_hidden_size: usize,
    /// Blocks of the decoder.
    pub decoder_num_hidden_layers: usize,
    /// Features between the two layers of the decoder's MLPs.
    pub decoder_intermediate_size: usize,
    /// The share of patches that are hidden, in `[0, 1)`.
    pub mask_ratio: f64,
    /// Whether the target is each patch normalised by its own mean and std.
    pub norm_pix_loss: bool,
    /// Every other key of `config.json` (`architectures`, `transformers_version`, `torch_dtype`, `id2label`, …), written back
    /// as it was.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for MaeConfig {
    /// Transformers' defaults: ViT-B/16 with `layer_norm_eps` 1e-12.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            image_size: Size::from(224),
            patch_size: Size::from(16),
            num_channels: 3,
            qkv_bias: true,
            decoder_num_attention_heads: 16,
            decoder_hidden_size: 512,
            decoder_num_hidden_layers: 8,
            decoder_intermediate_size: 2048,
            mask_ratio: 0.75,
            norm_pix_loss: false,
            other: BTreeMap::new(),
        }
    }
}

impl MaeConfig {
    /// Reads the text of a `config.json` and [validates](MaeConfig::validate) it.
    ///
    /// # Errors
    /// [`Error::Config`] for text that is not a JSON object, a value of the wrong type, a `model_type` other than `vit_mae`,
    /// and settings that cannot work.
    pub fn from_json(text: &str) -> Result<Self> {
        let config = json::read(text)?;
        config.validate()?;
        Ok(config)
    }

    /// Reads a `config.json`, as [`MaeConfig::from_json`].
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read; [`Error::Config`], which then names the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = crate::files::read_text(path, MAX_BYTES)?;
        Self::from_json(&text).map_err(|error| match error {
            Error::Config(problem) => Error::Config(format!("{}: {problem}", path.display())),
            other => other,
        })
    }

    /// The text of `config.json` as transformers writes it: keys sorted, two spaces of indentation, Python's numbers.
    ///
    /// `model_type` is `vit_mae`; `architectures` is what was read, else `["ViTMAEForPreTraining"]`.
    #[must_use]
    pub fn to_json(&self) -> String {
        json::write(self)
    }

    /// The sizes of an image and its patches.
    #[must_use]
    pub fn image(&self) -> ImageShape {
        ImageShape {
            channels: self.num_channels,
            height: self.image_size.height,
            width: self.image_size.width,
            patch_height: self.patch_size.height,
            patch_width: self.patch_size.width,
        }
    }

    /// Patches `L` of an image; 0 for sizes that [`MaeConfig::validate`] refuses.
    #[must_use]
    pub fn patches(&self) -> usize {
        let rows = self.image_size.height.checked_div(self.patch_size.height);
        let columns = self.image_size.width.checked_div(self.patch_size.width);
        rows.zip(columns).and_then(|(rows, columns)| rows.checked_mul(columns)).unwrap_or(0)
    }

    /// Visible patches of an image at the configuration's `mask_ratio`.
    ///
    /// # Errors
    /// As [`visible_patches`].
    pub fn keep(&self) -> Result<usize> {
        visible_patches(self.patches(), self.mask_ratio)
    }
}
