//! Where benches run, on how many images, and how their time is taken.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use vitmae::cpu::Cpu;
use vitmae::ops::{Backend, Cost, Element, ImageShape, Real};
use vitmae::random::RandomStream;

/// A model's sizes at 224 pixels, as far as ops depend on them.
pub struct Model {
    /// Its name in bench ids.
    pub name: &'static str,
    /// Features of the encoder.
    pub width: usize,
    /// Heads of the encoder.
    pub heads: usize,
    /// Height and width of a patch.
    pub patch: usize,
    /// Whether its decoder and its patches are those of a smaller model, and so need no times of their own.
    pub repeats: bool,
}

/// ViT-B/16.
pub const BASE: Model = Model { name: "vit_b", width: 768, heads: 12, patch: 16, repeats: false };
/// ViT-L/16.
pub const LARGE: Model = Model { name: "vit_l", width: 1024, heads: 16, patch: 16, repeats: true };
/// ViT-H/14.
pub const HUGE: Model = Model { name: "vit_h", width: 1280, heads: 16, patch: 14, repeats: false };

impl Model {
    /// Features of the decoder, of every model.
    pub const DECODER_WIDTH: usize = 512;
    /// Heads of the decoder, of every model.
    pub const DECODER_HEADS: usize = 16;

    /// The pictures.
    pub fn image(&self) -> ImageShape {
        ImageShape { channels: 3, height: 224, width: 224, patch_height: self.patch, patch_width: self.patch }
    }

    /// Name, tokens of an image and features of the encoder and, if it is this model's own, the decoder.
    pub fn parts(&self) -> Vec<(String, usize, usize)> {
        let mut parts = vec![(format!("{}_encoder", self.name), 1 + self.visible(), self.width)];
        if !self.repeats {
            parts.push((format!("{}_decoder", self.name), 1 + self.patches(), Self::DECODER_WIDTH));
        }
        parts
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        self.image().patches()
    }

    /// Visible patches of an image, a quarter.
    pub fn visible(&self) -> usize {
        self.patches() / 4
    }
}

/// Takes the time of some work.
type Timer = Box<dyn Fn(&mut dyn FnMut()) -> Duration>;

/// A device to measure.
pub struct Place<B: Backend<Master = f32>> {
    /// The device.
    pub backend: B,
    /// The models whose sizes are measured.
    pub models: &'static [Model],
    /// Images of a batch.
    pub batch: usize,
    /// Parameters that the optimiser updates: as many as ViT-B/16 has with its decoder.
    pub parameters: usize,
    label: String,
    /// Bytes that calls in a row should touch before memory is used again.
    rotate_bytes: u64,
    timer: Timer,
}

/// Whether criterion takes times: cargo passes `--bench` then. Otherwise it runs everything once.
pub fn measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

impl<B: Backend<Master = f32>> Place<B> {
    /// Models whose patches and decoder are their own.
    pub fn different(&self) -> impl Iterator<Item = &'static Model> {
        self.models.iter().filter(|model| !model.repeats)
    }

    /// Bytes of an element of activations.
    pub fn element_bytes(&self) -> usize {
        size_of::<B::Element>()
    }

    /// Measures `call` as `family/op/shape/device/element`, on what `make` makes, which must be the same size each time.
    pub fn measure<S>(
        &self,
        criterion: &mut Criterion,
        [family, op, shape]: [&str; 3],
        cost: Cost,
        make: impl Fn(&Self) -> vitmae::Result<S>,
        call: impl Fn(&B, &mut S) -> vitmae::Result<()>,
    ) {
        let mut group = criterion.benchmark_group(family);
        group.throughput(match cost.flops {
            0 => Throughput::Bytes(cost.bytes),
            flops => Throughput::ElementsAndBytes { elements: flops, bytes: cost.bytes },
        });
        // There are many shapes; a GPU's times vary little.
        if self.rotate_bytes > 0 {
            group.sample_size(20);
            group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
        } else {
            group.sample_size(30);
            group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
        }
        let mut sets: Vec<S> = Vec::new();
        group.bench_function(format!("{op}/{shape}/{}", self.label), |bencher| {
            // Only when criterion's filter lets it run, and once.
            if sets.is_empty() {
                let count = self.rotate_bytes.div_ceil(cost.bytes.max(1)).clamp(1, 64);
                sets = (0..count).map(|_| make(self)).collect::<vitmae::Result<_>>().expect("there is enough memory");
            }
            bencher.iter_custom(|iterations| {
                let mut next = 0;
                (self.timer)(&mut || {
                    for _ in 0..iterations {
                        call(&self.backend, &mut sets[next]).expect("the buffers have the shape's sizes");
                        next = (next + 1) % sets.len();
                    }
                })
            });
        });
    }

    /// Random numbers of any kind, `value` from 32 random bits.
    pub fn filled<T: Element>(&self, length: usize, value: impl Fn(u32) -> T) -> vitmae::Result<B::Buffer<T>> {
        // As many as the hardest look at them could tell apart from more; then again from the start.
        let mut stream = RandomStream::new(1, 0, length as u64, 200);
        let few: Vec<T> = (0..length.min(1 << 18)).map(|_| value(stream.next_u32())).collect();
        let values: Vec<T> = few.iter().copied().cycle().take(length).collect();
        let mut buffer = self.backend.buffer(length)?;
        self.backend.upload(&mut buffer, &values)?;
        Ok(buffer)
    }

    /// Activations in [-1, 1).
    pub fn elements(&self, length: usize) -> vitmae::Result<B::Buffer<B::Element>> {
        self.filled(length, |bits| B::Element::from_f64(f64::from(bits as i32) / f64::from(1u32 << 31)))
    }

    /// f32 numbers in [-1, 1): weights, vectors, statistics, noise.
    pub fn masters(&self, length: usize) -> vitmae::Result<B::Buffer<f32>> {
        self.filled(length, |bits| bits as i32 as f32 / (1u32 << 31) as f32)
    }

    /// f32 numbers above 0: second moments, deviations.
    pub fn positive(&self, length: usize) -> vitmae::Result<B::Buffer<f32>> {
        self.filled(length, |bits| (bits | 1) as f32 / u32::MAX as f32)
    }

    /// The same everywhere.
    pub fn constant<T: Element>(&self, length: usize, value: T) -> vitmae::Result<B::Buffer<T>> {
        self.filled(length, |_| value)
    }

    /// Bytes of a batch of pictures.
    pub fn pictures(&self, model: &Model) -> vitmae::Result<B::Buffer<u8>> {
        self.filled(self.batch * model.image().length(), |bits| (bits >> 24) as u8)
    }

    /// For each image, `selected` different patches of `patches`, in an order of its own.
    pub fn ids(&self, patches: usize, selected: usize) -> vitmae::Result<B::Buffer<u32>> {
        let mut stream = RandomStream::new(1, 0, patches as u64, 201);
        let mut ids = Vec::with_capacity(self.batch * selected);
        for _ in 0..self.batch {
            let mut order: Vec<(u32, u32)> = (0..patches as u32).map(|patch| (stream.next_u32(), patch)).collect();
            order.sort_unstable();
            ids.extend(order[..selected].iter().map(|&(_, patch)| patch));
        }
        let mut buffer = self.backend.buffer(ids.len())?;
        self.backend.upload(&mut buffer, &ids)?;
        Ok(buffer)
    }
}

impl Place<Cpu<f32>> {
    /// The CPU.
    pub fn cpu(backend: Cpu<f32>) -> Self {
        Self {
            backend,
            models: &[BASE],
            batch: if measuring() { 8 } else { 1 },
            parameters: if measuring() { 111_907_840 } else { 1 << 16 },
            label: "cpu/f32".to_string(),
            rotate_bytes: 0,
            timer: Box::new(|work| {
                let start = Instant::now();
                work();
                start.elapsed()
            }),
        }
    }
}

#[cfg(feature = "cuda")]
impl<E: vitmae::cuda::CudaElement> Place<vitmae::cuda::Cuda<E>>
where
    vitmae::cuda::Cuda<E>: Backend<Master = f32, Element = E>,
{
    /// A GPU, with elements that are called so.
    pub fn cuda(gpu: &vitmae::cuda::Gpu, element: &str) -> vitmae::Result<Self> {
        let stream = gpu.new_stream()?;
        Ok(Self {
            backend: vitmae::cuda::Cuda::new(stream.clone()),
            models: if measuring() { &[BASE, LARGE, HUGE] } else { &[BASE] },
            batch: if measuring() { 256 } else { 2 },
            parameters: if measuring() { 111_907_840 } else { 1 << 16 },
            label: format!("cuda/{element}"),
            // Past three times the second-level cache of every GPU so far (126 MB).
            rotate_bytes: 400_000_000,
            timer: Box::new(move |work| {
                let start = stream.mark().expect("an event");
                work();
                stream.mark().and_then(|end| end.since(&start)).expect("the work ran")
            }),
        })
    }
}
