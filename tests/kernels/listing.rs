//! A device that runs nothing and keeps what it was asked for: which kernels launchers choose, and their grids.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vitmae::cuda::embedded::Kernel;
use vitmae::cuda::gemm::{GemmAddresses, GemmDescription};
use vitmae::cuda::launch::{Argument, Driver, Grid, Limits};
use vitmae::cuda::recording::RecordedWork;
use vitmae::cuda::{CudaError, DeviceId, Result, Stream};

/// The kernels that were launched.
#[derive(Debug)]
pub struct Listing {
    limits: Limits,
    next: AtomicU64,
    launches: Mutex<BTreeMap<&'static str, Grid>>,
}

impl Listing {
    /// A device with the limits of another stream's.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, next: AtomicU64::new(256), launches: Mutex::default() })
    }

    pub fn stream(self: &Arc<Self>) -> Stream {
        Stream::new(Arc::clone(self) as Arc<dyn Driver>)
    }

    pub fn symbols(&self) -> BTreeSet<&'static str> {
        self.launches.lock().expect("nobody panics with it").keys().copied().collect()
    }

    /// The grid of a kernel's last launch.
    pub fn grid(&self, symbol: &str) -> Option<Grid> {
        self.launches.lock().expect("nobody panics with it").get(symbol).copied()
    }
}

impl Driver for Listing {
    fn device(&self) -> DeviceId {
        DeviceId::Gpu(usize::MAX)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        Ok(self.next.fetch_add(bytes.next_multiple_of(256) as u64, Ordering::Relaxed))
    }

    unsafe fn release(&self, _: u64) {}

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, _: &mut [u8], _: u64) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn fill(&self, _: u64, _: u8, _: usize) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, grid: Grid, _: &[Argument<'_>]) -> Result<()> {
        self.launches.lock().expect("nobody panics with it").insert(kernel.symbol(), grid);
        Ok(())
    }

    fn allocations(&self) -> u64 {
        0
    }

    fn begin_recording(&self) -> Result<()> {
        Ok(())
    }

    fn end_recording(&self) -> Result<Box<dyn RecordedWork>> {
        Err(CudaError::Recording { what: "recording on a device that runs nothing" })
    }

    unsafe fn gemm(&self, _: &GemmDescription, _: &GemmAddresses) -> Result<()> {
        Ok(())
    }
}
