//! The names under which implementations save the same parameters, led back to those of transformers 4.
//!
//! | saved by | block's prefix | inside a block |
//! | --- | --- | --- |
//! | transformers 4 (published) | `vit.encoder.layer.N`, `decoder.decoder_layers.N` | `attention.attention.query`, `attention.output.dense`, `intermediate.dense`, `output.dense` |
//! | transformers 5, files | `vit.encoder.layer.N`, `decoder.decoder_encoder.layer.N` | the same |
//! | transformers 5, in memory | `vit.layers.N`, `decoder.decoder_layers.N` | `attention.q_proj`, `attention.o_proj`, `mlp.fc1`, `mlp.fc2` |
//!
//! `ViTMAEModel` saves the encoder without the leading `vit.`.

use std::borrow::Cow;

/// What an encoder's names start with where `vit.` is left out.
const ENCODER_STARTS: &[&str] = &["embeddings.", "encoder.layer.", "layers.", "layernorm.", "pooler."];

const BLOCK_PREFIXES: &[(&str, &str)] = &[
    ("vit.layers.", "vit.encoder.layer."),
    ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
    ("vit.encoder.layer.", "vit.encoder.layer."),
    ("decoder.decoder_layers.", "decoder.decoder_layers."),
];

const BLOCK_PARTS: &[(&str, &str)] = &[
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
];

/// The published name of the tensor that a file calls `name`; a name that is not known stays as it is.
pub(crate) fn published(name: &str) -> String {
    let name = if ENCODER_STARTS.iter().any(|start| name.starts_with(start)) {
        Cow::Owned(format!("vit.{name}"))
    } else {
        Cow::Borrowed(name)
    };
    for (saved, published) in BLOCK_PREFIXES {
        let Some((layer, part)) = name.strip_prefix(saved).and_then(|rest| rest.split_once('.')) else { continue };
        let renamed = BLOCK_PARTS.iter().find_map(|(saved, published)| Some((*published, part.strip_prefix(saved)?)));
        let (start, end) = renamed.unwrap_or(("", part));
        return format!("{published}{layer}.{start}{end}");
    }
    name.into_owned()
}

/// Whether `name` (published) belongs to the decoder.
pub(crate) fn is_decoder(name: &str) -> bool {
    name.starts_with("decoder.")
}

/// Whether `name` (published) belongs to a part that other models put on an encoder, and that an encoder does not need.
pub(crate) fn is_head(name: &str) -> bool {
    ["classifier.", "vit.pooler."].iter().any(|start| name.starts_with(start))
}

/// Whether `name` is one of the original implementation's or of timm's.
pub(crate) fn is_original(name: &str) -> bool {
    ["blocks.", "decoder_blocks.", "patch_embed."].iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_version_lead_to_the_published_ones() {
        for (saved, expected) in [
            ("vit.layers.10.attention.q_proj.bias", "vit.encoder.layer.10.attention.attention.query.bias"),
            ("layers.0.mlp.fc2.weight", "vit.encoder.layer.0.output.dense.weight"),
            ("encoder.layer.3.layernorm_after.weight", "vit.encoder.layer.3.layernorm_after.weight"),
            ("decoder.decoder_encoder.layer.1.output.dense.bias", "decoder.decoder_layers.1.output.dense.bias"),
            ("decoder.decoder_layers.1.attention.o_proj.bias", "decoder.decoder_layers.1.attention.output.dense.bias"),
            ("embeddings.cls_token", "vit.embeddings.cls_token"),
            ("layernorm.weight", "vit.layernorm.weight"),
            ("decoder.decoder_norm.weight", "decoder.decoder_norm.weight"),
            ("classifier.weight", "classifier.weight"),
            ("vit.layers.", "vit.layers."),
            ("", ""),
        ] {
            assert_eq!(published(saved), expected);
        }
    }
}
