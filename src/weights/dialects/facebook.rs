//! The original implementation (facebookresearch/mae), whose encoder has timm's names: query, key and value of a block are one
//! tensor. Position tables are saved as they are here, with the class token's row first.

use super::Dialect;
use super::View::{Part, Whole};
use crate::weights::ENCODER_POSITIONS;

pub(super) const DIALECT: Dialect = Dialect {
    name: "the original implementation and timm",
    marks: &["blocks.", "decoder_blocks.", "patch_embed."],
    blocks: &[("blocks.*.", "vit.encoder.layer.*."), ("decoder_blocks.*.", "decoder.decoder_layers.*.")],
    inside: &[
        ("norm1.", "layernorm_before.", Whole),
        ("attn.qkv.", "attention.attention.query.", Part(0, 3)),
        ("attn.qkv.", "attention.attention.key.", Part(1, 3)),
        ("attn.qkv.", "attention.attention.value.", Part(2, 3)),
        ("attn.proj.", "attention.output.dense.", Whole),
        ("norm2.", "layernorm_after.", Whole),
        ("mlp.fc1.", "intermediate.dense.", Whole),
        ("mlp.fc2.", "output.dense.", Whole),
    ],
    outside: &[
        ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection.", Whole),
        ("cls_token", "vit.embeddings.cls_token", Whole),
        ("pos_embed", ENCODER_POSITIONS, Whole),
        ("norm.", "vit.layernorm.", Whole),
        ("head.", "classifier.", Whole),
        ("mask_token", "decoder.mask_token", Whole),
        ("decoder_", "decoder.decoder_", Whole),
    ],
};
