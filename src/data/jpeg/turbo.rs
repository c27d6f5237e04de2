//! By libjpeg-turbo, which Pillow decodes with, too.

use std::cell::RefCell;
use std::ffi::c_int;

use turbojpeg_sys as tj;

use super::header::Header;
use crate::data::image::{CropBox, Part};

/// Passes over a progressive picture, at most: files with thousands of them take minutes.
const MOST_SCANS: c_int = 500;

/// A decompressor, for one thread at a time.
struct Decompressor(tj::tjhandle);

impl Drop for Decompressor {
    fn drop(&mut self) {
        // SAFETY: tj3Destroy(handle) of a handle that tj3Init made and nobody uses any more.
        unsafe { tj::tj3Destroy(self.0) }
    }
}

thread_local! {
    /// Made once: it has buffers of its own.
    static DECOMPRESSOR: RefCell<Option<Decompressor>> = const { RefCell::new(None) };
}

impl Decompressor {
    fn new() -> Option<Self> {
        // SAFETY: tj3Init(initType) has no preconditions; null means that there is no memory.
        let handle = unsafe { tj::tj3Init(tj::TJINIT_TJINIT_DECOMPRESS as c_int) };
        (!handle.is_null()).then_some(Self(handle))
    }

    /// Whether the last call did what it should, if perhaps with a warning as Pillow ignores them.
    fn went_well(&self, status: c_int) -> bool {
        // SAFETY: tj3GetErrorCode(handle) of a live handle.
        status == 0 || unsafe { tj::tj3GetErrorCode(self.0) } == tj::TJERR_TJERR_WARNING as c_int
    }
}

/// Decodes `window`; whether it could.
pub(super) fn decode(bytes: &[u8], header: &Header, window: CropBox, part: &mut Part) -> bool {
    DECOMPRESSOR.with(|decompressor| match &mut *decompressor.borrow_mut() {
        Some(decompressor) => decode_with(decompressor, bytes, header, window, part),
        none => match Decompressor::new() {
            Some(new) => decode_with(none.insert(new), bytes, header, window, part),
            None => false,
        },
    })
}

fn decode_with(decompressor: &Decompressor, bytes: &[u8], header: &Header, window: CropBox, part: &mut Part) -> bool {
    let handle = decompressor.0;
    let format = if header.components == 1 { tj::TJPF_TJPF_GRAY } else { tj::TJPF_TJPF_RGB };
    // SAFETY: tj3Set(handle, param, value) and tj3DecompressHeader(handle, jpegBuf, jpegSize) of a live handle and a slice.
    let status = unsafe {
        tj::tj3Set(handle, tj::TJPARAM_TJPARAM_SCANLIMIT as c_int, MOST_SCANS);
        tj::tj3DecompressHeader(handle, bytes.as_ptr(), bytes.len() as _)
    };
    // SAFETY: tj3Get(handle, param) of a live handle.
    let found = [tj::TJPARAM_TJPARAM_JPEGHEIGHT, tj::TJPARAM_TJPARAM_JPEGWIDTH]
        .map(|parameter| unsafe { tj::tj3Get(handle, parameter as c_int) });
    if !decompressor.went_well(status) || found != [header.height as c_int, header.width as c_int] {
        return false;
    }
    let CropBox { top, left, height, width } = window;
    let region = if (height, width) == (header.height, header.width) {
        // Without one: the last picture's is still set.
        tj::tjregion { x: 0, y: 0, w: 0, h: 0 }
    } else {
        tj::tjregion { x: left as c_int, y: top as c_int, w: width as c_int, h: height as c_int }
    };
    // SAFETY: tj3SetCroppingRegion(handle, region) of a live handle, after tj3DecompressHeader; it checks the region.
    if unsafe { tj::tj3SetCroppingRegion(handle, region) } != 0 {
        return false;
    }
    let row = width * header.components;
    // Either all of it is written or it is not used.
    part.image.pixels.resize(row * height, 0);
    (part.top, part.left, part.image.height, part.image.width) = (top, left, height, width);
    // SAFETY: tj3Decompress8(handle, jpegBuf, jpegSize, dstBuf, pitch, pixelFormat): a slice, and `height` rows of `row` bytes,
    // which is what the region, or the header that was just compared, makes it write.
    let status = unsafe {
        let pixels = part.image.pixels.as_mut_ptr();
        tj::tj3Decompress8(handle, bytes.as_ptr(), bytes.len() as _, pixels, row as c_int, format)
    };
    decompressor.went_well(status)
}
