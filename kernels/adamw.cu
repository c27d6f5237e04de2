// AdamW over a flat arena (Loshchilov and Hutter, arXiv 1711.05101): gradient norm, update, working copy.
//
//   norm = sqrt(sum g^2)                                 g: gradients [n]
//   s    = min(1, clip / norm)
//   p   *= 1 - lr * decay                                only the first `decayed` parameters: the matrices
//   m   += (1 - beta1) (s g - m)                         v = beta2 v + (1 - beta2) (s g)^2
//   p   -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//
// A step in four launches, none of which needs anything from the host but the learning rate:
//   gradient_norm_partial   each block's share of the sum of squares, in f64, to partial [blocks]
//   gradient_norm_finish    norm [1], f32, from partial [count]; NaN or infinite where a gradient is, and infinite
//                           where the norm of finite ones is beyond f32
//   adamw_prepare           one thread: decides whether the step is finite (norm, and loss [1] where the pointer is not
//                           null), counts it in state [1], and writes factors [8] for the update
//   adamw_update_f32        parameters, m and v [n], f32, in place; nothing where factors say that the step is skipped
//   adamw_update_bf16       the same, and working [decayed]: the updated matrices rounded to bf16
// and, where weights were loaded:
//   masters_to_bf16         working [n], bf16, from parameters [n]
// and, where a run keeps a moving average of its weights, behind the update:
//   weights_average         average [n], f32, in place: average += share (p - average), share = 1 - decay of the average
//
// Ops of adamw_prepare: adamw_step
// Ops of adamw_update: adamw_step
// Ops of masters_to_bf16: adamw_step
//
// Arithmetic: the sum of squares in f64 (squares of f32 are exact there, and do not overflow), in an order that depends on n
// and on `vectorized` alone; bias corrections in f64 (powers by squaring, as src/ops/adamw.rs does); the update in f32.
// All outputs are assigned but for parameters, m, v, average and state, which are updated. No aliasing.
//
// Preconditions, checked by the launcher (src/cuda/adamw.rs): buffer lengths, decayed <= n; `vectorized` is 1 only where all
// arenas are 16-byte aligned; partial and state are 8-byte, factors 16-byte aligned.
// Launch: block 256. gradient_norm_partial: grid ceil(n / 8192), at most 1024, 2 KiB of shared memory; gradient_norm_finish:
// grid 1, 2 KiB; adamw_prepare: grid 1, block 32; updates, masters_to_bf16 and weights_average: grid ceil(n / 2048).
// Bytes: norm 4 n; update 28 n, and 2 decayed (bf16); masters_to_bf16 6 n; weights_average 12 n. FLOPs: norm 2 n, update
// 15 n, weights_average 3 n.
// Bound by: memory.
#include "device.cuh"

constexpr u32 THREADS = 256;
// Parameters in 16 bytes of f32, and such vectors of a thread.
constexpr u32 VECTOR = 4;
constexpr u32 VECTORS = 2;

// What the optimiser keeps. `AdamWState` in src/ops/adamw.rs, same layout.
struct AdamWState {
    u64 updates;
    u64 skipped;
    u64 skipped_in_a_row;
    double gradient_norm;
    double loss;
};

// `AdamWParameters` in src/cuda/adamw.rs, same layout.
struct AdamWParameters {
    double beta1;
    double beta2;
    double epsilon;
    double weight_decay;
    double clip_norm;  // infinite: no clipping
};

// What every parameter is updated with.
struct alignas(16) AdamWFactors {
    float gradient_scale;
    float decay;
    float first;         // 1 - beta1
    float second;        // beta2
    float second_rest;   // 1 - beta2
    float root_scale;    // 1 / sqrt(1 - beta2^t)
    float epsilon;
    float step_size;     // -lr / (1 - beta1^t); NaN: skip
};

DEVICE double square(float value) {
    const double wide = value;
    return wide * wide;
}

KERNEL(256)
gradient_norm_partial(double* __restrict__ partial, const float* __restrict__ gradient, u64 length, u32 blocks, u32 vectorized) {
    // Four loads in flight; each has its own sum.
    constexpr u32 LOADS = 4;
    double sums[LOADS] = {0.0, 0.0, 0.0, 0.0};
    const u64 vectors = vectorized ? length / 4 : 0;
    const u64 stride = static_cast<u64>(blocks) * THREADS;
    const u64 thread = static_cast<u64>(block_index()) * THREADS + thread_index();
    u64 vector = thread;
    for (; vector + (LOADS - 1) * stride < vectors; vector += LOADS * stride) {
        u32x4 words[LOADS];
        UNROLL
        for (u32 i = 0; i < LOADS; ++i) words[i] = load_16(gradient + 4 * (vector + i * stride));
        UNROLL
        for (u32 i = 0; i < LOADS; ++i) {
            float values[4];
            Element<float>::unpack(words[i], values);
            UNROLL
            for (u32 k = 0; k < 4; ++k) sums[i] += square(values[k]);
        }
    }
    for (; vector < vectors; vector += stride) {
        float values[4];
        Element<float>::unpack(load_16(gradient + 4 * vector), values);
        UNROLL
        for (u32 k = 0; k < 4; ++k) sums[0] += square(values[k]);
    }
    for (u64 index = 4 * vectors + thread; index < length; index += stride) sums[0] += square(gradient[index]);
    const double sum = block_sum<THREADS>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (thread_index() == 0) partial[block_index()] = sum;
}

KERNEL(256)
gradient_norm_finish(float* __restrict__ norm, const double* __restrict__ partial, u32 count) {
    double sum = 0.0;
    for (u32 index = thread_index(); index < count; index += THREADS) sum += partial[index];
    sum = block_sum<THREADS>(sum);
    if (thread_index() == 0) *norm = static_cast<float>(square_root_rn(sum));
}

DEVICE double power(double base, u64 exponent) {
    double product = 1.0;
    for (double square = base; exponent > 0; exponent >>= 1) {
        if (exponent & 1) product *= square;
        square *= square;
    }
    return product;
}

KERNEL(32)
adamw_prepare(AdamWFactors* __restrict__ factors, AdamWState* __restrict__ state, const float* __restrict__ norm,
              const float* __restrict__ loss, const double* __restrict__ learning_rate, AdamWParameters parameters) {
    if (thread_index() != 0) return;
    const double gradient_norm = *norm;
    const double loss_value = loss != nullptr ? *loss : 0.0;
    state->gradient_norm = gradient_norm;
    state->loss = loss_value;
    if (!is_finite(gradient_norm) || !is_finite(loss_value)) {
        state->skipped += 1;
        state->skipped_in_a_row += 1;
        factors->step_size = quiet_nan();
        return;
    }
    const u64 updates = state->updates + 1;
    state->updates = updates;
    state->skipped_in_a_row = 0;
    const double rate = *learning_rate;
    const bool clip = gradient_norm > parameters.clip_norm;
    factors->gradient_scale = static_cast<float>(clip ? parameters.clip_norm / gradient_norm : 1.0);
    factors->decay = static_cast<float>(1.0 - rate * parameters.weight_decay);
    factors->first = static_cast<float>(1.0 - parameters.beta1);
    factors->second = static_cast<float>(parameters.beta2);
    factors->second_rest = static_cast<float>(1.0 - parameters.beta2);
    factors->root_scale = static_cast<float>(1.0 / square_root_rn(1.0 - power(parameters.beta2, updates)));
    factors->epsilon = static_cast<float>(parameters.epsilon);
    factors->step_size = static_cast<float>(-rate / (1.0 - power(parameters.beta1, updates)));
}

// One parameter.
DEVICE void update(float& master, float& first, float& second, float gradient, float decay, const AdamWFactors& factors) {
    gradient *= factors.gradient_scale;
    first = multiply_add_rn(factors.first, gradient - first, first);
    second = multiply_add_rn(factors.second_rest * gradient, gradient, second * factors.second);
    const float denominator = multiply_add_rn(square_root_rn(second), factors.root_scale, factors.epsilon);
    master = multiply_add_rn(factors.step_size, divide_rn(first, denominator), master * decay);
}

// Rounds four masters from `start` on to a working copy, as far as it goes; there is none for f32.
DEVICE void store_working(float*, u64, u64, const float*) {}

DEVICE void store_working(bf16* working, u64 start, u64 end, const float* masters) {
    if (start + VECTOR <= end) {
        const u64 high = pack_bf16(masters[2], masters[3]);
        *reinterpret_cast<u64*>(working + start) = pack_bf16(masters[0], masters[1]) | high << 32;
    } else {
        for (u32 k = 0; start + k < end; ++k) Element<bf16>::store(working + start + k, masters[k]);
    }
}

// Calls vector(start) for whole aligned vectors of this thread, else element(index). Neighbouring threads take neighbouring
// vectors, so that every access of a warp is one range of whole sectors.
template <typename V, typename E>
DEVICE void for_each_parameter(u64 length, bool vectorized, V vector, E element) {
    const u64 block_start = static_cast<u64>(block_index()) * (THREADS * VECTOR * VECTORS);
    if (vectorized && block_start + THREADS * VECTOR * VECTORS <= length) {
        UNROLL
        for (u32 i = 0; i < VECTORS; ++i) vector(block_start + (i * THREADS + thread_index()) * VECTOR);
        return;
    }
    const u64 end = minimum(block_start + THREADS * VECTOR * VECTORS, length);
    for (u64 index = block_start + thread_index(); index < end; index += THREADS) element(index);
}

template <typename W>
DEVICE void adamw_update(float* master, W* working, float* first, float* second, const float* gradient,
                         const AdamWFactors* prepared, u64 length, u64 decayed, bool vectorized) {
    float values[8];
    Element<float>::unpack(load_16(prepared), values);
    Element<float>::unpack(load_16(reinterpret_cast<const u8*>(prepared) + 16), values + 4);
    const AdamWFactors factors = {values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]};
    // Not equal to itself: a NaN.
    if (factors.step_size != factors.step_size) return;
    const auto vector = [=](u64 start) {
        float masters[VECTOR], firsts[VECTOR], seconds[VECTOR], gradients[VECTOR];
        Element<float>::unpack(load_own_16(master + start), masters);
        Element<float>::unpack(load_own_16(first + start), firsts);
        Element<float>::unpack(load_own_16(second + start), seconds);
        Element<float>::unpack(load_16(gradient + start), gradients);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            const float decay = start + k < decayed ? factors.decay : 1.0f;
            update(masters[k], firsts[k], seconds[k], gradients[k], decay, factors);
        }
        Element<float>::store_vector(master + start, masters);
        Element<float>::store_vector(first + start, firsts);
        Element<float>::store_vector(second + start, seconds);
        store_working(working, start, decayed, masters);
    };
    const auto element = [=](u64 index) {
        float values[3] = {master[index], first[index], second[index]};
        update(values[0], values[1], values[2], gradient[index], index < decayed ? factors.decay : 1.0f, factors);
        master[index] = values[0];
        first[index] = values[1];
        second[index] = values[2];
        store_working(working, index, minimum(index + 1, decayed), values);
    };
    for_each_parameter(length, vectorized, vector, element);
}

KERNEL(256)
adamw_update_f32(float* __restrict__ master, float* __restrict__ first, float* __restrict__ second,
                 const float* __restrict__ gradient, const AdamWFactors* __restrict__ factors, u64 length, u64 decayed,
                 u32 vectorized) {
    adamw_update<float>(master, nullptr, first, second, gradient, factors, length, decayed, vectorized != 0);
}

KERNEL(256)
adamw_update_bf16(float* __restrict__ master, bf16* __restrict__ working, float* __restrict__ first,
                  float* __restrict__ second, const float* __restrict__ gradient,
                  const AdamWFactors* __restrict__ factors, u64 length, u64 decayed, u32 vectorized) {
    adamw_update<bf16>(master, working, first, second, gradient, factors, length, decayed, vectorized != 0);
}

KERNEL(256)
masters_to_bf16(bf16* __restrict__ working, const float* __restrict__ master, u64 length, u32 vectorized) {
    const auto vector = [=](u64 start) {
        float values[VECTOR];
        Element<float>::unpack(load_16(master + start), values);
        store_working(working, start, length, values);
    };
    const auto element = [=](u64 index) { Element<bf16>::store(working + index, master[index]); };
    for_each_parameter(length, vectorized != 0, vector, element);
}

KERNEL(256)
weights_average(float* __restrict__ average, const float* __restrict__ master, float share, u64 length, u32 vectorized) {
    const auto vector = [=](u64 start) {
        float averages[VECTOR];
        float masters[VECTOR];
        Element<float>::unpack(load_own_16(average + start), averages);
        Element<float>::unpack(load_16(master + start), masters);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) averages[k] = multiply_add_rn(share, masters[k] - averages[k], averages[k]);
        Element<float>::store_vector(average + start, averages);
    };
    const auto element = [=](u64 index) {
        average[index] = multiply_add_rn(share, master[index] - average[index], average[index]);
    };
    for_each_parameter(length, vectorized != 0, vector, element);
}
