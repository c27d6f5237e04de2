// What the backward kernels of attention share: p and ds of a step, on s^T = k q^T.
#ifndef VITMAE_ATTENTION_BACKWARD_CUH
#define VITMAE_ATTENTION_BACKWARD_CUH

#include "attention.cuh"

// Two numbers that move in one 64-bit access.
struct alignas(8) Pair {
    float x, y;
};

// s^T to p^T in place: rows are keys from `first` on, columns are queries, whose lse_log2 lies in shared memory.
template <u32 M, u32 COUNT>
DEVICE void probabilities(f32x4 (&s)[M][COUNT], const float* lse_log2, u32 first, const AttentionShape& shape) {
    const float scale_log2 = shape.scale * LOG2_E;
    const u32 column = 2 * (lane_index() % 4);
    UNROLL
    for (u32 i = 0; i < COUNT; ++i) {
        const Pair lse = *reinterpret_cast<const Pair*>(lse_log2 + 8 * i + column);
        UNROLL
        for (u32 m = 0; m < M; ++m) {
            s[m][i].x = exp2_approximate(s[m][i].x * scale_log2 - lse.x);
            s[m][i].y = exp2_approximate(s[m][i].y * scale_log2 - lse.y);
            s[m][i].z = exp2_approximate(s[m][i].z * scale_log2 - lse.x);
            s[m][i].w = exp2_approximate(s[m][i].w * scale_log2 - lse.y);
        }
    }
    if (first + 16 * M <= shape.tokens) return;
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        const u32 key = first + 16 * m + lane_index() / 4;
        UNROLL
        for (u32 i = 0; i < COUNT; ++i) {
            if (key >= shape.tokens) s[m][i].x = s[m][i].y = 0.0f;
            if (key + 8 >= shape.tokens) s[m][i].z = s[m][i].w = 0.0f;
        }
    }
}

// ds = p * (dp - delta), in dp. `delta`: query 32 r + lane of lane and entry r.
template <u32 M, u32 QUERY_TILES>
DEVICE void score_gradients(f32x4 (&dp)[M][2 * QUERY_TILES], const f32x4 (&p)[M][2 * QUERY_TILES],
                            const float (&delta)[(QUERY_TILES + 1) / 2]) {
    UNROLL
    for (u32 i = 0; i < 2 * QUERY_TILES; ++i) {
        const u32 lane = 8 * (i % 4) + 2 * (lane_index() % 4);
        const float first = shuffle(delta[i / 4], lane), second = shuffle(delta[i / 4], lane + 1);
        UNROLL
        for (u32 m = 0; m < M; ++m) {
            dp[m][i].x = p[m][i].x * (dp[m][i].x - first);
            dp[m][i].y = p[m][i].y * (dp[m][i].y - second);
            dp[m][i].z = p[m][i].z * (dp[m][i].z - first);
            dp[m][i].w = p[m][i].w * (dp[m][i].w - second);
        }
    }
}

// Two neighbouring 16 x 8 tiles at a time: sums become operand A.
template <u32 M, u32 GROUPS>
DEVICE void as_operand_A(u32x4 (&a)[M][GROUPS], const f32x4 (&sums)[M][2 * GROUPS]) {
    UNROLL
    for (u32 m = 0; m < M; ++m) {
        UNROLL
        for (u32 group = 0; group < GROUPS; ++group) a[m][group] = as_operand_A(sums[m][2 * group], sums[m][2 * group + 1]);
    }
}

#endif
