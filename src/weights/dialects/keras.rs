//! `TFViTMAEForPreTraining` of transformers 4, saved as safetensors: Keras stores kernels with inputs before outputs, and those
//! of convolutions with the channels last.

use super::View::{Axes, Whole};
use super::{Dialect, View};

/// A dense layer's kernel, `[in, out]` to `[out, in]`.
const DENSE: View = Axes(&[1, 0]);
/// A convolution's kernel, `[height, width, in, out]` to `[out, in, height, width]`.
const CONVOLUTION: View = Axes(&[3, 2, 0, 1]);

pub(super) const DIALECT: Dialect = Dialect {
    name: "transformers' TensorFlow models",
    marks: &["vit/", "decoder/"],
    blocks: &[
        ("vit/encoder/layer_._*/", "vit.encoder.layer.*."),
        ("decoder/decoder_layers.*/", "decoder.decoder_layers.*."),
    ],
    inside: &[
        ("layernorm_before/gamma:0", "layernorm_before.weight", Whole),
        ("layernorm_before/beta:0", "layernorm_before.bias", Whole),
        ("attention/attention/query/kernel:0", "attention.attention.query.weight", DENSE),
        ("attention/attention/query/bias:0", "attention.attention.query.bias", Whole),
        ("attention/attention/key/kernel:0", "attention.attention.key.weight", DENSE),
        ("attention/attention/key/bias:0", "attention.attention.key.bias", Whole),
        ("attention/attention/value/kernel:0", "attention.attention.value.weight", DENSE),
        ("attention/attention/value/bias:0", "attention.attention.value.bias", Whole),
        ("attention/output/dense/kernel:0", "attention.output.dense.weight", DENSE),
        ("attention/output/dense/bias:0", "attention.output.dense.bias", Whole),
        ("layernorm_after/gamma:0", "layernorm_after.weight", Whole),
        ("layernorm_after/beta:0", "layernorm_after.bias", Whole),
        ("intermediate/dense/kernel:0", "intermediate.dense.weight", DENSE),
        ("intermediate/dense/bias:0", "intermediate.dense.bias", Whole),
        ("output/dense/kernel:0", "output.dense.weight", DENSE),
        ("output/dense/bias:0", "output.dense.bias", Whole),
    ],
    outside: &[
        (
            "vit/embeddings/patch_embeddings/projection/kernel:0",
            "vit.embeddings.patch_embeddings.projection.weight",
            CONVOLUTION,
        ),
        ("vit/embeddings/patch_embeddings/projection/bias:0", "vit.embeddings.patch_embeddings.projection.bias", Whole),
        ("vit/embeddings/cls_token:0", "vit.embeddings.cls_token", Whole),
        ("vit/embeddings/position_embeddings:0", "vit.embeddings.position_embeddings", Whole),
        ("vit/layernorm/gamma:0", "vit.layernorm.weight", Whole),
        ("vit/layernorm/beta:0", "vit.layernorm.bias", Whole),
        ("decoder/decoder_embed/kernel:0", "decoder.decoder_embed.weight", DENSE),
        ("decoder/decoder_embed/bias:0", "decoder.decoder_embed.bias", Whole),
        ("decoder/mask_token:0", "decoder.mask_token", Whole),
        ("decoder/decoder_pos_embed:0", "decoder.decoder_pos_embed", Whole),
        ("decoder/decoder_norm/gamma:0", "decoder.decoder_norm.weight", Whole),
        ("decoder/decoder_norm/beta:0", "decoder.decoder_norm.bias", Whole),
        ("decoder/decoder_pred/kernel:0", "decoder.decoder_pred.weight", DENSE),
        ("decoder/decoder_pred/bias:0", "decoder.decoder_pred.bias", Whole),
    ],
};
