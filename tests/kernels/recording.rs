//! Work that is recorded and launched as a whole, and memory that is planned.

use vitmae::cuda::launch::Stream;
use vitmae::cuda::masking::{MaskingOutput, MaskingShape, masking_forward_noise};
use vitmae::cuda::{Buffer, Cuda, CudaError};
use vitmae::ops::Memory;

use crate::emulated::{SEEDS, device};

const SHAPE: MaskingShape = MaskingShape { batch: 3, patches: 20, keep: 5 };

/// What a masking writes.
struct Masks {
    ids_keep: Buffer<u32>,
    ids_hidden: Buffer<u32>,
    ids_restore: Buffer<u32>,
    mask: Buffer<f32>,
    copy: Buffer<f32>,
}

impl Masks {
    fn new(stream: &Stream) -> Self {
        let ids = |count| stream.uninitialised(SHAPE.batch * count).expect("memory");
        Self {
            ids_keep: ids(SHAPE.keep),
            ids_hidden: ids(SHAPE.patches - SHAPE.keep),
            ids_restore: ids(SHAPE.patches),
            mask: stream.zeros(SHAPE.batch * SHAPE.patches).expect("memory"),
            copy: stream.zeros(SHAPE.batch * SHAPE.patches).expect("memory"),
        }
    }

    /// A fill, a launch and a copy.
    fn make(&mut self, stream: &Stream, noise: &Buffer<f32>) -> Result<(), CudaError> {
        stream.fill(&mut self.copy.as_mut_slice(), 0xff)?;
        let mut output = MaskingOutput {
            ids_keep: self.ids_keep.as_mut_slice(),
            ids_hidden: self.ids_hidden.as_mut_slice(),
            ids_restore: self.ids_restore.as_mut_slice(),
            mask: self.mask.as_mut_slice(),
        };
        masking_forward_noise(stream, &mut output, &noise.as_slice(), SHAPE)?;
        drop(output);
        let half = SHAPE.batch * SHAPE.patches / 2;
        let copied = self.mask.as_slice();
        stream.copy(&mut self.copy.as_mut_slice().range(0..half)?, &copied.range(0..half)?)
    }

    fn read(&self, stream: &Stream) -> (Vec<u32>, Vec<u32>) {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        let restore = stream.download(&self.ids_restore.as_slice()).expect("a copy");
        (restore, bits(stream.download(&self.copy.as_slice()).expect("a copy")))
    }
}

fn noise(seed: u32) -> Vec<f32> {
    (0..60u32).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32).collect()
}

#[test]
fn recorded_work_runs_when_it_is_launched_and_sees_the_memory_of_that_time() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        let mut input = stream.upload(&noise(0)).expect("memory");
        let mut recorded = Masks::new(&stream);
        recorded.make(&stream, &input).expect("it runs");
        let before = recorded.read(&stream);
        stream.write(&mut input.as_mut_slice(), &noise(7)).expect("a copy");
        let work = stream.record(|| recorded.make(&stream, &input)).expect("it can be recorded");
        assert_eq!(recorded.read(&stream), before, "recording ran the work");
        let mut direct = Masks::new(&stream);
        let mut allocations = 0;
        for step in 7..11 {
            stream.write(&mut input.as_mut_slice(), &noise(step)).expect("a copy");
            // SAFETY: the buffers of `recorded` and `input` are still there.
            unsafe { work.launch() }.expect("it runs");
            direct.make(&stream, &input).expect("it runs");
            assert_eq!(recorded.read(&stream), direct.read(&stream));
            assert_ne!(recorded.read(&stream), before);
            // A GPU's first copies reserve pinned memory; nothing after them does.
            assert!(step == 7 || stream.allocations() == allocations);
            allocations = stream.allocations();
        }
    }
}

#[test]
fn what_cannot_be_recorded_is_an_error_and_ends_the_recording() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let mut memory = stream.zeros::<f32>(4).expect("memory");
    let errors = [
        stream.record(|| stream.zeros::<f32>(1).map(drop)).expect_err("reserving memory"),
        stream.record(|| stream.write(&mut memory.as_mut_slice(), &[1.0; 4])).expect_err("a copy"),
        stream.record(|| stream.download(&memory.as_slice()).map(drop)).expect_err("a copy"),
        stream.record(|| stream.synchronize()).expect_err("waiting"),
        stream.record(|| stream.record(|| Ok::<_, CudaError>(())).map(drop)).expect_err("two recordings"),
        stream.record(|| stream.mark().map(drop)).expect_err("a mark"),
    ];
    for error in errors {
        assert!(matches!(error, CudaError::Recording { .. }), "{error}");
    }
    stream.write(&mut memory.as_mut_slice(), &[1.0; 4]).expect("a copy");
    assert_eq!(stream.download(&memory.as_slice()).expect("a copy"), [1.0; 4]);
}

#[test]
fn a_buffer_that_recorded_work_drops_does_not_end_the_recording() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let mut memory = stream.zeros::<f32>(4).expect("memory");
    let other = stream.zeros::<f32>(4).expect("memory");
    let work = stream.record(|| {
        stream.fill(&mut memory.as_mut_slice(), 0xff)?;
        drop(other);
        Ok::<_, CudaError>(())
    });
    // SAFETY: the work uses `memory` alone.
    unsafe { work.expect("it can be recorded").launch() }.expect("it runs");
    assert!(stream.download(&memory.as_slice()).expect("a copy").iter().all(|value| value.is_nan()));
}

#[test]
fn buffers_that_are_made_together_share_one_allocation() {
    let Some(device) = device(0) else { return };
    let cuda = Cuda::<f32>::new(device.stream());
    // A GPU's first copy reserves pinned memory, which is counted too.
    cuda.stream().upload(&[0u32; 2]).expect("a copy");
    cuda.stream().synchronize().expect("the copy is done");
    let before = cuda.stream().allocations();
    let (mut small, mut large, filled) = cuda
        .in_one_allocation(|cuda| {
            let (small, large) = (cuda.buffer::<u8>(3)?, cuda.buffer::<f32>(1000)?);
            let mut filled = cuda.buffer::<u32>(2)?;
            cuda.upload(&mut filled, &[5, 6])?;
            Ok((small, large, filled))
        })
        .expect("memory");
    assert_eq!(cuda.stream().allocations() - before, 1);
    assert_eq!(cuda.stream().download(&large.slice()).expect("a copy"), [0.0; 1000]);
    assert!(large.slice().is_aligned_16());
    cuda.upload(&mut small, &[7; 3]).expect("a copy");
    cuda.upload(&mut large, &[1.5; 1000]).expect("a copy");
    assert_eq!(cuda.stream().download(&small.slice()).expect("a copy"), [7; 3]);
    assert_eq!(cuda.stream().download(&filled.slice()).expect("a copy"), [5, 6]);
}
