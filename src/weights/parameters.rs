//! The table of a model's parameters.

use std::convert::Infallible;
use std::fmt::Arguments;

use crate::config::MaeConfig;
use crate::config::declare::{self, Builder, Group, Init};

/// Which part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// The encoder alone, for features and classification.
    EncoderOnly,
    /// Encoder and decoder.
    All,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// The published name, such as `vit.encoder.layer.0.attention.attention.query.weight`.
    pub name: String,
    /// The shape under that name.
    pub shape: Vec<usize>,
    /// The part of the arena that it lies in.
    pub group: Group,
    /// The values that it starts with.
    pub init: Init,
}

impl ParameterSpec {
    /// Elements: the product of the shape.
    #[must_use]
    pub fn length(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every parameter of a model under its published (transformers 4) name, in the arena's order: matrices, then vectors and
/// tokens, then the position tables.
///
/// Query, key and value of a layer lie side by side, so that they form one `[3 D, D]` matrix and one `[3 D]` bias. The
/// configuration must be one that [`MaeConfig::validate`] accepts.
#[must_use]
pub fn parameters(config: &MaeConfig, parts: Parts) -> Vec<ParameterSpec> {
    parameters_and_stages(config, parts).0
}

/// The parameters, and where in the arena each stage of the declaration starts.
pub(crate) fn parameters_and_stages(config: &MaeConfig, parts: Parts) -> (Vec<ParameterSpec>, Vec<usize>) {
    let mut list = List::default();
    let Ok(()) = match parts {
        Parts::EncoderOnly => declare::encoder(&mut list, config).map(drop),
        Parts::All => declare::autoencoder(&mut list, config).map(drop),
    };
    (list.groups.concat(), list.stages)
}

/// Lists what is declared.
#[derive(Default)]
struct List {
    groups: [Vec<ParameterSpec>; 3],
    stages: Vec<usize>,
    /// Elements of the matrices so far.
    matrices: usize,
}

impl List {
    fn push(&mut self, group: Group, names: &[Arguments<'_>], shape: &[usize], init: Init) {
        let spec = |name: &Arguments<'_>| ParameterSpec { name: name.to_string(), shape: shape.into(), group, init };
        self.groups[group as usize].extend(names.iter().map(spec));
    }
}

impl Builder for List {
    type Matrix = ();
    type Vector = ();
    type Table = ();
    type Error = Infallible;

    fn matrix(&mut self, names: &[Arguments<'_>], shape: &[usize]) -> Result<(), Infallible> {
        self.matrices += names.len() * shape.iter().product::<usize>();
        self.push(Group::Matrix, names, shape, Init::Xavier { fan_out: names.len() * shape[0] });
        Ok(())
    }

    fn vector(&mut self, names: &[Arguments<'_>], shape: &[usize], init: Init) -> Result<(), Infallible> {
        self.push(Group::Vector, names, shape, init);
        Ok(())
    }

    fn table(&mut self, name: &str, shape: &[usize]) -> Result<(), Infallible> {
        self.push(Group::Table, &[format_args!("{name}")], shape, Init::SinCos);
        Ok(())
    }

    fn stage(&mut self) {
        self.stages.push(self.matrices);
    }
}
