//! What a configuration must fulfil.

use crate::config::MaeConfig;
use crate::{Error, Result};

/// More blocks than any model has; without a bound a `config.json` could ask for a table of parameters without end.
const MAX_LAYERS: usize = 10_000;

fn ensure(holds: bool, problem: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Config(problem())) }
}

impl MaeConfig {
    /// Checks that a model can be built: sizes are positive, heads divide widths, patches divide the image, numbers are in
    /// their ranges, and no tensor is so large that its size overflows.
    ///
    /// # Errors
    /// [`Error::Config`] for the first rule that is broken; it names the field and what would be accepted.
    pub fn validate(&self) -> Result<()> {
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("num_channels", self.num_channels),
            ("decoder_hidden_size", self.decoder_hidden_size),
            ("decoder_num_hidden_layers", self.decoder_num_hidden_layers),
            ("decoder_num_attention_heads", self.decoder_num_attention_heads),
            ("decoder_intermediate_size", self.decoder_intermediate_size),
        ] {
            ensure(size > 0, || format!("{name} must be at least 1, found 0"))?;
            let layers = name.ends_with("num_hidden_layers");
            ensure(!layers || size <= MAX_LAYERS, || format!("{name} must be at most {MAX_LAYERS}, found {size}"))?;
        }
        for (name, width, heads_name, heads) in [
            ("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads),
            (
                "decoder_hidden_size",
                self.decoder_hidden_size,
                "decoder_num_attention_heads",
                self.decoder_num_attention_heads,
            ),
        ] {
            ensure(width % heads == 0, || format!("{name} {width} is not a multiple of {heads_name} {heads}"))?;
            ensure(width % 4 == 0, || {
                format!("{name} {width} is not a multiple of 4, which the sine-cosine position table needs")
            })?;
        }
        self.activation()?;
        for (name, probability) in self.dropout() {
            ensure((0.0..=1.0).contains(&probability), || format!("{name} {probability} is not in [0, 1]"))?;
        }
        ensure((0.0..1.0).contains(&self.mask_ratio), || format!("mask_ratio {} is not in [0, 1)", self.mask_ratio))?;
        ensure(self.layer_norm_eps > 0.0 && self.layer_norm_eps.is_finite(), || {
            format!("layer_norm_eps must be positive, found {}; the original code has 1e-6", self.layer_norm_eps)
        })?;
        ensure(self.initializer_range >= 0.0 && self.initializer_range.is_finite(), || {
            format!("initializer_range must not be negative, found {}", self.initializer_range)
        })?;
        self.check_sizes()
    }

    fn dropout(&self) -> [(&'static str, f64); 2] {
        [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
        ]
    }

    /// Patches divide the image, and no size overflows: a configuration may come from anywhere.
    fn check_sizes(&self) -> Result<()> {
        let image = self.image();
        // Before `ImageShape::check`, which rounds sizes up to a multiple of the patch.
        ensure(self.sizes_fit(), || {
            "the sizes are so large that a tensor's length does not fit into this machine's address space; check image_size, \
             patch_size, num_channels, hidden_size, intermediate_size and their decoder_ counterparts"
                .into()
        })?;
        image.check()
    }

    fn sizes_fit(&self) -> bool {
        let product =
            |factors: &[usize]| factors.iter().try_fold(1_usize, |product, &factor| product.checked_mul(factor));
        let image = self.image();
        // Twice the image: room to suggest the next multiple of the patch.
        let pixels = product(&[2, image.channels.max(1), image.height, 2, image.width]);
        let patch = product(&[2, image.channels.max(1), image.patch_height, 2, image.patch_width]);
        let tokens = self.patches().checked_add(1);
        let tables = tokens.and_then(|tokens| product(&[8, tokens, self.hidden_size.max(self.decoder_hidden_size)]));
        let attention = tokens.and_then(|tokens| {
            product(&[8, tokens, tokens, self.num_attention_heads.max(self.decoder_num_attention_heads)])
        });
        // Eight bytes a number, and room for what is computed from them.
        let parameters = self.checked_parameter_count().is_some_and(|count| count < (isize::MAX as u64) / 64);
        pixels.is_some() && patch.is_some() && tables.is_some() && attention.is_some() && parameters
    }

    /// Checks that training computes what the configuration says.
    ///
    /// # Errors
    /// [`Error::Config`] for dropout other than 0, which training does not have.
    pub fn check_trainable(&self) -> Result<()> {
        for (name, probability) in self.dropout() {
            ensure(probability == 0.0, || {
                format!(
                    "{name} is {probability}, but training has no dropout (masked autoencoders are trained without it); \
                     set it to 0"
                )
            })?;
        }
        Ok(())
    }
}
