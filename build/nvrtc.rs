//! Finding NVRTC and compiling a kernel with it.
//!
//! Compiled twice: into the build script and, through `#[path]`, into the crate, which compiles kernels at run time where
//! the build machine had no NVRTC. cudarc panics where a library or symbol is missing, so everything is probed first.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys};

/// Environment variables that decide which NVRTC is found.
pub const SEARCH_VARIABLES: &[&str] =
    &["VITMAE_NVRTC", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"];

/// What [`usual_folders`] looks at, in words.
const USUAL_PLACES: [&str; 5] =
    ["CUDA_HOME", "/usr/local/cuda*", "LD_LIBRARY_PATH", "site-packages of VIRTUAL_ENV", "the system's libraries"];

/// Options for every kernel; `--gpu-architecture` comes on top.
pub const OPTIONS: &[&str] = &["--std=c++20"];

/// The sonames that cudarc and we ask the system's loader for, newest first.
const SONAMES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12"];

/// What is called through cudarc; all of it must be there.
const SYMBOLS: &[&CStr] = &[
    c"nvrtcVersion",
    c"nvrtcCreateProgram",
    c"nvrtcCompileProgram",
    c"nvrtcDestroyProgram",
    c"nvrtcGetProgramLog",
    c"nvrtcGetProgramLogSize",
    c"nvrtcGetPTX",
    c"nvrtcGetPTXSize",
    c"nvrtcGetCUBIN",
    c"nvrtcGetCUBINSize",
    c"nvrtcGetErrorString",
];

/// Why a kernel could not be compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NvrtcError {
    /// No NVRTC library was found.
    NotFound {
        /// The places that were searched, in order.
        searched: Vec<String>,
    },
    /// A library was found and cannot be used.
    Unusable {
        /// The library.
        library: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An architecture's name is not of the form `sm_90a`, `compute_90` or `90`.
    BadTarget {
        /// The name.
        name: String,
    },
    /// NVRTC rejected a kernel.
    Compile {
        /// The source file.
        file: String,
        /// The architecture.
        target: String,
        /// NVRTC's log.
        log: String,
    },
    /// An NVRTC function failed for another reason.
    Call {
        /// The function.
        function: &'static str,
        /// NVRTC's name for the error.
        reason: String,
    },
}

impl fmt::Display for NvrtcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { searched } => write!(
                f,
                "NVRTC was not found (searched {}); install the CUDA toolkit or `pip install 'nvidia-cuda-nvrtc==13.0.*'` \
                 and set VITMAE_NVRTC to libnvrtc.so or its folder",
                searched.join(", ")
            ),
            Self::Unusable { library, reason } => write!(f, "NVRTC at {library} cannot be used: {reason}"),
            Self::BadTarget { name } => {
                write!(f, "\"{name}\" is not an architecture; write them as in VITMAE_CUDA_ARCHS=sm_80,sm_90a")
            }
            Self::Compile { file, target, log } => write!(f, "{file} does not compile for {target}:\n{log}"),
            Self::Call { function, reason } => write!(f, "{function} failed: {reason}"),
        }
    }
}

impl std::error::Error for NvrtcError {}

/// What a kernel is compiled for: machine code for one architecture (`sm_90a`), or PTX for it and all later ones
/// (`compute_90`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Compute capability times ten: 90 for 9.0.
    pub capability: u32,
    /// `a` for code that runs on exactly this architecture, `f` for its family.
    pub suffix: Option<char>,
    /// PTX instead of machine code.
    pub ptx: bool,
}

impl Target {
    /// Reads `sm_90a`, `compute_90` or `90a`.
    pub fn parse(name: &str) -> Result<Self, NvrtcError> {
        let bad = || NvrtcError::BadTarget { name: name.to_string() };
        let ptx = name.starts_with("compute_");
        let rest = name.strip_prefix("sm_").or(name.strip_prefix("compute_")).unwrap_or(name);
        let digits = rest.trim_end_matches(['a', 'f']);
        let suffix = rest.strip_prefix(digits).and_then(|s| s.chars().next());
        if rest.len() > digits.len() + 1 || digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let capability = digits.parse().map_err(|_| bad())?;
        if !(50..1000).contains(&capability) {
            return Err(bad());
        }
        Ok(Self { capability, suffix, ptx })
    }

    /// Reads a list such as `sm_80,sm_90a` and adds PTX for the newest of them.
    pub fn parse_list(names: &str) -> Result<Vec<Self>, NvrtcError> {
        let mut targets = Vec::new();
        for name in names.split([',', ' ', ';']).filter(|name| !name.is_empty()) {
            let target = Self::parse(name)?;
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        let newest = targets.iter().map(|target| target.capability).max();
        let Some(capability) = newest else {
            return Err(NvrtcError::BadTarget { name: names.to_string() });
        };
        let forward = Self { capability, suffix: None, ptx: true };
        if !targets.iter().any(|target| target.ptx && target.suffix.is_none()) {
            targets.push(forward);
        }
        Ok(targets)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.ptx { "compute_" } else { "sm_" }, self.capability)?;
        self.suffix.map_or(Ok(()), |suffix| write!(f, "{suffix}"))
    }
}

/// A source file in memory: its name, as in `#include`, and its text.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The name.
    pub name: &'a str,
    /// The text.
    pub text: &'a str,
}

/// A compiled kernel file.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code, or PTX with its closing NUL.
    pub image: Vec<u8>,
    /// Warnings; empty if there were none.
    pub log: String,
}

/// A loaded NVRTC.
#[derive(Debug, Clone)]
pub struct Nvrtc {
    /// Where it was found.
    pub library: String,
    /// Major and minor version.
    pub version: (u32, u32),
}

impl Nvrtc {
    /// Finds and loads NVRTC: at `VITMAE_NVRTC` only, if that is set, else in the usual places.
    pub fn find() -> Result<Self, NvrtcError> {
        let explicit = std::env::var_os("VITMAE_NVRTC").filter(|value| !value.is_empty());
        if let Some(path) = explicit {
            return Self::find_in(&[PathBuf::from(path)], &[])?.must_be_what_cudarc_uses();
        }
        Self::find_in(&usual_folders("cuda_nvrtc"), SONAMES).map_err(|error| match error {
            NvrtcError::NotFound { .. } => NvrtcError::NotFound { searched: USUAL_PLACES.map(String::from).to_vec() },
            other => other,
        })
    }

    /// Finds and loads the first NVRTC in `paths` (libraries, or folders with one), then among `sonames`, as the system's
    /// loader knows them.
    pub fn find_in(paths: &[PathBuf], sonames: &[&str]) -> Result<Self, NvrtcError> {
        let mut unusable = None;
        let libraries = paths.iter().flat_map(|path| libraries_at(path));
        for library in libraries.chain(sonames.iter().map(PathBuf::from)) {
            match Self::load(&library) {
                Ok(found) => return Ok(found),
                // The loader's word on a library that is not installed is no news.
                Err(_) if library.components().count() == 1 => {}
                Err(error) => unusable = unusable.or(Some(error)),
            }
        }
        let searched = paths.iter().map(|path| path.display().to_string()).chain(sonames.iter().map(|s| s.to_string()));
        Err(unusable.unwrap_or(NvrtcError::NotFound { searched: searched.collect() }))
    }

    /// Loads one library and keeps it loaded, so that cudarc finds it by its soname.
    fn load(path: &Path) -> Result<Self, NvrtcError> {
        let library = path.display().to_string();
        let unusable = |reason: String| NvrtcError::Unusable { library: library.clone(), reason };
        // SAFETY: loading runs NVRTC's initialisers, which have no preconditions.
        let loaded = unsafe { libloading::Library::new(path) }.map_err(|error| unusable(reason_of(&error)))?;
        for symbol in SYMBOLS {
            // SAFETY: the symbol is only looked up, as an address.
            if unsafe { loaded.get::<*const ()>(symbol.to_bytes_with_nul()) }.is_err() {
                return Err(unusable(format!("it has no {}", symbol.to_string_lossy())));
            }
        }
        let version = {
            // SAFETY: nvrtcVersion(int*, int*) -> nvrtcResult, as in nvrtc.h.
            let nvrtc_version = unsafe {
                loaded.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> sys::nvrtcResult>(b"nvrtcVersion\0")
            }
            .map_err(|error| unusable(reason_of(&error)))?;
            let (mut major, mut minor) = (0, 0);
            // SAFETY: both pointers are valid for writes.
            check("nvrtcVersion", unsafe { nvrtc_version(&mut major, &mut minor) })?;
            (major.unsigned_abs(), minor.unsigned_abs())
        };
        if version.0 < 12 {
            return Err(unusable(format!("it is version {}.{}, and 12.0 or newer is needed", version.0, version.1)));
        }
        // NVRTC opens this one by its bare name when it compiles, and not every build of it looks beside itself.
        let builtins = path.with_file_name(format!("libnvrtc-builtins.so.{}.{}", version.0, version.1));
        if builtins.is_file() {
            // SAFETY: a library of data and functions for NVRTC, without preconditions.
            let builtins =
                unsafe { libloading::Library::new(&builtins) }.map_err(|error| unusable(reason_of(&error)))?;
            std::mem::forget(builtins);
        }
        // Both stay loaded for the life of the process.
        std::mem::forget(loaded);
        // SAFETY: only opens libraries by name.
        if !unsafe { sys::is_culib_present() } {
            return Err(unusable("its soname is not libnvrtc.so.13 or libnvrtc.so.12".to_string()));
        }
        Ok(Self { library, version })
    }

    /// cudarc asks the loader for `libnvrtc.so` first: where another one is in its path, say so instead of using it quietly.
    fn must_be_what_cudarc_uses(self) -> Result<Self, NvrtcError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is loaded and has the symbol; both pointers are valid for writes.
        check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
        if (major.unsigned_abs(), minor.unsigned_abs()) == self.version {
            return Ok(self);
        }
        let (wanted_major, wanted_minor) = self.version;
        Err(NvrtcError::Unusable {
            library: self.library,
            reason: format!(
                "it is version {wanted_major}.{wanted_minor}, but the system's loader has a libnvrtc.so of version \
                 {major}.{minor} that comes first; put this one's folder first in LD_LIBRARY_PATH"
            ),
        })
    }

    /// Compiles one kernel file. `headers` are what it includes.
    pub fn compile(&self, source: Source, headers: &[Source], target: Target) -> Result<Compiled, NvrtcError> {
        let text = c_string(source.text)?;
        let name = c_string(source.name)?;
        let header_texts = headers.iter().map(|header| c_string(header.text)).collect::<Result<Vec<_>, _>>()?;
        let header_names = headers.iter().map(|header| c_string(header.name)).collect::<Result<Vec<_>, _>>()?;
        let mut options = OPTIONS.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
        options.push(c_string(&format!("--gpu-architecture={target}"))?);

        let texts = pointers(&header_texts);
        let names = pointers(&header_names);
        let mut program = Program(std::ptr::null_mut());
        // SAFETY: all pointers are to NUL-terminated strings that outlive the program; the arrays have as many entries as said.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &mut program.0,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        let option_pointers = pointers(&options);
        // SAFETY: the program was just created; the options are NUL-terminated.
        let status = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as c_int, option_pointers.as_ptr()) };
        // SAFETY: the program exists.
        let log = unsafe { nvrtc::get_program_log(program.0) }
            .map(|log| text_of(&log))
            .map_err(|error| call_error("nvrtcGetProgramLog", error.0))?;
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            let log = if log.is_empty() { text_of_status(status) } else { log };
            return Err(NvrtcError::Compile { file: source.name.to_string(), target: target.to_string(), log });
        }
        Ok(Compiled { image: program.image(target.ptx)?, log })
    }
}

/// A program that is destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Program {
    /// The compiled program: PTX with its NUL, or machine code.
    fn image(&self, ptx: bool) -> Result<Vec<u8>, NvrtcError> {
        if ptx {
            // SAFETY: the program exists and was compiled.
            let text = unsafe { nvrtc::get_ptx(self.0) }.map_err(|error| call_error("nvrtcGetPTX", error.0))?;
            return Ok(text.into_iter().map(|byte| byte as u8).collect());
        }
        let mut size = 0;
        // SAFETY: the program exists and was compiled; the pointer is valid for a write.
        check("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) })?;
        let mut image = vec![0u8; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        check("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) })?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created by nvrtcCreateProgram and destroyed once. A failure here leaks, which harms nobody.
            let _ = unsafe { nvrtc::destroy_program(self.0) };
        }
    }
}

/// Folders where toolkits and Python packages put NVRTC, or another library whose folder among those of CUDA 12 is `package`.
pub fn usual_folders(package: &str) -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut folders = Vec::new();
    for root in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable) {
        folders.extend([root.join("lib64"), root.join("lib"), root.join("targets/x86_64-linux/lib")]);
    }
    let mut toolkits = entries("/usr/local".as_ref());
    toolkits.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda")));
    // The newest first; plain `cuda`, the one that the system's owner chose, before all.
    toolkits.sort_by_key(|path| (path.file_name() != Some("cuda".as_ref()), std::cmp::Reverse(path.clone())));
    folders.extend(toolkits.iter().map(|root| root.join("lib64")));
    if let Some(paths) = std::env::var_os("LD_LIBRARY_PATH") {
        folders.extend(std::env::split_paths(&paths).filter(|path| path.is_absolute()));
    }
    for root in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable) {
        let pythons = entries(&root.join("lib"));
        let is_python =
            |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
        for python in pythons.iter().filter(is_python) {
            let packages = python.join("site-packages/nvidia");
            folders.extend([packages.join("cu13/lib"), packages.join(package).join("lib")]);
        }
        folders.push(root.join("lib"));
    }
    folders
}

/// The NVRTC libraries at a path: itself if it is a file, else those in the folder, the known sonames first.
fn libraries_at(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_path_buf()];
    }
    let candidates = SONAMES.iter().copied().chain(["libnvrtc.so"]);
    candidates.map(|name| path.join(name)).filter(|library| library.is_file()).collect()
}

/// What is in a folder, in a fixed order; nothing if it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

/// The loader's own words, which libloading keeps out of its messages.
pub fn reason_of(error: &libloading::Error) -> String {
    match error {
        libloading::Error::DlOpen { source } | libloading::Error::DlSym { source } => source.to_string(),
        other => other.to_string(),
    }
}

fn check(function: &'static str, status: sys::nvrtcResult) -> Result<(), NvrtcError> {
    if status == sys::nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(call_error(function, status)) }
}

fn call_error(function: &'static str, status: sys::nvrtcResult) -> NvrtcError {
    NvrtcError::Call { function, reason: text_of_status(status) }
}

fn text_of_status(status: sys::nvrtcResult) -> String {
    format!("{status:?}")
}

/// NVRTC's logs end with a NUL.
fn text_of(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

fn c_string(text: &str) -> Result<CString, NvrtcError> {
    CString::new(text).map_err(|_| NvrtcError::Call {
        function: "nvrtcCreateProgram",
        reason: "a source, name or option contains a NUL byte".to_string(),
    })
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}
