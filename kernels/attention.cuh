// What the attention kernels share: shapes, tiles of bf16 rows in shared memory, fragments, and the online softmax.
//
// To read the kernels from the simplest on, and what each step buys:
//
//   plain     attention_plain.cu: f32, no matrix instructions; the algorithm to read first and to compare with
//   whole     a block per head, all scores in registers, every byte read once: as fast as memory for N up to 80
//   resident  a head's keys and values stay in shared memory and warps walk over them: still one read of every byte
//   streamed  keys pass through two stages of shared memory: any N, and keys are read once per block of queries
//
// A tile is rows of one head (D features) in shared memory, filled up with zeros to HEAD_DIM features, a multiple of 16, and to
// whole 16-row groups. Rows lie 2 * HEAD_DIM + 16 bytes apart: an odd multiple of 16 bytes, so that the eight rows of a matrix
// that ldmatrix_x4 reads fall into different banks.
//
// Scores live in units of log2: exp(s / sqrt(D)) = exp2(s * scale_log2), which saves a multiplication per element.
//
// The names here, and those of FlashAttention's papers and code (arXiv 2205.14135, 2307.08691):
//
//   s, p                    S and P: acc_s before and after the softmax
//   row_max, row_sum        m and l: the online softmax's running maximum and sum of a row
//   out                     O: acc_o, divided by row_sum at the end only
//   log_sum_exp, lse_log2   L: softmax_lse, in natural units (stored) and in units of log2 (used)
//   scale_log2              softmax_scale_log2
//   dout, dp, ds            dO, dP, dS
//   delta                   D_i: dP_sum. There rowsum(dO * O), here the equal rowsum(P * dP)
//   tokens N, head_dim D    seqlen and d; HEAD_DIM is kHeadDim
//   QUERIES, KEYS           kBlockM and kBlockN
//
// The fragments of mma_m16n8k16, which adds A (16 x 16) times B (16 x 8) to C (16 x 8). A lane l = 4 r + c holds:
//
//                 A: two columns a register            C: one column a register       B: two rows a register
//   columns     0 1  2 3  4 5  6 7 | 8 9  ...        0 1  2 3  4 5  6 7          columns   0    1   ...   7
//   row 0        0    1    2    3  |  0              0    1    2    3            rows 0 1   0    4        28
//   row 1        4    5    6    7  |  4              4    5    6    7            rows 2 3   1    5        29   b_0
//    ...              .x           |     .z                x y                   rows 4 5   2    6        30
//   row 7       28   29   30   31  | 28             28   29   30   31            rows 6 7   3    7        31
//              --------------------+------         --------------------                    -------------------
//   row 8        0    1    2    3  |  0              0    1    2    3            rows 8 9   0    4        28
//    ...              .y           |     .w                z w                     ...            ...          b_1
//   row 15      28   29   30   31  | 28             28   29   30   31            rows 14 15 3    7        31
//
// So C of one product, rounded to bf16, lies as A of the next (as_operand_A): 16 x 8 sums are columns 0-7 or 8-15 of an A.
//
// ldmatrix_x4 loads four 8 x 8 matrices into x, y, z, w: of each, a lane gets row r, columns 2 c and 2 c + 1; transposed, it
// gets rows 2 c and 2 c + 1 of column r. Two orders of the quarters of a 16 x 16 piece of a tile serve all products:
//
//   rows_first                columns 0-7   8-15      columns_first             columns 0-7   8-15
//                 rows 0-7        x          z                      rows 0-7        x          y
//                 rows 8-15       y          w                      rows 8-15       z          w
//
//   straight:   A of these rows                       straight:   B of the transpose: (x, y) is b_0, b_1 of rows 0-7, (z, w) of
//                                                                 rows 8-15, for a product over the tile's columns: mm_ABt
//   transposed: B of these columns: (x, y) is b_0,    transposed: A of the transpose
//               b_1 of columns 0-7, (z, w) of 8-15,
//               for a product over its rows: mma_AB
#ifndef VITMAE_ATTENTION_CUH
#define VITMAE_ATTENTION_CUH

#include "device.cuh"

// Sizes of an attention op, as the launchers fill them in (`AttentionParameters` in src/cuda/attention.rs, same layout).
struct AttentionShape {
    u32 tokens;    // N
    u32 heads;     // H
    u32 head_dim;  // D
    float scale;   // 1 / sqrt(D)
};

constexpr float LN_2 = 0.6931471805599453f;

DEVICE float minus_infinity() { return bits_float(0xff800000u); }

// Where one head of one sequence lies in packed qkv [B, N, 3, H, D] or in [B, N, H, D]. The tokens of a batch are counted in 32
// bits: launchers see that B * N is below 2^31.
template <typename T>
struct HeadRows {
    T* start;
    u64 stride;  // elements from one token to the next

    DEVICE T* row(u32 token) const { return start + token * stride; }
};

// `which`: 0 for queries, 1 for keys, 2 for values.
template <typename T>
DEVICE HeadRows<T> packed_rows(T* qkv, u32 sample, u32 head, u32 which, const AttentionShape& shape) {
    const u64 stride = 3ull * shape.heads * shape.head_dim;
    const u64 within = (static_cast<u64>(which) * shape.heads + head) * shape.head_dim;
    return {qkv + sample * shape.tokens * stride + within, stride};
}

template <typename T>
DEVICE HeadRows<T> output_rows(T* out, u32 sample, u32 head, const AttentionShape& shape) {
    const u64 stride = static_cast<u64>(shape.heads) * shape.head_dim;
    return {out + sample * shape.tokens * stride + static_cast<u64>(head) * shape.head_dim, stride};
}

// A block's sample, head and tile; the head changes fastest, because the rows of neighbouring heads lie side by side.
struct BlockPlace {
    u32 sample;
    u32 head;
    u32 tile;

    DEVICE BlockPlace(u32 tiles, const AttentionShape& shape) {
        const u32 group = block_index() / shape.heads;
        head = block_index() - group * shape.heads;
        sample = group / tiles;
        tile = group - sample * tiles;
    }

    // Index of a token's number in [B, H, N].
    DEVICE u64 statistic(u32 token, const AttentionShape& shape) const {
        return (static_cast<u64>(sample) * shape.heads + head) * shape.tokens + token;
    }
};

// Log-sum-exp in units of log2; for tokens that do not exist a value that makes their probabilities 0.
DEVICE float lse_log2_of(const float* log_sum_exp, u32 token, const BlockPlace& place, const AttentionShape& shape) {
    if (token >= shape.tokens) return -minus_infinity();
    return log_sum_exp[place.statistic(token, shape)] * LOG2_E;
}

DEVICE constexpr u32 tile_stride(u32 width) { return 2 * width + 16; }

// Starts to copy `rows` rows from token `first` on into a tile; zeros for tokens and features that do not exist.
template <u32 HEAD_DIM>
DEVICE void copy_tile(u8* tile, const HeadRows<const bf16>& from, u32 first, u32 rows, const AttentionShape& shape) {
    constexpr u32 WORDS = HEAD_DIM / 8;
    for (u32 i = thread_index(); i < rows * WORDS; i += block_threads()) {
        const u32 row = i / WORDS, word = i % WORDS;
        const bool exists = first + row < shape.tokens && 8 * word < shape.head_dim;
        const bf16* source = exists ? from.row(first + row) + 8 * word : from.start;
        copy_async_16_or_zero(tile + row * tile_stride(HEAD_DIM) + 16 * word, source, exists);
    }
}

// The address that a lane gives to load a 16 x 16 piece of a tile, by the drawings above.
DEVICE const u8* rows_first(const u8* tile, u32 stride) {
    return tile + (lane_index() & 15) * stride + (lane_index() >> 4) * 16;
}

DEVICE const u8* columns_first(const u8* tile, u32 stride) {
    return tile + ((lane_index() & 7) + (lane_index() >> 4) * 8) * stride + ((lane_index() >> 3) & 1) * 16;
}

// Two neighbouring 16 x 8 tiles of sums become operand A of 16 columns.
DEVICE u32x4 as_operand_A(const f32x4& first, const f32x4& second) {
    return {pack_bf16(first.x, first.y), pack_bf16(first.z, first.w), pack_bf16(second.x, second.y),
            pack_bf16(second.z, second.w)};
}

template <u32 COUNT>
DEVICE void clear(f32x4 (&sums)[COUNT]) {
    UNROLL
    for (u32 i = 0; i < COUNT; ++i) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
}

// Operand A of 16 rows of a tile.
template <u32 HEAD_DIM>
DEVICE void load_operand_A(u32x4 (&a)[HEAD_DIM / 16], const u8* rows) {
    const u8* address = rows_first(rows, tile_stride(HEAD_DIM));
    UNROLL
    for (u32 k = 0; k < HEAD_DIM / 16; ++k) a[k] = ldmatrix_x4(address + 32 * k);
}

// s[m] = A[m] B^T over features: M operands of 16 rows by 16 * GROUPS rows of a tile.
template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void mm_ABt(f32x4 (&s)[M][2 * GROUPS], const u32x4 (&a)[M][HEAD_DIM / 16], const u8* rows) {
    UNROLL
    for (u32 m = 0; m < M; ++m) clear(s[m]);
    const u8* address = columns_first(rows, tile_stride(HEAD_DIM));
    UNROLL
    for (u32 k = 0; k < HEAD_DIM / 16; ++k) {
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) {
            const u32x4 b = ldmatrix_x4(address + group * 16 * tile_stride(HEAD_DIM) + 32 * k);
            UNROLL
            for (u32 m = 0; m < M; ++m) {
                s[m][2 * group] = mma_m16n8k16(a[m][k], b.x, b.y, s[m][2 * group]);
                s[m][2 * group + 1] = mma_m16n8k16(a[m][k], b.z, b.w, s[m][2 * group + 1]);
            }
        }
    }
}

// The same with A loaded on the way, from 16 * M rows of another tile.
template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void mm_ABt(f32x4 (&s)[M][2 * GROUPS], const u8* a_rows, const u8* rows) {
    UNROLL
    for (u32 m = 0; m < M; ++m) clear(s[m]);
    const u8* a_address = rows_first(a_rows, tile_stride(HEAD_DIM));
    const u8* address = columns_first(rows, tile_stride(HEAD_DIM));
    UNROLL
    for (u32 k = 0; k < HEAD_DIM / 16; ++k) {
        u32x4 a[M];
        UNROLL
        for (u32 m = 0; m < M; ++m) a[m] = ldmatrix_x4(a_address + m * 16 * tile_stride(HEAD_DIM) + 32 * k);
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) {
            const u32x4 b = ldmatrix_x4(address + group * 16 * tile_stride(HEAD_DIM) + 32 * k);
            UNROLL
            for (u32 m = 0; m < M; ++m) {
                s[m][2 * group] = mma_m16n8k16(a[m], b.x, b.y, s[m][2 * group]);
                s[m][2 * group + 1] = mma_m16n8k16(a[m], b.z, b.w, s[m][2 * group + 1]);
            }
        }
    }
}

// sums[m] += A[m] B over 16 * GROUPS rows of a tile, for M operands of 16 rows.
template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void mma_AB(f32x4 (&sums)[M][HEAD_DIM / 8], const u32x4 (&a)[M][GROUPS], const u8* rows) {
    const u8* address = rows_first(rows, tile_stride(HEAD_DIM));
    UNROLL
    for (u32 group = 0; group < GROUPS; ++group) {
        UNROLL
        for (u32 pair = 0; pair < HEAD_DIM / 16; ++pair) {
            const u32x4 b = ldmatrix_x4_transposed(address + group * 16 * tile_stride(HEAD_DIM) + 32 * pair);
            UNROLL
            for (u32 m = 0; m < M; ++m) {
                sums[m][2 * pair] = mma_m16n8k16(a[m][group], b.x, b.y, sums[m][2 * pair]);
                sums[m][2 * pair + 1] = mma_m16n8k16(a[m][group], b.z, b.w, sums[m][2 * pair + 1]);
            }
        }
    }
}

// Removes the scores of keys from `end` on; the scores' first key is `first`.
template <u32 COUNT>
DEVICE void mask_keys(f32x4 (&s)[COUNT], u32 first, u32 end) {
    UNROLL
    for (u32 i = 0; i < COUNT; ++i) {
        const u32 key = first + 8 * i + 2 * (lane_index() % 4);
        if (key >= end) s[i].x = s[i].z = minus_infinity();
        if (key + 1 >= end) s[i].y = s[i].w = minus_infinity();
    }
}

// Sums or maxima over the four lanes that share rows of a fragment.
DEVICE float sum_of_row(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

DEVICE float maximum(float a, float b) { return a > b ? a : b; }

DEVICE float maximum_of_row(float value) {
    value = maximum(value, shuffle_xor(value, 1));
    return maximum(value, shuffle_xor(value, 2));
}

// Transposes 4 x 4 words over four neighbouring lanes: word i of lane c becomes word c of lane i.
DEVICE void transpose_over_lanes(u32 (&words)[4]) {
    const bool odd = lane_index() & 1, upper = lane_index() & 2;
    UNROLL
    for (u32 i = 0; i < 4; i += 2) {
        const u32 other = shuffle_xor(odd ? words[i] : words[i + 1], 1);
        words[i] = odd ? other : words[i];
        words[i + 1] = odd ? words[i + 1] : other;
    }
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 other = shuffle_xor(upper ? words[i] : words[i + 2], 2);
        words[i] = upper ? other : words[i];
        words[i + 2] = upper ? words[i + 2] : other;
    }
}

// Writes 16 rows of sums as bf16, times a factor per row half, from token `first` on; only tokens and features that exist.
// Four lanes hold eight features of a row in four words; exchanging words gives each lane 16 bytes of four groups of eight.
template <u32 HEAD_DIM>
DEVICE void store_rows(const HeadRows<bf16>& to, const f32x4 (&sums)[HEAD_DIM / 8], u32 first, float factor, float factor_8,
                       const AttentionShape& shape) {
    constexpr u32 EIGHTS = HEAD_DIM / 8;
    const u32 row = first + lane_index() / 4, column = lane_index() % 4;
    UNROLL
    for (u32 half = 0; half < 2; ++half) {
        const u32 token = row + 8 * half;
        const float by = half == 0 ? factor : factor_8;
        bf16* target = token < shape.tokens ? to.row(token) : nullptr;
        u32 packed[EIGHTS];
        UNROLL
        for (u32 i = 0; i < EIGHTS; ++i) {
            packed[i] = half == 0 ? pack_bf16(sums[i].x * by, sums[i].y * by) : pack_bf16(sums[i].z * by, sums[i].w * by);
        }
        UNROLL
        for (u32 i = 0; i + 4 <= EIGHTS; i += 4) {
            u32 words[4] = {packed[i], packed[i + 1], packed[i + 2], packed[i + 3]};
            transpose_over_lanes(words);
            const u32 feature = 8 * (i + column);
            if (target != nullptr && feature < shape.head_dim) {
                store_16(target + feature, {words[0], words[1], words[2], words[3]});
            }
        }
        UNROLL
        for (u32 i = EIGHTS / 4 * 4; i < EIGHTS; ++i) {
            // No shuffle holds the last product of these sums in front of the condition, which each lane decides for itself.
            const u32 word = opaque(packed[i]);
            if (target != nullptr && 8 * i < shape.head_dim) {
                *reinterpret_cast<u32*>(target + 8 * i + 2 * column) = word;
            }
        }
    }
}

#endif
