//! The masked autoencoder over a [`Backend`](crate::ops::Backend): encoder, decoder and loss, forward and backward.

mod autoencoder;
mod backward;
mod encoder;
mod gradients;
mod images;
mod initialize;
mod masking;
mod objective;
mod parameters;
mod pixels;
mod plan;
mod positions;
mod pretraining;
mod transformer;
mod workspace;

pub use autoencoder::{MaeForPreTraining, Reconstruction};
pub use encoder::{Encoded, EncoderView, Extras, MaeEncoder};
pub use gradients::Gradients;
pub use images::{ImageValues, Images};
pub use masking::{MaskedImages, Masking};
pub use objective::{Batch, Objective};
pub(crate) use parameters::download_part;
pub use parameters::{Layout, Parameters};
pub use pixels::predicted_images;
pub use plan::MemoryUse;
pub use positions::{PositionInterpolation, interpolate_flat, interpolate_grid, sin_cos_table};
pub use workspace::{Purpose, Workspace, WorkspaceShape};
