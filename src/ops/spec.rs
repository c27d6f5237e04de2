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
    /// The file in `kernels/`, `src/ops/`, `src/cpu/`, `tests/` and `benches/` that has it.
    pub family: &'static str,
    /// The trait method.
    pub name: &'static str,
    /// The `extern "C"` kernels that compute it on a GPU; empty where there is none yet.
    pub symbols: &'static [&'static str],
}

const fn op(family: &'static str, name: &'static str, symbols: &'static [&'static str]) -> OpSpec {
    OpSpec { family, name, symbols }
}

/// Every op, in the order in which a step calls them first.
pub const OPS: &[OpSpec] = &[
    op("masking", "masking_from_noise", &["masking_forward_noise_f32"]),
    op("masking", "masking_random", &["masking_forward_random"]),
    op(
        "patchify",
        "patchify_visible_forward",
        &[
            "patchify_visible_forward_u8_f32",
            "patchify_visible_forward_u8_bf16",
            "patchify_visible_forward_f32_f32",
            "patchify_visible_forward_f32_bf16",
        ],
    ),
    op("linear", "linear_forward", &["linear_bias_round_bf16"]),
    op("linear", "linear_residual_forward", &["linear_bias_round_bf16"]),
    op(
        "linear",
        "linear_activation_forward",
        &["linear_bias_round_bf16", "linear_activation_forward_f32", "linear_activation_forward_bf16"],
    ),
    op("linear", "activation_forward", &["linear_activation_forward_f32", "linear_activation_forward_bf16"]),
    op("linear", "linear_backward_input", &[]),
    op(
        "linear",
        "linear_activation_backward_input",
        &["linear_activation_backward_f32", "linear_activation_backward_bf16"],
    ),
    op(
        "linear",
        "linear_activation_backward",
        &[
            "linear_activation_backward_bias_f32",
            "linear_activation_backward_bias_bf16",
            "linear_bias_backward_finish_f32",
        ],
    ),
    op(
        "linear",
        "linear_backward_weight",
        &["linear_bias_backward_partial_f32", "linear_bias_backward_partial_bf16", "linear_bias_backward_finish_f32"],
    ),
    op("tokens", "tokens_assemble_forward", &["tokens_assemble_forward_f32", "tokens_assemble_forward_bf16"]),
    op("tokens", "tokens_assemble_backward", &["tokens_assemble_backward_f32", "tokens_assemble_backward_bf16"]),
    op("tokens", "tokens_unshuffle_forward", &["tokens_unshuffle_forward_f32", "tokens_unshuffle_forward_bf16"]),
    op(
        "tokens",
        "tokens_unshuffle_backward",
        &["tokens_unshuffle_backward_f32", "tokens_unshuffle_backward_bf16", "tokens_unshuffle_backward_mask_token"],
    ),
    op("tokens", "tokens_gather_forward", &["tokens_gather_forward_f32", "tokens_gather_forward_bf16"]),
    op("tokens", "tokens_gather_backward", &["tokens_gather_backward_f32", "tokens_gather_backward_bf16"]),
    op("layernorm", "layernorm_forward", &["layernorm_forward_f32", "layernorm_forward_bf16"]),
    op(
        "layernorm",
        "layernorm_backward",
        &[
            "layernorm_backward_dx_any_f32",
            "layernorm_backward_dx_256_f32",
            "layernorm_backward_dx_512_f32",
            "layernorm_backward_dx_768_f32",
            "layernorm_backward_dx_1024_f32",
            "layernorm_backward_dx_1280_f32",
            "layernorm_backward_dx_any_bf16",
            "layernorm_backward_dx_256_bf16",
            "layernorm_backward_dx_512_bf16",
            "layernorm_backward_dx_768_bf16",
            "layernorm_backward_dx_1024_bf16",
            "layernorm_backward_dx_1280_bf16",
            "layernorm_backward_parameters",
        ],
    ),
    op(
        "attention",
        "attention_forward",
        &[
            "attention_forward_whole_d64_n64_bf16",
            "attention_forward_whole_d64_n80_bf16",
            "attention_forward_whole_d80_n80_bf16",
            "attention_forward_resident_d32_bf16",
            "attention_forward_resident_d64_bf16",
            "attention_forward_resident_d80_bf16",
            "attention_forward_streamed_d32_bf16",
            "attention_forward_streamed_d64_bf16",
            "attention_forward_streamed_d80_bf16",
            "attention_forward_streamed_d128_bf16",
            "attention_forward_f32",
        ],
    ),
    op(
        "attention",
        "attention_backward",
        &[
            "attention_backward_whole_d64_n64_bf16",
            "attention_backward_whole_d64_n80_bf16",
            "attention_backward_whole_d80_n80_bf16",
            "attention_backward_resident_d32_bf16",
            "attention_backward_resident_d64_bf16",
            "attention_backward_delta_d32_bf16",
            "attention_backward_delta_d64_bf16",
            "attention_backward_delta_d80_bf16",
            "attention_backward_delta_d128_bf16",
            "attention_backward_keys_d32_bf16",
            "attention_backward_keys_d64_bf16",
            "attention_backward_keys_d80_bf16",
            "attention_backward_keys_d128_bf16",
            "attention_backward_queries_d32_bf16",
            "attention_backward_queries_d64_bf16",
            "attention_backward_queries_d80_bf16",
            "attention_backward_queries_d128_bf16",
            "attention_backward_delta_f32",
            "attention_backward_keys_f32",
            "attention_backward_queries_f32",
        ],
    ),
    op("attention", "attention_probabilities", &["attention_probabilities_f32", "attention_probabilities_bf16"]),
    op(
        "loss",
        "loss_forward_backward",
        &[
            "loss_forward_backward_u8_f32",
            "loss_forward_backward_u8_bf16",
            "loss_forward_backward_f32_f32",
            "loss_forward_backward_f32_bf16",
            "loss_sum",
        ],
    ),
    op(
        "cross_entropy",
        "cross_entropy_forward_backward",
        &["cross_entropy_forward_backward_f32", "cross_entropy_forward_backward_bf16", "loss_sum"],
    ),
    op("adamw", "gradient_norm", &["gradient_norm_partial", "gradient_norm_finish"]),
    op("adamw", "adamw_step", &["adamw_prepare", "adamw_update_f32", "adamw_update_bf16", "masters_to_bf16"]),
    op("adamw", "weights_average", &["weights_average"]),
];
