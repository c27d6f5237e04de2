//! The table of a model's parameters.

use crate::config::MaeConfig;

/// Which part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// The encoder alone, for features and classification.
    EncoderOnly,
    /// Encoder and decoder.
    All,
}

/// What a parameter is: how it is initialised, and whether it decays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// The weight of a linear layer or of the patch embedding; weight decay applies to it.
    Matrix,
    /// A bias.
    Bias,
    /// The weight of a LayerNorm.
    NormScale,
    /// The bias of a LayerNorm.
    NormShift,
    /// The class token or the mask token.
    Token,
    /// A position table, which is not trained.
    Position,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// The published name, such as `vit.encoder.layer.0.attention.attention.query.weight`.
    pub name: String,
    /// The shape under that name.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
}

impl ParameterSpec {
    /// A parameter.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, kind: ParameterKind) -> Self {
        Self { name: name.into(), shape: shape.into(), kind }
    }

    /// Elements: the product of the shape.
    #[must_use]
    pub fn length(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The published name of the encoder's position table `[1, 1 + L, D]`.
pub const ENCODER_POSITIONS: &str = "vit.embeddings.position_embeddings";
/// The published name of the decoder's position table `[1, 1 + L, D]`.
pub const DECODER_POSITIONS: &str = "decoder.decoder_pos_embed";

/// Every parameter of a model under its published (transformers 4) name, in the arena's order: matrices, then vectors and
/// tokens, then the position tables.
///
/// Query, key and value of a layer lie side by side, so that they form one `[3 D, D]` matrix and one `[3 D]` bias. The
/// configuration must be one that [`MaeConfig::validate`] accepts.
#[must_use]
pub fn parameters(config: &MaeConfig, parts: Parts) -> Vec<ParameterSpec> {
    let image = config.image();
    let tokens = 1 + config.patches();
    let (width, decoder_width) = (config.hidden_size, config.decoder_hidden_size);
    let mut table = Table::default();

    table.linear(
        "vit.embeddings.patch_embeddings.projection",
        vec![width, image.channels, image.patch_height, image.patch_width],
    );
    table.token("vit.embeddings.cls_token", width);
    for layer in 0..config.num_hidden_layers {
        table.block(&format!("vit.encoder.layer.{layer}"), width, config.intermediate_size, config.qkv_bias);
    }
    table.norm("vit.layernorm", width);
    table.positions(ENCODER_POSITIONS, tokens, width);

    if parts == Parts::All {
        table.linear("decoder.decoder_embed", vec![decoder_width, width]);
        table.token("decoder.mask_token", decoder_width);
        for layer in 0..config.decoder_num_hidden_layers {
            let name = format!("decoder.decoder_layers.{layer}");
            table.block(&name, decoder_width, config.decoder_intermediate_size, config.qkv_bias);
        }
        table.norm("decoder.decoder_norm", decoder_width);
        table.linear("decoder.decoder_pred", vec![image.patch_length(), decoder_width]);
        table.positions(DECODER_POSITIONS, tokens, decoder_width);
    }
    let Table { mut matrices, vectors, positions } = table;
    matrices.extend(vectors);
    matrices.extend(positions);
    matrices
}

/// Parameters by their place in the arena.
#[derive(Default)]
struct Table {
    matrices: Vec<ParameterSpec>,
    vectors: Vec<ParameterSpec>,
    positions: Vec<ParameterSpec>,
}

impl Table {
    /// A linear layer with a bias.
    fn linear(&mut self, name: &str, shape: Vec<usize>) {
        self.vectors.push(ParameterSpec::new(format!("{name}.bias"), [shape[0]], ParameterKind::Bias));
        self.matrices.push(ParameterSpec::new(format!("{name}.weight"), shape, ParameterKind::Matrix));
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.vectors.push(ParameterSpec::new(format!("{name}.weight"), [width], ParameterKind::NormScale));
        self.vectors.push(ParameterSpec::new(format!("{name}.bias"), [width], ParameterKind::NormShift));
    }

    fn token(&mut self, name: &str, width: usize) {
        self.vectors.push(ParameterSpec::new(name, [1, 1, width], ParameterKind::Token));
    }

    fn positions(&mut self, name: &str, tokens: usize, width: usize) {
        self.positions.push(ParameterSpec::new(name, [1, tokens, width], ParameterKind::Position));
    }

    fn block(&mut self, name: &str, width: usize, mlp_width: usize, qkv_bias: bool) {
        self.norm(&format!("{name}.layernorm_before"), width);
        for part in ["query", "key", "value"] {
            let name = format!("{name}.attention.attention.{part}");
            self.matrices.push(ParameterSpec::new(format!("{name}.weight"), [width, width], ParameterKind::Matrix));
            if qkv_bias {
                self.vectors.push(ParameterSpec::new(format!("{name}.bias"), [width], ParameterKind::Bias));
            }
        }
        self.linear(&format!("{name}.attention.output.dense"), vec![width, width]);
        self.norm(&format!("{name}.layernorm_after"), width);
        self.linear(&format!("{name}.intermediate.dense"), vec![mlp_width, width]);
        self.linear(&format!("{name}.output.dense"), vec![width, mlp_width]);
    }
}
