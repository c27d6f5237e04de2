// Attention, backward, bf16, for sequences of any length: the gradients of q, k and v from that of the output in three launches
// (Dao et al., arXiv 2205.14135, without its atomics). Sequences that fit into shared memory: attention_backward.cu.
// With s = q k^T / sqrt(D) and p = exp(s - log_sum_exp), rebuilt here:
//
//   dv = p^T dout     dp = dout v^T     delta = sum over keys of p * dp     ds = p * (dp - delta)
//   dq = ds k / sqrt(D)                 dk = ds^T q / sqrt(D)
//
// The output is not read: delta comes from p and dp in f32, and is not divided by the sum of p: attention_backward.cu says why.
//
// First delta; then dk and dv of a block of keys, queries streaming past; then dq of a block of queries, keys streaming past:
//
//   attention_backward_delta_d32_bf16    attention_backward_keys_d32_bf16    attention_backward_queries_d32_bf16
//   attention_backward_delta_d64_bf16    attention_backward_keys_d64_bf16    attention_backward_queries_d64_bf16
//   attention_backward_delta_d80_bf16    attention_backward_keys_d80_bf16    attention_backward_queries_d80_bf16
//   attention_backward_delta_d128_bf16   attention_backward_keys_d128_bf16   attention_backward_queries_d128_bf16
//
// The number after d is the most features that a kernel takes; fewer are filled up with zeros in shared memory.
//
// Pointers, all distinct (no aliasing):
//   dqkv         [B, N, 3, H, D], bf16, assigned. The launches keep delta as f32 in the first four bytes of a head's row of dq,
//                from the first launch to the third, which overwrites it
//   dout         [B, N, H * D], bf16
//   qkv          [B, N, 3, H, D], bf16
//   log_sum_exp  [B, H, N], f32, of the forward pass
// Products accumulate in f32; p and ds are f32 and rounded to bf16 as factors of a product. All sums have a fixed order.
//
// Preconditions, checked by src/cuda/attention.rs: D is a multiple of 8 and at most the kernel's; all buffers 16-byte aligned
// and as long as their shapes; B * H * tiles and B * N below 2^31; shared memory fits the device.
//
// Launch, with S = 2 * d + 16 bytes per row in shared memory, of 4 warps:
//   delta, queries  B * H * ceil(N / Q) blocks; 2 (Q + 2 T) S bytes; Q = 128 and T = 64 for d32 and d64, Q = 64 and T = 64 for
//                   d80, Q = 64 and T = 32 for d128
//   keys            B * H * ceil(N / K) blocks; 2 (K + 64) S + 512 bytes; K = 128 for d32 and d64, else 64
//
// Bytes: 14 B N H D + 4 B H N at least, and what streams past again for each block. FLOPs: 18 B H N^2 D, and 3 B H N^2
// exponentials. Bound by: shared memory and matrix instructions.
#include "attention_backward.cuh"

// Where delta of a token lies between the three launches.
DEVICE u32* delta_of(bf16* dqkv, u32 token, const BlockPlace& place, const AttentionShape& shape) {
    return reinterpret_cast<u32*>(packed_rows(dqkv, place.sample, place.head, 0, shape).row(token));
}

// What a warp keeps of M times 16 queries: lse_log2, and delta, which is known (dq) or being added up over a lane's columns.
template <u32 M>
struct QueryRows {
    float lse_log2[M][2];
    float delta[M][2];
};

// One step over 16 * GROUPS keys, the first of which is `first`: adds to delta, or to dq with the delta that is known.
template <u32 HEAD_DIM, u32 M, u32 GROUPS, bool LAST, bool DELTA>
DEVICE void step_over_keys(QueryRows<M>& rows, f32x4 (&dq)[M][HEAD_DIM / 8], const u8* queries, const u8* dout, const u8* keys,
                           const u8* values, u32 first, const AttentionShape& shape) {
    const float scale_log2 = shape.scale * LOG2_E;
    f32x4 p[M][2 * GROUPS], dp[M][2 * GROUPS];
    mm_ABt<HEAD_DIM, M, GROUPS>(p, queries, keys);
    mm_ABt<HEAD_DIM, M, GROUPS>(dp, dout, values);
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        if (LAST) mask_keys(p[m], first, shape.tokens);
        UNROLL
        for (u32 i = 0; i < 2 * GROUPS; ++i) {
            p[m][i].x = exp2_approximate(p[m][i].x * scale_log2 - rows.lse_log2[m][0]);
            p[m][i].y = exp2_approximate(p[m][i].y * scale_log2 - rows.lse_log2[m][0]);
            p[m][i].z = exp2_approximate(p[m][i].z * scale_log2 - rows.lse_log2[m][1]);
            p[m][i].w = exp2_approximate(p[m][i].w * scale_log2 - rows.lse_log2[m][1]);
            if (DELTA) {
                rows.delta[m][0] += p[m][i].x * dp[m][i].x + p[m][i].y * dp[m][i].y;
                rows.delta[m][1] += p[m][i].z * dp[m][i].z + p[m][i].w * dp[m][i].w;
            } else {
                dp[m][i].x = p[m][i].x * (dp[m][i].x - rows.delta[m][0]);
                dp[m][i].y = p[m][i].y * (dp[m][i].y - rows.delta[m][0]);
                dp[m][i].z = p[m][i].z * (dp[m][i].z - rows.delta[m][1]);
                dp[m][i].w = p[m][i].w * (dp[m][i].w - rows.delta[m][1]);
            }
        }
    }
    if (DELTA) return;
    u32x4 a[M][GROUPS];
    as_operand_A<M, GROUPS>(a, dp);
    mma_AB<HEAD_DIM, M, GROUPS>(dq, a, keys);
}

// The kernels attention_backward_delta_* (DELTA) and attention_backward_queries_*: KEYS keys at a time in two stages.
template <u32 HEAD_DIM, u32 M, u32 GROUPS, u32 KEYS, bool DELTA>
DEVICE void backward_queries(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* log_sum_exp,
                             const AttentionShape& shape) {
    constexpr u32 QUERIES = 64 * M, STRIDE = tile_stride(HEAD_DIM), STEP = 16 * GROUPS;
    const BlockPlace place((shape.tokens + QUERIES - 1) / QUERIES, shape);
    const HeadRows<const bf16> keys = packed_rows(qkv, place.sample, place.head, 1, shape);
    const HeadRows<const bf16> values = packed_rows(qkv, place.sample, place.head, 2, shape);
    u8* query_tile = shared_memory<u8>();
    u8* dout_tile = query_tile + QUERIES * STRIDE;
    u8* stages = dout_tile + QUERIES * STRIDE;
    const auto copy_stage = [&](u32 stage) {
        u8* tile = stages + (stage & 1) * (2 * KEYS * STRIDE);
        copy_tile<HEAD_DIM>(tile, keys, stage * KEYS, KEYS, shape);
        copy_tile<HEAD_DIM>(tile + KEYS * STRIDE, values, stage * KEYS, KEYS, shape);
    };
    const u32 block_first = place.tile * QUERIES;
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), block_first, QUERIES, shape);
    copy_tile<HEAD_DIM>(dout_tile, output_rows(dout, place.sample, place.head, shape), block_first, QUERIES, shape);
    copy_stage(0);
    copy_async_commit();

    const u32 mine = 16 * M * warp_index();
    QueryRows<M> rows;
    f32x4 dq[M][HEAD_DIM / 8];
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        clear(dq[m]);
        UNROLL
        for (u32 half = 0; half < 2; ++half) {
            const u32 token = block_first + mine + 16 * m + lane_index() / 4 + 8 * half;
            rows.lse_log2[m][half] = lse_log2_of(log_sum_exp, token, place, shape);
            rows.delta[m][half] = 0.0f;
            if (!DELTA && token < shape.tokens) rows.delta[m][half] = bits_float(*delta_of(dqkv, token, place, shape));
        }
    }
    const u32 count = (shape.tokens + KEYS - 1) / KEYS;
    for (u32 stage = 0; stage < count; ++stage) {
        if (stage + 1 < count) copy_stage(stage + 1);
        copy_async_commit();
        copy_async_wait_groups<1>();
        block_barrier();
        const u8* tile = stages + (stage & 1) * (2 * KEYS * STRIDE);
        const u32 end = minimum(stage * KEYS + KEYS, shape.tokens);
        u32 key = stage * KEYS;
        for (; key + STEP <= end; key += STEP, tile += STEP * STRIDE) {
            step_over_keys<HEAD_DIM, M, GROUPS, false, DELTA>(rows, dq, query_tile + mine * STRIDE, dout_tile + mine * STRIDE,
                                                              tile, tile + KEYS * STRIDE, key, shape);
        }
        for (; key < end; key += 16, tile += 16 * STRIDE) {
            step_over_keys<HEAD_DIM, M, 1, true, DELTA>(rows, dq, query_tile + mine * STRIDE, dout_tile + mine * STRIDE, tile,
                                                        tile + KEYS * STRIDE, key, shape);
        }
        block_barrier();
    }
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        const u32 first = block_first + mine + 16 * m;
        if (DELTA) {
            const float delta[2] = {sum_of_row(rows.delta[m][0]), sum_of_row(rows.delta[m][1])};
            const u32 half = lane_index() % 4, token = first + lane_index() / 4 + 8 * half;
            if (half < 2 && token < shape.tokens) {
                *delta_of(dqkv, token, place, shape) = float_bits(half == 0 ? delta[0] : delta[1]);
            }
        } else {
            store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 0, shape), dq[m], first, shape.scale, shape.scale,
                              shape);
        }
    }
}

// Queries that are in shared memory at a time, in each of two stages.
constexpr u32 STREAMED_QUERIES = 32;

template <u32 HEAD_DIM, u32 M>
DEVICE void backward_keys(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* log_sum_exp,
                          const AttentionShape& shape) {
    constexpr u32 KEYS = 64 * M, STRIDE = tile_stride(HEAD_DIM), QUERY_TILES = STREAMED_QUERIES / 16;
    const BlockPlace place((shape.tokens + KEYS - 1) / KEYS, shape);
    const HeadRows<const bf16> queries = packed_rows(qkv, place.sample, place.head, 0, shape);
    const HeadRows<const bf16> gradients = output_rows(dout, place.sample, place.head, shape);
    u8* key_tile = shared_memory<u8>();
    u8* value_tile = key_tile + KEYS * STRIDE;
    u8* stages = value_tile + KEYS * STRIDE;
    // lse_log2, then delta, of each stage.
    float* statistics = reinterpret_cast<float*>(stages + 4 * STREAMED_QUERIES * STRIDE);
    const auto copy_stage = [&](u32 stage) {
        const u32 first = stage * STREAMED_QUERIES;
        u8* tile = stages + (stage & 1) * (2 * STREAMED_QUERIES * STRIDE);
        copy_tile<HEAD_DIM>(tile, queries, first, STREAMED_QUERIES, shape);
        copy_tile<HEAD_DIM>(tile + STREAMED_QUERIES * STRIDE, gradients, first, STREAMED_QUERIES, shape);
        if (thread_index() < STREAMED_QUERIES) {
            const u32 token = first + thread_index();
            float* target = statistics + (stage & 1) * (2 * STREAMED_QUERIES) + thread_index();
            target[0] = lse_log2_of(log_sum_exp, token, place, shape);
            target[STREAMED_QUERIES] = token < shape.tokens ? bits_float(*delta_of(dqkv, token, place, shape)) : 0.0f;
        }
    };
    const u32 block_first = place.tile * KEYS;
    copy_tile<HEAD_DIM>(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), block_first, KEYS, shape);
    copy_tile<HEAD_DIM>(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), block_first, KEYS, shape);
    copy_stage(0);
    copy_async_commit();

    const u32 mine = 16 * M * warp_index();
    f32x4 dk[M][HEAD_DIM / 8], dv[M][HEAD_DIM / 8];
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        clear(dk[m]);
        clear(dv[m]);
    }
    const u32 count = (shape.tokens + STREAMED_QUERIES - 1) / STREAMED_QUERIES;
    for (u32 stage = 0; stage < count; ++stage) {
        if (stage + 1 < count) copy_stage(stage + 1);
        copy_async_commit();
        copy_async_wait_groups<1>();
        block_barrier();
        const u8* tile = stages + (stage & 1) * (2 * STREAMED_QUERIES * STRIDE);
        const u8* dout_tile = tile + STREAMED_QUERIES * STRIDE;
        const float* lse_log2 = statistics + (stage & 1) * (2 * STREAMED_QUERIES);
        f32x4 p[M][2 * QUERY_TILES], dp[M][2 * QUERY_TILES];
        u32x4 a[M][QUERY_TILES];
        mm_ABt<HEAD_DIM, M, QUERY_TILES>(p, key_tile + mine * STRIDE, tile);
        probabilities(p, lse_log2, block_first + mine, shape);
        as_operand_A<M, QUERY_TILES>(a, p);
        mma_AB<HEAD_DIM, M, QUERY_TILES>(dv, a, dout_tile);
        mm_ABt<HEAD_DIM, M, QUERY_TILES>(dp, value_tile + mine * STRIDE, dout_tile);
        const float delta[1] = {lse_log2[STREAMED_QUERIES + lane_index()]};
        score_gradients<M, QUERY_TILES>(dp, p, delta);
        as_operand_A<M, QUERY_TILES>(a, dp);
        mma_AB<HEAD_DIM, M, QUERY_TILES>(dk, a, tile);
        block_barrier();
    }
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        const u32 key = block_first + mine + 16 * m;
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 1, shape), dk[m], key, shape.scale, shape.scale,
                             shape);
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 2, shape), dv[m], key, 1.0f, 1.0f, shape);
    }
}

KERNEL(128)
attention_backward_delta_d32_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                  const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<32, 2, 4, 64, true>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_delta_d64_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                  const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<64, 2, 2, 64, true>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_delta_d80_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                  const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<80, 1, 2, 64, true>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_delta_d128_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                   const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<128, 1, 2, 32, true>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_keys_d32_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                 const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_keys<32, 2>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_keys_d64_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                 const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_keys<64, 2>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_keys_d80_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                 const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_keys<80, 1>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_keys_d128_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                  const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_keys<128, 1>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_queries_d32_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                    const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<32, 2, 2, 64, false>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_queries_d64_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                    const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<64, 2, 2, 64, false>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_queries_d80_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                    const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<80, 1, 2, 64, false>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(128)
attention_backward_queries_d128_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                     const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_queries<128, 1, 2, 32, false>(dqkv, dout, qkv, log_sum_exp, shape);
}
