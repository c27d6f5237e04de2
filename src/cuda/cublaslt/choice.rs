//! Choosing one of the algorithms that cuBLASLt proposes, and keeping the choice in a file.

use std::path::Path;
use std::time::Duration;

use cudarc::cublaslt::sys;

use super::{CANDIDATES, Key, WORKSPACE_BYTES};
use crate::cuda::embedded::read_cached;
use crate::cuda::error::Result;
use crate::cuda::hash::hash;

/// A candidate replaces one that cuBLASLt ranks before it if it takes less than this share of its time. Below that, noise
/// would choose.
const FASTER: f64 = 0.97;

/// The way of choosing, in the names of the files that keep choices. Raise it when proposals are asked for, left out or timed
/// in another way, so that no choice of the older way is taken.
pub(super) const SCHEME: u32 = 2;

/// Where the choice for a product is kept: a name that changes with everything that the choice depends on.
pub(super) fn file_name(scheme: u32, machine: &str, key: &Key) -> String {
    let way = format!("{scheme} {CANDIDATES} {FASTER} {WORKSPACE_BYTES}");
    let name = hash(&[way.as_bytes(), machine.as_bytes(), format!("{key:?}").as_bytes()]);
    format!("gemm-{name:032x}")
}

/// The candidate that a file names. The file's bytes are compared and never given to cuBLASLt.
pub(super) fn chosen_before(
    path: &Path,
    candidates: &[sys::cublasLtMatmulAlgo_t],
) -> Option<sys::cublasLtMatmulAlgo_t> {
    let kept = read_cached(path)?;
    let found = candidates.iter().find(|candidate| bytemuck::cast_slice::<u64, u8>(&candidate.data) == kept);
    if found.is_none() {
        tracing::info!("{} keeps an algorithm that is not proposed: choosing again", path.display());
    }
    found.copied()
}

/// What became of candidates.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice<A> {
    /// This one.
    Made(A),
    /// None of them runs.
    AllRefused,
    /// There was no memory to try them in.
    NoRoom,
}

/// The candidate of the least time, of those that have one: a later one only where it is clearly faster. The first that has
/// a time where they are not `compared`.
pub(super) fn choose<A: Copy>(
    candidates: &[A],
    compared: bool,
    mut time: impl FnMut(&A) -> Result<Option<Duration>>,
) -> Result<Choice<A>> {
    let mut best: Option<(Duration, A)> = None;
    for candidate in candidates {
        let Some(time) = time(candidate)? else { continue };
        if best.is_none_or(|(so_far, _)| time.as_secs_f64() < FASTER * so_far.as_secs_f64()) {
            best = Some((time, *candidate));
        }
        if !compared {
            break;
        }
    }
    Ok(best.map_or(Choice::AllRefused, |(_, candidate)| Choice::Made(candidate)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::cuda::embedded::write_cached;
    use crate::cuda::gemm::{EpilogueKind, Gemm, GemmAddresses, GemmDescription, GemmType, Layout};

    #[test]
    fn the_clearly_fastest_of_those_that_run_is_chosen() {
        let times = [None, Some(100), Some(98), Some(50), None, Some(49)];
        let time = |&index: &usize| Ok(times[index].map(Duration::from_micros));
        let chosen = |candidates: &[usize], compared| choose(candidates, compared, time).expect("no failure");
        assert_eq!(chosen(&[0, 1, 2], true), Choice::Made(1));
        assert_eq!(chosen(&[0, 1, 2, 3, 4, 5], true), Choice::Made(3));
        assert_eq!(chosen(&[0, 1, 3], false), Choice::Made(1));
        for compared in [false, true] {
            assert_eq!(chosen(&[0, 4], compared), Choice::AllRefused);
        }
        let broken = choose(&[1], true, |_| Err(crate::cuda::error::CudaError::Recording { what: "a failure" }));
        assert!(broken.is_err());
    }

    const AT: GemmAddresses =
        GemmAddresses { output: 0x1000, left: 0x1002, right: 0x1010, addend: 0x1000, bias: 0, pre: 0 };

    fn key(rows: usize, at: &GemmAddresses) -> Key {
        let (left, right) = (Layout::transposed(rows), Layout::rows(16));
        let gemm = Gemm { rows, columns: 16, depth: 4, left, right, output_stride: 16 };
        let (input, output, epilogue) = (GemmType::Bf16, GemmType::F32, EpilogueKind::Nothing);
        Key::new(GemmDescription { gemm, input, output, adds: true, epilogue }, at)
    }

    #[test]
    fn a_choice_is_kept_for_one_product_machine_and_way_of_choosing() {
        let elsewhere = GemmAddresses { addend: 0x2000, ..AT };
        let names = [
            file_name(SCHEME, "H200", &key(8, &AT)),
            file_name(SCHEME - 1, "H200", &key(8, &AT)),
            file_name(SCHEME, "A100", &key(8, &AT)),
            file_name(SCHEME, "H200", &key(9, &AT)),
            // Out of place, other algorithms are allowed.
            file_name(SCHEME, "H200", &key(8, &elsewhere)),
            file_name(SCHEME, "H200", &key(8, &GemmAddresses { output: 0x1010, addend: 0x1010, ..AT })),
        ];
        assert_eq!(HashSet::from(names.clone()).len(), names.len(), "{names:?}");
        assert_eq!(names[0], file_name(SCHEME, "H200", &key(8, &AT)));
    }

    #[test]
    fn what_was_kept_is_one_of_the_candidates_or_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("gemm");
        let algorithm = |first| sys::cublasLtMatmulAlgo_t { data: [first, 2, 3, 4, 5, 6, 7, 8] };
        let candidates = [algorithm(1), algorithm(10)];
        let found = || chosen_before(&path, &candidates).map(|found| found.data);
        assert_eq!(found(), None, "no file");
        for candidate in candidates {
            write_cached(&path, bytemuck::cast_slice(&candidate.data)).expect("written");
            assert_eq!(found(), Some(candidate.data));
        }
        // Right in itself, and not proposed: of a product with other alignments, or made up.
        for data in [&algorithm(2).data[..], &[0; 8], &candidates[0].data[..7], &[]] {
            write_cached(&path, bytemuck::cast_slice(data)).expect("written");
            assert_eq!(found(), None, "{data:?}");
        }
        std::fs::write(&path, bytemuck::cast_slice::<u64, u8>(&candidates[0].data)).expect("written");
        assert_eq!(found(), None, "without its hash");
    }

    #[test]
    fn a_key_sees_alignment_and_aliasing() {
        let key = key(8, &AT);
        assert!(key.in_place);
        assert_eq!(key.alignments, [256, 2, 16, 256, 256, 256]);
        let apart = Key::new(key.description, &GemmAddresses { addend: 0x2008, ..AT });
        assert!(!apart.in_place && apart != key);
    }
}
