//! How much memory a model takes, counted from the plan of its buffers.

use crate::Result;
use crate::config::MaeConfig;
use crate::model::workspace::{Purpose, WorkspaceShape};
use crate::weights::{Group, ParameterSpec, Parts};

/// Bytes that a model needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Master weights, their working copy and position tables.
    pub parameters: u64,
    /// Gradients and both moments; 0 unless training.
    pub optimizer: u64,
    /// Activations, temporary tensors and gradients that flow.
    pub activations: u64,
}

impl MemoryUse {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.parameters + self.optimizer + self.activations
    }

    /// Of a model in f32 with a workspace of this shape; [`Purpose`] decides which parts there are.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an unknown activation.
    pub fn of(config: &MaeConfig, shape: &WorkspaceShape) -> Result<Self> {
        Self::with_elements(config, shape, 4)
    }

    /// The same where an activation takes `element_bytes`: 4, or 2 in bf16, where the matrices have a working copy too.
    ///
    /// # Errors
    /// As [`MemoryUse::of`].
    pub fn with_elements(config: &MaeConfig, shape: &WorkspaceShape, element_bytes: u64) -> Result<Self> {
        let encodes_only = shape.purpose == Purpose::Encode;
        let trains = matches!(shape.purpose, Purpose::Train | Purpose::Inspect);
        let specs = crate::weights::parameters(config, if encodes_only { Parts::EncoderOnly } else { Parts::All });
        let count = |spec: &ParameterSpec| spec.shape.iter().map(|&n| n as u64).product::<u64>();
        let all: u64 = specs.iter().map(count).sum();
        let trained: u64 = specs.iter().filter(|spec| spec.group != Group::Table).map(count).sum();
        let matrices: u64 = specs.iter().filter(|spec| spec.group == Group::Matrix).map(count).sum();
        let copy = if element_bytes == 4 { 0 } else { element_bytes * matrices };

        let encoder = shape.encoder(config, shape.batch)?;
        let decoder = shape.decoder(config, shape.batch)?;
        let stack = |stack: &crate::model::transformer::StackShape, depth: usize| {
            let (rows, width) = (stack.rows(), stack.width);
            let block = rows * (5 * width + stack.mlp_width);
            let (streams, blocks) = shape.kept().counts(depth);
            let statistics = blocks * rows * (stack.heads + 4);
            ((streams * rows * width + blocks * block) as u64, statistics as u64)
        };
        let (patches, predicted, length) = (shape.image.patches(), shape.predicted(), shape.image.patch_length());
        let (batch, keep) = (shape.batch, shape.keep);
        let (width, decoder_width) = (config.hidden_size, config.decoder_hidden_size);
        let (mut numbers, mut statistics) = stack(&encoder, config.num_hidden_layers);
        numbers += (batch * keep * (length + width) + encoder.rows() * width) as u64;
        statistics += 2 * encoder.rows() as u64;
        let mut stacks = vec![encoder];
        if !encodes_only {
            let more = stack(&decoder, config.decoder_num_hidden_layers);
            numbers +=
                more.0 + (encoder.rows() * decoder_width + batch * predicted * 2 * (decoder_width + length)) as u64;
            statistics += more.1 + 3 * (batch * predicted) as u64;
            stacks.push(decoder);
        }
        let largest = |numbers: &dyn Fn(&crate::model::transformer::StackShape) -> usize| {
            stacks.iter().map(numbers).max().unwrap_or(0) as u64
        };
        let narrow = largest(&|stack| stack.rows() * stack.width);
        let wide = largest(&|stack| stack.rows() * stack.mlp_width.max(3 * stack.width));
        numbers += narrow + largest(&|stack| stack.rows() * stack.mlp_width);
        if trains {
            numbers += narrow + wide;
            numbers += (2 * encoder.rows() * width + decoder.rows() * decoder_width) as u64;
            numbers += (2 * batch * predicted * decoder_width) as u64;
        }
        // Pixels as bytes; noise, ids (kept, hidden, restored, all) and mask.
        let inputs = (batch * (shape.image.length() + 5 * 4 * patches)) as u64;
        Ok(Self {
            parameters: 4 * all + copy,
            optimizer: if trains { 3 * 4 * trained } else { 0 },
            activations: element_bytes * numbers + 4 * statistics + inputs,
        })
    }
}
