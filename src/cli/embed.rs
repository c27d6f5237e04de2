//! `vitmae embed`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::builder::{PathBufValueParser, TypedValueParser};
use vitmae::config::Size;
use vitmae::data::{Loader, LoaderOptions, Source, SourceOptions, Transform};
use vitmae::files::{check_output_beside, write_atomically};
use vitmae::model::{Extras, ImageValues, Images, MaeEncoder, Masking, PositionInterpolation};
use vitmae::ops::Backend;
use vitmae::weights::{Checkpoint, Tensor, Values, write_tensors};

use crate::cli::arguments::{at_least_one, feature_file, processor_for};
use crate::cli::progress;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// An autoencoder or an encoder
    #[arg(long, value_name = "CKPT")]
    from: PathBuf,
    /// Pictures: a folder, tar shards (braces allowed), parquet files, one picture, or synthetic[:COUNT[:SEED]]
    #[arg(long, value_name = "SRC")]
    data: OsString,
    /// FILE.safetensors (features, samples, labels) or FILE.npy (features); FILE.names.txt then says which picture a row is
    #[arg(long, value_name = "FILE", value_parser = PathBufValueParser::new().try_map(feature_file))]
    out: PathBuf,
    /// The class token, the mean of the patch tokens, or all tokens, behind the last LayerNorm
    #[arg(long, value_name = "POOL", default_value = "cls")]
    pool: Pool,
    /// Pictures at a time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    batch_size: usize,
    /// Another image size, with interpolated positions [default: the model's]
    #[arg(long, value_name = "N|HxW")]
    image_size: Option<Size>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Pool {
    Cls,
    Mean,
    Tokens,
}

pub(crate) fn run<B: Backend>(backend: B, arguments: Arguments, threads: usize, quiet: bool) -> anyhow::Result<()> {
    let as_npy = arguments.out.extension().is_some_and(|end| end == "npy");
    let mut names_path = arguments.out.clone().into_os_string();
    names_path.push(".names.txt");
    let names_path = PathBuf::from(names_path);
    for path in [&arguments.out, &names_path] {
        check_output_beside(path, &arguments.from, [Path::new(&arguments.data)])?;
    }
    let mut checkpoint = Checkpoint::open(&arguments.from)?;
    let encoder = MaeEncoder::from_checkpoint(&mut checkpoint, backend)?;
    let image = encoder.config().image();
    let processor = processor_for(&arguments.from, encoder.config(), arguments.image_size)?;
    let (height, width) = processor.output_size();
    let (mean, std) = processor.normalization();
    let source = Source::parse(&arguments.data, &SourceOptions::new(image.channels, height, width)?)?;
    let total = source.len();
    let options = LoaderOptions { batch_size: arguments.batch_size, workers: threads, ..LoaderOptions::default() };
    let mut loader = Loader::evaluation(source, Transform::Inference(processor), &options)?;

    let view = encoder.view();
    let mut workspace = None;
    let mut features = Features::default();
    let bar = progress::bar(total as u64, 0, quiet);
    while let Some(batch) = loader.next_batch()? {
        let images = Images {
            batch: batch.len(),
            channels: batch.channels,
            height: batch.height,
            width: batch.width,
            values: ImageValues::Bytes { values: &batch.pixels, mean: &mean, std: &std },
        };
        // The first batch may be smaller than those behind it: bad pictures are left out.
        if workspace.as_ref().is_none_or(|(_, most)| *most < batch.len()) {
            workspace = Some((view.workspace(&images, Some(PositionInterpolation::Grid))?, batch.len()));
        }
        let Some((workspace, _)) = &mut workspace else { continue };
        let encoded = view.encode_in(workspace, &images, &Masking::None, Extras::default())?;
        features.add(&encoded, arguments.pool);
        features.samples.extend(batch.samples.iter().map(|&sample| sample as i64));
        features.labels.extend(batch.labels.iter().flatten().map(|&label| i64::from(label)));
        bar.inc(batch.len() as u64);
    }
    progress::clear();

    let source = loader.source();
    let names: Vec<String> = features.samples.iter().map(|&sample| line_of(&source.name(sample as usize))).collect();
    if !features.values.iter().all(|value| value.is_finite()) {
        bail!("features are not finite: the weights of {} may have run away", arguments.from.display());
    }
    let shape: Vec<String> = features.shape().iter().map(ToString::to_string).collect();
    if as_npy {
        features.write_npy(&arguments.out)?;
    } else {
        features.write_safetensors(&arguments.out)?;
    }
    write_atomically(&names_path, |file| names.iter().try_for_each(|name| file.bytes(name.as_bytes())))?;
    let left_out = loader.bad_pictures();
    if left_out > 0 {
        tracing::warn!("{left_out} pictures could not be decoded and were left out");
    }
    writeln!(
        io::stdout(),
        "wrote {}: features [{}]; rows as in {}",
        arguments.out.display(),
        shape.join(", "),
        names_path.display()
    )?;
    Ok(())
}

/// A name as one line: with Rust's quotes and escapes where it is no plain text.
fn line_of(name: &Path) -> String {
    match name.to_str() {
        Some(text) if !text.contains(|c: char| c.is_control()) => format!("{text}\n"),
        _ => format!("{name:?}\n"),
    }
}

/// What was collected so far.
#[derive(Default)]
struct Features {
    values: Vec<f32>,
    samples: Vec<i64>,
    labels: Vec<i64>,
    /// Tokens of a picture where all are kept.
    tokens: Option<usize>,
    width: usize,
}

impl Features {
    fn add(&mut self, encoded: &vitmae::model::Encoded, pool: Pool) {
        self.width = encoded.width;
        for picture in encoded.last_hidden_state.chunks_exact(encoded.tokens * encoded.width) {
            match pool {
                Pool::Cls => self.values.extend_from_slice(&picture[..encoded.width]),
                Pool::Tokens => {
                    self.tokens = Some(encoded.tokens);
                    self.values.extend_from_slice(picture);
                }
                Pool::Mean => {
                    let mut sums = vec![0.0f64; encoded.width];
                    for token in picture[encoded.width..].chunks_exact(encoded.width) {
                        sums.iter_mut().zip(token).for_each(|(sum, &value)| *sum += f64::from(value));
                    }
                    let patches = (encoded.tokens - 1) as f64;
                    self.values.extend(sums.iter().map(|sum| (sum / patches) as f32));
                }
            }
        }
    }

    fn shape(&self) -> Vec<usize> {
        let mut shape = vec![self.samples.len()];
        shape.extend(self.tokens);
        shape.push(self.width);
        shape
    }

    fn write_safetensors(self, path: &Path) -> vitmae::Result<()> {
        let count = self.samples.len();
        let shape = self.shape();
        let labels =
            (self.labels.len() == count).then(|| Tensor::new([count], Values::I64(self.labels))).transpose()?;
        let features = Tensor::new(shape, Values::F32(self.values))?;
        let samples = Tensor::new([count], Values::I64(self.samples))?;
        let mut tensors = vec![("features", &features), ("samples", &samples)];
        tensors.extend(labels.as_ref().map(|labels| ("labels", labels)));
        write_tensors(path, &tensors)
    }

    /// NumPy's format, version 1.0.
    fn write_npy(self, path: &Path) -> vitmae::Result<()> {
        let shape: Vec<String> = self.shape().iter().map(ToString::to_string).collect();
        let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}), }}", shape.join(", "));
        // Magic, version, length and header together fill whole lines of 64 bytes.
        let unpadded = 10 + header.len() + 1;
        header.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
        header.push('\n');
        write_atomically(path, |file| {
            file.bytes(b"\x93NUMPY\x01\x00")?;
            file.bytes(&(header.len() as u16).to_le_bytes())?;
            file.bytes(header.as_bytes())?;
            self.values.iter().try_for_each(|value| file.bytes(&value.to_le_bytes()))
        })
    }
}
