//! The kernels: which there are, which forms of them are embedded, and which form a GPU gets.
//!
//! A GPU gets the embedded machine code that was compiled for it, else embedded PTX, which the driver compiles, else the
//! embedded source, compiled by an NVRTC that is found at run time and kept in the user's cache folder.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::ZlibDecoder;

use super::error::{CudaError, Result};
use super::gemm::{GemmElement, GemmType};
use super::hash::hash;
pub use super::nvrtc::Target;
use super::nvrtc::{Nvrtc, NvrtcError, Source};
use crate::ops::KERNELS;

/// A kernel, by its place in [`KERNELS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel(usize);

impl Kernel {
    /// The kernel with a symbol. For constants: a symbol that no source has then does not compile.
    pub(crate) const fn named(symbol: &str) -> Self {
        Self::find(symbol, "")
    }

    /// The kernel of this name for elements of a type. For `const { … }`, as above.
    pub(crate) const fn of<E: GemmElement>(name: &str) -> Self {
        match E::TYPE {
            GemmType::F32 => Self::find(name, "_f32"),
            GemmType::Bf16 => Self::find(name, "_bf16"),
        }
    }

    const fn find(name: &str, suffix: &str) -> Self {
        let mut index = 0;
        while index < KERNELS.len() {
            let (start, end) = KERNELS[index].symbol.as_bytes().split_at(match KERNELS[index].symbol.len() {
                length if length >= name.len() => name.len(),
                length => length,
            });
            if equal(start, name.as_bytes()) && equal(end, suffix.as_bytes()) {
                return Self(index);
            }
            index += 1;
        }
        panic!("no kernel in kernels/ has this name")
    }

    /// Its place in [`KERNELS`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0
    }

    /// Its name in `kernels/`.
    #[must_use]
    pub fn symbol(self) -> &'static str {
        KERNELS[self.0].symbol
    }
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}

/// What the build embedded.
#[derive(Debug)]
pub struct Manifest {
    /// Version of the NVRTC that compiled the images; none if the build machine had none.
    pub nvrtc: Option<(u32, u32)>,
    /// Options that it was given, besides the architecture.
    pub options: &'static [&'static str],
    /// Hash of options, headers and sources.
    pub source_hash: u128,
    /// What the kernel files include.
    pub headers: &'static [Header],
    /// The kernel files.
    pub files: &'static [KernelFile],
}

/// A header that kernel files include.
#[derive(Debug)]
pub struct Header {
    /// Its name, as in `#include`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// One `.cu` file.
#[derive(Debug)]
pub struct KernelFile {
    /// Its name in `kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Its compiled forms; none if the build machine had no NVRTC.
    pub images: &'static [Image],
}

/// A compiled form of a kernel file.
#[derive(Debug)]
pub struct Image {
    /// What it was compiled for.
    pub target: Target,
    /// Bytes of the code.
    pub len: usize,
    /// The code as a zlib stream.
    pub compressed: &'static [u8],
}

static MANIFEST: Manifest = include!(concat!(env!("OUT_DIR"), "/manifest.rs"));

/// The kernels that are embedded in this build.
#[must_use]
pub fn embedded_kernels() -> &'static Manifest {
    &MANIFEST
}

impl Image {
    /// The code: an ELF file, or PTX that ends with a NUL.
    ///
    /// # Errors
    ///
    /// [`CudaError::DamagedCode`] if the embedded stream is not what the build wrote.
    pub fn code(&self) -> Result<Vec<u8>> {
        let damaged = |reason| CudaError::DamagedCode { target: self.target.to_string(), reason };
        // One byte more than expected is read, so that a stream that is too long shows.
        let mut code = Vec::with_capacity(self.len + 1);
        let mut stream = ZlibDecoder::new(self.compressed).take(self.len as u64 + 1);
        stream.read_to_end(&mut code).map_err(|error| damaged(error.to_string()))?;
        if code.len() != self.len {
            return Err(damaged(format!("{} bytes where {} were compiled", code.len(), self.len)));
        }
        Ok(code)
    }
}

impl Target {
    /// Whether a GPU of compute capability `major.minor` runs it.
    pub fn runs_on(&self, major: u32, minor: u32) -> bool {
        let device = 10 * major + minor;
        match (self.suffix, self.ptx) {
            (Some('a'), _) => device == self.capability,
            (_, true) if self.suffix.is_none() => device >= self.capability,
            _ => device / 10 == self.capability / 10 && device >= self.capability,
        }
    }
}

impl KernelFile {
    /// The kernels in it.
    pub fn symbols(&self) -> impl Iterator<Item = &'static str> {
        KERNELS.iter().filter(|kernel| kernel.file == self.name).map(|kernel| kernel.symbol)
    }

    /// The images that a GPU of compute capability `major.minor` runs, best first: machine code for exactly this
    /// architecture, machine code for an older one of its generation, PTX from the newest.
    #[must_use]
    pub fn images_for(&self, major: u32, minor: u32) -> Vec<&'static Image> {
        let mut images: Vec<_> = self.images.iter().filter(|image| image.target.runs_on(major, minor)).collect();
        images.sort_by_key(|image| {
            let Target { capability, suffix, ptx } = image.target;
            (ptx, std::cmp::Reverse(capability), suffix.is_none())
        });
        images
    }

    /// Compiles the file for one GPU with an NVRTC that is found now, or takes it from the cache folder.
    pub(crate) fn compile(&self, target: Target) -> std::result::Result<Vec<u8>, NvrtcError> {
        self.compile_with(&Nvrtc::find()?, target, cache_folder().as_deref())
    }

    fn compile_with(
        &self,
        nvrtc: &Nvrtc,
        target: Target,
        cache: Option<&Path>,
    ) -> std::result::Result<Vec<u8>, NvrtcError> {
        let headers: Vec<_> =
            MANIFEST.headers.iter().map(|header| Source { name: header.name, text: header.text }).collect();
        let source = Source { name: self.name, text: self.text };
        let cached = cache.map(|folder| folder.join(cache_name(nvrtc, source, &headers, target)));
        if let Some(image) = cached.as_deref().and_then(read_cached) {
            return Ok(image);
        }
        let compiled = nvrtc.compile(source, &headers, target)?;
        if let Some(path) = cached {
            // A cache that cannot be written costs time at the next start and nothing else.
            if let Err(error) = write_cached(&path, &compiled.image) {
                tracing::debug!("cannot cache {}: {error}", path.display());
            }
        }
        Ok(compiled.image)
    }
}

/// A file name that changes with everything that the image depends on.
fn cache_name(nvrtc: &Nvrtc, source: Source, headers: &[Source], target: Target) -> String {
    let version = format!("{:?} {target}", nvrtc.version);
    let mut parts = vec![version.as_bytes(), source.name.as_bytes(), source.text.as_bytes()];
    parts.extend(super::nvrtc::OPTIONS.iter().map(|option| option.as_bytes()));
    parts.extend(headers.iter().flat_map(|header| [header.name.as_bytes(), header.text.as_bytes()]));
    format!("{:032x}-{target}", hash(&parts))
}

/// `$XDG_CACHE_HOME/vitmae/kernels`, or what stands in for it.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache"))).or(folder("LOCALAPPDATA"));
    Some(cache?.join("vitmae").join("kernels"))
}

/// An image, or whatever was written, if the file is there and ends with its own hash.
pub(super) fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let image_len = bytes.len().checked_sub(size_of::<u128>())?;
    let stored = bytes.split_off(image_len);
    (stored == hash(&[&bytes]).to_le_bytes()).then_some(bytes)
}

/// Writes an image and its hash so that a reader sees all of it or nothing.
pub(super) fn write_cached(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)?;
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    let unfinished = path.with_extension(format!("unfinished-{}-{write}", std::process::id()));
    let mut file = std::fs::File::create(&unfinished)?;
    let written = file
        .write_all(image)
        .and_then(|()| file.write_all(&hash(&[image]).to_le_bytes()))
        .and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        // The name is ours alone, so there is nobody to disturb.
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    fn image(target: &str) -> Image {
        Image { target: Target::parse(target).expect("a good name"), len: 0, compressed: b"" }
    }

    #[test]
    fn targets_are_read_and_written() {
        for name in ["sm_80", "sm_90a", "sm_100f", "compute_90", "sm_120"] {
            assert_eq!(Target::parse(name).expect(name).to_string(), name);
        }
        assert_eq!(Target::parse("90a").expect("short form").to_string(), "sm_90a");
        for name in ["", "sm_", "sm_x", "sm_90aa", "sm_90b", "cuda", "sm_9000", "sm_8", "sm_-80"] {
            assert!(Target::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_list_of_targets_gets_ptx_for_its_newest() {
        let names = |list| -> Vec<_> { Target::parse_list(list).expect(list).iter().map(Target::to_string).collect() };
        assert_eq!(names("sm_80,sm_90a"), ["sm_80", "sm_90a", "compute_90"]);
        assert_eq!(names("sm_90a, sm_80,sm_80"), ["sm_90a", "sm_80", "compute_90"]);
        assert_eq!(names("sm_80,compute_80"), ["sm_80", "compute_80"]);
        assert!(Target::parse_list("").is_err());
    }

    #[test]
    fn a_gpu_gets_the_code_made_for_it() {
        let images = ["sm_80", "sm_90a", "compute_90", "sm_90"].map(image);
        let file = KernelFile { name: "", text: "", images: Box::leak(Box::new(images)) };
        let choice = |major, minor| -> Vec<_> {
            file.images_for(major, minor).iter().map(|image| image.target.to_string()).collect()
        };
        assert_eq!(choice(9, 0), ["sm_90a", "sm_90", "compute_90"]);
        assert_eq!(choice(8, 0), ["sm_80"]);
        assert_eq!(choice(8, 9), ["sm_80"]);
        assert_eq!(choice(10, 0), ["compute_90"]);
        assert_eq!(choice(12, 1), ["compute_90"]);
        assert!(choice(7, 5).is_empty());
    }

    #[test]
    fn damaged_code_is_an_error() {
        let mut stream = ZlibEncoder::new(Vec::new(), Compression::best());
        stream.write_all(&[7; 1000]).expect("in memory");
        let stream = stream.finish().expect("in memory");
        let code = |len, bytes: &[u8]| {
            let compressed = Box::leak(bytes.to_vec().into_boxed_slice());
            Image { len, compressed, ..image("sm_90a") }.code()
        };
        assert_eq!(code(1000, &stream).expect("whole"), [7; 1000]);
        for len in [0, 999, 1001] {
            let error = code(len, &stream).expect_err("another length").to_string();
            assert!(error.contains("sm_90a") && error.contains("damaged"), "{error}");
        }
        for cut in 0..stream.len() {
            assert!(code(1000, &stream[..cut]).is_err(), "cut at {cut}");
        }
        for place in 0..stream.len() {
            let mut bytes = stream.clone();
            bytes[place] ^= 0x10;
            assert!(code(1000, &bytes).map_or(true, |code| code == [7; 1000]), "changed at {place}");
        }
    }

    #[test]
    fn a_file_is_compiled_at_run_time_once() {
        let nvrtc = match Nvrtc::find() {
            Ok(nvrtc) => nvrtc,
            Err(error) => {
                assert!(std::env::var("VITMAE_REQUIRE_NVRTC").as_deref() != Ok("1"), "{error}");
                println!("skipped: {error}");
                return;
            }
        };
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = &embedded_kernels().files[0];
        let target = Target::parse("sm_86").expect("a good name");
        let first = file.compile_with(&nvrtc, target, Some(folder.path())).expect("compiled");
        let entries: Vec<_> = std::fs::read_dir(folder.path()).expect("read").collect();
        assert_eq!(entries.len(), 1);
        let path = entries[0].as_ref().expect("an entry").path();
        assert_eq!(read_cached(&path).as_deref(), Some(first.as_slice()));
        // Whatever the entry holds is what comes back: nothing is compiled the second time.
        write_cached(&path, b"from the cache").expect("written");
        assert_eq!(file.compile_with(&nvrtc, target, Some(folder.path())).expect("cached"), b"from the cache");
        let other = Target::parse("sm_80").expect("a good name");
        assert!(file.compile_with(&nvrtc, other, Some(folder.path())).expect("compiled").starts_with(b"\x7fELF"));
        // A folder that cannot be written is no error.
        let nowhere = path.join("no folder");
        assert!(file.compile_with(&nvrtc, other, Some(&nowhere)).is_ok());
    }

    #[test]
    fn a_damaged_cache_entry_is_not_used() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("deep").join("entry");
        write_cached(&path, b"machine code").expect("written");
        assert_eq!(read_cached(&path).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[0] ^= 1;
        std::fs::write(&path, &bytes).expect("written");
        assert_eq!(read_cached(&path), None);
        std::fs::write(&path, b"short").expect("written");
        assert_eq!(read_cached(&path), None);
        assert_eq!(std::fs::read_dir(path.parent().expect("a folder")).expect("read").count(), 1);
    }
}
