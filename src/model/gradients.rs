//! Gradients of the trained parameters: one arena beside that of the weights.

use crate::Result;
use crate::model::parameters::{AutoencoderGradients, GradientHandles, Layout, Vector, download_part};
use crate::ops::Backend;

/// The gradients of a model's trained parameters, which backward passes add to. `L` is the tree of its layers' gradients.
#[derive(Debug)]
pub struct Gradients<B: Backend, L = AutoencoderGradients<B>> {
    pub(crate) arena: Vector<B>,
    pub(crate) layers: L,
}

impl<B: Backend, L> Gradients<B, L> {
    /// Zeroed gradients. `layers` walks the declaration of the model whose parameters are laid out so.
    pub(crate) fn new(
        backend: &B,
        layout: &Layout,
        layers: impl FnOnce(&mut GradientHandles<'_, B>) -> Result<L>,
    ) -> Result<Self> {
        let arena = backend.buffer(layout.trained())?;
        let layers = layers(&mut GradientHandles::new(backend, layout, &arena))?;
        Ok(Self { arena, layers })
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
