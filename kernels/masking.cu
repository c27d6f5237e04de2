// Random masking: which patches of each sample the encoder sees (He et al., arXiv 2111.06377, section 3).
//
//   rank[b, i] = position of noise[b, i] in the stable ascending sort of noise[b, :]; equal values keep their order, and
//                -0.0 equals 0.0. A NaN comes after every number, as in NumPy and PyTorch.
//
// Outputs (assigned, every element, row-major, u32 unless said otherwise; B samples, L patches):
//   ids_keep     [B, keep]       ids_keep[b, rank] = i for rank < keep: visible patches, in the order of the shuffle
//   ids_hidden   [B, L - keep]   ids_hidden[b, rank - keep] = i for the others
//   ids_restore  [B, L]          ids_restore[b, i] = rank: the argsort of the shuffle, its inverse
//   mask         [B, L], f32     0 = visible (rank < keep), 1 = hidden
//
// Noise:
//   masking_forward_noise_f32    noise [B, L], f32, given
//   masking_forward_random       drawn here: word w of Philox4x32-10 with key (seed low, seed high) and counter
//                                (j, epoch, s low, (s high & 0xffffff) | 1 << 24) belongs to patch i = 4 j + w, where s is
//                                samples[b], u64 [B], the sample's index in the whole data set; the noise is its 24 high
//                                bits over 2^24. A mask therefore depends on seed, epoch and sample alone.
//
// Ops of masking_forward_noise: masking_from_noise
// Ops of masking_forward_random: masking_random
//
// Method: noise becomes an unsigned key that sorts the same way; every thread counts, over all patches, the keys that come
// before its own. That is L comparisons per patch, but no data-dependent control flow, and the rank is what is wanted.
//
// No aliasing. Nothing is saved for a backward pass: masking has none.
// Preconditions, checked by the launcher (src/cuda/masking.rs): keep <= L, 1 <= L <= 6144, B < 2^31, buffer lengths.
// Launch: grid B, block a multiple of 32 up to 256, dynamic shared memory 4 * (4 * ceil(L / 4)) + 4 * L bytes.
// Bytes: 12 B L written, plus 4 B L (noise) or 8 B (samples) read. Integer operations: about 2.75 B L^2 for the ranks, and
// about 30 per patch for Philox. Bound by: the integer pipe from about L = 40 on; below, latency and the launch.
#include "device.cuh"

// Keys are below this, so that "key + 1" cannot wrap; the padding after the last patch is this and never counts.
constexpr u32 PADDING_KEY = 0xffffffffu;
constexpr u32 NAN_KEY = 0xff800001u;

// An unsigned number that sorts as the float does.
DEVICE u32 key_of_noise(float noise) {
    const u32 bits = float_bits(noise);
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return NAN_KEY;
    if (magnitude == 0) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Ranks and writes one sample. keys: [L] in shared memory, padded to a multiple of four; order: [L] in shared memory.
DEVICE void rank_and_write(u32* ids_keep, u32* ids_hidden, u32* ids_restore, float* mask, const u32* keys, u32* order,
                           u32 patches, u32 keep) {
    const u64 sample = block_index();
    const u32 groups = (patches + 3) / 4;
    block_barrier();
    for (u32 patch = thread_index(); patch < patches; patch += block_threads()) {
        const u32 key = keys[patch];
        const u32 own_group = patch / 4;
        u32 rank = 0;
        for (u32 group = 0; group < groups; ++group) {
            // The same address in every lane: one broadcast of four keys. In earlier groups a tie comes first too.
            const u32x4 other = load_shared_16(keys + 4 * group);
            const u32 bound = key + (group < own_group);
            rank += (other.x < bound) + (other.y < bound) + (other.z < bound) + (other.w < bound);
        }
        for (u32 other = 4 * own_group; other < patch; ++other) rank += keys[other] == key;
        order[rank] = patch;
        ids_restore[sample * patches + patch] = rank;
        mask[sample * patches + patch] = rank < keep ? 0.0f : 1.0f;
    }
    // Through shared memory, so that the lists are written in whole sectors and not scattered word by word.
    block_barrier();
    const u32 hidden = patches - keep;
    for (u32 rank = thread_index(); rank < patches; rank += block_threads()) {
        if (rank < keep) {
            ids_keep[sample * keep + rank] = order[rank];
        } else {
            ids_hidden[sample * hidden + (rank - keep)] = order[rank];
        }
    }
}

KERNEL(256)
masking_forward_noise_f32(u32* __restrict__ ids_keep, u32* __restrict__ ids_hidden, u32* __restrict__ ids_restore,
                          float* __restrict__ mask, const float* __restrict__ noise, u32 patches, u32 keep) {
    u32* keys = shared_memory<u32>();
    const u32 padded = (patches + 3) / 4 * 4;
    const u64 sample = block_index();
    for (u32 patch = thread_index(); patch < padded; patch += block_threads()) {
        keys[patch] = patch < patches ? key_of_noise(noise[sample * patches + patch]) : PADDING_KEY;
    }
    rank_and_write(ids_keep, ids_hidden, ids_restore, mask, keys, keys + padded, patches, keep);
}

KERNEL(256)
masking_forward_random(u32* __restrict__ ids_keep, u32* __restrict__ ids_hidden, u32* __restrict__ ids_restore,
                       float* __restrict__ mask, const u64* __restrict__ samples, u64 seed, u32 epoch, u32 patches,
                       u32 keep) {
    u32* keys = shared_memory<u32>();
    const u32 groups = (patches + 3) / 4;
    const u64 sample = samples[block_index()];
    for (u32 group = thread_index(); group < groups; group += block_threads()) {
        const u32x4 words = philox_of_sample(group, STREAM_MASKING, sample, epoch, seed);
        const u32 first = 4 * group;
        keys[first] = words.x >> 8;
        keys[first + 1] = first + 1 < patches ? words.y >> 8 : PADDING_KEY;
        keys[first + 2] = first + 2 < patches ? words.z >> 8 : PADDING_KEY;
        keys[first + 3] = first + 3 < patches ? words.w >> 8 : PADDING_KEY;
    }
    rank_and_write(ids_keep, ids_hidden, ids_restore, mask, keys, keys + 4 * groups, patches, keep);
}
