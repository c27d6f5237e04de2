// Attention without matrix instructions: f32 throughout, to compare other ways of computing it with, and the probabilities for
// looking at. out = softmax(q k^T / sqrt(D)) v per head; the equations of the gradients are in attention_backward.cu.
//
//   attention_forward_f32            out and the natural log-sum-exp of the scaled scores, with an online softmax
//   attention_backward_delta_f32     three launches: delta = sum over keys of p * dp, over that of p, which the rounding of
//   attention_backward_keys_f32      log_sum_exp keeps from being 1; then dk and dv of 32 keys; then dq of 32 queries. Delta
//   attention_backward_queries_f32   stays in the first element of a head's row of dq, which the third launch overwrites
//   attention_probabilities_f32      p = exp(q k^T / sqrt(D) - log_sum_exp), from f32 or bf16
//   attention_probabilities_bf16
//
// Pointers, all distinct (no aliasing); T is f32, or bf16 for attention_probabilities_bf16:
//   out, dout      [B, N, H * D], f32; out is assigned
//   qkv, dqkv      [B, N, 3, H, D], T; dqkv is assigned
//   log_sum_exp    [B, H, N], f32; assigned by the forward pass, read by the others
//   probabilities  [B, H, N, N], T, assigned
// All arithmetic is f32; sums have a fixed order.
//
// A block has 16 x 16 threads and works on 32 queries by 32 keys at a time: a thread has 2 x 2 scores and, of 32 rows of a
// result, 2 rows and every sixteenth feature.
//
// Preconditions, checked by src/cuda/attention.rs: D at most 128; buffers as long as their shapes; B * H * tiles and
// B * N below 2^31.
// Launch: B * H * ceil(N / 32) blocks of 256 threads; tiles of 32 rows of R = 16 ceil(D / 16) + 1 floats and of 33 in shared
// memory: forward 384 R + 4608 bytes, backward's delta 512 R, its other two 512 R + 8448, probabilities 256 R.
// Bytes: those of attention_forward.cu and attention_backward.cu with 4 bytes for 2, but keys and values once per 32 queries.
// FLOPs: 4 B H N^2 D forward, 18 B H N^2 D backward. Bound by: shared memory, at about one load per multiply-add.
#include "attention.cuh"

constexpr u32 TILE = 32;
constexpr u32 SCORE_STRIDE = TILE + 1;
constexpr u32 MAX_SIXTEENS = 8;

DEVICE float as_float(float value) { return value; }
DEVICE float as_float(bf16 value) { return bits_float(static_cast<u32>(value.bits) << 16); }

// Where a thread stands in the block's 16 x 16.
struct Cell {
    u32 row = thread_index() / 16;
    u32 column = thread_index() % 16;
    u32 sixteens;  // features, in sixteens
    u32 stride;    // from one row of a tile to the next; odd, so that a column lies in different banks

    DEVICE explicit Cell(const AttentionShape& shape) : sixteens((shape.head_dim + 15) / 16), stride(16 * sixteens + 1) {}
};

// Loads 32 rows, as floats, from token `first` on; zeros for tokens and features that do not exist.
template <typename T>
DEVICE void load_tile(float* tile, const HeadRows<const T>& from, u32 first, const Cell& cell, const AttentionShape& shape) {
    for (u32 row = warp_index(); row < TILE; row += block_threads() / 32) {
        for (u32 feature = lane_index(); feature < 16 * cell.sixteens; feature += 32) {
            const bool exists = first + row < shape.tokens && feature < shape.head_dim;
            tile[row * cell.stride + feature] = exists ? as_float(from.row(first + row)[feature]) : 0.0f;
        }
    }
}

// s[i][j] = row i of `a` by row j of `b`; this thread's rows are 16 apart.
DEVICE void mm_ABt(float (&s)[2][2], const float* a, const float* b, const Cell& cell) {
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0.0f;
    const float* a_row = a + cell.row * cell.stride;
    const float* b_row = b + cell.column * cell.stride;
    const u32 down = 16 * cell.stride;
    for (u32 k = 0; k < 16 * cell.sixteens; ++k) {
        const float a_0 = a_row[k], a_1 = a_row[down + k], b_0 = b_row[k], b_1 = b_row[down + k];
        s[0][0] += a_0 * b_0;
        s[0][1] += a_0 * b_1;
        s[1][0] += a_1 * b_0;
        s[1][1] += a_1 * b_1;
    }
}

// sums[i] += row i of 32 x 32 factors by the rows of a tile. `across`, `along`: from one row of the factors to the next, and
// from one element of a row to the next.
DEVICE void mma_AB(float (&sums)[2][MAX_SIXTEENS], const float* factors, u32 across, u32 along, const float* rows,
                               const Cell& cell) {
    const float* factor = factors + cell.row * across;
    const float* row = rows + cell.column;
    for (u32 k = 0; k < TILE; ++k, factor += along, row += cell.stride) {
        const float first = factor[0], second = factor[16 * across];
        UNROLL
        for (u32 j = 0; j < MAX_SIXTEENS; ++j) {
            if (j >= cell.sixteens) break;
            const float value = row[16 * j];
            sums[0][j] += first * value;
            sums[1][j] += second * value;
        }
    }
}

DEVICE void clear(float (&sums)[2][MAX_SIXTEENS]) {
    UNROLL
    for (u32 j = 0; j < MAX_SIXTEENS; ++j) sums[0][j] = sums[1][j] = 0.0f;
}

// Writes this thread's rows, times a factor each, from token `first` on.
DEVICE void store_rows(const HeadRows<float>& to, const float (&sums)[2][MAX_SIXTEENS], u32 first, float factor, float factor_16,
                       const Cell& cell, const AttentionShape& shape) {
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 token = first + cell.row + 16 * i;
        UNROLL
        for (u32 j = 0; j < MAX_SIXTEENS; ++j) {
            const u32 feature = 16 * j + cell.column;
            if (token < shape.tokens && feature < shape.head_dim) {
                to.row(token)[feature] = sums[i][j] * (i == 0 ? factor : factor_16);
            }
        }
    }
}

KERNEL(256)
attention_forward_f32(float* __restrict__ out, float* __restrict__ log_sum_exp, const float* __restrict__ qkv,
                      const AttentionShape shape) {
    const BlockPlace place((shape.tokens + TILE - 1) / TILE, shape);
    const Cell cell(shape);
    float* query_tile = shared_memory<float>();
    float* key_tile = query_tile + TILE * cell.stride;
    float* value_tile = key_tile + TILE * cell.stride;
    float* scores = value_tile + TILE * cell.stride;
    // Per query: what exponentials are relative to, their row sum, and the last step's factor on older ones.
    float* row_max = scores + TILE * SCORE_STRIDE;
    float* row_sum = row_max + TILE;
    float* factor = row_sum + TILE;
    const float scale_log2 = shape.scale * LOG2_E;
    const u32 first = place.tile * TILE;
    load_tile(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), first, cell, shape);
    if (thread_index() < TILE) {
        row_max[thread_index()] = minus_infinity();
        row_sum[thread_index()] = 0.0f;
    }
    float sums[2][MAX_SIXTEENS];
    clear(sums);
    for (u32 key = 0; key < shape.tokens; key += TILE) {
        load_tile(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), key, cell, shape);
        load_tile(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), key, cell, shape);
        block_barrier();
        float s[2][2];
        mm_ABt(s, query_tile, key_tile, cell);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            UNROLL
            for (u32 j = 0; j < 2; ++j) {
                const u32 column = cell.column + 16 * j;
                scores[(cell.row + 16 * i) * SCORE_STRIDE + column] =
                    key + column < shape.tokens ? s[i][j] * scale_log2 : minus_infinity();
            }
        }
        block_barrier();
        // Four rows to a warp, a key to a lane.
        for (u32 row = warp_index(); row < TILE; row += block_threads() / 32) {
            float& score = scores[row * SCORE_STRIDE + lane_index()];
            const float before = row_max[row];
            float largest = score;
            for (u32 mask = 16; mask > 0; mask /= 2) largest = maximum(largest, shuffle_xor(largest, mask));
            largest = maximum(largest, before);
            const float p = exp2_approximate(score - largest);
            score = p;
            float total = p;
            for (u32 mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
            warp_barrier();
            if (lane_index() == 0) {
                factor[row] = exp2_approximate(before - largest);
                row_sum[row] = row_sum[row] * factor[row] + total;
                row_max[row] = largest;
            }
        }
        block_barrier();
        UNROLL
        for (u32 j = 0; j < MAX_SIXTEENS; ++j) {
            sums[0][j] *= factor[cell.row];
            sums[1][j] *= factor[cell.row + 16];
        }
        mma_AB(sums, scores, SCORE_STRIDE, 1, value_tile, cell);
        block_barrier();
    }
    store_rows(output_rows(out, place.sample, place.head, shape), sums, first, 1.0f / row_sum[cell.row],
               1.0f / row_sum[cell.row + 16], cell, shape);
    const u32 token = first + thread_index();
    if (thread_index() < TILE && token < shape.tokens) {
        const float value = row_max[thread_index()] * LN_2 + natural_logarithm(row_sum[thread_index()]);
        log_sum_exp[place.statistic(token, shape)] = value;
    }
}

// Shared memory of a backward kernel, and the scores of a tile.
struct Backward {
    Cell cell;
    float *query_tile, *key_tile, *value_tile, *dout_tile;
    float *probabilities, *gradients;  // [32 queries, 33]

    DEVICE explicit Backward(const AttentionShape& shape) : cell(shape) {
        query_tile = shared_memory<float>();
        key_tile = query_tile + TILE * cell.stride;
        value_tile = key_tile + TILE * cell.stride;
        dout_tile = value_tile + TILE * cell.stride;
        probabilities = dout_tile + TILE * cell.stride;
        gradients = probabilities + TILE * SCORE_STRIDE;
    }

    DEVICE void load_queries(const float* dout, const float* qkv, u32 first, const BlockPlace& place,
                             const AttentionShape& shape) const {
        load_tile(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), first, cell, shape);
        load_tile(dout_tile, output_rows(dout, place.sample, place.head, shape), first, cell, shape);
    }

    DEVICE void load_keys(const float* qkv, u32 first, const BlockPlace& place, const AttentionShape& shape) const {
        load_tile(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), first, cell, shape);
        load_tile(value_tile, packed_rows(qkv, place.sample, place.head, 2, shape), first, cell, shape);
    }

    // p and dp of this thread, with keys from `key` on.
    DEVICE void scores(float (&p)[2][2], float (&dp)[2][2], const float (&lse_log2)[2], u32 key,
                       const AttentionShape& shape) const {
        mm_ABt(p, query_tile, key_tile, cell);
        mm_ABt(dp, dout_tile, value_tile, cell);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            UNROLL
            for (u32 j = 0; j < 2; ++j) {
                const bool exists = key + cell.column + 16 * j < shape.tokens;
                p[i][j] = exists ? exp2_approximate(p[i][j] * (shape.scale * LOG2_E) - lse_log2[i]) : 0.0f;
            }
        }
    }

    // Leaves p and ds = p * (dp - delta) in shared memory.
    DEVICE void store_scores(const float (&p)[2][2], const float (&dp)[2][2], const float (&delta)[2]) const {
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            UNROLL
            for (u32 j = 0; j < 2; ++j) {
                const u32 at = (cell.row + 16 * i) * SCORE_STRIDE + cell.column + 16 * j;
                probabilities[at] = p[i][j];
                gradients[at] = p[i][j] * (dp[i][j] - delta[i]);
            }
        }
    }
};

// Reference and delta of this thread's two queries from `first` on.
DEVICE void query_statistics(float (&lse_log2)[2], float (&delta)[2], const float* log_sum_exp, const float* dqkv, u32 first,
                             const Cell& cell, const BlockPlace& place, const AttentionShape& shape) {
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        const u32 token = first + cell.row + 16 * i;
        lse_log2[i] = lse_log2_of(log_sum_exp, token, place, shape);
        delta[i] = token < shape.tokens ? *packed_rows(dqkv, place.sample, place.head, 0, shape).row(token) : 0.0f;
    }
}

KERNEL(256)
attention_backward_delta_f32(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                             const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    const BlockPlace place((shape.tokens + TILE - 1) / TILE, shape);
    const Backward backward(shape);
    const u32 first = place.tile * TILE;
    float lse_log2[2], delta[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
    UNROLL
    for (u32 i = 0; i < 2; ++i) lse_log2[i] = lse_log2_of(log_sum_exp, first + backward.cell.row + 16 * i, place, shape);
    backward.load_queries(dout, qkv, first, place, shape);
    for (u32 key = 0; key < shape.tokens; key += TILE) {
        backward.load_keys(qkv, key, place, shape);
        block_barrier();
        float p[2][2], dp[2][2];
        backward.scores(p, dp, lse_log2, key, shape);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            delta[i] += p[i][0] * dp[i][0] + p[i][1] * dp[i][1];
            sum[i] += p[i][0] + p[i][1];
        }
        block_barrier();
    }
    UNROLL
    for (u32 i = 0; i < 2; ++i) {
        for (u32 mask = 8; mask > 0; mask /= 2) {
            delta[i] += shuffle_xor(delta[i], mask);
            sum[i] += shuffle_xor(sum[i], mask);
        }
        const u32 token = first + backward.cell.row + 16 * i;
        if (backward.cell.column == 0 && token < shape.tokens) {
            *packed_rows(dqkv, place.sample, place.head, 0, shape).row(token) = delta[i] / sum[i];
        }
    }
}

KERNEL(256)
attention_backward_keys_f32(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                            const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    const BlockPlace place((shape.tokens + TILE - 1) / TILE, shape);
    const Backward backward(shape);
    const u32 key = place.tile * TILE;
    float dk[2][MAX_SIXTEENS], dv[2][MAX_SIXTEENS];
    clear(dk);
    clear(dv);
    backward.load_keys(qkv, key, place, shape);
    for (u32 first = 0; first < shape.tokens; first += TILE) {
        float lse_log2[2], delta[2], p[2][2], dp[2][2];
        query_statistics(lse_log2, delta, log_sum_exp, dqkv, first, backward.cell, place, shape);
        backward.load_queries(dout, qkv, first, place, shape);
        block_barrier();
        backward.scores(p, dp, lse_log2, key, shape);
        backward.store_scores(p, dp, delta);
        block_barrier();
        mma_AB(dv, backward.probabilities, 1, SCORE_STRIDE, backward.dout_tile, backward.cell);
        mma_AB(dk, backward.gradients, 1, SCORE_STRIDE, backward.query_tile, backward.cell);
        block_barrier();
    }
    const HeadRows<float> dk_rows = packed_rows(dqkv, place.sample, place.head, 1, shape);
    store_rows(dk_rows, dk, key, shape.scale, shape.scale, backward.cell, shape);
    store_rows(packed_rows(dqkv, place.sample, place.head, 2, shape), dv, key, 1.0f, 1.0f, backward.cell, shape);
}

KERNEL(256)
attention_backward_queries_f32(float* __restrict__ dqkv, const float* __restrict__ dout, const float* __restrict__ qkv,
                               const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    const BlockPlace place((shape.tokens + TILE - 1) / TILE, shape);
    const Backward backward(shape);
    const u32 first = place.tile * TILE;
    float lse_log2[2], delta[2], dq[2][MAX_SIXTEENS];
    clear(dq);
    query_statistics(lse_log2, delta, log_sum_exp, dqkv, first, backward.cell, place, shape);
    backward.load_queries(dout, qkv, first, place, shape);
    for (u32 key = 0; key < shape.tokens; key += TILE) {
        backward.load_keys(qkv, key, place, shape);
        block_barrier();
        float p[2][2], dp[2][2];
        backward.scores(p, dp, lse_log2, key, shape);
        backward.store_scores(p, dp, delta);
        block_barrier();
        mma_AB(dq, backward.gradients, SCORE_STRIDE, 1, backward.key_tile, backward.cell);
        block_barrier();
    }
    const HeadRows<float> dq_rows = packed_rows(dqkv, place.sample, place.head, 0, shape);
    store_rows(dq_rows, dq, first, shape.scale, shape.scale, backward.cell, shape);
}

template <typename T>
DEVICE void attention_probabilities(T* probabilities, const T* qkv, const float* log_sum_exp, const AttentionShape& shape) {
    const BlockPlace place((shape.tokens + TILE - 1) / TILE, shape);
    const Cell cell(shape);
    float* query_tile = shared_memory<float>();
    float* key_tile = query_tile + TILE * cell.stride;
    const u32 first = place.tile * TILE;
    load_tile(query_tile, packed_rows(qkv, place.sample, place.head, 0, shape), first, cell, shape);
    for (u32 key = 0; key < shape.tokens; key += TILE) {
        load_tile(key_tile, packed_rows(qkv, place.sample, place.head, 1, shape), key, cell, shape);
        block_barrier();
        float s[2][2];
        mm_ABt(s, query_tile, key_tile, cell);
        UNROLL
        for (u32 i = 0; i < 2; ++i) {
            const u32 token = first + cell.row + 16 * i;
            const float lse_log2 = lse_log2_of(log_sum_exp, token, place, shape);
            UNROLL
            for (u32 j = 0; j < 2; ++j) {
                const u32 column = key + cell.column + 16 * j;
                if (token >= shape.tokens || column >= shape.tokens) continue;
                const float p = exp2_approximate(s[i][j] * (shape.scale * LOG2_E) - lse_log2);
                Element<T>::store(probabilities + place.statistic(token, shape) * shape.tokens + column, p);
            }
        }
        block_barrier();
    }
}

KERNEL(256)
attention_probabilities_f32(float* __restrict__ probabilities, const float* __restrict__ qkv,
                            const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    attention_probabilities(probabilities, qkv, log_sum_exp, shape);
}

KERNEL(256)
attention_probabilities_bf16(bf16* __restrict__ probabilities, const bf16* __restrict__ qkv,
                             const float* __restrict__ log_sum_exp, const AttentionShape shape) {
    attention_probabilities(probabilities, qkv, log_sum_exp, shape);
}
