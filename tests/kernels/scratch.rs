//! Scratch memory of the CUDA backend.

use vitmae::ops::{Memory, Record};

use super::emulated::{Cuda, CudaBuffer, SliceMut, device};

/// Where a slice starts, and how long it is.
fn place(memory: &mut SliceMut<'_, f32>) -> vitmae::Result<(Vec<u8>, usize)> {
    Ok((memory.argument().bytes().to_vec(), memory.len()))
}

#[test]
fn scratch_memory_is_shared_and_grows_only_when_it_must() {
    let Some(device) = device(0) else { return };
    let backend = Cuda::<f32>::new(device.stream());
    let (small, length) = backend.with_scratch(100, place).expect("reserved");
    assert_eq!(length, 100);
    // Fewer numbers, no more than there are, none: the same memory, also from a clone.
    for length in [7, 128, 0] {
        assert_eq!(backend.clone().with_scratch(length, place).expect("kept").1, length);
    }
    assert_eq!(backend.with_scratch(100, place).expect("kept"), (small.clone(), 100));
    let (large, _) = backend.with_scratch(129, place).expect("grown");
    assert_ne!(large, small);
    assert_eq!(backend.with_scratch(1, place).expect("kept").0, large);
    // Too much is an error, and the next call works.
    assert!(backend.with_scratch(usize::MAX, place).is_err());
    assert_eq!(backend.with_scratch(3, place).expect("reserved").1, 3);
    // So does the call after one that failed.
    let refused = backend.with_scratch(3, |_| Err::<(), _>(vitmae::Error::Device("no".to_string())));
    assert!(refused.is_err());
    assert_eq!(backend.with_scratch(3, place).expect("kept").1, 3);
}

#[test]
fn a_recording_that_saw_other_scratch_memory_is_refused() {
    let Some(device) = device(0) else { return };
    let backend = Cuda::<f32>::new(device.stream());
    let mut out = backend.buffer::<f32>(4).expect("reserved");
    let record = |out: &mut CudaBuffer<f32>| {
        let recorded = backend.record(|| {
            backend.with_scratch(100, |scratch| {
                backend.stream().fill(scratch, 0x7f)?;
                let four = scratch.range(0..4)?;
                Ok(backend.stream().copy(&mut out.slice_mut(), &four.as_slice())?)
            })
        });
        recorded.expect("it can be recorded")
    };
    // SAFETY, here and below: `out` is still there.
    let replay = |recording| unsafe { backend.replay(recording) };
    backend.with_scratch(100, place).expect("reserved");
    let recording = record(&mut out);
    assert!(replay(&recording).expect("it runs"));
    // Less than there is changes nothing.
    backend.with_scratch(7, place).expect("kept");
    assert!(replay(&recording).expect("it runs"));
    // A failure to grow may move the memory; it is as long as before.
    assert!(backend.with_scratch(usize::MAX, place).is_err());
    backend.with_scratch(100, place).expect("kept or reserved anew");
    assert!(!replay(&recording).expect("refused, not a fault"));
    let recording = record(&mut out);
    assert!(replay(&recording).expect("it runs"));
    // What cannot grow while work is recorded stays.
    assert!(backend.record(|| backend.with_scratch(1000, |_| Ok(()))).is_err());
    assert!(replay(&recording).expect("it runs"));
    backend.with_scratch(1000, place).expect("grown");
    assert!(!replay(&recording).expect("refused, not a fault"));
}
