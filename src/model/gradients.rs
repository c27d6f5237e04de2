//! Gradients of the trained parameters: one arena beside that of the weights.

use crate::Result;
use crate::config::MaeConfig;
use crate::model::layers::{DecoderLayers, EncoderLayers, Handles};
use crate::model::parameters::{GradientHandles, Layout, download_part};
use crate::model::workspace::Vector;
use crate::ops::Backend;

/// The gradients of a model's trained parameters, which backward passes add to.
#[derive(Debug)]
pub struct Gradients<B: Backend> {
    pub(crate) arena: Vector<B>,
    pub(crate) encoder: EncoderLayers<Vector<B>, Vector<B>>,
    pub(crate) decoder: DecoderLayers<Vector<B>, Vector<B>>,
}

impl<B: Backend> Gradients<B> {
    pub(crate) fn new(backend: &B, config: &MaeConfig, layout: &Layout) -> Result<Self> {
        let arena = backend.buffer(layout.trained())?;
        let handles = GradientHandles { backend, layout, arena: &arena };
        let encoder = handles.encoder(config)?;
        let decoder = handles.decoder(config)?;
        Ok(Self { arena, encoder, decoder })
    }

    /// Sets all of them to zero.
    ///
    /// # Errors
    /// Device errors.
    pub fn zero(&mut self, backend: &B) -> Result<()> {
        backend.zero(&mut self.arena)
    }

    /// All of them as they are, unrounded: those of a parameter at its [`Layout::range`].
    ///
    /// # Errors
    /// Device errors.
    pub fn download(&self, backend: &B, layout: &Layout) -> Result<Vec<B::Master>> {
        let mut values = vec![B::Master::default(); layout.trained()];
        backend.download(&mut values, &self.arena)?;
        Ok(values)
    }

    /// The gradient of parameter `index` of `layout`; `None` for a position table, which is not trained.
    ///
    /// # Errors
    /// Device errors.
    pub fn get(&self, backend: &B, layout: &Layout, index: usize) -> Result<Option<Vec<f32>>> {
        let range = layout.range(index);
        if range.start >= layout.trained() {
            return Ok(None);
        }
        download_part(backend, &self.arena, range).map(Some)
    }
}
