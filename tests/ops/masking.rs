use proptest::prelude::*;
use vitmae::cpu::Cpu;
use vitmae::ops::{MaskingShape, PatchMasking, RandomMask};
use vitmae::random::{AUGMENTATION_STREAM, MASKING_STREAM, RandomStream, philox4x32};

use crate::support::{plain, read_plain, same_on_any_threads};

const GUARD: u32 = 0xdead_beef;

/// `ids_keep`, `ids_hidden`, `ids_restore` and mask.
type Masked = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<f32>);

fn run(
    shape: MaskingShape,
    op: impl Fn(&Cpu, [&mut vitmae::cpu::CpuBuffer<u32>; 3], &mut vitmae::cpu::CpuBuffer<f32>) + Sync,
) -> Masked {
    let MaskingShape { batch, patches, keep } = shape;
    same_on_any_threads(|| {
        let new = |length: usize| plain(&vec![GUARD; length], GUARD);
        let (mut kept, mut hidden) = (new(batch * keep), new(batch * (patches - keep)));
        let mut restore = new(batch * patches);
        let mut mask = plain(&vec![9.0_f32; batch * patches], 9.0);
        op(&Cpu::new(), [&mut kept, &mut hidden, &mut restore], &mut mask);
        let read = |buffer| read_plain(buffer, GUARD);
        (read(&kept), read(&hidden), read(&restore), read_plain(&mask, 9.0))
    })
}

fn from_noise(shape: MaskingShape, noise: &[f32]) -> Masked {
    let noise = plain(noise, f32::NAN);
    run(shape, |cpu, [kept, hidden, restore], mask| {
        cpu.masking_from_noise(shape, kept, hidden, restore, mask, &noise).unwrap();
    })
}

/// By the definition: a stable sort with a comparison.
fn naive(shape: MaskingShape, noise: &[f32]) -> Masked {
    let (mut kept, mut hidden, mut restores, mut masks) = (vec![], vec![], vec![], vec![]);
    for noise in noise.chunks(shape.patches) {
        let mut shuffle: Vec<usize> = (0..shape.patches).collect();
        shuffle.sort_by(|&a, &b| noise[a].partial_cmp(&noise[b]).unwrap());
        let mut restore = vec![0; shape.patches];
        shuffle.iter().enumerate().for_each(|(rank, &patch)| restore[patch] = rank as u32);
        kept.extend(shuffle[..shape.keep].iter().map(|&patch| patch as u32));
        hidden.extend(shuffle[shape.keep..].iter().map(|&patch| patch as u32));
        masks.extend(restore.iter().map(|&rank| if (rank as usize) < shape.keep { 0.0 } else { 1.0 }));
        restores.extend(restore);
    }
    (kept, hidden, restores, masks)
}

#[test]
fn philox_gives_the_known_answers_of_random123() {
    assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    assert_eq!(
        philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

#[test]
fn a_random_stream_counts_through_its_blocks() {
    let (seed, epoch, sample) = (0x0123_4567_89ab_cdef, 7, 0x00ab_cdef_1234_5678);
    let words: Vec<u32> = RandomStream::new(seed, epoch, sample, AUGMENTATION_STREAM).take(12).collect();
    for block in 0..3 {
        let counter = [block, 7, 0x1234_5678, 0x02ab_cdef];
        assert_eq!(words[4 * block as usize..][..4], philox4x32(counter, [0x89ab_cdef, 0x0123_4567]));
    }
    let mut stream = RandomStream::new(seed, epoch, sample, AUGMENTATION_STREAM);
    assert_eq!(stream.next_f32(), (words[0] >> 8) as f32 / 16_777_216.0);
}

#[test]
fn masking_is_a_stable_sort_of_noise_with_ties_and_signed_zeros() {
    let shape = MaskingShape { batch: 1, patches: 9, keep: 4 };
    let noise = [0.5, 0.0, -0.0, 0.25, 0.0, 0.5, -1.0, 0.25, 0.5];
    let (kept, hidden, restore, mask) = from_noise(shape, &noise);
    assert_eq!(kept, [6, 1, 2, 4]);
    assert_eq!(hidden, [3, 7, 0, 5, 8]);
    assert_eq!(restore, [6, 1, 2, 4, 3, 7, 0, 5, 8]);
    assert_eq!(mask, [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
}

#[test]
fn masking_takes_every_patch_or_none() {
    for keep in [0, 5] {
        let shape = MaskingShape { batch: 2, patches: 5, keep };
        let noise = [0.3, 0.1, 0.2, 0.9, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1];
        assert!(from_noise(shape, &noise) == naive(shape, &noise));
    }
}

#[test]
fn random_masking_sorts_the_high_bits_of_its_words() {
    let shape = MaskingShape { batch: 3, patches: 197, keep: 50 };
    let random = RandomMask { seed: 0xfedc_ba98_7654_3210, epoch: 3 };
    let samples = [5, 0x0012_3456_789a_bcde, u64::MAX];
    let mut noise = Vec::new();
    for sample in samples {
        for patch in 0..197 {
            let high = ((sample >> 32) as u32 & 0xff_ffff) | u32::from(MASKING_STREAM) << 24;
            let words = philox4x32([patch / 4, 3, sample as u32, high], [0x7654_3210, 0xfedc_ba98]);
            noise.push((words[patch as usize % 4] >> 8) as f32 / 16_777_216.0);
        }
    }
    let samples = plain(&samples, 0);
    let found = run(shape, |cpu, [kept, hidden, restore], mask| {
        cpu.masking_random(shape, kept, hidden, restore, mask, random, &samples).unwrap();
    });
    assert!(found == naive(shape, &noise));
}

#[test]
fn masking_refuses_short_buffers_and_keeping_more_than_there_is() {
    let cpu = Cpu::<f32>::new();
    let ids = || plain(&[0_u32; 4], 0);
    let mut mask = plain(&[0.0_f32; 4], 0.0);
    let noise = plain(&[0.0_f32; 4], 0.0);
    for shape in [
        MaskingShape { batch: 100, patches: 4, keep: 1 },
        MaskingShape { batch: 1, patches: 4, keep: 5 },
        MaskingShape { batch: usize::MAX, patches: 4, keep: 4 },
    ] {
        let result = cpu.masking_from_noise(shape, &mut ids(), &mut ids(), &mut ids(), &mut mask, &noise);
        assert!(matches!(result, Err(vitmae::Error::Shape { .. })), "{shape:?}");
    }
}

proptest! {
    #[test]
    fn masking_agrees_with_its_definition(
        batch in 1_usize..4,
        keep in 0_usize..40,
        more in 0_usize..40,
        seed in any::<u64>(),
        values in 1_u32..50,
    ) {
        let shape = MaskingShape { batch, patches: (keep + more).max(1), keep };
        let noise: Vec<f32> = RandomStream::new(seed, 0, 0, 200)
            .take(batch * shape.patches).map(|word| (word % values) as f32 - 9.0).collect();
        prop_assert!(from_noise(shape, &noise) == naive(shape, &noise));
    }
}
