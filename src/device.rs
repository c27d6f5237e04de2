//! What a model runs on, chosen at run time.
//!
//! ```no_run
//! use vitmae::device::{Device, Work};
//! use vitmae::model::MaeForPreTraining;
//! use vitmae::ops::Backend;
//!
//! struct Count;
//!
//! impl Work for Count {
//!     type Output = vitmae::Result<usize>;
//!
//!     fn run<B: Backend>(self, backend: B) -> Self::Output {
//!         Ok(MaeForPreTraining::from_pretrained("checkpoint", backend)?.parameters().layout().trained())
//!     }
//! }
//!
//! let trained = Device::best()?.run(Count)?;
//! # Ok::<(), vitmae::Error>(())
//! ```
//!
//! Whoever knows the device gives it to the model directly: `MaeForPreTraining::from_pretrained(path, Cpu::<f32>::new())`.

use std::fmt;
use std::str::FromStr;

use crate::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::cuda::{Cuda, DeviceInfo, Gpu};
use crate::distributed::Processes;
use crate::ops::Backend;
use crate::{Error, Result};

/// Which device to use: `auto`, `cpu`, `cuda`, `cuda:N` or `emulator`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that this build has code for, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
    /// The CUDA kernels on the CPU, under checks: for tests, and slow.
    Emulator,
}

impl DeviceChoice {
    /// What one of several processes takes of this choice: of the machine's GPUs the one with its local rank, or the only one that
    /// it is shown. `cuda:N` with N above 0 stays as it is.
    ///
    /// # Errors
    /// [`Error::Config`] where a machine has fewer GPUs than processes.
    pub fn for_process(self, processes: &Processes) -> Result<Self> {
        if processes.size() == 1 || !matches!(self, Self::Auto | Self::Cuda(0)) {
            return Ok(self);
        }
        self.of_gpus(gpus(), processes.local_rank())
    }

    fn of_gpus(self, gpus: usize, local_rank: usize) -> Result<Self> {
        match (self, gpus) {
            // The CPU, or the error that says what is missing.
            (choice, 0) => Ok(choice),
            (_, 1) => Ok(Self::Cuda(0)),
            (_, gpus) if local_rank < gpus => Ok(Self::Cuda(local_rank)),
            _ => Err(Error::Config(format!(
                "this is process {local_rank} (counted from 0) of its machine, which has {gpus} GPUs: start one for each GPU, and \
                 set LOCAL_RANK where they are started by hand"
            ))),
        }
    }
}

/// How many GPUs there are.
fn gpus() -> usize {
    #[cfg(feature = "cuda")]
    return crate::cuda::devices().map_or(0, |devices| devices.len());
    #[cfg(not(feature = "cuda"))]
    0
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulator" => Ok(Self::Emulator),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
                _ => Err(Error::value("device", "expected auto, cpu, cuda, cuda:N or emulator")),
            },
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Emulator => f.write_str("emulator"),
        }
    }
}

/// The type of activations and working weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits throughout: what comparisons want, and all that the CPU has.
    F32,
    /// bfloat16 with sums and master weights in 32 bits: the normal mode of a GPU.
    Bf16,
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::value("precision", "expected f32 or bf16")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::F32 { "f32" } else { "bf16" })
    }
}

/// A device that is ready to work.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The CPU.
    Cpu(Cpu<f32>),
    /// A GPU or the emulator in f32.
    #[cfg(feature = "cuda")]
    CudaF32(Cuda<f32>),
    /// A GPU or the emulator in bf16.
    #[cfg(feature = "cuda")]
    CudaBf16(Cuda<half::bf16>),
}

/// Something to do on whatever device there is.
pub trait Work {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, backend: B) -> Self::Output;
}

impl Device {
    /// The best device of this machine in its normal precision, as `--device auto` takes it. What it is goes to the log.
    ///
    /// # Errors
    /// None so far: where no GPU can be used there is the CPU.
    pub fn best() -> Result<Self> {
        Self::open(DeviceChoice::Auto, None)
    }

    /// Opens a device; where no precision is asked for, bf16 on a GPU and f32 on the CPU.
    ///
    /// # Errors
    /// [`Error::Cuda`] where a GPU was asked for and there is no driver, no such GPU, an old one, or no code for it;
    /// [`Error::Device`] for what this build lacks, and for bf16 on the CPU.
    pub fn open(choice: DeviceChoice, precision: Option<Precision>) -> Result<Self> {
        let device = match choice {
            DeviceChoice::Auto => Self::automatic(precision),
            DeviceChoice::Cpu => Self::cpu(precision),
            DeviceChoice::Cuda(ordinal) => Self::cuda(ordinal, precision),
            DeviceChoice::Emulator => Self::emulator(precision),
        }?;
        tracing::info!("running on {device}");
        Ok(device)
    }

    fn cpu(precision: Option<Precision>) -> Result<Self> {
        if precision == Some(Precision::Bf16) {
            return Err(Error::Device("bf16 needs a GPU; on the CPU use --precision f32 (its default)".into()));
        }
        Ok(Self::Cpu(Cpu::new()))
    }

    /// The numbers on this device.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self {
            #[cfg(feature = "cuda")]
            Self::CudaBf16(_) => Precision::Bf16,
            _ => Precision::F32,
        }
    }

    /// Operations per second of its matrix products in this precision, without sparsity, by the data sheet of the GPU's name;
    /// what model FLOPs utilisation is a share of. Nothing where that is not known.
    #[must_use]
    pub fn peak_flops(&self) -> Option<f64> {
        match self {
            #[cfg(feature = "cuda")]
            Self::CudaBf16(cuda) => {
                let crate::cuda::DeviceId::Gpu(ordinal) = cuda.stream().device() else { return None };
                peak_of(&name_of(ordinal)?)
            }
            _ => None,
        }
    }

    /// Does some work on it.
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            Self::Cpu(cpu) => work.run(cpu),
            #[cfg(feature = "cuda")]
            Self::CudaF32(cuda) => work.run(cuda),
            #[cfg(feature = "cuda")]
            Self::CudaBf16(cuda) => work.run(cuda),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[cfg(feature = "cuda")]
        let device = match self {
            Self::Cpu(_) => None,
            Self::CudaF32(cuda) => Some(cuda.stream().device()),
            Self::CudaBf16(cuda) => Some(cuda.stream().device()),
        };
        #[cfg(feature = "cuda")]
        match device {
            Some(crate::cuda::DeviceId::Gpu(ordinal)) => {
                let name = name_of(ordinal).unwrap_or_else(|| "a GPU".to_owned());
                return write!(f, "cuda:{ordinal} ({name}), {}", self.precision());
            }
            Some(crate::cuda::DeviceId::Emulator(_)) => return write!(f, "the emulator, {}", self.precision()),
            None => {}
        }
        write!(f, "the CPU ({}), {}", crate::cpu::Isa::used(), self.precision())
    }
}

#[cfg(feature = "cuda")]
impl Device {
    fn over(stream: crate::cuda::Stream, precision: Option<Precision>) -> Self {
        match precision.unwrap_or(Precision::Bf16) {
            Precision::F32 => Self::CudaF32(Cuda::new(stream)),
            Precision::Bf16 => Self::CudaBf16(Cuda::new(stream)),
        }
    }

    fn cuda(ordinal: usize, precision: Option<Precision>) -> Result<Self> {
        let gpu = Gpu::open(ordinal)?;
        // Here, and not in the middle of the first pass.
        crate::cuda::cublaslt::probe()?;
        Ok(Self::over(gpu.new_stream()?, precision))
    }

    fn automatic(precision: Option<Precision>) -> Result<Self> {
        match crate::cuda::devices() {
            // A machine without a GPU is nothing to speak of.
            Err(error) => tracing::debug!("{error}"),
            Ok(devices) => {
                for device in devices {
                    let opened = usable(&device).and_then(|()| Self::cuda(device.ordinal, precision));
                    match opened {
                        Ok(opened) => return Ok(opened),
                        Err(error) => tracing::warn!("cuda:{} is not used: {error}", device.ordinal),
                    }
                }
            }
        }
        Self::cpu(precision)
    }

    #[cfg(feature = "emulator")]
    fn emulator(precision: Option<Precision>) -> Result<Self> {
        use crate::cuda::emulator::{Emulator, Options};
        Ok(Self::over(Emulator::new(Options::default())?.stream(), precision))
    }
}

/// Dense bf16 with f32 sums, from NVIDIA's data sheets; the first part of a name that fits counts.
#[cfg(feature = "cuda")]
const PEAK_TFLOPS: [(&str, f64); 9] = [
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("B200", 2250.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.2),
];

/// What the driver calls a GPU.
#[cfg(feature = "cuda")]
fn name_of(ordinal: usize) -> Option<String> {
    Some(crate::cuda::devices().ok()?.into_iter().find(|device| device.ordinal == ordinal)?.name)
}

#[cfg(feature = "cuda")]
fn peak_of(name: &str) -> Option<f64> {
    PEAK_TFLOPS.iter().find(|(part, _)| name.contains(part)).map(|(_, tflops)| tflops * 1e12)
}

/// Whether the kernels run on a GPU without being compiled first, which `auto` does not do behind its user's back.
#[cfg(feature = "cuda")]
fn usable(device: &DeviceInfo) -> Result<()> {
    device.check_supported()?;
    let (major, minor) = device.compute_capability;
    let missing = crate::cuda::embedded_kernels().files.iter().find(|file| file.images_for(major, minor).is_empty());
    match missing {
        None => Ok(()),
        Some(file) => Err(Error::Device(format!(
            "this build has no machine code of {} for compute capability {major}.{minor}; build it where NVRTC is found, or \
             choose the GPU with --device cuda:{} to compile the kernels now",
            file.name, device.ordinal
        ))),
    }
}

#[cfg(not(feature = "cuda"))]
impl Device {
    fn cuda(ordinal: usize, _precision: Option<Precision>) -> Result<Self> {
        Err(Error::Device(format!(
            "GPU {ordinal} cannot be used: this program was built without the feature `cuda`; build it with --features cuda"
        )))
    }

    fn automatic(precision: Option<Precision>) -> Result<Self> {
        Self::cpu(precision)
    }
}

#[cfg(not(feature = "emulator"))]
impl Device {
    fn emulator(_precision: Option<Precision>) -> Result<Self> {
        Err(Error::Device(
            "the emulator is not part of this program; build it with --features emulator (needs a C++20 compiler)"
                .into(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:13", "emulator"] {
            assert_eq!(text.parse::<DeviceChoice>().expect(text).to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().expect("short form"), DeviceChoice::Cuda(0));
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
        for text in ["f32", "bf16"] {
            assert_eq!(text.parse::<Precision>().expect(text).to_string(), text);
        }
        assert!("f16".parse::<Precision>().is_err());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn peaks_are_those_of_the_data_sheets() {
        assert_eq!(peak_of("NVIDIA H100 80GB HBM3"), Some(989e12));
        assert_eq!(peak_of("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(peak_of("NVIDIA H200"), Some(989e12));
        assert_eq!(peak_of("NVIDIA GeForce GT 710"), None);
        assert_eq!(Device::open(DeviceChoice::Cpu, None).expect("the CPU").peak_flops(), None);
    }

    #[test]
    fn processes_share_the_gpus_of_a_machine() {
        assert_eq!(DeviceChoice::Auto.of_gpus(8, 3).expect("enough"), DeviceChoice::Cuda(3));
        assert_eq!(DeviceChoice::Cuda(0).of_gpus(8, 0).expect("enough"), DeviceChoice::Cuda(0));
        // A launcher that shows each process its own.
        assert_eq!(DeviceChoice::Auto.of_gpus(1, 3).expect("shown one"), DeviceChoice::Cuda(0));
        assert_eq!(DeviceChoice::Auto.of_gpus(0, 3).expect("none"), DeviceChoice::Auto);
        assert!(DeviceChoice::Auto.of_gpus(4, 4).is_err());
    }

    #[test]
    fn there_is_always_a_best_device() {
        let device = Device::best().expect("the CPU at least");
        println!("{device}");
        assert!(matches!(Device::open(DeviceChoice::Cpu, None), Ok(Device::Cpu(_))));
    }

    #[test]
    fn what_cannot_be_used_says_what_to_do() {
        let text = Device::open(DeviceChoice::Cpu, Some(Precision::Bf16)).expect_err("no bf16").to_string();
        assert!(text.contains("--precision f32"), "{text}");
        let text = Device::open(DeviceChoice::Cuda(usize::MAX), None).expect_err("no such GPU").to_string();
        assert!(
            ["--device cpu", "CUDA_VISIBLE_DEVICES", "--features"].iter().any(|word| text.contains(word)),
            "{text}"
        );
        if cfg!(not(feature = "emulator")) {
            let text = Device::open(DeviceChoice::Emulator, None).expect_err("not built").to_string();
            assert!(text.contains("--features emulator"), "{text}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn auto_takes_no_gpu_that_is_old_or_without_code() {
        let info = |major, minor| {
            let mut info = DeviceInfo::unknown(0);
            info.compute_capability = (major, minor);
            info
        };
        assert!(usable(&info(7, 5)).is_err());
        let embedded = crate::cuda::embedded_kernels().files.iter().all(|file| !file.images_for(9, 0).is_empty());
        assert_eq!(usable(&info(9, 0)).is_ok(), embedded);
    }
}
