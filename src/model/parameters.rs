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
use std::ops::Range;

use crate::model::layers::Handles;
use crate::ops::Backend;
use crate::weights::{Checkpoint, ParameterKind, ParameterSpec};
use crate::{Error, Result};

/// Where each named parameter lies in the arenas.
#[derive(Debug)]
pub struct Layout {
    specs: Vec<ParameterSpec>,
    ranges: Vec<Range<usize>>,
    by_name: HashMap<String, usize>,
    matrices: usize,
    trained: usize,
    total: usize,
}

impl Layout {
    pub(crate) fn new(specs: Vec<ParameterSpec>) -> Self {
        let mut ranges = Vec::with_capacity(specs.len());
        let (mut matrices, mut trained, mut total) = (0, 0, 0);
        for spec in &specs {
            let length: usize = spec.shape.iter().product();
            ranges.push(total..total + length);
            total += length;
            if spec.kind == ParameterKind::Matrix {
                matrices = total;
            }
            if spec.kind != ParameterKind::Position {
                trained = total;
            }
        }
        let by_name = specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        Self { specs, ranges, by_name, matrices, trained, total }
    }

    /// Names, shapes and kinds, in the arena's order.
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

    /// The range of parameters that lie side by side.
    fn joined(&self, names: &[String]) -> Result<Range<usize>> {
        let mut joined: Option<Range<usize>> = None;
        for name in names {
            let index = self.index(name).ok_or_else(|| Error::Config(format!("the model has no parameter {name}")))?;
            let range = self.range(index);
            joined = Some(match joined {
                None => range,
                Some(before) if before.end == range.start => before.start..range.end,
                Some(_) => return Err(Error::Config(format!("parameters {names:?} do not lie side by side"))),
            });
        }
        Ok(joined.unwrap_or_default())
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
    pub(crate) fn zeroed(backend: &B, specs: Vec<ParameterSpec>) -> Result<Self> {
        let layout = Layout::new(specs);
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
        WeightHandles { backend, parameters: self }
    }

    /// A handle to the parameter called `name`, as masters.
    pub(crate) fn master_handle(&self, backend: &B, name: &str) -> Result<B::Buffer<B::Master>> {
        self.handles(backend).vector(&[name.to_owned()])
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
        let masters: Vec<B::Master> = values.iter().map(|&value| B::master(f64::from(value))).collect();
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
    Ok(values.into_iter().map(|value| B::master_f64(value) as f32).collect())
}

/// See [`Parameters::handles`].
pub(crate) struct WeightHandles<'a, B: Backend> {
    backend: &'a B,
    parameters: &'a Parameters<B>,
}

impl<B: Backend> Handles for WeightHandles<'_, B> {
    type Matrix = B::Buffer<B::Element>;
    type Vector = B::Buffer<B::Master>;

    fn matrix(&self, names: &[String]) -> Result<Self::Matrix> {
        let range = self.parameters.layout.joined(names)?;
        // SAFETY: as `Parameters::handles` says, the owner keeps layers and arenas apart.
        unsafe { self.backend.alias(&self.parameters.working, range.start, range.len()) }
    }

    fn vector(&self, names: &[String]) -> Result<Self::Vector> {
        let range = self.parameters.layout.joined(names)?;
        // SAFETY: as above.
        unsafe { self.backend.alias(&self.parameters.master, range.start, range.len()) }
    }
}

/// Handles to a gradient arena that has a parameter layout.
pub(crate) struct GradientHandles<'a, B: Backend> {
    pub backend: &'a B,
    pub layout: &'a Layout,
    pub arena: &'a B::Buffer<B::Master>,
}

impl<B: Backend> Handles for GradientHandles<'_, B> {
    type Matrix = B::Buffer<B::Master>;
    type Vector = B::Buffer<B::Master>;

    fn matrix(&self, names: &[String]) -> Result<Self::Matrix> {
        let range = self.layout.joined(names)?;
        // SAFETY: `Gradients` owns the arena and these handles, and lends only one of them at a time.
        unsafe { self.backend.alias(self.arena, range.start, range.len()) }
    }

    fn vector(&self, names: &[String]) -> Result<Self::Vector> {
        self.matrix(names)
    }
}
