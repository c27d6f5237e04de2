//! Hugging Face's transformers. Published are the names of version 4; version 5 has others in memory and for the decoder's
//! blocks, and `ViTMAEModel` saves the encoder without the leading `vit.`.

use super::Dialect;
use super::View::Whole;

pub(super) const DIALECT: Dialect = Dialect {
    name: "transformers",
    marks: &[],
    blocks: &[
        ("vit.encoder.layer.*.", "vit.encoder.layer.*."),
        ("decoder.decoder_layers.*.", "decoder.decoder_layers.*."),
        ("encoder.layer.*.", "vit.encoder.layer.*."),
        ("vit.layers.*.", "vit.encoder.layer.*."),
        ("layers.*.", "vit.encoder.layer.*."),
        ("decoder.decoder_encoder.layer.*.", "decoder.decoder_layers.*."),
    ],
    inside: &[
        ("attention.attention.", "attention.attention.", Whole),
        ("attention.output.", "attention.output.", Whole),
        ("intermediate.", "intermediate.", Whole),
        ("output.", "output.", Whole),
        ("attention.q_proj.", "attention.attention.query.", Whole),
        ("attention.k_proj.", "attention.attention.key.", Whole),
        ("attention.v_proj.", "attention.attention.value.", Whole),
        ("attention.o_proj.", "attention.output.dense.", Whole),
        ("mlp.fc1.", "intermediate.dense.", Whole),
        ("mlp.fc2.", "output.dense.", Whole),
    ],
    outside: &[
        ("vit.", "vit.", Whole),
        ("embeddings.", "vit.embeddings.", Whole),
        ("layernorm.", "vit.layernorm.", Whole),
        ("pooler.", "vit.pooler.", Whole),
    ],
};
