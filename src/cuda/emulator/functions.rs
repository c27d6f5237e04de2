//! The emulator's functions: part of this program, or of a shared library.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;

/// The interface of runtime.cpp.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    pub(super) new: unsafe extern "C" fn(u64) -> *mut c_void,
    pub(super) delete: unsafe extern "C" fn(*mut c_void),
    pub(super) message: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    pub(super) allocate: unsafe extern "C" fn(*mut c_void, u64) -> u64,
    pub(super) release: unsafe extern "C" fn(*mut c_void, u64) -> c_int,
    pub(super) upload: unsafe extern "C" fn(*mut c_void, u64, *const c_void, u64) -> c_int,
    pub(super) download: unsafe extern "C" fn(*mut c_void, *mut c_void, u64, u64) -> c_int,
    pub(super) readable: unsafe extern "C" fn(*mut c_void, u64, u64) -> c_int,
    pub(super) copy: unsafe extern "C" fn(*mut c_void, u64, u64, u64) -> c_int,
    pub(super) fill: unsafe extern "C" fn(*mut c_void, u64, c_int, u64) -> c_int,
    pub(super) launch: Launch,
}

type Launch = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    c_uint,
    c_uint,
    c_uint,
    *const *const c_void,
    *const usize,
    usize,
) -> c_int;

#[cfg(feature = "emulator")]
mod linked {
    use super::*;

    unsafe extern "C" {
        pub(super) fn vitmae_emulator_new(seed: u64) -> *mut c_void;
        pub(super) fn vitmae_emulator_delete(emulator: *mut c_void);
        pub(super) fn vitmae_emulator_message(emulator: *mut c_void) -> *const c_char;
        pub(super) fn vitmae_emulator_allocate(emulator: *mut c_void, bytes: u64) -> u64;
        pub(super) fn vitmae_emulator_release(emulator: *mut c_void, address: u64) -> c_int;
        pub(super) fn vitmae_emulator_upload(emulator: *mut c_void, to: u64, from: *const c_void, bytes: u64) -> c_int;
        pub(super) fn vitmae_emulator_download(emulator: *mut c_void, to: *mut c_void, from: u64, bytes: u64) -> c_int;
        pub(super) fn vitmae_emulator_readable(emulator: *mut c_void, from: u64, bytes: u64) -> c_int;
        pub(super) fn vitmae_emulator_copy(emulator: *mut c_void, to: u64, from: u64, bytes: u64) -> c_int;
        pub(super) fn vitmae_emulator_fill(emulator: *mut c_void, to: u64, value: c_int, bytes: u64) -> c_int;
        pub(super) fn vitmae_emulator_launch(
            emulator: *mut c_void,
            symbol: *const c_char,
            blocks: c_uint,
            threads: c_uint,
            shared_bytes: c_uint,
            arguments: *const *const c_void,
            sizes: *const usize,
            count: usize,
        ) -> c_int;
    }
}

impl Functions {
    #[cfg(feature = "emulator")]
    pub(super) const LINKED: Self = Self {
        new: linked::vitmae_emulator_new,
        delete: linked::vitmae_emulator_delete,
        message: linked::vitmae_emulator_message,
        allocate: linked::vitmae_emulator_allocate,
        release: linked::vitmae_emulator_release,
        upload: linked::vitmae_emulator_upload,
        download: linked::vitmae_emulator_download,
        readable: linked::vitmae_emulator_readable,
        copy: linked::vitmae_emulator_copy,
        fill: linked::vitmae_emulator_fill,
        launch: linked::vitmae_emulator_launch,
    };

    /// Takes them from a shared library, which stays loaded.
    ///
    /// # Safety
    ///
    /// The library is an emulator, built from this version of the sources.
    pub(super) unsafe fn load(path: &Path) -> std::result::Result<Self, libloading::Error> {
        // SAFETY: what the caller promises, here and for all types below.
        unsafe {
            let library = libloading::Library::new(path)?;
            let functions = Self {
                new: *library.get(b"vitmae_emulator_new")?,
                delete: *library.get(b"vitmae_emulator_delete")?,
                message: *library.get(b"vitmae_emulator_message")?,
                allocate: *library.get(b"vitmae_emulator_allocate")?,
                release: *library.get(b"vitmae_emulator_release")?,
                upload: *library.get(b"vitmae_emulator_upload")?,
                download: *library.get(b"vitmae_emulator_download")?,
                readable: *library.get(b"vitmae_emulator_readable")?,
                copy: *library.get(b"vitmae_emulator_copy")?,
                fill: *library.get(b"vitmae_emulator_fill")?,
                launch: *library.get(b"vitmae_emulator_launch")?,
            };
            std::mem::forget(library);
            Ok(functions)
        }
    }
}
