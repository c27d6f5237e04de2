//! Writing checkpoints.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::config::MaeConfig;
use crate::files::write_atomically;
use crate::weights::checkpoint::{CONFIG, WEIGHTS};
use crate::weights::dialects::{is_decoder, is_head};
use crate::weights::{ParameterSpec, write_f32, write_stream};
use crate::{Error, Result};

/// Writes `model.safetensors` and then `config.json` into a folder, which is created if needed. `values` returns
/// the numbers of each parameter of `specs`, one at a time.
///
/// Each file is replaced whole or not at all. `architectures` and the type of the weights in `config.json` are set to what is
/// written.
///
/// # Errors
/// [`Error::Io`]; [`Error::Shape`] when `values` returns more or fewer numbers than a parameter has; what `values` returns.
pub fn save_pretrained<V: AsRef<[f32]>>(
    folder: impl AsRef<Path>,
    config: &MaeConfig,
    specs: &[ParameterSpec],
    mut values: impl FnMut(usize) -> Result<V>,
) -> Result<()> {
    let folder = folder.as_ref();
    std::fs::create_dir_all(folder).map_err(|source| Error::io("creating", folder, source))?;
    let entries = specs.iter().map(|spec| (spec.name.clone(), Dtype::F32, spec.shape.clone())).collect();
    write_stream(&folder.join(WEIGHTS), entries, |index, writer| {
        let values = values(index)?;
        let (spec, found) = (&specs[index], values.as_ref());
        if found.len() != spec.length() {
            return Err(Error::shape("save_pretrained", &spec.name, format!("{:?}", spec.shape), found.len()));
        }
        write_f32(writer, found)
    })?;

    let mut config = config.clone();
    let architecture = if specs.iter().any(|spec| is_decoder(&spec.name)) {
        Some("ViTMAEForPreTraining")
    } else if specs.iter().any(|spec| is_head(&spec.name)) {
        // A classifier: its caller knows what it is called.
        None
    } else {
        Some("ViTMAEModel")
    };
    if let Some(architecture) = architecture {
        config.other.insert("architectures".into(), Value::from(vec![architecture]));
    }
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = config.other.get_mut(key) {
            *dtype = Value::from("float32");
        }
    }
    write_atomically(&folder.join(CONFIG), |writer| writer.bytes(config.to_json().as_bytes()))
}
