//! `vitmae reconstruct`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use vitmae::config::Size;
use vitmae::data::{Source, SourceOptions};
use vitmae::figures::reconstruction_grid;
use vitmae::files::check_output_beside;
use vitmae::model::{ImageValues, Images, MaeForPreTraining, Masking, PositionInterpolation};
use vitmae::ops::{Backend, ImageShape};

use crate::cli::arguments::{mask_ratio, png, processor_for};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// An autoencoder
    #[arg(long, value_name = "CKPT")]
    from: PathBuf,
    /// Pictures
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// The PNG to write
    #[arg(long, value_name = "FILE.png", value_parser = PathBufValueParser::new().try_map(png))]
    out: PathBuf,
    /// Decides which patches are hidden
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Share of patches that are hidden [default: the model's]
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = mask_ratio)]
    mask_ratio: Option<f64>,
    /// Another image size, with interpolated positions [default: the model's]
    #[arg(long, value_name = "N|HxW")]
    image_size: Option<Size>,
}

pub(crate) fn run<B: Backend>(backend: B, arguments: &Arguments) -> anyhow::Result<()> {
    check_output_beside(&arguments.out, &arguments.from, arguments.images.iter().map(PathBuf::as_path))?;
    let model = MaeForPreTraining::from_pretrained(&arguments.from, backend)?;
    let config = model.config();
    let processor = processor_for(&arguments.from, config, arguments.image_size)?;
    let (height, width) = processor.output_size();
    let (mean, std) = processor.normalization();
    let shape = ImageShape { height, width, ..config.image() };
    shape.check()?;
    let source = Source::files(&arguments.images, &SourceOptions::new(shape.channels, height, width)?)?;
    let mut values = Vec::new();
    let mut labels = Vec::new();
    for index in 0..source.len() {
        let picture = processor.process(&source.read(index)?)?;
        values.extend_from_slice(&picture.pixels);
        let name = source.name(index);
        labels.push(name.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()));
    }
    let images = Images {
        batch: source.len(),
        channels: shape.channels,
        height,
        width,
        values: ImageValues::Bytes { values: &values, mean: &mean, std: &std },
    };
    let ratio = arguments.mask_ratio.unwrap_or(config.mask_ratio);
    let masking = Masking::random(ratio, arguments.seed);
    let result =
        model.forward_with(&images, &masking, Some(PositionInterpolation::Grid), vitmae::model::Extras::default())?;
    if !result.loss.is_finite() {
        tracing::warn!("the loss is not finite: the weights of {} may have run away", arguments.from.display());
    }
    let mut grid = reconstruction_grid(config, shape, &images, &result, (&mean, &std), &labels)?;
    grid.footer(&format!("Mask ratio {ratio}, seed {}; loss {:.4}.", arguments.seed, result.loss));
    grid.save(&arguments.out)?;
    writeln!(io::stdout(), "wrote {}: loss {:.6}", arguments.out.display(), result.loss)?;
    Ok(())
}
