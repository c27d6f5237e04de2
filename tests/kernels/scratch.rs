//! Scratch memory of the CUDA backend.

use super::emulated::{Cuda, SliceMut, device};

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
