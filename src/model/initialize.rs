//! A fresh model's weights, as the original implementation draws them.

use std::f64::consts::TAU;

use crate::Result;
use crate::config::MaeConfig;
use crate::model::parameters::Parameters;
use crate::model::positions::sin_cos_table;
use crate::ops::Backend;
use crate::random::{INITIALIZATION_STREAM, RandomStream};
use crate::weights::Init;

/// Gives each parameter the values that its declaration says; each has random numbers of its own.
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
        let length = spec.length();
        let values: Vec<f32> = match spec.init {
            Init::Xavier { fan_out } => {
                let fan_in: usize = spec.shape.iter().skip(1).product();
                let bound = (6.0 / (fan_in + fan_out) as f64).sqrt();
                (0..length).map(|_| ((2.0 * uniform(&mut random) - 1.0) * bound) as f32).collect()
            }
            Init::Normal { std } => (0..length).map(|_| (std * normal(&mut random)) as f32).collect(),
            Init::SinCos => sin_cos_table(rows, columns, spec.shape.last().copied().unwrap_or(0)),
            // As the arena is made.
            Init::Constant(0.0) => continue,
            Init::Constant(value) => vec![value; length],
        };
        parameters.set(backend, index, &values)?;
    }
    parameters.refresh(backend)
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
