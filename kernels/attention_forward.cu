// Attention, forward, bf16: out = softmax(q k^T / sqrt(D)) v per head (Vaswani et al., arXiv 1706.03762), with the natural
// log-sum-exp of the scaled scores for the backward pass. The softmax over a row is done piece by piece where a row does not
// fit into registers (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
//
//   attention_forward_whole_d64_n64_bf16      short sequences: a block per head, a warp per 16 queries, whole rows of scores
//   attention_forward_whole_d64_n80_bf16      in registers
//   attention_forward_whole_d80_n80_bf16
//   attention_forward_resident_d32_bf16       keys and values of a head stay in shared memory; a warp takes 16 or 32 queries
//   attention_forward_resident_d64_bf16       and walks over the keys
//   attention_forward_resident_d80_bf16
//   attention_forward_streamed_d32_bf16       any N: a block takes some queries and streams the keys past
//   attention_forward_streamed_d64_bf16
//   attention_forward_streamed_d80_bf16
//   attention_forward_streamed_d128_bf16
//
// The number after d is the most features that a kernel takes; fewer are filled up with zeros in shared memory.
//
// Pointers, all distinct (no aliasing):
//   out          [B, N, H * D], bf16, assigned
//   log_sum_exp  [B, H, N], f32, assigned: what the backward pass needs besides qkv
//   qkv          [B, N, 3, H, D], bf16
// Products accumulate in f32; scores, row_maxima and sums are f32; probabilities are rounded to bf16 for the product with v.
// A row's exponentials are relative to row_max, which is raised only when a score exceeds it by more than 8 (a factor of 2^8),
// so that rescaling is rare; the result does not depend on it except for rounding. No order depends on timing.
//
// Preconditions, checked by src/cuda/attention.rs: D is a multiple of 8 and at most the kernel's; all buffers 16-byte aligned
// and as long as their shapes; B * H * tiles and B * N below 2^31; N at most 64 or 80 (whole); shared memory fits the device.
//
// Launch, with S = 2 * d + 16 bytes per row in shared memory:
//   whole     B * H blocks of n / 16 warps; 3 n S bytes
//   resident  B * H blocks of warps up to the launch bound; (2 * 16 ceil(N / 16) + Q ceil(N / Q)) S bytes; Q = 16 for d80,
//             else 32
//   streamed  B * H * ceil(N / Q) blocks of 4 warps; (Q + 256) S bytes; Q = 128 queries up to d64, else 64
// A resident kernel is right with any number of warps; its bound says how many registers a thread may have. d32: 512 threads
// make it 128 registers, with which three blocks of the 5 warps that the launcher takes at most fit a multiprocessor. d64:
// 256 threads allow all 255, of which it needs 178 (two blocks of 5 warps). d80: 288 threads are the 9 warps of its launches.
//
// Bytes: 8 B N H D + 4 B H N. FLOPs: 4 B H N^2 D, and B H N^2 exponentials.
// Bound by: memory for short sequences; exponentials, matrix instructions and shared memory alike for long ones.
#include "attention.cuh"

// What a warp keeps of M times 16 rows while it walks over the keys. Components x, y of sums belong to row lane / 4, z and w to
// the row 8 further on; so do entries 0 and 1 of the statistics.
template <u32 HEAD_DIM, u32 M>
struct Rows {
    f32x4 out[M][HEAD_DIM / 8];
    float row_max[M][2];  // what the exponentials are relative to, in units of log2; at most SLACK below the true maximum
    float row_sum[M][2];        // of exponentials, over this lane's columns

    DEVICE Rows() {
        UNROLL
        for (u32 m = 0; m < M; ++m) {
            clear(out[m]);
            row_max[m][0] = row_max[m][1] = minus_infinity();
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }
};

// The largest score of each of the two rows in this step, in units of log2.
template <u32 COUNT>
DEVICE void row_maxima(float (&step_max)[2], const f32x4 (&s)[COUNT], float scale_log2) {
    float first = minus_infinity(), second = minus_infinity();
    UNROLL
    for (u32 i = 0; i < COUNT; ++i) {
        first = maximum(first, maximum(s[i].x, s[i].y));
        second = maximum(second, maximum(s[i].z, s[i].w));
    }
    step_max[0] = maximum_of_row(first) * scale_log2;
    step_max[1] = maximum_of_row(second) * scale_log2;
}

// Scores to exponentials, in place; adds them to this lane's sums.
template <u32 COUNT>
DEVICE void exponentials(f32x4 (&s)[COUNT], float (&row_sum)[2], const float (&row_max)[2], float scale_log2) {
    UNROLL
    for (u32 i = 0; i < COUNT; ++i) {
        s[i].x = exp2_approximate(s[i].x * scale_log2 - row_max[0]);
        s[i].y = exp2_approximate(s[i].y * scale_log2 - row_max[0]);
        s[i].z = exp2_approximate(s[i].z * scale_log2 - row_max[1]);
        s[i].w = exp2_approximate(s[i].w * scale_log2 - row_max[1]);
        row_sum[0] += s[i].x + s[i].y;
        row_sum[1] += s[i].z + s[i].w;
    }
}

// Raises row_max of 16 rows where a score exceeds it by more than SLACK, and rescales what was summed so far.
template <u32 HEAD_DIM, u32 M>
DEVICE void raise_row_max(Rows<HEAD_DIM, M>& rows, u32 m, const float (&step_max)[2]) {
    constexpr float SLACK = 8.0f;
    const bool grew = step_max[0] > rows.row_max[m][0] + SLACK || step_max[1] > rows.row_max[m][1] + SLACK;
    if (warp_ballot(grew) == 0) return;
    float factor[2];
    UNROLL
    for (u32 half = 0; half < 2; ++half) {
        const float raised = maximum(rows.row_max[m][half], step_max[half]);
        factor[half] = exp2_approximate(rows.row_max[m][half] - raised);
        rows.row_max[m][half] = raised;
        rows.row_sum[m][half] *= factor[half];
    }
    UNROLL
    for (u32 i = 0; i < HEAD_DIM / 8; ++i) {
        rows.out[m][i].x *= factor[0];
        rows.out[m][i].y *= factor[0];
        rows.out[m][i].z *= factor[1];
        rows.out[m][i].w *= factor[1];
    }
}

// One step over 16 * GROUPS keys, the first of which is `first`; with LAST, those from N on are left out.
template <u32 HEAD_DIM, u32 M, u32 GROUPS, bool LAST>
DEVICE void attend(Rows<HEAD_DIM, M>& rows, const u32x4 (&query)[M][HEAD_DIM / 16], const u8* keys, const u8* values, u32 first,
                   const AttentionShape& shape) {
    const float scale_log2 = shape.scale * LOG2_E;
    f32x4 s[M][2 * GROUPS];
    mm_ABt<HEAD_DIM, M, GROUPS>(s, query, keys);
    u32x4 p[M][GROUPS];
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        if (LAST) mask_keys(s[m], first, shape.tokens);
        float step_max[2];
        row_maxima(step_max, s[m], scale_log2);
        raise_row_max(rows, m, step_max);
        exponentials(s[m], rows.row_sum[m], rows.row_max[m], scale_log2);
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) p[m][group] = as_operand_A(s[m][2 * group], s[m][2 * group + 1]);
    }
    mma_AB<HEAD_DIM, M, GROUPS>(rows.out, p, values);
}

// The keys [first, end) of a tile whose first row is key `first`: whole steps, then 16 keys at a time.
template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void attend_all(Rows<HEAD_DIM, M>& rows, const u32x4 (&query)[M][HEAD_DIM / 16], const u8* keys, const u8* values,
                       u32 first, u32 end, const AttentionShape& shape) {
    constexpr u32 STEP = 16 * GROUPS;
    u32 key = first;
    for (; key + STEP <= end; key += STEP) {
        const u32 offset = (key - first) * tile_stride(HEAD_DIM);
        attend<HEAD_DIM, M, GROUPS, false>(rows, query, keys + offset, values + offset, key, shape);
    }
    for (; key < end; key += 16) {
        const u32 offset = (key - first) * tile_stride(HEAD_DIM);
        attend<HEAD_DIM, M, 1, true>(rows, query, keys + offset, values + offset, key, shape);
    }
}

// Divides by the sums and writes 16 rows and their log-sum-exp, from token `first` on.
template <u32 HEAD_DIM>
DEVICE void finish(bf16* out, float* log_sum_exp, const f32x4 (&sums)[HEAD_DIM / 8], const float (&row_max)[2],
                   const float (&lane_sum)[2], u32 first, const BlockPlace& place, const AttentionShape& shape) {
    const float sum[2] = {sum_of_row(lane_sum[0]), sum_of_row(lane_sum[1])};
    store_rows<HEAD_DIM>(output_rows(out, place.sample, place.head, shape), sums, first, 1.0f / sum[0], 1.0f / sum[1], shape);
    const u32 half = lane_index() % 4;
    const u32 token = first + lane_index() / 4 + 8 * half;
    if (half < 2 && token < shape.tokens) {
        const float first_value = row_max[0] * LN_2 + natural_logarithm(sum[0]);
        const float second_value = row_max[1] * LN_2 + natural_logarithm(sum[1]);
        log_sum_exp[place.statistic(token, shape)] = half == 0 ? first_value : second_value;
    }
}

template <u32 HEAD_DIM, u32 GROUPS>
DEVICE void forward_whole(bf16* out, float* log_sum_exp, const bf16* qkv, const AttentionShape& shape) {
    constexpr u32 ROWS = 16 * GROUPS;
    const BlockPlace place(1, shape);
    u8* query_tile = shared_memory<u8>();
    u8* key_tile = query_tile + ROWS * tile_stride(HEAD_DIM);
    u8* value_tile = key_tile + ROWS * tile_stride(HEAD_DIM);
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), 0, ROWS, shape);
    copy_tile<HEAD_DIM>(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), 0, ROWS, shape);
    copy_async_commit();
    copy_tile<HEAD_DIM>(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), 0, ROWS, shape);
    copy_async_commit();

    const u32 first = 16 * warp_index();
    const bool works = first < shape.tokens;
    const float scale_log2 = shape.scale * LOG2_E;
    u32x4 p[1][GROUPS];
    float row_max[2], row_sum[2] = {0.0f, 0.0f};
    copy_async_wait_groups<1>();
    block_barrier();
    if (works) {
        u32x4 query[1][HEAD_DIM / 16];
        load_operand_A<HEAD_DIM>(query[0], query_tile + first * tile_stride(HEAD_DIM));
        f32x4 s[1][2 * GROUPS];
        mm_ABt<HEAD_DIM, 1, GROUPS>(s, query, key_tile);
        mask_keys(s[0], 0, shape.tokens);
        row_maxima(row_max, s[0], scale_log2);
        exponentials(s[0], row_sum, row_max, scale_log2);
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) p[0][group] = as_operand_A(s[0][2 * group], s[0][2 * group + 1]);
    }
    copy_async_wait_groups<0>();
    block_barrier();
    if (works) {
        f32x4 sums[1][HEAD_DIM / 8];
        clear(sums[0]);
        mma_AB<HEAD_DIM, 1, GROUPS>(sums, p, value_tile);
        finish<HEAD_DIM>(out, log_sum_exp, sums[0], row_max, row_sum, first, place, shape);
    }
}

template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void forward_resident(bf16* out, float* log_sum_exp, const bf16* qkv, const AttentionShape& shape) {
    constexpr u32 QUERIES = 16 * M;
    const BlockPlace place(1, shape);
    const u32 key_rows = (shape.tokens + 15) / 16 * 16;
    const u32 query_rows = (shape.tokens + QUERIES - 1) / QUERIES * QUERIES;
    u8* key_tile = shared_memory<u8>();
    u8* value_tile = key_tile + key_rows * tile_stride(HEAD_DIM);
    u8* query_tile = value_tile + key_rows * tile_stride(HEAD_DIM);
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), 0, query_rows, shape);
    copy_tile<HEAD_DIM>(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), 0, key_rows, shape);
    copy_tile<HEAD_DIM>(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), 0, key_rows, shape);
    copy_async_wait();
    block_barrier();
    for (u32 first = QUERIES * warp_index(); first < shape.tokens; first += QUERIES * (block_threads() / 32)) {
        u32x4 query[M][HEAD_DIM / 16];
        UNROLL
        for (u32 m = 0; m < M; ++m) load_operand_A<HEAD_DIM>(query[m], query_tile + (first + 16 * m) * tile_stride(HEAD_DIM));
        Rows<HEAD_DIM, M> rows;
        attend_all<HEAD_DIM, M, GROUPS>(rows, query, key_tile, value_tile, 0, shape.tokens, shape);
        UNROLL
        for (u32 m = 0; m < M; ++m) {
            finish<HEAD_DIM>(out, log_sum_exp, rows.out[m], rows.row_max[m], rows.row_sum[m], first + 16 * m, place, shape);
        }
    }
}

// Keys that are in shared memory at a time, in each of two stages.
constexpr u32 STREAMED_KEYS = 64;

template <u32 HEAD_DIM, u32 M, u32 GROUPS>
DEVICE void forward_streamed(bf16* out, float* log_sum_exp, const bf16* qkv, const AttentionShape& shape) {
    constexpr u32 WARPS = 4, QUERIES = 16 * M * WARPS, STRIDE = tile_stride(HEAD_DIM);
    const BlockPlace place((shape.tokens + QUERIES - 1) / QUERIES, shape);
    const HeadRows<const bf16> keys = packed_rows(qkv, place.sample, place.head, 1, shape);
    const HeadRows<const bf16> values = packed_rows(qkv, place.sample, place.head, 2, shape);
    u8* query_tile = shared_memory<u8>();
    u8* stages = query_tile + QUERIES * STRIDE;
    const auto copy_stage = [&](u32 stage) {
        u8* tile = stages + (stage & 1) * (2 * STREAMED_KEYS * STRIDE);
        copy_tile<HEAD_DIM>(tile, keys, stage * STREAMED_KEYS, STREAMED_KEYS, shape);
        copy_tile<HEAD_DIM>(tile + STREAMED_KEYS * STRIDE, values, stage * STREAMED_KEYS, STREAMED_KEYS, shape);
    };
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), place.tile * QUERIES, QUERIES, shape);
    copy_stage(0);
    copy_async_commit();

    const u32 mine = 16 * M * warp_index();
    const u32 first = place.tile * QUERIES + mine;
    u32x4 query[M][HEAD_DIM / 16];
    Rows<HEAD_DIM, M> rows;
    const u32 count = (shape.tokens + STREAMED_KEYS - 1) / STREAMED_KEYS;
    for (u32 stage = 0; stage < count; ++stage) {
        if (stage + 1 < count) copy_stage(stage + 1);
        copy_async_commit();
        copy_async_wait_groups<1>();
        block_barrier();
        if (stage == 0) {
            UNROLL
            for (u32 m = 0; m < M; ++m) load_operand_A<HEAD_DIM>(query[m], query_tile + (mine + 16 * m) * STRIDE);
        }
        const u8* tile = stages + (stage & 1) * (2 * STREAMED_KEYS * STRIDE);
        const u32 key = stage * STREAMED_KEYS;
        const u32 end = minimum(key + STREAMED_KEYS, shape.tokens);
        if (first < shape.tokens) {
            attend_all<HEAD_DIM, M, GROUPS>(rows, query, tile, tile + STREAMED_KEYS * STRIDE, key, end, shape);
        }
        block_barrier();
    }
    if (first >= shape.tokens) return;
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        finish<HEAD_DIM>(out, log_sum_exp, rows.out[m], rows.row_max[m], rows.row_sum[m], first + 16 * m, place, shape);
    }
}

KERNEL(128)
attention_forward_whole_d64_n64_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                     const AttentionShape shape) {
    forward_whole<64, 4>(out, log_sum_exp, qkv, shape);
}

KERNEL(160)
attention_forward_whole_d64_n80_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                     const AttentionShape shape) {
    forward_whole<64, 5>(out, log_sum_exp, qkv, shape);
}

KERNEL(160)
attention_forward_whole_d80_n80_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                     const AttentionShape shape) {
    forward_whole<80, 5>(out, log_sum_exp, qkv, shape);
}

KERNEL(512)
attention_forward_resident_d32_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_resident<32, 2, 3>(out, log_sum_exp, qkv, shape);
}

KERNEL(256)
attention_forward_resident_d64_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_resident<64, 2, 2>(out, log_sum_exp, qkv, shape);
}

KERNEL(288)
attention_forward_resident_d80_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_resident<80, 1, 4>(out, log_sum_exp, qkv, shape);
}

KERNEL(128)
attention_forward_streamed_d32_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_streamed<32, 2, 4>(out, log_sum_exp, qkv, shape);
}

KERNEL(128)
attention_forward_streamed_d64_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_streamed<64, 2, 4>(out, log_sum_exp, qkv, shape);
}

KERNEL(256)
attention_forward_streamed_d80_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                    const AttentionShape shape) {
    forward_streamed<80, 1, 2>(out, log_sum_exp, qkv, shape);
}

KERNEL(128)
attention_forward_streamed_d128_bf16(bf16* __restrict__ out, float* __restrict__ log_sum_exp, const bf16* __restrict__ qkv,
                                     const AttentionShape shape) {
    forward_streamed<128, 1, 4>(out, log_sum_exp, qkv, shape);
}
