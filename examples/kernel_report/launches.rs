//! How training steps launch each kernel: the real model and the real launchers, over a driver that runs nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use vitmae::config::MaeConfig;
use vitmae::cuda::embedded::Kernel;
use vitmae::cuda::gemm::{GemmAddresses, GemmDescription};
use vitmae::cuda::launch::{Argument, Driver, Grid, Limits};
use vitmae::cuda::recording::RecordedWork;
use vitmae::cuda::{Cuda, CudaElement, CudaError, DeviceId, Result, Stream};
use vitmae::model::{ImageValues, Images, MaeForPreTraining, Masking};
use vitmae::ops::Backend;
use vitmae::train::{OptimizerSettings, Trainer};

/// Threads and dynamic shared memory of the launches of each kernel, by symbol; of several the one with most shared memory.
pub type Launches = BTreeMap<&'static str, (u32, u32)>;

/// Images of a step. Grids depend on it, blocks do not.
const BATCH: usize = 64;

/// The launches of a training step of ViT-B, L and H in bf16 and in f32, on a device with these limits.
pub fn of_training_steps(limits: Limits) -> vitmae::Result<Launches> {
    let counter = Arc::new(Counter { limits, next: AtomicU64::new(1 << 40), launches: Mutex::default() });
    for config in [MaeConfig::base(), MaeConfig::large(), MaeConfig::huge()] {
        // Layers are alike: one of each kind shows them all.
        let config = MaeConfig { num_hidden_layers: 1, decoder_num_hidden_layers: 1, ..config };
        step::<bf16>(&counter, &config)?;
        step::<f32>(&counter, &config)?;
    }
    let launches = counter.launches.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(launches.clone())
}

fn step<E: CudaElement>(counter: &Arc<Counter>, config: &MaeConfig) -> vitmae::Result<()>
where
    Cuda<E>: Backend<Master = f32>,
{
    let stream = Stream::new(Arc::clone(counter) as Arc<dyn Driver>);
    let model = MaeForPreTraining::new(config.clone(), Cuda::<E>::new(stream), 0)?;
    let mut trainer = Trainer::new(model, OptimizerSettings::default(), BATCH)?;
    trainer.set_recording(false);
    let image = config.image();
    let pixels = vec![0u8; BATCH * image.length()];
    let values = ImageValues::Bytes { values: &pixels, mean: &[0.5; 3], std: &[0.5; 3] };
    let images = Images { batch: BATCH, channels: image.channels, height: image.height, width: image.width, values };
    trainer.accumulate(&images, &Masking::random(0.75, 0), BATCH)?;
    trainer.launch_update(1e-4)
}

/// Hands out addresses that nothing lies behind, and takes down what is launched.
#[derive(Debug)]
struct Counter {
    limits: Limits,
    next: AtomicU64,
    launches: Mutex<Launches>,
}

impl Driver for Counter {
    fn device(&self) -> DeviceId {
        DeviceId::Emulator(u64::MAX)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        Ok(self.next.fetch_add((bytes as u64 + 1).next_multiple_of(256), Ordering::Relaxed))
    }

    unsafe fn release(&self, _address: u64) {}

    unsafe fn upload(&self, _to: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, bytes: &mut [u8], _from: u64) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    unsafe fn copy(&self, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn fill(&self, _to: u64, _value: u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, grid: Grid, _arguments: &[Argument<'_>]) -> Result<()> {
        let mut launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        let launch = launches.entry(kernel.symbol()).or_insert((grid.threads, grid.shared_bytes));
        if grid.shared_bytes > launch.1 {
            *launch = (grid.threads, grid.shared_bytes);
        }
        Ok(())
    }

    fn allocations(&self) -> u64 {
        0
    }

    fn begin_recording(&self) -> Result<()> {
        Err(CudaError::Recording { what: "anything" })
    }

    fn end_recording(&self) -> Result<Box<dyn RecordedWork>> {
        Err(CudaError::Recording { what: "anything" })
    }

    unsafe fn gemm(&self, _description: &GemmDescription, _addresses: &GemmAddresses) -> Result<()> {
        Ok(())
    }
}
