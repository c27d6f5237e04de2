//! The functions that `hidden_act` names.

use crate::config::MaeConfig;
use crate::{Error, Result};

/// The function between the two layers of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)` with the error function (transformers' `gelu`).
    Gelu,
    /// Its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)` (`silu`, `swish`).
    Silu,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
}

/// The names of `hidden_act` that are known, with what they compute.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("quick_gelu", Activation::QuickGelu),
];

impl MaeConfig {
    /// What `hidden_act` computes.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that is not known; the message lists those that are.
    pub fn activation(&self) -> Result<Activation> {
        let known = ACTIVATIONS.iter().find(|(name, _)| *name == self.hidden_act);
        known.map(|(_, activation)| *activation).ok_or_else(|| {
            let names: Vec<&str> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
            Error::Config(format!("hidden_act {:?} is not known; known are {}", self.hidden_act, names.join(", ")))
        })
    }
}
