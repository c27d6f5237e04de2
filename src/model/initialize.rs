//! A fresh model's weights, as the original implementation draws them.

use std::f64::consts::TAU;

use crate::Result;
use crate::config::MaeConfig;
use crate::model::parameters::Parameters;
use crate::model::positions::sin_cos_table;
use crate::ops::Backend;
use crate::random::{INITIALIZATION_STREAM, RandomStream};
use crate::weights::{ENCODER_POSITIONS, ParameterKind, ParameterSpec};

/// Xavier-uniform matrices (query, key and value as the one matrix that they are in the original; the patch embedding seen as
/// a linear layer), normal(0.02) class and mask tokens, LayerNorms 1 and 0, biases 0, sin-cos position tables.
pub(crate) fn initialize<B: Backend>(
    parameters: &mut Parameters<B>,
    backend: &B,
    config: &MaeConfig,
    seed: u64,
) -> Result<()> {
    let (rows, columns) = config.image().grid();
    for index in 0..parameters.layout().specs().len() {
        let spec = &parameters.layout().specs()[index];
        let mut random = RandomStream::new(seed, 0, index as u64, INITIALIZATION_STREAM);
        let length: usize = spec.shape.iter().product();
        let values: Vec<f32> = match spec.kind {
            ParameterKind::Matrix => {
                let bound = xavier_bound(spec);
                (0..length).map(|_| ((2.0 * uniform(&mut random) - 1.0) * bound) as f32).collect()
            }
            ParameterKind::Token => (0..length).map(|_| (0.02 * normal(&mut random)) as f32).collect(),
            ParameterKind::Position => {
                let encoder = spec.name == ENCODER_POSITIONS;
                let width = if encoder { config.hidden_size } else { config.decoder_hidden_size };
                sin_cos_table(rows, columns, width)
            }
            ParameterKind::NormScale => vec![1.0; length],
            ParameterKind::Bias | ParameterKind::NormShift => continue,
        };
        parameters.set(backend, index, &values)?;
    }
    parameters.refresh(backend)
}

/// `sqrt(6 / (fan_in + fan_out))` (Glorot and Bengio 2010).
fn xavier_bound(spec: &ParameterSpec) -> f64 {
    let outputs = spec.shape.first().copied().unwrap_or(1);
    let inputs: usize = spec.shape.iter().skip(1).product();
    let packed = [".query.", ".key.", ".value."].iter().any(|part| spec.name.contains(part));
    let outputs = if packed { 3 * outputs } else { outputs };
    (6.0 / (inputs + outputs) as f64).sqrt()
}

/// In `[0, 1)`, with 32 random bits.
fn uniform(random: &mut RandomStream) -> f64 {
    f64::from(random.next_u32()) / 4_294_967_296.0
}

/// Mean 0, standard deviation 1 (Box and Muller 1958).
fn normal(random: &mut RandomStream) -> f64 {
    let (radius, angle) = (1.0 - uniform(random), uniform(random));
    (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
}
