//! Finding cuBLASLt. cudarc panics where a library or symbol is missing, so everything is probed first.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::cublaslt::sys;

use crate::cuda::error::{CudaError, Result};
use crate::cuda::nvrtc::{reason_of, usual_folders};

/// Names of the library, newest first. cudarc tries them too.
const SONAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// What this file calls through cudarc, which panics on a symbol that is missing.
const SYMBOLS: [&str; 14] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCapGetAttribute",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// Finds and loads cuBLASLt once, and says which version it is (130002 for 13.0.2).
///
/// `VITMAE_CUBLASLT` may name the library or its folder; else the system's loader and the usual folders are asked. Without
/// the library this is [`CudaError::CublasMissing`].
pub fn probe() -> Result<usize> {
    static PROBED: OnceLock<Result<usize>> = OnceLock::new();
    PROBED.get_or_init(find).clone()
}

fn find() -> Result<usize> {
    let explicit = std::env::var_os("VITMAE_CUBLASLT").filter(|path| !path.is_empty()).map(PathBuf::from);
    // SAFETY: only opens libraries by name.
    let is_present = || unsafe { sys::is_culib_present() };
    let mut wanted = None;
    let searched = match explicit {
        Some(path) => {
            wanted = Some(load_from(&path)?);
            path.display().to_string()
        }
        None if is_present() => "the system's libraries".to_string(),
        None => {
            // The first that loads; what does not is as good as missing.
            let _ = usual_folders("cublas").iter().find(|folder| load_from(folder).is_ok());
            "the system's libraries, CUDA_HOME, /usr/local/cuda*, LD_LIBRARY_PATH, site-packages of VIRTUAL_ENV"
                .to_string()
        }
    };
    if !is_present() {
        return Err(CudaError::CublasMissing { searched });
    }
    // SAFETY: it is present, so cudarc opens it again and does not panic.
    let library = unsafe { sys::culib() };
    for symbol in SYMBOLS {
        // SAFETY: the symbol is only looked up, as an address.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(CudaError::CublasUnusable { reason: format!("it has no {symbol}") });
        }
    }
    // SAFETY: cublasLtGetVersion() has no preconditions.
    let version = unsafe { sys::cublasLtGetVersion() };
    if let Some(wanted) = wanted.filter(|&wanted| wanted != version) {
        // cudarc asks the loader for `libcublasLt.so` first: say so instead of using another one quietly.
        let reason = format!(
            "VITMAE_CUBLASLT is version {wanted}, but the system's loader has a libcublasLt.so of version {version} that \
             comes first; put the wanted one's folder first in LD_LIBRARY_PATH"
        );
        return Err(CudaError::CublasUnusable { reason });
    }
    // 12.0 is 120000: three digits for the minor version and two for the patch, whatever the major version.
    if version < 120_000 {
        let reason = format!("it is version {version}, and 12.0 (120000) or newer is needed");
        return Err(CudaError::CublasUnusable { reason });
    }
    Ok(version)
}

/// Loads the library at a path, or in a folder, and keeps it loaded, so that cudarc finds it by its soname; says its version.
fn load_from(path: &Path) -> Result<usize> {
    let mut candidates = vec![path.to_path_buf()];
    if !path.is_file() {
        candidates = SONAMES.iter().map(|name| path.join(name)).filter(|path| path.is_file()).collect();
    }
    let Some(path) = candidates.first() else {
        return Err(CudaError::CublasMissing { searched: path.display().to_string() });
    };
    let unusable = |error| CudaError::CublasUnusable { reason: format!("{}: {}", path.display(), reason_of(&error)) };
    // SAFETY: loading runs cuBLASLt's initialisers, which have no preconditions.
    let library = unsafe { libloading::Library::new(path) }.map_err(unusable)?;
    // SAFETY: cublasLtGetVersion() -> size_t has no preconditions.
    let version =
        unsafe { library.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion\0").map(|version| version()) };
    let version = version.map_err(unusable)?;
    std::mem::forget(library);
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_cublaslt_is_an_error_that_says_what_to_do() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let error = load_from(folder.path()).expect_err("none");
        assert!(matches!(error, CudaError::CublasMissing { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("VITMAE_CUBLASLT") && text.contains("nvidia-cublas"), "{text}");

        std::fs::write(folder.path().join(SONAMES[1]), "not a library").expect("written");
        let error = load_from(folder.path()).expect_err("no library");
        assert!(matches!(error, CudaError::CublasUnusable { .. }), "{error:?}");
    }
}
