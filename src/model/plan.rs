//! Memory planned before it is allocated: a workspace takes its buffers from an [`Allocator`], which is a device or counts bytes.

use std::cell::Cell;
use std::fmt::Debug;
use std::marker::PhantomData;

use half::bf16;

use crate::Result;
use crate::config::MaeConfig;
use crate::model::parameters::Layout;
use crate::model::workspace::{Purpose, Workspace, WorkspaceShape};
use crate::ops::{Element, Memory};
use crate::weights::Parts;

/// Where buffers come from.
pub trait Allocator: Debug {
    /// Activations.
    type Element: Element;
    /// Statistics and losses.
    type Master: Element;
    /// A buffer of elements of type `T`.
    type Buffer<T: Element>: Debug;

    /// One zeroed buffer of `length` elements.
    fn buffer<T: Element>(&self, length: usize) -> Result<Self::Buffer<T>>;
}

impl<B: Memory> Allocator for B {
    type Element = <B as Memory>::Element;
    type Master = <B as Memory>::Master;
    type Buffer<T: Element> = <B as Memory>::Buffer<T>;

    fn buffer<T: Element>(&self, length: usize) -> Result<Self::Buffer<T>> {
        Memory::buffer(self, length)
    }
}

/// Counts the bytes of buffers with activations of type `E` and masters of type `M`, and allocates none.
#[derive(Debug)]
struct ByteCount<E, M> {
    bytes: Cell<u64>,
    types: PhantomData<(E, M)>,
}

impl<E: Element, M: Element> Allocator for ByteCount<E, M> {
    type Element = E;
    type Master = M;
    type Buffer<T: Element> = ();

    fn buffer<T: Element>(&self, length: usize) -> Result<()> {
        let bytes = (length as u64).saturating_mul(size_of::<T>() as u64);
        self.bytes.set(self.bytes.get().saturating_add(bytes));
        Ok(())
    }
}

/// Bytes that a model needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Master weights, their working copy and position tables.
    pub parameters: u64,
    /// Gradients and both moments; 0 unless training.
    pub optimizer: u64,
    /// The workspace, with pixels as bytes: activations, temporary tensors and gradients that flow.
    pub activations: u64,
}

impl MemoryUse {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.parameters + self.optimizer + self.activations
    }

    /// Of a model in f32 with a workspace of this shape; [`Purpose`] decides which parts there are.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an unknown activation.
    pub fn of(config: &MaeConfig, shape: &WorkspaceShape) -> Result<Self> {
        Self::count::<f32, f32>(config, shape)
    }

    /// The same in bf16, where the matrices have a working copy, too.
    ///
    /// # Errors
    /// As [`MemoryUse::of`].
    pub fn of_bf16(config: &MaeConfig, shape: &WorkspaceShape) -> Result<Self> {
        Self::count::<bf16, f32>(config, shape)
    }

    fn count<E: Element, M: Element>(config: &MaeConfig, shape: &WorkspaceShape) -> Result<Self> {
        let layout =
            Layout::new(config, if shape.purpose == Purpose::Encode { Parts::EncoderOnly } else { Parts::All });
        let (element, master) = (size_of::<E>(), size_of::<M>());
        let copy = if element == master { 0 } else { element * layout.matrices() };
        let memory = ByteCount::<E, M> { bytes: Cell::new(0), types: PhantomData };
        Workspace::build(&memory, config, *shape)?;
        shape.pixels::<u8, _>(&memory)?;
        Ok(Self {
            parameters: (master * layout.total() + copy) as u64,
            optimizer: if shape.purpose.trains() { (3 * master * layout.trained()) as u64 } else { 0 },
            activations: memory.bytes.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, allocated_bytes};
    use crate::model::{ImageValues, Images, MaeForPreTraining, MaskedImages, Masking};

    fn check<F: crate::cpu::Float>(purpose: Purpose, recompute: bool) -> Result<()> {
        let mut config = MaeConfig::tiny();
        config.image_size = (32, 64).into();
        config.decoder_hidden_size = 60;
        config.decoder_num_attention_heads = 3;
        let pixels = vec![7; 3 * config.image().length()];
        let values = ImageValues::Bytes { values: &pixels, mean: &[0.5; 3], std: &[0.25; 3] };
        let images = Images { batch: 3, channels: 3, height: 32, width: 64, values };
        let batch = MaskedImages::new(&config, &images, &Masking::random(0.6, 1))?;
        let shape = WorkspaceShape { recompute, ..WorkspaceShape::of(&batch, purpose, None) };
        let planned = MemoryUse::count::<F, F>(&config, &shape)?;

        let start = allocated_bytes();
        let model = MaeForPreTraining::new(config, Cpu::<F>::new(), 0)?;
        let parameters = allocated_bytes();
        let mut workspace = model.workspace(shape)?;
        workspace.upload(model.backend(), &batch)?;
        let activations = allocated_bytes();
        assert_eq!(planned.activations, activations - parameters, "{purpose:?}, recompute {recompute}");
        if purpose == Purpose::Encode {
            return Ok(());
        }
        assert_eq!(planned.parameters, parameters - start);
        let gradients = model.gradients()?;
        let trains = u64::from(purpose.trains());
        assert_eq!(planned.optimizer, trains * 3 * (allocated_bytes() - activations));
        drop(gradients);
        Ok(())
    }

    #[test]
    fn planned_bytes_are_those_that_are_allocated() -> Result<()> {
        for purpose in [Purpose::Encode, Purpose::Predict, Purpose::Train, Purpose::Inspect] {
            for recompute in [false, true] {
                check::<f32>(purpose, recompute)?;
                check::<f64>(purpose, recompute)?;
            }
        }
        Ok(())
    }
}
