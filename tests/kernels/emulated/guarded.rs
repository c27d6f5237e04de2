//! A GPU for tests. Every allocation starts as NaN patterns and lies between guard zones that are looked at when it is given
//! back, and each stream is a device of its own, so that memory of another is refused as it is between emulators.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vitmae::cuda::embedded::Kernel;
use vitmae::cuda::gemm::{GemmAddresses, GemmDescription};
use vitmae::cuda::launch::{Argument, Driver, Grid, Limits};
use vitmae::cuda::recording::RecordedWork;
use vitmae::cuda::{DeviceId, Gpu, Mark, Result, Stream};

/// Bytes before and after an allocation; keeps its alignment.
const GUARD: usize = 256;
/// What guards hold, and fresh memory: a NaN in every type of floating-point number.
const POISON: u8 = 0xff;

/// A stream on the GPU that a name like `cuda`, `cuda:1` or `cuda-plain` means. Launchers see the smaller of its limits and
/// `limits`, so that the shapes of a test reach the kernels and the turns of their loops that they reach on the emulator.
pub fn stream(name: &str, limits: Limits) -> Stream {
    static GPUS: Mutex<Option<HashMap<usize, Gpu>>> = Mutex::new(None);
    let ordinal = name.split_once(':').map_or(0, |(_, ordinal)| ordinal.parse().expect("a number after cuda:"));
    let gpu = {
        let mut gpus = GPUS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let gpus = gpus.get_or_insert_default();
        gpus.entry(ordinal)
            .or_insert_with(|| Gpu::open(ordinal).unwrap_or_else(|error| panic!("{name}: {error}")))
            .clone()
    };
    announce(&gpu);
    let stream = gpu.new_stream().unwrap_or_else(|error| panic!("{name}: {error}"));
    let own = stream.driver().limits();
    let limits = Limits {
        shared_bytes: own.shared_bytes.min(limits.shared_bytes),
        multiprocessors: own.multiprocessors.min(limits.multiprocessors),
    };
    guarded(&stream, limits, if name.starts_with("cuda-plain") { 0 } else { GUARD })
}

/// A stream whose memory is poisoned and lies between guard zones of so many bytes; as it is, if that is 0.
fn guarded(stream: &Stream, limits: Limits, guard: usize) -> Stream {
    static STREAMS: AtomicUsize = AtomicUsize::new(0);
    let number = STREAMS.fetch_add(1, Ordering::Relaxed);
    let inner = Arc::clone(stream.driver());
    Stream::new(Arc::new(Guarded {
        inner,
        limits,
        number,
        guard,
        recording: AtomicBool::new(false),
        sizes: Mutex::default(),
    }))
}

/// Says once which GPU the tests run on.
fn announce(gpu: &Gpu) {
    static SAID: OnceLock<()> = OnceLock::new();
    SAID.get_or_init(|| println!("on {:?}", gpu.info()));
}

#[derive(Debug)]
struct Guarded {
    inner: Arc<dyn Driver>,
    limits: Limits,
    number: usize,
    guard: usize,
    recording: AtomicBool,
    /// Bytes of each allocation.
    sizes: Mutex<HashMap<u64, usize>>,
}

impl Guarded {
    fn guards(&self, address: u64, bytes: usize) -> [u64; 2] {
        [address - self.guard as u64, address + bytes as u64]
    }

    /// Waits, so that a fault is the last launch's and stops the test there.
    fn wait(&self) -> Result<()> {
        if self.recording.load(Ordering::Relaxed) { Ok(()) } else { self.inner.synchronize() }
    }
}

impl Driver for Guarded {
    fn device(&self) -> DeviceId {
        DeviceId::Gpu(1000 + self.number)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        if self.guard == 0 {
            return self.inner.allocate(bytes);
        }
        let whole = self.inner.allocate(bytes + 2 * self.guard)?;
        // SAFETY: the allocation has this many bytes.
        unsafe { self.inner.fill(whole, POISON, bytes + 2 * self.guard)? };
        let address = whole + self.guard as u64;
        self.sizes.lock().expect("nobody panics with it").insert(address, bytes);
        Ok(address)
    }

    unsafe fn release(&self, address: u64) {
        let size = self.sizes.lock().expect("nobody panics with it").remove(&address);
        let Some(bytes) = size else {
            // SAFETY: the caller's promise; without guards the address is the inner driver's.
            return unsafe { self.inner.release(address) };
        };
        let mut damaged = None;
        for (start, side) in self.guards(address, bytes).into_iter().zip(["before", "after"]) {
            let mut found = vec![0; self.guard];
            // SAFETY: a guard zone is part of the allocation.
            let read = unsafe { self.inner.download(&mut found, start) };
            if read.is_ok() && found.iter().any(|&byte| byte != POISON) {
                damaged = Some(side);
            }
        }
        // SAFETY: it came from the inner driver and is not used again.
        unsafe { self.inner.release(address - self.guard as u64) };
        if let Some(side) = damaged.filter(|_| !std::thread::panicking()) {
            panic!("a kernel wrote {side} a buffer of {bytes} bytes");
        }
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.upload(to, bytes) }
    }

    unsafe fn download(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.download(bytes, from) }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.copy(to, from, bytes) }
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.fill(to, value, bytes) }
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }

    unsafe fn launch(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(kernel, grid, arguments)? };
        self.wait()
    }

    fn allocations(&self) -> u64 {
        self.inner.allocations()
    }

    fn begin_recording(&self) -> Result<()> {
        self.recording.store(true, Ordering::Relaxed);
        self.inner.begin_recording()
    }

    fn end_recording(&self) -> Result<Box<dyn RecordedWork>> {
        self.recording.store(false, Ordering::Relaxed);
        self.inner.end_recording()
    }

    unsafe fn gemm(&self, description: &GemmDescription, addresses: &GemmAddresses) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.gemm(description, addresses)? };
        self.wait()
    }

    fn mark(&self) -> Result<Mark> {
        self.inner.mark()
    }
}

#[test]
fn guard_zones_show_a_write_outside_a_buffer() {
    let Some(emulator) = super::emulator_itself(0) else { return };
    let inner = emulator.stream();
    let stream = guarded(&inner, inner.driver().limits(), GUARD);
    let fresh = stream.uninitialised::<f32>(3).expect("reserved");
    assert!(stream.download(&fresh.as_slice()).expect("downloaded").into_iter().all(f32::is_nan));
    drop(fresh);
    for (offset, side) in [(-1, "before"), (12, "after")] {
        let address = stream.driver().allocate(12).expect("reserved");
        // SAFETY: the guard zones belong to the same allocation, which is given back once.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| unsafe {
            stream.driver().fill(address.wrapping_add_signed(offset), 0, 1).expect("filled");
            stream.driver().release(address);
        }));
        let message = outcome.expect_err("a panic").downcast::<String>().expect("with a message");
        assert_eq!(*message, format!("a kernel wrote {side} a buffer of 12 bytes"));
    }
}
