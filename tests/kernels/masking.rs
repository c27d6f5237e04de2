//! Masking against a stable sort.

use vitmae::cpu::Cpu;
use vitmae::ops::{self, Memory, PatchMasking};

use super::emulated::masking::{MAX_PATCHES, MaskingOutput, MaskingShape, RandomMask};
use super::emulated::masking::{masking_forward_noise, masking_forward_random};
use super::emulated::{Buffer, Cuda, CudaError, SEEDS, Stream, device};

/// Host copies of what a masking writes.
#[derive(Debug, PartialEq)]
struct Masks {
    ids_keep: Vec<u32>,
    ids_hidden: Vec<u32>,
    ids_restore: Vec<u32>,
    mask: Vec<f32>,
}

/// The masking of noise `[B, L]`, by its definition.
fn expected(noise: &[f32], shape: MaskingShape) -> Masks {
    let mut masks = Masks { ids_keep: vec![], ids_hidden: vec![], ids_restore: vec![], mask: vec![] };
    for row in noise.chunks(shape.patches) {
        let mut shuffle: Vec<u32> = (0..shape.patches as u32).collect();
        // Stable; NaN after every number.
        shuffle.sort_by(|&a, &b| {
            let (a, b) = (row[a as usize], row[b as usize]);
            a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
        });
        let mut restore = vec![0; shape.patches];
        shuffle.iter().enumerate().for_each(|(rank, &patch)| restore[patch as usize] = rank as u32);
        masks.ids_keep.extend(&shuffle[..shape.keep]);
        masks.ids_hidden.extend(&shuffle[shape.keep..]);
        masks.mask.extend(restore.iter().map(|&rank| if (rank as usize) < shape.keep { 0.0 } else { 1.0 }));
        masks.ids_restore.extend(restore);
    }
    masks
}

struct Buffers {
    ids_keep: Buffer<u32>,
    ids_hidden: Buffer<u32>,
    ids_restore: Buffer<u32>,
    mask: Buffer<f32>,
}

impl Buffers {
    fn new(stream: &Stream, MaskingShape { batch, patches, keep }: MaskingShape) -> Self {
        let words = |len| stream.uninitialised(len).expect("reserved");
        Self {
            ids_keep: words(batch * keep),
            ids_hidden: words(batch * (patches - keep)),
            ids_restore: words(batch * patches),
            mask: stream.uninitialised(batch * patches).expect("reserved"),
        }
    }

    fn output(&mut self) -> MaskingOutput<'_> {
        MaskingOutput {
            ids_keep: self.ids_keep.as_mut_slice(),
            ids_hidden: self.ids_hidden.as_mut_slice(),
            ids_restore: self.ids_restore.as_mut_slice(),
            mask: self.mask.as_mut_slice(),
        }
    }

    fn download(&self, stream: &Stream) -> Masks {
        let words = |buffer: &Buffer<u32>| stream.download(&buffer.as_slice()).expect("downloaded");
        Masks {
            ids_keep: words(&self.ids_keep),
            ids_hidden: words(&self.ids_hidden),
            ids_restore: words(&self.ids_restore),
            mask: stream.download(&self.mask.as_slice()).expect("downloaded"),
        }
    }
}

fn by_noise(stream: &Stream, noise: &[f32], shape: MaskingShape) -> Masks {
    let mut buffers = Buffers::new(stream, shape);
    let noise = stream.upload(noise).expect("uploaded");
    masking_forward_noise(stream, &mut buffers.output(), &noise.as_slice(), shape).expect("no fault");
    buffers.download(stream)
}

/// Noise with many ties: `levels` different values.
fn noise(shape: MaskingShape, levels: u32) -> Vec<f32> {
    let word = |index: usize| rand_philox::philox4x32_10([index as u32, levels, 0, 0], [1, 2])[0];
    (0..shape.batch * shape.patches).map(|index| (word(index) % levels) as f32 / levels as f32 - 0.5).collect()
}

#[test]
fn masking_by_noise_is_the_stable_argsort() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let stream = device.stream();
        for patches in [1, 2, 3, 4, 5, 31, 32, 33, 49, 64, 196, 255, 256, 257, 300, 785] {
            for keep in [0, 1, patches / 4, patches] {
                let shape = MaskingShape { batch: 3, patches, keep };
                for levels in [1, 7, 1 << 20] {
                    let noise = noise(shape, levels);
                    assert_eq!(by_noise(&stream, &noise, shape), expected(&noise, shape), "{shape:?}, {levels} levels");
                }
            }
        }
    }
}

#[test]
fn masking_takes_thousands_of_patches() {
    let Some(device) = device(2) else { return };
    for patches in [4096, MAX_PATCHES] {
        let shape = MaskingShape { batch: 1, patches, keep: patches / 4 };
        let noise = noise(shape, 1000);
        assert_eq!(by_noise(&device.stream(), &noise, shape), expected(&noise, shape), "{patches}");
    }
}

#[test]
fn masking_orders_signs_zeros_infinities_and_nans() {
    let Some(device) = device(0) else { return };
    let tiny = f32::from_bits(1);
    let noise = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::NAN,
        f32::INFINITY,
        -0.0,
        f32::NEG_INFINITY,
        0.0,
        tiny,
        -tiny,
        f32::MAX,
        f32::MIN,
        -f32::NAN,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE,
        f32::INFINITY,
        f32::NAN,
    ];
    let shape = MaskingShape { batch: 1, patches: noise.len(), keep: 5 };
    let masks = by_noise(&device.stream(), &noise, shape);
    assert_eq!(masks, expected(&noise, shape));
    assert_eq!(masks.ids_keep, [7, 12, 3, 15, 10]);
}

#[test]
fn random_masks_depend_on_seed_epoch_and_sample_alone() {
    let samples = [0u64, 1, 77, u64::from(u32::MAX), 1 << 40, (1 << 56) - 1];
    for order in SEEDS {
        let Some(device) = device(order) else { return };
        let stream = device.stream();
        for (patches, seed, epoch) in [(1, 0, 0), (49, 3, 1), (196, u64::MAX, 7), (197, 0x1234_5678_9abc_def0, 399)] {
            let shape = MaskingShape { batch: samples.len(), patches, keep: patches / 4 };
            // By the definition: word w of block j is patch 4 j + w; 24 high bits.
            let mut noise = Vec::new();
            for sample in samples {
                for patch in 0..patches as u32 {
                    let high = (sample >> 32) as u32 & 0x00ff_ffff | 1 << 24;
                    let counter = [patch / 4, epoch, sample as u32, high];
                    let words = rand_philox::philox4x32_10(counter, [seed as u32, (seed >> 32) as u32]);
                    noise.push((words[patch as usize % 4] >> 8) as f32 / (1 << 24) as f32);
                }
            }
            let run = |samples: &[u64]| {
                let shape = MaskingShape { batch: samples.len(), ..shape };
                let mut buffers = Buffers::new(&stream, shape);
                let samples = stream.upload(samples).expect("uploaded");
                let random = RandomMask { samples: samples.as_slice(), seed, epoch };
                masking_forward_random(&stream, &mut buffers.output(), &random, shape).expect("no fault");
                buffers.download(&stream)
            };
            let all = run(&samples);
            assert_eq!(all, expected(&noise, shape), "{shape:?}");
            // Another batch, another place in it: the same mask.
            let alone = run(&samples[3..4]);
            assert_eq!(alone.ids_restore, all.ids_restore[3 * patches..4 * patches]);
        }
    }
}

/// Both ops through the contract, into buffers that are longer than they need be.
fn as_a_backend<M: PatchMasking>(device: &M, shape: MaskingShape, noise: &[f32], samples: &[u64]) -> [Masks; 2] {
    let MaskingShape { batch, patches, keep } = shape;
    let hidden = patches - keep;
    let words = |len| device.buffer::<u32>(len + 5).expect("reserved");
    let mut ids = [words(batch * keep), words(batch * hidden), words(batch * patches)];
    let mut mask = device.buffer(batch * patches + 5).expect("reserved");
    let (mut noise_buffer, mut sample_buffer) =
        (device.buffer(noise.len() + 1).expect("reserved"), device.buffer(batch + 1).expect("reserved"));
    device.upload(&mut noise_buffer, noise).expect("uploaded");
    device.upload(&mut sample_buffer, samples).expect("uploaded");
    let mut run = |random: Option<ops::RandomMask>| {
        let [keep_ids, hidden_ids, restore] = &mut ids;
        match random {
            None => device.masking_from_noise(shape, keep_ids, hidden_ids, restore, &mut mask, &noise_buffer),
            Some(random) => {
                device.masking_random(shape, keep_ids, hidden_ids, restore, &mut mask, random, &sample_buffer)
            }
        }
        .expect("no fault");
        let read = |buffer, len| {
            let mut values = vec![0; len];
            device.download(&mut values, buffer).expect("downloaded");
            values
        };
        let mut mask_values = vec![0.0; batch * patches];
        device.download(&mut mask_values, &mask).expect("downloaded");
        Masks {
            ids_keep: read(&ids[0], batch * keep),
            ids_hidden: read(&ids[1], batch * hidden),
            ids_restore: read(&ids[2], batch * patches),
            mask: mask_values,
        }
    };
    [run(None), run(Some(ops::RandomMask { seed: 0x1234_5678_9abc, epoch: 3 }))]
}

#[test]
fn masking_is_what_the_cpu_does() {
    let Some(device) = device(2) else { return };
    let cuda = Cuda::<f32>::new(device.stream());
    for (patches, keep) in [(1, 0), (49, 12), (197, 49), (300, 300)] {
        let shape = MaskingShape { batch: 3, patches, keep };
        let (noise, samples) = (noise(shape, 40), [7, 1 << 33, 12_345]);
        let expected = as_a_backend(&Cpu::<f32>::new(), shape, &noise, &samples);
        assert_eq!(as_a_backend(&cuda, shape, &noise, &samples), expected, "{shape:?}");
    }
    let [mut a, mut b, mut c] = [0; 3].map(|_| cuda.buffer::<u32>(8).expect("reserved"));
    let mut mask = cuda.buffer::<f32>(8).expect("reserved");
    let noise = cuda.buffer::<f32>(8).expect("reserved");
    let shape = MaskingShape { batch: 3, patches: 3, keep: 1 };
    let refused = cuda.masking_from_noise(shape, &mut a, &mut b, &mut c, &mut mask, &noise);
    assert!(matches!(refused, Err(vitmae::Error::Shape { .. })), "{refused:?}");
}

#[test]
fn masking_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let shape = MaskingShape { batch: 2, patches: 8, keep: 2 };
    let mut buffers = Buffers::new(&stream, shape);
    let noise = stream.upload(&[0.5f32; 16]).expect("uploaded");
    let mut refused = |shape: MaskingShape| {
        let error =
            masking_forward_noise(&stream, &mut buffers.output(), &noise.as_slice(), shape).expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(refused(MaskingShape { keep: 9, ..shape }).contains("visible patches is 9, expected 0 to 8"));
    assert!(refused(MaskingShape { keep: 3, ..shape }).contains("length of ids_keep is 4, expected 6"));
    assert!(refused(MaskingShape { patches: 0, keep: 0, ..shape }).contains("number of patches is 0"));
    assert!(refused(MaskingShape { patches: MAX_PATCHES + 1, ..shape }).contains("number of patches is 6145"));
    assert!(refused(MaskingShape { batch: 3, ..shape }).contains("expected 6"));
    refused(MaskingShape { batch: usize::MAX, ..shape });

    let short = stream.upload(&[0.5f32; 15]).expect("uploaded");
    let error = masking_forward_noise(&stream, &mut buffers.output(), &short.as_slice(), shape).expect_err("refused");
    assert!(error.to_string().contains("length of noise is 15, expected 16"), "{error}");

    // Nothing to do is no error; memory of another device is.
    let empty = MaskingShape { batch: 0, ..shape };
    let nothing = stream.upload::<f32>(&[]).expect("reserved");
    let mut none = Buffers::new(&stream, empty);
    masking_forward_noise(&stream, &mut none.output(), &nothing.as_slice(), empty).expect("no work");
    let Some(other) = super::emulated::device(0) else { return };
    let elsewhere = other.stream().upload(&[0.5f32; 16]).expect("uploaded");
    let error =
        masking_forward_noise(&stream, &mut buffers.output(), &elsewhere.as_slice(), shape).expect_err("refused");
    assert!(matches!(error, CudaError::WrongDevice { argument: 4, .. }), "{error:?}");
}
