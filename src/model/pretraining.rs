//! Pre-training as an objective: hidden patches are predicted from visible ones.

use std::ops::Range;
use std::path::Path;

use crate::Result;
use crate::model::autoencoder::MaeForPreTraining;
use crate::model::gradients::Gradients;
use crate::model::images::ImageValues;
use crate::model::masking::{MaskedImages, Masking};
use crate::model::objective::{Batch, Objective};
use crate::model::parameters::{AutoencoderGradients, Parameters, Vector, download_part};
use crate::model::positions::PositionInterpolation;
use crate::model::workspace::{Purpose, Workspace, WorkspaceShape};
use crate::ops::{Backend, MaskingShape};

impl Batch for MaskedImages<'_> {
    fn size(&self) -> usize {
        self.images.batch
    }

    fn part(&self, range: Range<usize>) -> Self {
        let mask = MaskingShape { batch: range.len(), ..self.mask };
        let masking = self.masking.part(range.clone(), mask.patches);
        Self { images: self.images.part(range), masking, image: self.image, mask }
    }

    fn identity(&self) -> [u64; 8] {
        let images = match self.images.values {
            ImageValues::Normalized(values) => values.as_ptr().addr(),
            ImageValues::Bytes { values, .. } => values.as_ptr().addr(),
        };
        let masks = match self.masking {
            Masking::None => [0; 6],
            Masking::Noise { ratio, noise } => [1, ratio.to_bits(), noise.as_ptr().addr() as u64, 0, 0, 0],
            Masking::Random { ratio, random, samples, first } => {
                let samples = samples.map_or(0, |samples| samples.as_ptr().addr());
                [2, ratio.to_bits(), samples as u64, random.seed, random.epoch.into(), first]
            }
        };
        let [kind, ratio, place, seed, epoch, first] = masks;
        [images as u64, self.size() as u64, kind, ratio, place, seed, epoch, first]
    }
}

/// What pre-training in a workspace depends on. The `batch` of `workspace` is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PretrainingShape {
    workspace: WorkspaceShape,
    /// Whether the pixels are bytes: a workspace keeps a buffer for one kind only.
    bytes: bool,
}

impl<B: Backend> Objective<B> for MaeForPreTraining<B> {
    type Batch<'a> = MaskedImages<'a>;
    type Shape = PretrainingShape;
    type Workspace = Workspace<B>;
    type Layers = AutoencoderGradients<B>;

    fn backend(&self) -> &B {
        &self.backend
    }

    fn parameters(&self) -> &Parameters<B> {
        &self.parameters
    }

    fn parameters_mut(&mut self) -> (&B, &mut Parameters<B>) {
        (&self.backend, &mut self.parameters)
    }

    fn check_trainable(&self) -> Result<()> {
        self.config.check_trainable()
    }

    fn gradients(&self) -> Result<Gradients<B>> {
        self.gradients()
    }

    fn shape(&self, batch: &MaskedImages<'_>, recompute: bool) -> PretrainingShape {
        let workspace = WorkspaceShape::of(batch, Purpose::Train, Some(PositionInterpolation::Grid));
        let bytes = matches!(batch.images.values, ImageValues::Bytes { .. });
        PretrainingShape { workspace: WorkspaceShape { batch: 0, recompute, ..workspace }, bytes }
    }

    fn terms(shape: &PretrainingShape) -> usize {
        shape.workspace.image.patches() - shape.workspace.keep
    }

    fn workspace(&self, size: usize, shape: &PretrainingShape) -> Result<Workspace<B>> {
        self.workspace(WorkspaceShape { batch: size, ..shape.workspace })
    }

    fn prepare(&self, workspace: &mut Workspace<B>, batch: &MaskedImages<'_>) -> Result<()> {
        workspace.upload(&self.backend, batch)
    }

    fn forward(
        &self,
        workspace: &mut Workspace<B>,
        size: usize,
        terms_in_step: usize,
        loss: &mut Vector<B>,
    ) -> Result<()> {
        self.forward_prepared(workspace, size, terms_in_step, loss, None)
    }

    fn backward(
        &self,
        workspace: &mut Workspace<B>,
        size: usize,
        gradients: &mut Gradients<B>,
        stages: Range<usize>,
    ) -> Result<()> {
        self.backward_stages(workspace, size, gradients, stages)
    }

    fn save_with(&self, folder: &Path, trained: &Vector<B>) -> Result<()> {
        let layout = self.parameters.layout();
        crate::weights::save_pretrained(folder, &self.config, layout.specs(), |index| {
            let range = layout.range(index);
            let arena = if range.end > layout.trained() { &self.parameters.master } else { trained };
            download_part(&self.backend, arena, range)
        })
    }
}
