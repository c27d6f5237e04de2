//! The table of ops, and what each costs.

/// What one call of an op moves and computes, at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that must be read and written once each.
    pub bytes: u64,
    /// Floating-point operations; a multiply-add counts as two.
    pub flops: u64,
}

impl Cost {
    /// The cost of two calls after each other.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }

    /// The cost of `count` equal calls.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self { bytes: self.bytes * count, flops: self.flops * count }
    }
}

/// One op of the contract.
#[derive(Clone, Copy, Debug)]
pub struct OpSpec {
    /// The file in `kernels/`, `src/ops/`, `src/cpu/`, `src/cuda/`, `tests/` and `benches/` that has it.
    pub family: &'static str,
    /// The trait method.
    pub name: &'static str,
}

impl OpSpec {
    /// The kernels that compute it on a GPU; none where a library's product does.
    pub fn symbols(self) -> impl Iterator<Item = &'static str> {
        KERNELS.iter().filter(move |kernel| kernel.computes(self.name)).map(|kernel| kernel.symbol)
    }
}

const fn op(family: &'static str, name: &'static str) -> OpSpec {
    OpSpec { family, name }
}

/// Every op, in the order in which a step calls them first.
pub const OPS: &[OpSpec] = &[
    op("masking", "masking_from_noise"),
    op("masking", "masking_random"),
    op("patchify", "patchify_visible_forward"),
    op("linear", "linear_forward"),
    op("linear", "linear_residual_forward"),
    op("linear", "linear_activation_forward"),
    op("linear", "activation_forward"),
    op("linear", "linear_backward_input"),
    op("linear", "linear_activation_backward_input"),
    op("linear", "linear_activation_backward"),
    op("linear", "linear_backward_weight"),
    op("tokens", "tokens_assemble_forward"),
    op("tokens", "tokens_assemble_backward"),
    op("tokens", "tokens_unshuffle_forward"),
    op("tokens", "tokens_unshuffle_backward"),
    op("tokens", "tokens_gather_forward"),
    op("tokens", "tokens_gather_backward"),
    op("layernorm", "layernorm_forward"),
    op("layernorm", "layernorm_backward"),
    op("attention", "attention_forward"),
    op("attention", "attention_backward"),
    op("attention", "attention_probabilities"),
    op("loss", "loss_forward_backward"),
    op("cross_entropy", "cross_entropy_forward_backward"),
    op("adamw", "gradient_norm"),
    op("adamw", "adamw_step"),
    op("adamw", "weights_average"),
];

/// A kernel in `kernels/*.cu`.
#[derive(Clone, Copy, Debug)]
pub struct KernelSpec {
    /// The file.
    pub file: &'static str,
    /// Its `extern "C"` name.
    pub symbol: &'static str,
    /// The ops that its file names in a comment `// Ops of KERNEL: op, op`. Without one it belongs to the op that its name
    /// begins with.
    pub named_ops: &'static [&'static str],
}

impl KernelSpec {
    fn computes(&self, op: &str) -> bool {
        match self.named_ops {
            [] => self.symbol.strip_prefix(op).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')),
            named => named.contains(&op),
        }
    }
}

/// Every kernel, as the build script reads them in `kernels/`.
pub const KERNELS: &[KernelSpec] = include!(concat!(env!("OUT_DIR"), "/symbols.rs"));
