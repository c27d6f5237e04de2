// Attention, backward, bf16, for sequences of which a head fits into shared memory: the gradients of q, k and v from that of the
// output in one launch (Dao et al., arXiv 2205.14135, without its atomics). Longer ones: attention_backward_streamed.cu.
// With s = q k^T / sqrt(D) and p = exp(s - log_sum_exp), rebuilt here:
//
//   dv = p^T dout     dp = dout v^T     delta = sum over keys of p * dp     ds = p * (dp - delta)
//   dq = ds k / sqrt(D)                 dk = ds^T q / sqrt(D)
//
// The output is not read: delta comes from p and dp in f32. It is not divided by the sum of p, as attention_plain.cu does: the
// rounding of log_sum_exp makes that sum 1 but for about |log_sum_exp| 2^-23, which is below the 2^-9 that rounding ds to bf16
// costs while scores stay below about 2,000. delta from a stored output in bf16 would be off by 2^-9 always.
//
//   attention_backward_whole_d64_n64_bf16     short sequences: a block per head, a warp per 16 keys, all queries at once
//   attention_backward_whole_d64_n80_bf16
//   attention_backward_whole_d80_n80_bf16
//   attention_backward_resident_d32_bf16      a warp owns 32 keys, and the block walks over 32 queries at a time
//   attention_backward_resident_d64_bf16
//
// Both work on s^T = k q^T, so that p^T and ds^T leave the matrix units in the layout in which they enter them again for dv and
// dk; only ds^T goes through shared memory, for dq. The number after d is the most features that a kernel takes; fewer are
// filled up with zeros in shared memory.
//
// Pointers, all distinct (no aliasing):
//   dqkv         [B, N, 3, H, D], bf16, assigned
//   dout         [B, N, H * D], bf16
//   qkv          [B, N, 3, H, D], bf16
//   log_sum_exp  [B, H, N], f32, of the forward pass
// Products accumulate in f32; p and ds are f32 and rounded to bf16 as factors of a product. All sums have a fixed order: no
// atomics, and partial sums of delta are added warp by warp.
//
// Preconditions, checked by src/cuda/attention.rs: D is a multiple of 8 and at most the kernel's; dqkv, dout and qkv 16-byte
// aligned, all buffers as long as their shapes; B * H and B * N below 2^31; N at most 64 or 80 (whole) or 32 per
// warp (resident); shared memory fits the device.
//
// Launch, with S = 2 * d + 16 bytes per row in shared memory:
//   whole     B * H blocks of W = n / 16 warps; n (3 S + max(S, 2 n + 16) + 4 + 4 W) bytes
//   resident  B * H blocks of W = ceil(N / 32) warps; 32 W (4 S + 84) + 128 W bytes
//
// Bytes: 14 B N H D + 4 B H N. FLOPs: 10 B H N^2 D, and B H N^2 exponentials.
// Bound by: memory for short sequences; shared memory and matrix instructions for long ones.
#include "attention_backward.cuh"

// This warp's part of delta: sums of p * dp over its keys, for 16 * QUERY_TILES queries. Eight lanes hold rows of a column:
// each exchange halves what a lane has a to add.
template <u32 M, u32 QUERY_TILES>
DEVICE void sum_delta(float* partial, const f32x4 (&p)[M][2 * QUERY_TILES], const f32x4 (&dp)[M][2 * QUERY_TILES]) {
    const bool upper = lane_index() & 16, odd = lane_index() & 8;
    UNROLL
    for (u32 tile = 0; tile < QUERY_TILES; ++tile) {
        float sums[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
        UNROLL
        for (u32 m = 0; m < M; ++m) {
            UNROLL
            for (u32 half = 0; half < 2; ++half) {
                const f32x4 &a = p[m][2 * tile + half], &b = dp[m][2 * tile + half];
                sums[half][0] += a.x * b.x + a.z * b.z;
                sums[half][1] += a.y * b.y + a.w * b.w;
            }
        }
        float pair[2];
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            pair[i] = (upper ? sums[1][i] : sums[0][i]) + shuffle_xor(upper ? sums[0][i] : sums[1][i], 16);
        }
        float sum = (odd ? pair[1] : pair[0]) + shuffle_xor(odd ? pair[0] : pair[1], 8);
        sum += shuffle_xor(sum, 4);
        const u32 query = 16 * tile + (upper ? 8 : 0) + 2 * (lane_index() % 4) + (odd ? 1 : 0);
        if ((lane_index() & 4) == 0) partial[query] = sum;
    }
}

// delta from the warps' parts, in their order.
template <u32 QUERY_TILES>
DEVICE void add_delta(float (&delta)[(QUERY_TILES + 1) / 2], const float* partial, u32 warps) {
    UNROLL
    for (u32 r = 0; r < (QUERY_TILES + 1) / 2; ++r) {
        const u32 query = minimum(32 * r + lane_index(), 16 * QUERY_TILES - 1);
        delta[r] = 0.0f;
        for (u32 warp = 0; warp < warps; ++warp) delta[r] += partial[warp * 16 * QUERY_TILES + query];
    }
}

// Writes ds^T, keys by queries, to this warp's rows of a tile.
template <u32 M, u32 GROUPS>
DEVICE void store_scores(u8* rows, const u32x4 (&ds)[M][GROUPS]) {
    constexpr u32 STRIDE = tile_stride(16 * GROUPS);
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        u8* target = rows + (16 * m + lane_index() / 4) * STRIDE + 4 * (lane_index() % 4);
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) {
            *reinterpret_cast<u32*>(target + 32 * group) = ds[m][group].x;
            *reinterpret_cast<u32*>(target + 8 * STRIDE + 32 * group) = ds[m][group].y;
            *reinterpret_cast<u32*>(target + 32 * group + 16) = ds[m][group].z;
            *reinterpret_cast<u32*>(target + 8 * STRIDE + 32 * group + 16) = ds[m][group].w;
        }
    }
}

template <u32 HEAD_DIM, u32 TILES>
DEVICE void backward_whole(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* log_sum_exp,
                           const AttentionShape& shape) {
    constexpr u32 ROWS = 16 * TILES, STRIDE = tile_stride(HEAD_DIM), SCORE_STRIDE = tile_stride(ROWS);
    const BlockPlace place(1, shape);
    u8* query_tile = shared_memory<u8>();
    u8* key_tile = query_tile + ROWS * STRIDE;
    u8* dout_tile = key_tile + ROWS * STRIDE;
    u8* value_tile = dout_tile + ROWS * STRIDE;
    // ds^T takes the place of the values, which nobody needs once delta is known.
    u8* score_tile = value_tile;
    float* lse_log2 = reinterpret_cast<float*>(value_tile + ROWS * (STRIDE > SCORE_STRIDE ? STRIDE : SCORE_STRIDE));
    float* partial = lse_log2 + ROWS;
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), 0, ROWS, shape);
    copy_tile<HEAD_DIM>(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), 0, ROWS, shape);
    copy_async_commit();
    copy_tile<HEAD_DIM>(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), 0, ROWS, shape);
    copy_tile<HEAD_DIM>(dout_tile, output_rows(dout, place.sample, place.head, shape), 0, ROWS, shape);
    copy_async_commit();
    for (u32 token = thread_index(); token < ROWS; token += block_threads()) {
        lse_log2[token] = lse_log2_of(log_sum_exp, token, place, shape);
    }
    const u32 first = 16 * warp_index();
    f32x4 p[1][2 * TILES], dp[1][2 * TILES];
    // Barrier 1: queries and keys have landed. p^T = exp(k q^T / sqrt(D) - lse).
    copy_async_wait_groups<1>();
    block_barrier();
    mm_ABt<HEAD_DIM, 1, TILES>(p, key_tile + first * STRIDE, query_tile);
    probabilities(p, lse_log2, first, shape);
    // Barrier 2: values and dout have landed. dp^T = v dout^T, this warp's part of delta, dv = p^T dout.
    copy_async_wait_groups<0>();
    block_barrier();
    mm_ABt<HEAD_DIM, 1, TILES>(dp, value_tile + first * STRIDE, dout_tile);
    sum_delta<1, TILES>(partial + warp_index() * ROWS, p, dp);
    {
        u32x4 a[1][TILES];
        as_operand_A<1, TILES>(a, p);
        f32x4 dv[1][HEAD_DIM / 8];
        clear(dv[0]);
        mma_AB<HEAD_DIM, 1, TILES>(dv, a, dout_tile);
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 2, shape), dv[0], first, 1.0f, 1.0f, shape);
    }
    // Barrier 3: all parts of delta are there, and nobody reads the values any more. ds^T, and dk = ds^T q.
    block_barrier();
    {
        float delta[(TILES + 1) / 2];
        add_delta<TILES>(delta, partial, TILES);
        score_gradients<1, TILES>(dp, p, delta);
        u32x4 a[1][TILES];
        as_operand_A<1, TILES>(a, dp);
        store_scores<1, TILES>(score_tile + first * SCORE_STRIDE, a);
        f32x4 dk[1][HEAD_DIM / 8];
        clear(dk[0]);
        mma_AB<HEAD_DIM, 1, TILES>(dk, a, query_tile);
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 1, shape), dk[0], first, shape.scale, shape.scale,
                             shape);
    }
    // Barrier 4: ds^T is whole. dq = ds k, of 16 queries a warp.
    block_barrier();
    u32x4 a[1][TILES];
    const u8* address = columns_first(score_tile + 2 * first, SCORE_STRIDE);
    UNROLL
    for (u32 tile = 0; tile < TILES; ++tile) a[0][tile] = ldmatrix_x4_transposed(address + tile * 16 * SCORE_STRIDE);
    f32x4 dq[1][HEAD_DIM / 8];
    clear(dq[0]);
    mma_AB<HEAD_DIM, 1, TILES>(dq, a, key_tile);
    store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 0, shape), dq[0], first, shape.scale, shape.scale, shape);
}

// dq of 16 queries and 8 features: ds k, over all keys. Keys come 32 at a time, as two products that do not wait for each other.
template <u32 HEAD_DIM, u32 QUERY_TILES>
DEVICE void query_gradients(const HeadRows<bf16>& dq, const u8* score_tile, const u8* key_tile, u32 unit, u32 first_query,
                            const AttentionShape& shape) {
    constexpr u32 STRIDE = tile_stride(HEAD_DIM), SCORE_STRIDE = tile_stride(16 * QUERY_TILES);
    const u32 tile = unit / (HEAD_DIM / 8), eight = unit % (HEAD_DIM / 8);
    const u8* scores = columns_first(score_tile + 32 * tile, SCORE_STRIDE);
    const u8* keys = key_tile + lane_index() * STRIDE + 16 * eight;
    f32x4 sums[2];
    clear(sums);
    for (u32 key = 0; key < shape.tokens; key += 32) {
        const u32x4 b = ldmatrix_x4_transposed(keys + key * STRIDE);
        const u32x4 a_0 = ldmatrix_x4_transposed(scores + key * SCORE_STRIDE);
        const u32x4 a_1 = ldmatrix_x4_transposed(scores + (key + 16) * SCORE_STRIDE);
        sums[0] = mma_m16n8k16(a_0, b.x, b.y, sums[0]);
        sums[1] = mma_m16n8k16(a_1, b.z, b.w, sums[1]);
    }
    const u32 token = first_query + 16 * tile + lane_index() / 4;
    const u32 feature = 8 * eight + 2 * (lane_index() % 4);
    if (8 * eight >= shape.head_dim) return;
    if (token < shape.tokens) {
        *reinterpret_cast<u32*>(dq.row(token) + feature) =
            pack_bf16((sums[0].x + sums[1].x) * shape.scale, (sums[0].y + sums[1].y) * shape.scale);
    }
    if (token + 8 < shape.tokens) {
        *reinterpret_cast<u32*>(dq.row(token + 8) + feature) =
            pack_bf16((sums[0].z + sums[1].z) * shape.scale, (sums[0].w + sums[1].w) * shape.scale);
    }
}

template <u32 HEAD_DIM>
DEVICE void backward_resident(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* log_sum_exp,
                              const AttentionShape& shape) {
    constexpr u32 M = 2, QUERY_TILES = 2, QUERIES = 16 * QUERY_TILES, STRIDE = tile_stride(HEAD_DIM);
    const BlockPlace place(1, shape);
    const u32 warps = block_threads() / 32;
    const u32 rows = 32 * warps;
    u8* query_tile = shared_memory<u8>();
    u8* key_tile = query_tile + rows * STRIDE;
    u8* value_tile = key_tile + rows * STRIDE;
    u8* dout_tile = value_tile + rows * STRIDE;
    u8* score_tile = dout_tile + rows * STRIDE;
    float* lse_log2 = reinterpret_cast<float*>(score_tile + rows * tile_stride(QUERIES));
    float* partial = lse_log2 + rows;
    copy_tile<HEAD_DIM>(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), 0, rows, shape);
    copy_tile<HEAD_DIM>(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), 0, rows, shape);
    copy_tile<HEAD_DIM>(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), 0, rows, shape);
    copy_tile<HEAD_DIM>(dout_tile, output_rows(dout, place.sample, place.head, shape), 0, rows, shape);
    for (u32 token = thread_index(); token < rows; token += block_threads()) {
        lse_log2[token] = lse_log2_of(log_sum_exp, token, place, shape);
    }
    copy_async_wait();
    block_barrier();

    const HeadRows<bf16> dq = packed_rows(dqkv, place.sample, place.head, 0, shape);
    const u32 first = 16 * M * warp_index();
    f32x4 dk[M][HEAD_DIM / 8], dv[M][HEAD_DIM / 8];
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        clear(dk[m]);
        clear(dv[m]);
    }
    for (u32 query = 0; query < shape.tokens; query += QUERIES) {
        f32x4 p[M][2 * QUERY_TILES], dp[M][2 * QUERY_TILES];
        u32x4 a[M][QUERY_TILES];
        mm_ABt<HEAD_DIM, M, QUERY_TILES>(p, key_tile + first * STRIDE, query_tile + query * STRIDE);
        probabilities(p, lse_log2 + query, first, shape);
        mm_ABt<HEAD_DIM, M, QUERY_TILES>(dp, value_tile + first * STRIDE, dout_tile + query * STRIDE);
        sum_delta<M, QUERY_TILES>(partial + warp_index() * QUERIES, p, dp);
        as_operand_A<M, QUERY_TILES>(a, p);
        mma_AB<HEAD_DIM, M, QUERY_TILES>(dv, a, dout_tile + query * STRIDE);
        // Also: all warps are done with the last ds^T.
        block_barrier();
        float delta[(QUERY_TILES + 1) / 2];
        add_delta<QUERY_TILES>(delta, partial, warps);
        score_gradients<M, QUERY_TILES>(dp, p, delta);
        as_operand_A<M, QUERY_TILES>(a, dp);
        store_scores<M, QUERY_TILES>(score_tile + first * tile_stride(QUERIES), a);
        mma_AB<HEAD_DIM, M, QUERY_TILES>(dk, a, query_tile + query * STRIDE);
        // Also: all warps are done with the parts of delta.
        block_barrier();
        for (u32 unit = warp_index(); unit < QUERY_TILES * (HEAD_DIM / 8); unit += warps) {
            query_gradients<HEAD_DIM, QUERY_TILES>(dq, score_tile, key_tile, unit, query, shape);
        }
    }
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        const u32 key = first + 16 * m;
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 1, shape), dk[m], key, shape.scale, shape.scale,
                             shape);
        store_rows<HEAD_DIM>(packed_rows(dqkv, place.sample, place.head, 2, shape), dv[m], key, 1.0f, 1.0f, shape);
    }
}

KERNEL(128)
attention_backward_whole_d64_n64_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                      const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_whole<64, 4>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(160)
attention_backward_whole_d64_n80_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                      const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_whole<64, 5>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(160)
attention_backward_whole_d80_n80_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                      const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_whole<80, 5>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(384)
attention_backward_resident_d32_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                     const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_resident<32>(dqkv, dout, qkv, log_sum_exp, shape);
}

KERNEL(256)
attention_backward_resident_d64_bf16(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                                     const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    backward_resident<64>(dqkv, dout, qkv, log_sum_exp, shape);
}
