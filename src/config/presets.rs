//! Named model sizes.

use crate::config::{MaeConfig, Size};
use crate::{Error, Result};

/// The names that [`MaeConfig::by_name`] knows, smallest model first.
pub const PRESETS: &[&str] = &["tiny", "small", "base", "large", "huge"];

/// Width, layers and heads of a stack of blocks.
struct Stack(usize, usize, usize);

/// The decoder of He et al. for every size of encoder (section 4.1): 512 wide, 8 blocks, 16 heads.
const PAPER_DECODER: Stack = Stack(512, 8, 16);

fn preset(encoder: Stack, decoder: Stack, patch: usize) -> MaeConfig {
    MaeConfig {
        hidden_size: encoder.0,
        num_hidden_layers: encoder.1,
        num_attention_heads: encoder.2,
        intermediate_size: 4 * encoder.0,
        decoder_hidden_size: decoder.0,
        decoder_num_hidden_layers: decoder.1,
        decoder_num_attention_heads: decoder.2,
        decoder_intermediate_size: 4 * decoder.0,
        patch_size: Size::from(patch),
        layer_norm_eps: 1e-6,
        ..MaeConfig::default()
    }
}

/// Sizes for images of 224 pixels, with MLPs four times as wide as the tokens and the original's `layer_norm_eps` of 1e-6.
impl MaeConfig {
    /// ViT-Ti/16: 192 wide, 12 blocks, 3 heads; decoder 192 wide, 4 blocks, 3 heads. Not in the paper; for small data sets.
    #[must_use]
    pub fn tiny() -> Self {
        preset(Stack(192, 12, 3), Stack(192, 4, 3), 16)
    }

    /// ViT-S/16: 384 wide, 12 blocks, 6 heads; decoder 256 wide, 4 blocks, 8 heads: the paper's decoder at half its width and
    /// depth, with its 32 features a head. Not in the paper.
    #[must_use]
    pub fn small() -> Self {
        preset(Stack(384, 12, 6), Stack(256, 4, 8), 16)
    }

    /// ViT-B/16: 768 wide, 12 blocks, 12 heads, and the paper's decoder: 512 wide, 8 blocks, 16 heads.
    #[must_use]
    pub fn base() -> Self {
        preset(Stack(768, 12, 12), PAPER_DECODER, 16)
    }

    /// ViT-L/16: 1024 wide, 24 blocks, 16 heads, and the paper's decoder.
    #[must_use]
    pub fn large() -> Self {
        preset(Stack(1024, 24, 16), PAPER_DECODER, 16)
    }

    /// ViT-H/14: 1280 wide, 32 blocks, 16 heads, and the paper's decoder.
    #[must_use]
    pub fn huge() -> Self {
        preset(Stack(1280, 32, 16), PAPER_DECODER, 14)
    }

    /// The preset called `name`, one of [`PRESETS`], or as the original calls it (`mae_vit_base_patch16` and its sisters).
    ///
    /// # Errors
    /// [`Error::Config`] for another name.
    pub fn by_name(name: &str) -> Result<Self> {
        match name {
            "tiny" => Ok(Self::tiny()),
            "small" => Ok(Self::small()),
            "base" | "mae_vit_base_patch16" | "mae_vit_base_patch16_dec512d8b" => Ok(Self::base()),
            "large" | "mae_vit_large_patch16" | "mae_vit_large_patch16_dec512d8b" => Ok(Self::large()),
            "huge" | "mae_vit_huge_patch14" | "mae_vit_huge_patch14_dec512d8b" => Ok(Self::huge()),
            _ => Err(Error::Config(format!("model size {name:?} is not known; known are {}", PRESETS.join(", ")))),
        }
    }
}
