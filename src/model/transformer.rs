//! A stack of pre-norm transformer blocks (Dosovitskiy et al., arXiv 2010.11929): encoder and decoder alike.
//!
//! ```text
//! x ──┬─ norm1 ─ qkv ─ attention ─ projection ─(+)─┬─ norm2 ─ expand ─ activation ─ contract ─(+)── next x
//!     '───────────────────────────────────────────'└──────────────────────────────────────────'
//! ```
//!
//! Forward keeps per block: x and the middle of the residual stream, the norms' statistics, qkv, the log-sum-exp, the
//! attention's output and the input of the activation: 10 D numbers per token. The norms' and the activation's outputs, another
//! 6 D, are recomputed in backward; on a GPU that is modelled to take 5 % of its time. Where memory is short, forward keeps only x,
//! and backward runs each block once more: a third of forward's memory and a third more time.

use crate::Result;
use crate::model::parameters::{BlockGradients, BlockWeights};
use crate::model::plan::Allocator;
use crate::nvtx::range;
use crate::ops::{Activation, AttentionShape, Backend, LayerNormShape, LinearShape, Write};

/// Sizes of a stack for one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StackShape {
    pub batch: usize,
    pub tokens: usize,
    pub width: usize,
    pub heads: usize,
    pub mlp_width: usize,
    pub activation: Activation,
    pub epsilon: f64,
}

impl StackShape {
    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    pub fn norm(&self) -> LayerNormShape {
        LayerNormShape { rows: self.rows(), width: self.width, epsilon: self.epsilon }
    }

    pub fn attention(&self) -> AttentionShape {
        let Self { batch, tokens, heads, width, .. } = *self;
        AttentionShape { batch, tokens, heads, head_dim: width / heads }
    }

    fn linear(&self, inputs: usize, outputs: usize) -> LinearShape {
        LinearShape { rows: self.rows(), inputs, outputs }
    }
}

/// What forward keeps of one block for backward.
#[derive(Debug)]
struct BlockActivations<A: Allocator> {
    mean1: A::Buffer<A::Master>,
    rstd1: A::Buffer<A::Master>,
    qkv: A::Buffer<A::Element>,
    log_sum_exp: A::Buffer<A::Master>,
    attended: A::Buffer<A::Element>,
    middle: A::Buffer<A::Element>,
    mean2: A::Buffer<A::Master>,
    rstd2: A::Buffer<A::Master>,
    pre: A::Buffer<A::Element>,
}

/// What forward keeps for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing: there is no backward. All blocks share one set, and the residual stream alternates between two buffers.
    Nothing,
    /// The input of every block; the rest is computed again.
    Inputs,
    /// Everything that backward needs.
    Everything,
}

impl Keep {
    /// How many residual streams and how many sets of a block's other activations a stack of `depth` blocks has.
    pub fn counts(self, depth: usize) -> (usize, usize) {
        match self {
            Self::Nothing => (2.min(depth + 1), 1.min(depth)),
            Self::Inputs => (depth + 1, 1.min(depth)),
            Self::Everything => (depth + 1, depth),
        }
    }
}

/// The activations of a stack.
#[derive(Debug)]
pub(crate) struct StackActivations<A: Allocator> {
    streams: Vec<A::Buffer<A::Element>>,
    blocks: Vec<BlockActivations<A>>,
    depth: usize,
}

impl<A: Allocator> StackActivations<A> {
    pub fn new(memory: &A, shape: StackShape, depth: usize, keep: Keep) -> Result<Self> {
        let rows = shape.rows();
        let statistics = || memory.buffer(rows);
        let features = |width: usize| memory.buffer(rows * width);
        let (streams, blocks) = keep.counts(depth);
        Ok(Self {
            streams: (0..streams).map(|_| features(shape.width)).collect::<Result<_>>()?,
            blocks: (0..blocks)
                .map(|_| {
                    Ok(BlockActivations {
                        mean1: statistics()?,
                        rstd1: statistics()?,
                        qkv: features(3 * shape.width)?,
                        log_sum_exp: memory.buffer(rows * shape.heads)?,
                        attended: features(shape.width)?,
                        middle: features(shape.width)?,
                        mean2: statistics()?,
                        rstd2: statistics()?,
                        pre: features(shape.mlp_width)?,
                    })
                })
                .collect::<Result<_>>()?,
            depth,
        })
    }

    /// Where the stack's input goes, `[B * N, D]`.
    pub fn input_mut(&mut self) -> &mut A::Buffer<A::Element> {
        &mut self.streams[0]
    }

    /// The stack's output, `[B * N, D]`.
    pub fn output(&self) -> &A::Buffer<A::Element> {
        &self.streams[self.depth % self.streams.len()]
    }
}

/// Temporary tensors of one block, shared by all blocks of encoder and decoder.
#[derive(Debug)]
pub(crate) struct Scratch<A: Allocator> {
    norm: A::Buffer<A::Element>,
    expanded: A::Buffer<A::Element>,
    dnarrow: Option<A::Buffer<A::Element>>,
    dwide: Option<A::Buffer<A::Element>>,
}

impl<A: Allocator> Scratch<A> {
    pub fn new(memory: &A, shapes: &[StackShape], training: bool) -> Result<Self> {
        let largest = |numbers: fn(&StackShape) -> usize| shapes.iter().map(numbers).max().unwrap_or(0);
        let narrow = largest(|shape| shape.rows() * shape.width);
        let expanded = largest(|shape| shape.rows() * shape.mlp_width);
        let wide = largest(|shape| shape.rows() * shape.mlp_width.max(3 * shape.width));
        Ok(Self {
            norm: memory.buffer(narrow)?,
            expanded: memory.buffer(expanded)?,
            dnarrow: training.then(|| memory.buffer(narrow)).transpose()?,
            dwide: training.then(|| memory.buffer(wide)).transpose()?,
        })
    }
}

/// Looks at a stack while it runs.
pub(crate) trait Observer<B: Backend> {
    /// The residual stream before each block, and after the last one: `length` numbers.
    fn hidden_state(&mut self, length: usize, stream: &B::Buffer<B::Element>) -> Result<()>;
    /// The attention of each block.
    fn attention(
        &mut self,
        shape: AttentionShape,
        qkv: &B::Buffer<B::Element>,
        log_sum_exp: &B::Buffer<B::Master>,
    ) -> Result<()>;
}

/// Runs the blocks on [`StackActivations::input_mut`].
pub(crate) fn forward<B: Backend>(
    backend: &B,
    shape: StackShape,
    layers: &[BlockWeights<B>],
    activations: &mut StackActivations<B>,
    scratch: &mut Scratch<B>,
    mut observer: Option<&mut dyn Observer<B>>,
) -> Result<()> {
    let StackShape { width, mlp_width, .. } = shape;
    let StackActivations { streams, blocks, .. } = activations;
    let Scratch { norm, expanded, .. } = scratch;
    let (stream_count, block_count) = (streams.len(), blocks.len());
    for (layer, weights) in layers.iter().enumerate() {
        let _range = range(format_args!("layer {layer} forward, {} wide", shape.width));
        let (before, after) = two_mut(streams, layer % stream_count, (layer + 1) % stream_count);
        let kept = &mut blocks[layer % block_count];
        if let Some(observer) = observer.as_deref_mut() {
            observer.hidden_state(shape.rows() * width, before)?;
        }
        forward_kept(backend, shape, weights, before, kept, norm, expanded)?;
        if let Some(observer) = observer.as_deref_mut() {
            observer.attention(shape.attention(), &kept.qkv, &kept.log_sum_exp)?;
        }
        backend.linear_residual_forward(
            shape.linear(mlp_width, width),
            after,
            &kept.middle,
            expanded,
            &weights.contract.weight,
            weights.contract.bias.as_ref(),
        )?;
    }
    if let Some(observer) = observer {
        observer.hidden_state(shape.rows() * width, &streams[layers.len() % stream_count])?;
    }
    Ok(())
}

/// Runs a block up to its last linear layer: everything that backward needs of it.
fn forward_kept<B: Backend>(
    backend: &B,
    shape: StackShape,
    weights: &BlockWeights<B>,
    before: &B::Buffer<B::Element>,
    kept: &mut BlockActivations<B>,
    norm: &mut B::Buffer<B::Element>,
    expanded: &mut B::Buffer<B::Element>,
) -> Result<()> {
    let StackShape { width, mlp_width, activation, .. } = shape;
    let norm1 = &weights.norm1;
    backend.layernorm_forward(
        shape.norm(),
        norm,
        &mut kept.mean1,
        &mut kept.rstd1,
        before,
        &norm1.gamma,
        &norm1.beta,
    )?;
    backend.linear_forward(
        shape.linear(width, 3 * width),
        &mut kept.qkv,
        norm,
        &weights.qkv.weight,
        weights.qkv.bias.as_ref(),
    )?;
    backend.attention_forward(shape.attention(), &mut kept.attended, &mut kept.log_sum_exp, &kept.qkv)?;
    backend.linear_residual_forward(
        shape.linear(width, width),
        &mut kept.middle,
        before,
        &kept.attended,
        &weights.projection.weight,
        weights.projection.bias.as_ref(),
    )?;
    let norm2 = &weights.norm2;
    backend.layernorm_forward(
        shape.norm(),
        norm,
        &mut kept.mean2,
        &mut kept.rstd2,
        &kept.middle,
        &norm2.gamma,
        &norm2.beta,
    )?;
    backend.linear_activation_forward(
        shape.linear(width, mlp_width),
        activation,
        expanded,
        &mut kept.pre,
        norm,
        &weights.expand.weight,
        weights.expand.bias.as_ref(),
    )
}

/// Turns `dx`, the gradient of the output of block `layer`, into that of its input, and accumulates the parameters' gradients.
/// Blocks take their turns from the last to the first.
#[expect(clippy::too_many_arguments, reason = "what a stack is, twice its weights, and its memory")]
pub(crate) fn backward_block<B: Backend>(
    backend: &B,
    shape: StackShape,
    layers: &[BlockWeights<B>],
    gradients: &mut [BlockGradients<B>],
    activations: &mut StackActivations<B>,
    scratch: &mut Scratch<B>,
    dx: &mut B::Buffer<B::Element>,
    layer: usize,
) -> Result<()> {
    let StackShape { width, mlp_width, activation, .. } = shape;
    let Scratch { norm, expanded, dnarrow: Some(dnarrow), dwide: Some(dwide) } = scratch else {
        return Err(crate::Error::Config("this workspace was made for inference and cannot train".into()));
    };
    let (weights, gradients) = (&layers[layer], &mut gradients[layer]);
    let _range = range(format_args!("layer {layer} backward, {} wide", shape.width));
    let block_count = activations.blocks.len();
    let kept = &mut activations.blocks[layer % block_count];
    let before = &activations.streams[layer];
    // Where the blocks share one set, it still holds that of the last block.
    if block_count < layers.len() && layer + 1 < layers.len() {
        forward_kept(backend, shape, weights, before, kept, norm, expanded)?;
    }

    // The MLP: after = middle + contract(activation(expand(norm2(middle)))).
    let expand = shape.linear(width, mlp_width);
    let contract = shape.linear(mlp_width, width);
    backend.linear_activation_backward(
        contract,
        activation,
        dwide,
        expanded,
        gradients.expand.bias.as_mut(),
        dx,
        &weights.contract.weight,
        &kept.pre,
    )?;
    backend.linear_backward_weight(
        contract,
        &mut gradients.contract.weight,
        gradients.contract.bias.as_mut(),
        dx,
        expanded,
    )?;
    let norm2 = &weights.norm2;
    backend.layernorm_forward(
        shape.norm(),
        norm,
        &mut kept.mean2,
        &mut kept.rstd2,
        &kept.middle,
        &norm2.gamma,
        &norm2.beta,
    )?;
    // Its bias's gradient came with the activation's.
    backend.linear_backward_weight(expand, &mut gradients.expand.weight, None, dwide, norm)?;
    backend.linear_backward_input(expand, Write::Assign, dnarrow, dwide, &weights.expand.weight)?;
    backend.layernorm_backward(
        shape.norm(),
        Write::Accumulate,
        dx,
        &mut gradients.norm2.gamma,
        &mut gradients.norm2.beta,
        dnarrow,
        &kept.middle,
        &kept.mean2,
        &kept.rstd2,
        &norm2.gamma,
    )?;

    // Attention: middle = before + projection(attention(qkv(norm1(before)))).
    let packed = shape.linear(width, 3 * width);
    let projection = shape.linear(width, width);
    backend.linear_backward_weight(
        projection,
        &mut gradients.projection.weight,
        gradients.projection.bias.as_mut(),
        dx,
        &kept.attended,
    )?;
    backend.linear_backward_input(projection, Write::Assign, dnarrow, dx, &weights.projection.weight)?;
    backend.attention_backward(shape.attention(), dwide, dnarrow, &kept.qkv, &kept.log_sum_exp)?;
    let norm1 = &weights.norm1;
    backend.layernorm_forward(
        shape.norm(),
        norm,
        &mut kept.mean1,
        &mut kept.rstd1,
        before,
        &norm1.gamma,
        &norm1.beta,
    )?;
    backend.linear_backward_weight(packed, &mut gradients.qkv.weight, gradients.qkv.bias.as_mut(), dwide, norm)?;
    backend.linear_backward_input(packed, Write::Assign, dnarrow, dwide, &weights.qkv.weight)?;
    backend.layernorm_backward(
        shape.norm(),
        Write::Accumulate,
        dx,
        &mut gradients.norm1.gamma,
        &mut gradients.norm1.beta,
        dnarrow,
        before,
        &kept.mean1,
        &kept.rstd1,
        &norm1.gamma,
    )
}

/// Two different elements of a slice.
fn two_mut<T>(items: &mut [T], first: usize, second: usize) -> (&mut T, &mut T) {
    let (low, high) = items.split_at_mut(first.max(second));
    if first < second { (&mut low[first], &mut high[0]) } else { (&mut high[0], &mut low[second]) }
}
