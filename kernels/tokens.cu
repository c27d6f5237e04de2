// Sequences of tokens: copies of rows with something added, and the sums of gradients that go with it.
//
//   tokens_assemble_forward_*     x[b, 0] = class_token + positions[0],
//                                 x[b, 1 + j] = patches[b, j] + positions[1 + ids_keep[b, j]]
//   tokens_assemble_backward_*    dpatches[b, j] = dx[b, 1 + j],   dclass_token += sum over b of dx[b, 0]
//   tokens_unshuffle_forward_*    y[b, 0] = x[b, 0] + positions[0],   y[b, 1 + i] = token + positions[1 + i], where token is
//                                 x[b, 1 + r] if r = ids_restore[b, i] < n (the patch was visible), else mask_token
//   tokens_unshuffle_backward_*   dx[b, 0] = dy[b, 0],   dx[b, 1 + r] = dy[b, 1 + i] for visible patches; and, per slab of
//                                 tokens, the sum of dy[b, 1 + i] over hidden ones
//   tokens_unshuffle_backward_mask_token   dmask_token += sum of the slabs
//   tokens_gather_forward_*       y[b, j] = x[b, 1 + ids[b, j]]
//   tokens_gather_backward_*      dx[b, 1 + ids[b, j]] = dy[b, j], everything else in dx = 0
//
// Batch B, patches L, selected n, features D. patches, dpatches, and gather's y and dy [B, n, D]; assemble's x and dx, and
// unshuffle's x and dx [B, 1 + n, D]; unshuffle's y and dy, and gather's x and dx [B, 1 + L, D]; all f32 or bf16. class_token,
// mask_token and their gradients [D], positions [1 + L, D], partials [slabs, D], f32. ids_keep, ids [B, n], ids_restore [B, L],
// u32. Tokens and positions are read as f32 and added in f32, with one rounding. Gradients of activations are assigned;
// dclass_token and dmask_token accumulate, summed in f32 in a fixed order that depends on the grid: the same on the same
// device.
// An id in ids_keep or in gather's ids that is no patch gives a row of NaN in forward and is left out in gather's backward,
// where the ids of a sample are distinct. The ranks below n in a sample of ids_restore are distinct and all there. No aliasing.
//
// Method: WIDTH features per access, 16 bytes or one element. A thread of the copying kernels moves one access of one token; of
// unshuffle forward one of the same token of four samples, so that a position is read once for them. Assemble backward has
// blocks of their own for the class token, 32 columns each, which run beside the copies. Unshuffle backward gives a warp 32
// neighbouring accesses of every eighth token of its block's slab: visible rows go out, hidden ones add up in registers; each
// gradient is read once. Gather backward gives a block 32 tokens of a sample: which selected token belongs to each is noted in
// shared memory first, so that everything is written once.
//
// Preconditions, checked by the launcher (src/cuda/tokens.rs): B * (1 + max(L, n)) < 2^31, D >= 1, n <= L in unshuffle, the
// accesses to all tokens < 2^31, buffer lengths; for `vectorized` D a multiple of the vector and all pointers but those of ids,
// partials, dclass_token and dmask_token of 16 bytes.
// Launch: block 256. Grid: ceil(accesses / 256) of the output, for unshuffle forward of a quarter of the samples (rounded up);
// assemble backward ceil(D / 32) more; unshuffle backward tiles * slabs; gather backward B * ceil((1 + L) / 32); mask_token
// ceil(D / 32). Shared memory in bytes: assemble backward and mask_token 1024, unshuffle backward 1024 * WIDTH, gather backward
// 128.
// Bytes, e per element: assemble forward and backward 2 e B (1 + n) D; unshuffle forward e B (2 + n + L) D, and B (1 + L) D of
// positions from the L2 cache; unshuffle backward the same without positions; gather forward 2 e B n D, backward
// e B (1 + L + n) D. FLOPs: one per element of the output, or of the sums.
// Bound by: memory.
#include "device.cuh"

constexpr u32 WARPS = 8;
constexpr u32 THREADS = 32 * WARPS;
// Samples of a thread in unshuffle forward.
constexpr u32 SAMPLES = 4;
// Tokens of a block in gather backward.
constexpr u32 CHUNK = 32;

// What is the same for all threads. `TokensParameters` in src/cuda/tokens.rs, same layout.
struct TokensShape {
    u32 batch;            // B
    u32 patches;          // L
    u32 selected;         // n
    u32 width;            // D
    u32 vectorized;       // 1: 16 bytes per access, 0: one element
    u32 items;            // accesses that threads or, in unshuffle backward, slabs share
    Divider accesses;     // of a token: D / WIDTH
    Divider tokens;       // of a sample, as the kernel walks it
    u32 slabs;            // unshuffle backward
    u32 class_blocks;     // assemble backward: first blocks of the grid, which sum the class token's gradient
};

template <typename T>
DEVICE T* token_of(T* tensor, u32 token, const TokensShape& shape) {
    return tensor + static_cast<u64>(token) * shape.width;
}

// Moves WIDTH elements as they are.
template <u32 WIDTH, typename T>
DEVICE void copy_elements(T* to, const T* from) {
    if constexpr (WIDTH == 1) {
        Element<T>::store(to, Element<T>::load(from));
    } else {
        store_16(to, load_16(from));
    }
}

template <u32 WIDTH, typename T>
DEVICE void store_constant(T* to, float value) {
    float values[WIDTH];
    UNROLL
    for (u32 k = 0; k < WIDTH; ++k) values[k] = value;
    store_elements<WIDTH>(to, values);
}

template <u32 WIDTH>
DEVICE void add(float* sum, const float* values) {
    UNROLL
    for (u32 k = 0; k < WIDTH; ++k) sum[k] += values[k];
}

// Where a thread of a copying kernel works: an access, a token of a sample.
struct Place {
    u32 column;
    u32 token;
    u32 sample;

    template <u32 WIDTH>
    DEVICE static Place of(u32 item, const TokensShape& shape) {
        Place place;
        place.token = divide(item, shape.accesses);
        place.column = item * WIDTH;
        place.sample = divide(place.token, shape.tokens);
        return place;
    }
};

template <u32 WIDTH, typename T>
DEVICE void assemble_forward(T* x, const T* patches, const float* class_token, const float* positions, const u32* ids_keep,
                             const TokensShape& shape) {
    const u32 item = block_index() * THREADS + thread_index();
    if (item >= shape.items) return;
    const auto [column, token, sample] = Place::of<WIDTH>(item, shape);
    T* to = token_of(x, sample * (1 + shape.selected) + token, shape) + column;
    float values[WIDTH], position[WIDTH];
    u32 place = 0;
    if (token == 0) {
        load_elements<WIDTH>(class_token + column, values);
    } else {
        const u32 patch = sample * shape.selected + token - 1;
        const u32 id = ids_keep[patch];
        if (id >= shape.patches) return store_constant<WIDTH>(to, quiet_nan());
        place = 1 + id;
        load_elements<WIDTH>(token_of(patches, patch, shape) + column, values);
    }
    load_elements<WIDTH>(token_of(positions, place, shape) + column, position);
    add<WIDTH>(values, position);
    store_elements<WIDTH>(to, values);
}

template <u32 WIDTH, typename T>
DEVICE void assemble_backward(T* dpatches, float* dclass_token, const T* dx, const TokensShape& shape) {
    if (block_index() >= shape.class_blocks) {
        const u32 item = (block_index() - shape.class_blocks) * THREADS + thread_index();
        if (item >= shape.items) return;
        const auto [column, token, sample] = Place::of<WIDTH>(item, shape);
        const u32 from = sample * (1 + shape.selected) + 1 + token;
        const u32 to = sample * shape.selected + token;
        return copy_elements<WIDTH>(token_of(dpatches, to, shape) + column, token_of(dx, from, shape) + column);
    }
    const u32 column = block_index() * 32 + lane_index();
    const bool inside = column < shape.width;
    const u64 stride = static_cast<u64>(1 + shape.selected) * shape.width;
    const float sum = sum_of_column<WARPS>(shared_memory<float>(), dx + column, inside, shape.batch, stride);
    if (warp_index() == 0 && inside) dclass_token[column] += sum;
}

template <u32 WIDTH, typename T>
DEVICE void unshuffle_forward(T* y, const T* x, const float* mask_token, const float* positions, const u32* ids_restore,
                              const TokensShape& shape) {
    const u32 item = block_index() * THREADS + thread_index();
    if (item >= shape.items) return;
    const auto [column, token, group] = Place::of<WIDTH>(item, shape);
    const u32 first = group * SAMPLES;
    float position[WIDTH], mask[WIDTH], values[SAMPLES][WIDTH];
    load_elements<WIDTH>(token_of(positions, token, shape) + column, position);
    load_elements<WIDTH>(mask_token + column, mask);
    // All loads before the first store, so that they overlap.
    UNROLL
    for (u32 s = 0; s < SAMPLES; ++s) {
        const u32 sample = first + s;
        if (sample >= shape.batch) continue;
        // The class token's place is 0, a visible patch's 1 + rank.
        const u32 rank = token == 0 ? 0 : ids_restore[sample * shape.patches + token - 1];
        const u32 place = token == 0 ? 0 : 1 + rank;
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) values[s][k] = mask[k];
        if (token == 0 || rank < shape.selected) {
            load_elements<WIDTH>(token_of(x, sample * (1 + shape.selected) + place, shape) + column, values[s]);
        }
    }
    UNROLL
    for (u32 s = 0; s < SAMPLES; ++s) {
        if (first + s >= shape.batch) continue;
        add<WIDTH>(values[s], position);
        store_elements<WIDTH>(token_of(y, (first + s) * (1 + shape.patches) + token, shape) + column, values[s]);
    }
}

template <u32 WIDTH, typename T>
DEVICE void unshuffle_backward(T* dx, float* partials, const T* dy, const u32* ids_restore, const TokensShape& shape) {
    constexpr u32 TILE = 32 * WIDTH;
    u32 slab = block_index();
    const u32 tile = slab / shape.slabs;
    slab -= tile * shape.slabs;
    const u32 column = tile * TILE + lane_index() * WIDTH;
    const bool inside = column < shape.width;
    float sums[WIDTH];
    UNROLL
    for (u32 k = 0; k < WIDTH; ++k) sums[k] = 0.0f;
    // Four tokens at a time: their loads overlap.
    constexpr u32 TOKENS = 4;
    const u32 step = shape.slabs * WARPS;
    for (u32 first = slab * WARPS + warp_index(); inside && first < shape.items; first += TOKENS * step) {
        u32 to[TOKENS];
        float values[TOKENS][WIDTH];
        bool kept[TOKENS], hidden[TOKENS];
        UNROLL
        for (u32 t = 0; t < TOKENS; ++t) {
            const u32 row = first + t * step;
            kept[t] = hidden[t] = false;
            if (row >= shape.items) continue;
            u32 token = row;
            const u32 sample = divide(token, shape.tokens);
            const u32 rank = token == 0 ? 0 : ids_restore[sample * shape.patches + token - 1];
            kept[t] = token == 0 || rank < shape.selected;
            hidden[t] = !kept[t];
            to[t] = sample * (1 + shape.selected) + (token == 0 ? 0 : 1 + rank);
            load_elements<WIDTH>(token_of(dy, row, shape) + column, values[t]);
        }
        UNROLL
        for (u32 t = 0; t < TOKENS; ++t) {
            if (hidden[t]) add<WIDTH>(sums, values[t]);
            if (kept[t]) store_elements<WIDTH>(token_of(dx, to[t], shape) + column, values[t]);
        }
    }
    float* shared = shared_memory<float>();  // [WIDTH][WARPS * 32]
    UNROLL
    for (u32 k = 0; k < WIDTH; ++k) shared[k * THREADS + thread_index()] = sums[k];
    block_barrier();
    if (warp_index() != 0 || !inside) return;
    UNROLL
    for (u32 k = 0; k < WIDTH; ++k) {
        float sum = 0.0f;
        for (u32 warp = 0; warp < WARPS; ++warp) sum += shared[k * THREADS + warp * 32 + lane_index()];
        partials[static_cast<u64>(slab) * shape.width + column + k] = sum;
    }
}

template <u32 WIDTH, typename T>
DEVICE void gather_forward(T* y, const T* x, const u32* ids, const TokensShape& shape) {
    const u32 item = block_index() * THREADS + thread_index();
    if (item >= shape.items) return;
    const auto [column, token, sample] = Place::of<WIDTH>(item, shape);
    const u32 row = sample * shape.selected + token;
    const u32 id = ids[row];
    T* to = token_of(y, row, shape) + column;
    if (id >= shape.patches) return store_constant<WIDTH>(to, quiet_nan());
    copy_elements<WIDTH>(to, token_of(x, sample * (1 + shape.patches) + 1 + id, shape) + column);
}

template <u32 WIDTH, typename T>
DEVICE void gather_backward(T* dx, const T* dy, const u32* ids, const TokensShape& shape) {
    constexpr u32 NONE = 0xffffffffu;
    u32* source = shared_memory<u32>();  // [CHUNK]: the selected token that belongs to each
    // shape.tokens: chunks of a sample.
    u32 chunk = block_index();
    const u32 sample = divide(chunk, shape.tokens);
    const u32 first = chunk * CHUNK;
    if (thread_index() < CHUNK) source[thread_index()] = NONE;
    block_barrier();
    for (u32 j = thread_index(); j < shape.selected; j += THREADS) {
        const u32 id = ids[sample * shape.selected + j];
        const u32 place = 1 + id - first;
        if (id < shape.patches && 1 + id >= first && place < CHUNK) source[place] = j;
    }
    block_barrier();
    const u32 count = minimum(CHUNK, 1 + shape.patches - first);
    const u32 items = count * shape.accesses.divisor;
    for (u32 item = thread_index(); item < items; item += THREADS) {
        u32 access = item;
        const u32 token = divide(access, shape.accesses);
        const u32 column = access * WIDTH;
        T* to = token_of(dx, sample * (1 + shape.patches) + first + token, shape) + column;
        const u32 j = source[token];
        if (j == NONE) {
            store_constant<WIDTH>(to, 0.0f);
        } else {
            copy_elements<WIDTH>(to, token_of(dy, sample * shape.selected + j, shape) + column);
        }
    }
}

KERNEL(256)
tokens_assemble_forward_f32(float* __restrict__ x, const float* __restrict__ patches, const float* __restrict__ class_token,
                            const float* __restrict__ positions, const u32* __restrict__ ids_keep, const TokensShape shape) {
    if (shape.vectorized) return assemble_forward<4>(x, patches, class_token, positions, ids_keep, shape);
    assemble_forward<1>(x, patches, class_token, positions, ids_keep, shape);
}

KERNEL(256)
tokens_assemble_forward_bf16(bf16* __restrict__ x, const bf16* __restrict__ patches, const float* __restrict__ class_token,
                             const float* __restrict__ positions, const u32* __restrict__ ids_keep,
                             const TokensShape shape) {
    if (shape.vectorized) return assemble_forward<8>(x, patches, class_token, positions, ids_keep, shape);
    assemble_forward<1>(x, patches, class_token, positions, ids_keep, shape);
}

KERNEL(256)
tokens_assemble_backward_f32(float* __restrict__ dpatches, float* __restrict__ dclass_token, const float* __restrict__ dx,
                             const TokensShape shape) {
    if (shape.vectorized) return assemble_backward<4>(dpatches, dclass_token, dx, shape);
    assemble_backward<1>(dpatches, dclass_token, dx, shape);
}

KERNEL(256)
tokens_assemble_backward_bf16(bf16* __restrict__ dpatches, float* __restrict__ dclass_token, const bf16* __restrict__ dx,
                              const TokensShape shape) {
    if (shape.vectorized) return assemble_backward<8>(dpatches, dclass_token, dx, shape);
    assemble_backward<1>(dpatches, dclass_token, dx, shape);
}

KERNEL(256)
tokens_unshuffle_forward_f32(float* __restrict__ y, const float* __restrict__ x, const float* __restrict__ mask_token,
                             const float* __restrict__ positions, const u32* __restrict__ ids_restore,
                             const TokensShape shape) {
    if (shape.vectorized) return unshuffle_forward<4>(y, x, mask_token, positions, ids_restore, shape);
    unshuffle_forward<1>(y, x, mask_token, positions, ids_restore, shape);
}

KERNEL(256)
tokens_unshuffle_forward_bf16(bf16* __restrict__ y, const bf16* __restrict__ x, const float* __restrict__ mask_token,
                              const float* __restrict__ positions, const u32* __restrict__ ids_restore,
                              const TokensShape shape) {
    if (shape.vectorized) return unshuffle_forward<8>(y, x, mask_token, positions, ids_restore, shape);
    unshuffle_forward<1>(y, x, mask_token, positions, ids_restore, shape);
}

KERNEL(256)
tokens_unshuffle_backward_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                              const u32* __restrict__ ids_restore, const TokensShape shape) {
    if (shape.vectorized) return unshuffle_backward<4>(dx, partials, dy, ids_restore, shape);
    unshuffle_backward<1>(dx, partials, dy, ids_restore, shape);
}

KERNEL(256)
tokens_unshuffle_backward_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                               const u32* __restrict__ ids_restore, const TokensShape shape) {
    if (shape.vectorized) return unshuffle_backward<8>(dx, partials, dy, ids_restore, shape);
    unshuffle_backward<1>(dx, partials, dy, ids_restore, shape);
}

KERNEL(256)
tokens_gather_forward_f32(float* __restrict__ y, const float* __restrict__ x, const u32* __restrict__ ids,
                          const TokensShape shape) {
    if (shape.vectorized) return gather_forward<4>(y, x, ids, shape);
    gather_forward<1>(y, x, ids, shape);
}

KERNEL(256)
tokens_gather_forward_bf16(bf16* __restrict__ y, const bf16* __restrict__ x, const u32* __restrict__ ids,
                           const TokensShape shape) {
    if (shape.vectorized) return gather_forward<8>(y, x, ids, shape);
    gather_forward<1>(y, x, ids, shape);
}

KERNEL(256)
tokens_gather_backward_f32(float* __restrict__ dx, const float* __restrict__ dy, const u32* __restrict__ ids,
                           const TokensShape shape) {
    if (shape.vectorized) return gather_backward<4>(dx, dy, ids, shape);
    gather_backward<1>(dx, dy, ids, shape);
}

KERNEL(256)
tokens_gather_backward_bf16(bf16* __restrict__ dx, const bf16* __restrict__ dy, const u32* __restrict__ ids,
                            const TokensShape shape) {
    if (shape.vectorized) return gather_backward<8>(dx, dy, ids, shape);
    gather_backward<1>(dx, dy, ids, shape);
}

KERNEL(256)
tokens_unshuffle_backward_mask_token(float* __restrict__ dmask_token, const float* __restrict__ partials, const u32 slabs,
                                     const u32 width) {
    const u32 column = block_index() * 32 + lane_index();
    const bool inside = column < width;
    const float sum = sum_of_column<WARPS>(shared_memory<float>(), partials + column, inside, slabs, width);
    if (warp_index() == 0 && inside) dmask_token[column] += sum;
}
