//! Files of other programs, put together here from known numbers: names, joined tensors and transposed kernels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vitmae::config::{MaeConfig, Size};
use vitmae::weights::{Checkpoint, ParameterSpec, Parts, parameters};

use crate::{numbers, refused, small_config};

/// Stored tensors by name: shape and numbers.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A model's parameters by published name, each element a number of its own.
fn published(config: &MaeConfig, parts: Parts) -> Tensors {
    let (wanted, specs) = (parameters(config, parts), parameters(config, Parts::All));
    let numbered = specs.iter().enumerate().filter(|(_, spec)| wanted.contains(spec));
    numbered.map(|(index, spec)| (spec.name.clone(), (spec.shape.clone(), numbers(index, spec)))).collect()
}

fn replaced(name: &str, pairs: &[(&str, &str)]) -> String {
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// As the original implementation saves them: `[query; key; value]` is one tensor.
fn original(config: &MaeConfig, parts: Parts) -> Tensors {
    let mut stored = Tensors::new();
    let all = published(config, parts);
    for (published, (shape, values)) in &all {
        let name = replaced(
            published,
            &[
                ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
                ("vit.embeddings.position_embeddings", "pos_embed"),
                ("vit.embeddings.cls_token", "cls_token"),
                ("vit.encoder.layer.", "blocks."),
                ("vit.layernorm", "norm"),
                ("decoder.decoder_layers.", "decoder_blocks."),
                ("decoder.", ""),
                ("attention.output.dense", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ],
        );
        if name.contains("attention.attention.key") || name.contains("attention.attention.value") {
            continue;
        }
        let (mut shape, mut values) = (shape.clone(), values.clone());
        if name.contains("attention.attention.query") {
            for part in ["key", "value"] {
                values.extend(&all[&published.replace("query", part)].1);
            }
            shape[0] *= 3;
        }
        stored.insert(name.replace("attention.attention.query", "attn.qkv"), (shape, values));
    }
    stored
}

/// As Keras saves them: kernels of dense layers `[in, out]`, of convolutions `[height, width, in, out]`.
fn keras(config: &MaeConfig, parts: Parts) -> Tensors {
    let mut stored = Tensors::new();
    for (name, (shape, values)) in published(config, parts) {
        let norm = name.contains("norm");
        let kernel = !norm && name.ends_with(".weight");
        // The blocks of the decoder are called `decoder_layers.0`, with a dot.
        let name = replaced(&name, &[("encoder.layer.", "encoder.layer_@_"), ("decoder_layers.", "decoder_layers@")]);
        let name = name.replace('.', "/").replace('@', ".");
        let (weight, bias) = if norm { ("gamma", "beta") } else { ("kernel", "bias") };
        let name = name.replace("/weight", &format!("/{weight}")).replace("/bias", &format!("/{bias}")) + ":0";
        let (shape, values) = match shape[..] {
            [outputs, inputs] if kernel => {
                let turned = (0..inputs).flat_map(|i| (0..outputs).map(move |o| o * inputs + i));
                (vec![inputs, outputs], turned.map(|place| values[place]).collect())
            }
            [outputs, inputs, height, width] => {
                let mut turned = Vec::new();
                for pixel in 0..height * width {
                    for i in 0..inputs {
                        turned.extend((0..outputs).map(|o| values[(o * inputs + i) * height * width + pixel]));
                    }
                }
                (vec![height, width, inputs, outputs], turned)
            }
            _ => (shape, values),
        };
        stored.insert(name, (shape, values));
    }
    stored
}

fn write(folder: &Path, tensors: &Tensors) -> PathBuf {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, (*shape).clone(), data).unwrap())
    });
    let path = folder.join("other.safetensors");
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    path
}

/// Reads the parameters `parts` of a file: they must be those of the whole model.
fn check(config: &MaeConfig, tensors: &Tensors, parts: Parts) -> vitmae::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let (specs, expected) = (parameters(config, parts), published(config, Parts::All));
    let mut next = 0;
    Checkpoint::open(write(folder.path(), tensors))?.read_into(&specs, |index, values| {
        let spec: &ParameterSpec = &specs[index];
        assert_eq!(index, next);
        assert_eq!(values, expected[&spec.name].1, "{}", spec.name);
        next += 1;
        Ok(())
    })?;
    assert_eq!(next, specs.len());
    Ok(())
}

#[test]
fn files_are_named_as_their_programs_name_them() {
    let (original, keras) = (original(&small_config(), Parts::All), keras(&small_config(), Parts::All));
    for (name, shape) in [
        ("cls_token", &[1, 1, 8][..]),
        ("pos_embed", &[1, 7, 8]),
        ("patch_embed.proj.weight", &[8, 3, 4, 4]),
        ("blocks.1.norm1.weight", &[8]),
        ("blocks.1.attn.qkv.weight", &[24, 8]),
        ("blocks.1.attn.qkv.bias", &[24]),
        ("blocks.1.attn.proj.weight", &[8, 8]),
        ("blocks.1.mlp.fc1.weight", &[12, 8]),
        ("norm.bias", &[8]),
        ("mask_token", &[1, 1, 4]),
        ("decoder_pos_embed", &[1, 7, 4]),
        ("decoder_embed.weight", &[4, 8]),
        ("decoder_blocks.0.attn.qkv.weight", &[12, 4]),
        ("decoder_blocks.0.norm2.bias", &[4]),
        ("decoder_norm.weight", &[4]),
        ("decoder_pred.weight", &[48, 4]),
    ] {
        assert_eq!(original[name].0, shape, "{name}");
    }
    for (name, shape) in [
        ("vit/embeddings/patch_embeddings/projection/kernel:0", &[4, 4, 3, 8][..]),
        ("vit/embeddings/cls_token:0", &[1, 1, 8]),
        ("vit/encoder/layer_._1/attention/attention/query/kernel:0", &[8, 8]),
        ("vit/encoder/layer_._1/intermediate/dense/kernel:0", &[8, 12]),
        ("vit/encoder/layer_._1/layernorm_after/beta:0", &[8]),
        ("vit/layernorm/gamma:0", &[8]),
        ("decoder/decoder_layers.0/output/dense/kernel:0", &[6, 4]),
        ("decoder/decoder_pred/kernel:0", &[4, 48]),
        ("decoder/decoder_pred/bias:0", &[48]),
        ("decoder/mask_token:0", &[1, 1, 4]),
    ] {
        assert_eq!(keras[name].0, shape, "{name}");
    }
}

#[test]
fn encoders_alone_and_what_stands_on_them_are_read() {
    let config = small_config();
    for stored in [original, keras] {
        check(&config, &stored(&config, Parts::EncoderOnly), Parts::EncoderOnly).unwrap();
        check(&config, &stored(&config, Parts::All), Parts::EncoderOnly).unwrap();
        let encoder = stored(&config, Parts::EncoderOnly);
        refused(check(&config, &encoder, Parts::All), &["encoder without the decoder", "pre-training"]);
    }
    // timm's classifier.
    let mut classifier = original(&config, Parts::EncoderOnly);
    classifier.insert("head.weight".into(), (vec![5, 8], vec![0.5; 40]));
    classifier.insert("head.bias".into(), (vec![5], vec![0.5; 5]));
    check(&config, &classifier, Parts::EncoderOnly).unwrap();
}

#[test]
fn what_does_not_fit_is_named_in_both_dialects() {
    let config = small_config();
    let whole = original(&config, Parts::All);
    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole.clone();
        change(&mut tensors);
        check(&config, &tensors, Parts::All)
    };
    let query = "vit.encoder.layer.1.attention.attention.query.weight (blocks.1.attn.qkv.weight)";
    refused(
        changed(&|tensors| {
            tensors.remove("blocks.1.attn.qkv.weight");
            tensors.remove("mask_token");
            tensors.insert("fc_norm.bias".into(), (vec![1], vec![1.0]));
            tensors.insert("blocks.0.ls1.gamma".into(), (vec![1], vec![1.0]));
        }),
        &[
            "value.weight (blocks.1.attn.qkv.weight), decoder.mask_token (mask_token); unexpected: fc_norm.bias, vit",
            query,
            "vit.encoder.layer.0.ls1.gamma (blocks.0.ls1.gamma)",
            "names, which are those of the original implementation and timm",
        ],
    );
    let joined = |rows: usize| {
        changed(&|tensors| {
            tensors.insert("blocks.1.attn.qkv.weight".into(), (vec![rows, 8], vec![1.0; rows * 8]));
        })
    };
    refused(joined(27), &[query, "(expected [8, 8], found [9, 8], stored as [27, 8])"]);
    // Not three equal parts.
    refused(joined(25), &[query, "(expected [8, 8], found [25, 8], stored as [25, 8])"]);
    let nan = changed(&|tensors| tensors.get_mut("blocks.0.attn.qkv.bias").unwrap().1[13] = f32::NAN);
    refused(nan, &["tensor blocks.0.attn.qkv.bias has NaN as element 13"]);
    // A parameter twice, under the names of two programs.
    let twice = changed(&|tensors| {
        tensors.insert("vit.encoder.layer.0.attention.attention.key.bias".into(), (vec![8], vec![1.0; 8]));
    });
    refused(
        twice,
        &["blocks.0.attn.qkv.bias in", "vit.encoder.layer.0.attention.attention.key.bias in", "same parameter"],
    );
    // Kernels that are not turned.
    let mut kernels = keras(&config, Parts::All);
    let kernel = kernels.get_mut("vit/encoder/layer_._0/output/dense/kernel:0").unwrap();
    kernel.0.reverse();
    refused(
        check(&config, &kernels, Parts::All),
        &[
            "vit.encoder.layer.0.output.dense.weight (vit/encoder/layer_._0/output/dense/kernel:0)",
            "(expected [8, 12], found [12, 8], stored as [8, 12])",
            "TensorFlow",
        ],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every parameter of models of any sizes comes out of either layout as it went in.
    #[test]
    fn models_of_any_size_are_read(
        widths in (1..4_usize, 1..4_usize, 1..9_usize, 1..9_usize),
        layers in (1..12_usize, 1..3_usize),
        channels in 1..4_usize,
        patch in (1..4_usize, 1..4_usize),
        qkv_bias in any::<bool>(),
    ) {
        let config = MaeConfig {
            hidden_size: 4 * widths.0,
            decoder_hidden_size: 4 * widths.1,
            intermediate_size: widths.2,
            decoder_intermediate_size: widths.3,
            num_hidden_layers: layers.0,
            decoder_num_hidden_layers: layers.1,
            num_attention_heads: 1,
            num_channels: channels,
            patch_size: Size::from(patch),
            image_size: Size::from((2 * patch.0, 3 * patch.1)),
            qkv_bias,
            ..small_config()
        };
        for stored in [original(&config, Parts::All), keras(&config, Parts::All)] {
            check(&config, &stored, Parts::All).unwrap();
            check(&config, &stored, Parts::EncoderOnly).unwrap();
        }
    }
}
