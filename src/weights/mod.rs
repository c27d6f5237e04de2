//! Checkpoints: the names, formats and files of weights.
//!
//! A checkpoint is a folder with `config.json` and `model.safetensors` (or shards and their index), as transformers writes
//! it. A store reads the tensors of a file format, and a dialect says which parameters they are: transformers' names, the
//! original implementation's with timm's, and TensorFlow's. Whole autoencoders and encoders alone are read; written are the names
//! of transformers 4, which version 5 reads, too.

mod checkpoint;
mod dialects;
mod header;
mod parameters;
mod save;
mod shards;
mod store;
mod tensors;

pub use crate::config::declare::{DECODER_POSITIONS, ENCODER_POSITIONS, Group, Init};
pub use checkpoint::Checkpoint;
pub(crate) use parameters::parameters_and_stages;
pub use parameters::{ParameterSpec, Parts, parameters};
pub use save::save_pretrained;
pub use tensors::{Tensor, TensorFile, Values, write_tensors};
pub(crate) use tensors::{write_f32, write_stream};

/// Names for a message: the first ten, and how many more there are.
fn listed(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 10;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match names.len() {
        0 => "none".into(),
        count if count > SHOWN => format!("{} and {} more", shown.join(", "), count - SHOWN),
        _ => shown.join(", "),
    }
}
