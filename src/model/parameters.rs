//! The parameters of a model: one arena, laid out by the table of published names.
//!
//! ```text
//! master   [ matrices ............ | vectors and tokens ... | position tables ]
//! working  [ matrices ............ ]   (an alias of the masters where the types are the same)
//! gradient [ matrices ............ | vectors and tokens ... ]
//! ```
//!
//! Matrices come first: they are what weight decay applies to and what a half-precision backend keeps a copy of.

use std::collections::HashMap;
use std::fmt::Arguments;
use std::ops::Range;

use crate::config::MaeConfig;
use crate::config::declare::{AutoencoderLayers, BlockLayers, Builder, EncoderLayers, Init};
use crate::ops::{Backend, Memory, Real};
use crate::weights::{Checkpoint, Group, ParameterSpec, Parts, parameters_and_stages};
use crate::{Error, Result};

/// A buffer of activations or of a weight matrix.
pub(crate) type Matrix<B> = <B as Memory>::Buffer<<B as Memory>::Element>;
/// A buffer of masters.
pub(crate) type Vector<B> = <B as Memory>::Buffer<<B as Memory>::Master>;
/// The weights of one block.
pub(crate) type BlockWeights<B> = BlockLayers<Matrix<B>, Vector<B>>;
/// The gradients of one block.
pub(crate) type BlockGradients<B> = BlockLayers<Vector<B>, Vector<B>>;
/// The weights of the encoder.
pub(crate) type EncoderWeights<B> = EncoderLayers<Matrix<B>, Vector<B>, Vector<B>>;
/// The weights of encoder and decoder.
pub(crate) type AutoencoderWeights<B> = AutoencoderLayers<Matrix<B>, Vector<B>, Vector<B>>;
/// The gradients of encoder and decoder.
pub(crate) type AutoencoderGradients<B> = AutoencoderLayers<Vector<B>, Vector<B>, ()>;

/// Where each named parameter lies in the arenas.
#[derive(Debug)]
pub struct Layout {
    specs: Vec<ParameterSpec>,
    ranges: Vec<Range<usize>>,
    by_name: HashMap<String, usize>,
    stages: Vec<usize>,
    matrices: usize,
    trained: usize,
    total: usize,
}

impl Layout {
    pub(crate) fn new(config: &MaeConfig, parts: Parts) -> Self {
        let (specs, stages) = parameters_and_stages(config, parts);
        let mut ranges = Vec::with_capacity(specs.len());
        let (mut matrices, mut trained, mut total) = (0, 0, 0);
        for spec in &specs {
            ranges.push(total..total + spec.length());
            total += spec.length();
            match spec.group {
                Group::Matrix => (matrices, trained) = (total, total),
                Group::Vector => trained = total,
                Group::Table => (),
            }
        }
        let by_name = specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        Self { specs, ranges, by_name, stages, matrices, trained, total }
    }

    /// Names, shapes, groups and initial values, in the arena's order.
    #[must_use]
    pub fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    /// The elements of parameter `index` of [`Layout::specs`] in the arena.
    #[must_use]
    pub fn range(&self, index: usize) -> Range<usize> {
        self.ranges[index].clone()
    }

    /// The place in [`Layout::specs`] of the parameter with this published name.
    #[must_use]
    pub fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Elements that weight decay applies to: the matrices, at the start of the arena.
    #[must_use]
    pub fn matrices(&self) -> usize {
        self.matrices
    }

    /// Trained elements: all but the position tables at the arena's end.
    #[must_use]
    pub fn trained(&self) -> usize {
        self.trained
    }

    /// All elements.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many stages backward has.
    pub(crate) fn stages(&self) -> usize {
        self.stages.len()
    }

    /// Where the matrices' gradients are finished once the first `done` stages of backward have run: from there to the end of
    /// the matrices. Backward runs the stages of the declaration from the last to the first.
    pub(crate) fn finished_from(&self, done: usize) -> usize {
        let first = self.stages.len().saturating_sub(done);
        self.stages.get(first).copied().unwrap_or(self.matrices)
    }
}

/// The arenas that hold a model's weights.
#[derive(Debug)]
pub struct Parameters<B: Backend> {
    layout: Layout,
    pub(crate) master: B::Buffer<B::Master>,
    pub(crate) working: B::Buffer<B::Element>,
}

impl<B: Backend> Parameters<B> {
    pub(crate) fn zeroed(backend: &B, config: &MaeConfig, parts: Parts) -> Result<Self> {
        let layout = Layout::new(config, parts);
        let master = backend.buffer(layout.total)?;
        // SAFETY: masters are written only through `&mut Parameters` (loading, the optimiser), which the owner of both this
        // and the layers' handles lends alone; see `handles`.
        let working = unsafe { backend.working_copy(&master, layout.matrices)? };
        Ok(Self { layout, master, working })
    }

    /// Where each parameter lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Handles to the weights for the layers. The caller owns them together with `self` and never lends `&mut self` while a
    /// layer is in use.
    pub(crate) fn handles<'a>(&'a self, backend: &'a B) -> WeightHandles<'a, B> {
        WeightHandles { backend, parameters: self, next: Next::of(&self.layout) }
    }

    /// Fills all of them from a checkpoint that has exactly these.
    pub(crate) fn load(&mut self, backend: &B, checkpoint: &mut Checkpoint) -> Result<()> {
        let specs = self.layout.specs.clone();
        checkpoint.read_into(&specs, |index, values| self.set(backend, index, values))?;
        self.refresh(backend)
    }

    /// Copies parameter `index` to the device, rounding from f32.
    pub(crate) fn set(&mut self, backend: &B, index: usize, values: &[f32]) -> Result<()> {
        let range = self.layout.range(index);
        let masters: Vec<B::Master> = values.iter().map(|&value| B::Master::from_f64(value.into())).collect();
        // SAFETY: the handle lives only here, and `self` is borrowed mutably.
        let mut part = unsafe { backend.alias(&self.master, range.start, range.len())? };
        backend.upload(&mut part, &masters)
    }

    /// Rounds the masters into the working copy, after [`Parameters::set`].
    pub(crate) fn refresh(&mut self, backend: &B) -> Result<()> {
        backend.refresh(&mut self.working, &self.master)
    }

    /// Copies parameter `index` from the device.
    pub(crate) fn get(&self, backend: &B, index: usize) -> Result<Vec<f32>> {
        download_part(backend, &self.master, self.layout.range(index))
    }
}

/// Elements `range` of an arena as f32.
pub(crate) fn download_part<B: Backend>(
    backend: &B,
    arena: &B::Buffer<B::Master>,
    range: Range<usize>,
) -> Result<Vec<f32>> {
    // SAFETY: a read through a handle that lives only here, while the arena is borrowed.
    let part = unsafe { backend.alias(arena, range.start, range.len())? };
    let mut values = vec![B::Master::default(); range.len()];
    backend.download(&mut values, &part)?;
    Ok(values.into_iter().map(|value| value.to_f64() as f32).collect())
}

/// Where the next parameter of each group lies, in the order of the declaration.
struct Next([usize; 3]);

impl Next {
    fn of(layout: &Layout) -> Self {
        Self([0, layout.matrices, layout.trained])
    }

    /// A handle to the next `count` parameters of this shape.
    fn take<B: Backend, T: crate::ops::Element>(
        &mut self,
        backend: &B,
        arena: &B::Buffer<T>,
        group: Group,
        count: usize,
        shape: &[usize],
    ) -> Result<B::Buffer<T>> {
        let (next, length) = (&mut self.0[group as usize], count * shape.iter().product::<usize>());
        // SAFETY: the owner of the arena and of the handles lends only one of them at a time: see `Parameters::handles` and
        // `Gradients`.
        let part = unsafe { backend.alias(arena, *next, length)? };
        *next += length;
        Ok(part)
    }
}

/// See [`Parameters::handles`].
pub(crate) struct WeightHandles<'a, B: Backend> {
    backend: &'a B,
    parameters: &'a Parameters<B>,
    next: Next,
}

impl<B: Backend> Builder for WeightHandles<'_, B> {
    type Matrix = Matrix<B>;
    type Vector = Vector<B>;
    type Table = Vector<B>;
    type Error = Error;

    fn matrix(&mut self, names: &[Arguments<'_>], shape: &[usize]) -> Result<Matrix<B>> {
        self.next.take(self.backend, &self.parameters.working, Group::Matrix, names.len(), shape)
    }

    fn vector(&mut self, names: &[Arguments<'_>], shape: &[usize], _: Init) -> Result<Vector<B>> {
        self.next.take(self.backend, &self.parameters.master, Group::Vector, names.len(), shape)
    }

    fn table(&mut self, _: &str, shape: &[usize]) -> Result<Vector<B>> {
        self.next.take(self.backend, &self.parameters.master, Group::Table, 1, shape)
    }
}

/// Handles to a gradient arena, which has the layout of the parameters.
pub(crate) struct GradientHandles<'a, B: Backend> {
    backend: &'a B,
    arena: &'a Vector<B>,
    next: Next,
}

impl<'a, B: Backend> GradientHandles<'a, B> {
    pub fn new(backend: &'a B, layout: &Layout, arena: &'a Vector<B>) -> Self {
        Self { backend, arena, next: Next::of(layout) }
    }
}

impl<B: Backend> Builder for GradientHandles<'_, B> {
    type Matrix = Vector<B>;
    type Vector = Vector<B>;
    type Table = ();
    type Error = Error;

    fn matrix(&mut self, names: &[Arguments<'_>], shape: &[usize]) -> Result<Vector<B>> {
        self.next.take(self.backend, self.arena, Group::Matrix, names.len(), shape)
    }

    fn vector(&mut self, names: &[Arguments<'_>], shape: &[usize], _: Init) -> Result<Vector<B>> {
        self.next.take(self.backend, self.arena, Group::Vector, names.len(), shape)
    }

    fn table(&mut self, _: &str, _: &[usize]) -> Result<()> {
        Ok(())
    }
}
