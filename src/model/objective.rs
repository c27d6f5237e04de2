//! What a trainer trains: a model and what is asked of it.

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;

use crate::Result;
use crate::model::gradients::Gradients;
use crate::model::parameters::Parameters;
use crate::ops::Backend;

/// A batch on the host: inputs, and whatever the loss compares the outputs with.
pub trait Batch: Copy {
    /// How many inputs there are.
    fn size(&self) -> usize;

    /// The inputs of `range`, with what belongs to them.
    #[must_use]
    fn part(&self, range: Range<usize>) -> Self;

    /// Where the numbers lie, and all else that decides what is prepared from them: equal for the same batch given twice.
    fn identity(&self) -> [u64; 8];
}

/// A model and its loss, as a [`Trainer`](crate::train::Trainer) needs them.
///
/// The loss of a step is a mean over *terms*, as many per input as [`Objective::terms`] says: hidden patches in pre-training. A
/// step is made of micro-batches. Each is brought to the device by `prepare`; what follows is work of the device alone, which can
/// be recorded and replayed, so everything that differs between steps lies in device memory.
pub trait Objective<B: Backend>: Debug + Sized {
    /// What one step learns from.
    type Batch<'a>: Batch;
    /// What a workspace and the work in it depend on, besides the number of inputs.
    type Shape: Copy + Debug + PartialEq;
    /// All that forward and backward write, but for gradients.
    type Workspace: Debug;
    /// The tree of the layers' gradients.
    type Layers: Debug;

    /// What the model runs on.
    fn backend(&self) -> &B;

    /// The weights. Their layout also says how many stages backward has, and which gradients each stage finishes.
    fn parameters(&self) -> &Parameters<B>;

    /// The weights for the optimiser, which holds the only reference to the model meanwhile.
    fn parameters_mut(&mut self) -> (&B, &mut Parameters<B>);

    /// Checks that the model can be trained.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for what training does not do, such as dropout.
    fn check_trainable(&self) -> Result<()>;

    /// Zeroed gradients.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when there is not enough memory.
    fn gradients(&self) -> Result<Gradients<B, Self::Layers>>;

    /// What a workspace for such batches depends on. With `recompute` backward computes the blocks' activations again.
    fn shape(&self, batch: &Self::Batch<'_>, recompute: bool) -> Self::Shape;

    /// Terms of the loss per input.
    fn terms(shape: &Self::Shape) -> usize;

    /// A workspace for up to `size` inputs at a time.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for inputs that do not fit the model, [`Error::Device`](crate::Error::Device) when
    /// there is not enough memory.
    fn workspace(&self, size: usize, shape: &Self::Shape) -> Result<Self::Workspace>;

    /// Brings a batch to the device.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a batch that does not fit the workspace; device errors.
    fn prepare(&self, workspace: &mut Self::Workspace, batch: &Self::Batch<'_>) -> Result<()>;

    /// Forward of the `size` inputs that are prepared. Adds to `loss` `[1]` the sum over their terms, divided by `terms_in_step`.
    ///
    /// # Errors
    /// Device errors.
    fn forward(
        &self,
        workspace: &mut Self::Workspace,
        size: usize,
        terms_in_step: usize,
        loss: &mut B::Buffer<B::Master>,
    ) -> Result<()>;

    /// Some stages of backward after [`Objective::forward`]; calls follow each other until all stages have run. Gradients are
    /// added to.
    ///
    /// # Errors
    /// Device errors.
    fn backward(
        &self,
        workspace: &mut Self::Workspace,
        size: usize,
        gradients: &mut Gradients<B, Self::Layers>,
        stages: Range<usize>,
    ) -> Result<()>;

    /// Writes the model into a folder with trained weights from `trained`, an arena of the layout of [`Objective::parameters`].
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); what the folder held before stays whole.
    fn save_with(&self, folder: &Path, trained: &B::Buffer<B::Master>) -> Result<()>;
}
