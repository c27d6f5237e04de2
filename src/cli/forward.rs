//! `vitmae forward`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::bail;
use vitmae::Error;
use vitmae::files::check_output_beside;
use vitmae::model::{
    Extras, Gradients, ImageValues, Images, MaeForPreTraining, Masking, PositionInterpolation, Reconstruction,
};
use vitmae::ops::Backend;
use vitmae::weights::{Tensor, TensorFile, Values, write_tensors};

use crate::cli::arguments::mask_ratio;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// An autoencoder
    #[arg(long, value_name = "CKPT")]
    from: PathBuf,
    /// safetensors with pixel_values f32 [B, C, H, W] and, if you like, noise f32 [B, L]
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// safetensors for loss, logits, mask, ids_restore, last_hidden_state and what else is asked for
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Also grad.NAME of every trained parameter
    #[arg(long)]
    gradients: bool,
    /// Accept images of another size: 2d interpolates both position tables over the grid; transformers the decoder's in 1-D
    #[arg(long, value_name = "HOW", num_args = 0..=1, default_missing_value = "2d")]
    interpolate_pos_encoding: Option<Interpolation>,
    /// Also hidden_states.N of the encoder
    #[arg(long)]
    hidden_states: bool,
    /// Also attentions.N of the encoder
    #[arg(long)]
    attentions: bool,
    /// Share of patches that are hidden [default: the model's]
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = mask_ratio)]
    mask_ratio: Option<f64>,
    /// Decides which patches are hidden where no noise is given
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Interpolation {
    #[value(name = "2d")]
    Grid,
    Transformers,
}

pub(crate) fn run<B: Backend>(backend: B, arguments: &Arguments) -> anyhow::Result<()> {
    check_output_beside(&arguments.output, &arguments.from, [arguments.input.as_path()])?;
    let model = MaeForPreTraining::from_pretrained(&arguments.from, backend)?;
    let mut input = TensorFile::open(&arguments.input).map_err(of_input)?;
    let pixels = input.read_as_f32("pixel_values").map_err(of_input)?;
    let shape = input.shape("pixel_values").unwrap_or_default();
    let &[batch, channels, height, width] = shape else {
        bail!("{}: pixel_values should have the shape [B, C, H, W] and has {shape:?}", arguments.input.display());
    };
    let images = Images { batch, channels, height, width, values: ImageValues::Normalized(&pixels) };
    let ratio = arguments.mask_ratio.unwrap_or(model.config().mask_ratio);
    let noise = match input.shape("noise") {
        None => None,
        Some(&[images, _]) if images == batch => Some(input.read_as_f32("noise").map_err(of_input)?),
        Some(shape) => bail!(
            "{}: noise should have the shape [B, L] with B = {batch} and has {shape:?}",
            arguments.input.display()
        ),
    };
    let masking = match &noise {
        Some(noise) => Masking::Noise { ratio, noise },
        None => Masking::random(ratio, arguments.seed),
    };
    let interpolation = arguments.interpolate_pos_encoding.map(|how| match how {
        Interpolation::Grid => PositionInterpolation::Grid,
        Interpolation::Transformers => PositionInterpolation::Transformers,
    });
    let extras = Extras { hidden_states: arguments.hidden_states, attentions: arguments.attentions };
    let (result, gradients) = if arguments.gradients {
        let (result, gradients) = model.forward_backward(&images, &masking, interpolation, extras)?;
        (result, Some(gradients))
    } else {
        (model.forward_with(&images, &masking, interpolation, extras)?, None)
    };
    if !result.loss.is_finite() {
        tracing::warn!("the loss is not finite: pixels or weights are out of range");
    }
    write(arguments, &model, &result, gradients.as_ref())?;
    writeln!(io::stdout(), "loss {:.6}", result.loss)?;
    Ok(())
}

/// What is wrong with the input, which is read as a checkpoint's weights are and is none.
fn of_input(error: Error) -> Error {
    match error {
        Error::Checkpoint { path, problem } => Error::Value { what: format!("input {}", path.display()), problem },
        other => other,
    }
}

fn write<B: Backend>(
    arguments: &Arguments,
    model: &MaeForPreTraining<B>,
    result: &Reconstruction,
    gradients: Option<&Gradients<B>>,
) -> anyhow::Result<()> {
    let Reconstruction { batch, patches, keep, .. } = *result;
    let config = model.config();
    let (width, heads, tokens) = (config.hidden_size, config.num_attention_heads, 1 + keep);
    let ids_restore: Vec<i64> = result.ids_restore.iter().map(|&id| i64::from(id)).collect();
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], values: Values| -> vitmae::Result<()> {
        tensors.push((name, Tensor::new(shape, values)?));
        Ok(())
    };
    let f32s = |values: &[f32]| Values::F32(values.to_vec());
    add("loss".into(), &[1], Values::F32(vec![result.loss as f32]))?;
    add("logits".into(), &[batch, patches, config.image().patch_length()], f32s(&result.logits))?;
    add("mask".into(), &[batch, patches], f32s(&result.mask))?;
    add("ids_restore".into(), &[batch, patches], Values::I64(ids_restore))?;
    add("last_hidden_state".into(), &[batch, tokens, width], f32s(&result.last_hidden_state))?;
    for (layer, state) in result.hidden_states.iter().enumerate() {
        add(format!("hidden_states.{layer}"), &[batch, tokens, width], f32s(state))?;
    }
    for (layer, attention) in result.attentions.iter().enumerate() {
        add(format!("attentions.{layer}"), &[batch, heads, tokens, tokens], f32s(attention))?;
    }
    if let Some(gradients) = gradients {
        let layout = model.parameters().layout();
        for (index, spec) in layout.specs().iter().enumerate() {
            if let Some(gradient) = gradients.get(model.backend(), layout, index)? {
                add(format!("grad.{}", spec.name), &spec.shape, Values::F32(gradient))?;
            }
        }
    }
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Ok(write_tensors(&arguments.output, &named)?)
}
