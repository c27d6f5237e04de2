// Linear layers: what surrounds the matrix products, which are cuBLASLt's (src/cuda/gemm.rs).
//
//   linear_activation_forward_*    y = f(pre)                                    assigned
//   linear_activation_backward_*   dpre = dpre * f'(pre), in place               dpre holds the gradient of f's output before
//   linear_activation_backward_bias_*  the same, y = f(pre) again, and partial[c, j] = sum of dpre[r, j] over rows r of part c
//   linear_bias_backward_partial_* partial[c, j] = sum of dy[r, j] over the rows r of part c          assigned
//   linear_bias_backward_finish_f32  dbias[j] += sum over c of partial[c, j]     accumulated
//   linear_bias_round_bf16         rounded = bf16(bias), for an epilogue whose bias has the output's type
//
// Ops of linear_bias_round: linear_forward, linear_residual_forward, linear_activation_forward
// Ops of linear_activation_forward: linear_activation_forward, activation_forward
// Ops of linear_activation_backward: linear_activation_backward_input
// Ops of linear_activation_backward_bias: linear_activation_backward
// Ops of linear_bias_backward_partial: linear_backward_weight
// Ops of linear_bias_backward_finish: linear_backward_weight, linear_activation_backward
//
// One pass for backward's three needs of an activation: its slope, its output for the next weight's gradient, and the bias
// gradient of the layer before; the sums are of dpre before it is rounded.
// f: GELU with the error function (Hendrycks and Gimpel, arXiv 1606.08415), its tanh form, ReLU, SiLU, or
// x sigmoid(1.702 x).
// y, pre, dpre: `length` elements, or [rows, columns], f32 or bf16; dy [rows, columns], f32 or bf16; partial [parts,
// columns], dbias, bias [columns], f32. Arithmetic in f32, one rounding at the end. No aliasing but the one in place; y may
// not be pre. Forward saves pre.
//
// GELU: with z = |x|, the normal distribution's tail is exp(-z^2 / 2) R(z); R is t times a polynomial of degree 6 in
// t = 1 / (1 + p z), fitted for z from 0 to 6 with a relative error of 1.1e-7 (kernels/notes/linear.md). No cancellation, so
// the negative tail is as exact as the rest; the same exponential gives the density that the derivative needs. Two
// operations of the special function unit and about 15 others per element, without a branch.
//
// Method, activations: 16-byte vectors, PER_THREAD of them loaded before the first is used; a block takes BLOCK_VECTORS.
// What is left over, and everything where an address is not a multiple of 16, goes element by element.
// Method, bias: a warp reads 32 vectors of a row at once, so a lane owns a vector's columns and keeps their sums in
// registers; the block's warps take turns on the rows of its part, and are then added up through shared memory in order.
// Parts depend on the shape alone, so the sums have the same bits every time. Where rows do not start at multiples of 16
// bytes, a lane owns columns 32 apart.
//
// Preconditions, checked by the launcher (src/cuda/linear.rs): buffer lengths; columns < 2^31, rows < 2^31, blocks < 2^31;
// `vectorized` only if all addresses, and for the bias the rows, are multiples of 16 bytes.
// Launch, with v elements to 16 bytes: activations: grid ceil(length / (512 v)), block 256; sums over rows: grid parts *
// ceil(columns / (32 v)), block 256, 1024 v bytes of shared memory; finish: grid ceil(columns / 32), block 512, 2048 bytes;
// round: grid ceil(columns / 128), block 128.
// Bytes, e = element size: forward 2 e length, backward 3 e length, with y and sums 4 e length; parts: e rows columns + 4
// parts columns, finish: 4 parts columns. FLOPs: about 20 length for GELU, rows columns for the bias. Bound by: memory.
#include "device.cuh"

constexpr u32 THREADS = 256;
constexpr u32 PER_THREAD = 2;
constexpr u32 BLOCK_VECTORS = THREADS * PER_THREAD;

DEVICE float sigmoid(float x) { return reciprocal_approximate(1.0f + exponential(-x)); }

// x * Phi(x).
struct Gelu {
    // exp(-x^2 / 2), and Phi(x) made from it. Where both value and slope are asked for, the compiler does this once.
    DEVICE static void parts(float x, float& bell, float& distribution) {
        const float z = x < 0.0f ? -x : x;
        const float t = reciprocal_approximate(multiply_add_rn(z, 0.254999995f, 1.0f));
        bell = exp2_approximate(x * x * -0.721347520f);
        float r = multiply_add_rn(-0.0849474519f, t, 0.293743074f);
        r = multiply_add_rn(r, t, -0.199199498f);
        r = multiply_add_rn(r, t, 0.234586447f);
        r = multiply_add_rn(r, t, 0.0436649360f);
        r = multiply_add_rn(r, t, 0.111148275f);
        r = multiply_add_rn(r, t, 0.101004153f);
        const float tail = r * t * bell;
        distribution = x < 0.0f ? tail : 1.0f - tail;
    }

    DEVICE static float value(float x) {
        float bell, distribution;
        parts(x, bell, distribution);
        return x * distribution;
    }

    DEVICE static float slope(float x) {
        float bell, distribution;
        parts(x, bell, distribution);
        return multiply_add_rn(x * 0.398942280f, bell, distribution);
    }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
    static constexpr float LINEAR = 1.59576912f;
    static constexpr float CUBIC = 0.0713548163f;

    DEVICE static float value(float x) { return x * sigmoid(x * multiply_add_rn(x * x, CUBIC, LINEAR)); }

    DEVICE static float slope(float x) {
        // Further out the slope is 0 or 1 to 1e-20, and nothing here may overflow. A NaN stays.
        const float inside = x > 8.0f ? 8.0f : x < -8.0f ? -8.0f : x;
        const float square = inside * inside;
        const float rest = exponential(-inside * multiply_add_rn(square, CUBIC, LINEAR));
        const float s = reciprocal_approximate(1.0f + rest);
        // 1 - s is rest * s, without its cancellation.
        return multiply_add_rn(inside * s * rest * s, multiply_add_rn(square, 3.0f * CUBIC, LINEAR), s);
    }
};

struct Relu {
    DEVICE static float value(float x) { return x < 0.0f ? 0.0f : x; }
    DEVICE static float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

// x sigmoid(x).
struct Silu {
    DEVICE static float value(float x) { return x * sigmoid(x); }

    DEVICE static float slope(float x) {
        const float s = sigmoid(x);
        return multiply_add_rn(x * s, 1.0f - s, s);
    }
};

// x sigmoid(1.702 x).
struct QuickGelu {
    static constexpr float FACTOR = 1.702f;

    DEVICE static float value(float x) { return x * sigmoid(FACTOR * x); }

    DEVICE static float slope(float x) {
        const float s = sigmoid(FACTOR * x);
        return multiply_add_rn(FACTOR * x * s, 1.0f - s, s);
    }
};

// What is applied, and how: forward, or backward in place.
template <typename F>
struct Forward {
    DEVICE static float apply(float, float pre) { return F::value(pre); }
    static constexpr bool IN_PLACE = false;
};

template <typename F>
struct Backward {
    DEVICE static float apply(float gradient, float pre) { return gradient * F::slope(pre); }
    static constexpr bool IN_PLACE = true;
};

template <typename Operation, typename T>
DEVICE void elementwise(T* out, const T* pre, u64 length, bool vectorized) {
    constexpr u32 VECTOR = Element<T>::PER_16_BYTES;
    const u64 vectors = vectorized ? length / VECTOR : 0;
    const u64 first = static_cast<u64>(block_index()) * BLOCK_VECTORS + thread_index();
    u32x4 inputs[PER_THREAD];
    u32x4 gradients[PER_THREAD];
    UNROLL
    for (u32 i = 0; i < PER_THREAD; ++i) {
        const u64 vector = first + i * THREADS;
        if (vector >= vectors) continue;
        inputs[i] = load_16(pre + vector * VECTOR);
        if constexpr (Operation::IN_PLACE) gradients[i] = load_own_16(out + vector * VECTOR);
    }
    UNROLL
    for (u32 i = 0; i < PER_THREAD; ++i) {
        const u64 vector = first + i * THREADS;
        if (vector >= vectors) continue;
        float values[VECTOR];
        float results[VECTOR] = {};
        Element<T>::unpack(inputs[i], values);
        if constexpr (Operation::IN_PLACE) Element<T>::unpack(gradients[i], results);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) results[k] = Operation::apply(results[k], values[k]);
        Element<T>::store_vector(out + vector * VECTOR, results);
    }
    // The blocks share what is left: less than a vector, or everything.
    u64 element = vectors * VECTOR + static_cast<u64>(block_index()) * (vectorized ? THREADS : BLOCK_VECTORS * VECTOR);
    const u64 past = vectorized ? length : element + BLOCK_VECTORS * VECTOR;
    for (element += thread_index(); element < length && element < past; element += THREADS) {
        float gradient = 0.0f;
        if constexpr (Operation::IN_PLACE) gradient = Element<T>::load(out + element);
        Element<T>::store(out + element, Operation::apply(gradient, Element<T>::load(pre + element)));
    }
}

// The numbers of `Activation` in src/cuda/linear.rs.
template <template <typename> class Direction, typename T>
DEVICE void activation(T* out, const T* pre, u64 length, u32 function, u32 vectorized) {
    switch (function) {
        case 0: return elementwise<Direction<Gelu>>(out, pre, length, vectorized != 0);
        case 1: return elementwise<Direction<GeluTanh>>(out, pre, length, vectorized != 0);
        case 2: return elementwise<Direction<Relu>>(out, pre, length, vectorized != 0);
        case 3: return elementwise<Direction<Silu>>(out, pre, length, vectorized != 0);
        default: return elementwise<Direction<QuickGelu>>(out, pre, length, vectorized != 0);
    }
}

constexpr u32 SUM_WARPS = THREADS / 32;

// What is summed over rows: dy as it is.
template <typename T>
struct Gradient {
    using Type = T;
    // Rows that a warp has in flight.
    static constexpr u32 ROWS = 4;
    static constexpr u32 VECTOR = Element<T>::PER_16_BYTES;

    struct Loaded {
        u32x4 words;
    };

    const T* dy;

    DEVICE Loaded load(u64 at) const { return {load_16(dy + at)}; }
    DEVICE void use(u64, const Loaded& loaded, float* values) const { Element<T>::unpack(loaded.words, values); }
    DEVICE float use_element(u64 at) const { return Element<T>::load(dy + at); }
};

// What is summed over rows: dpre, which is made on the way, as y is.
template <typename T, typename F>
struct ActivationGradient {
    using Type = T;
    static constexpr u32 ROWS = 2;
    static constexpr u32 VECTOR = Element<T>::PER_16_BYTES;

    struct Loaded {
        u32x4 pre;
        u32x4 gradient;
    };

    T* dpre;
    T* y;
    const T* pre;

    DEVICE Loaded load(u64 at) const { return {load_16(pre + at), load_own_16(dpre + at)}; }

    DEVICE void use(u64 at, const Loaded& loaded, float* values) const {
        float inputs[VECTOR];
        float outputs[VECTOR];
        Element<T>::unpack(loaded.pre, inputs);
        Element<T>::unpack(loaded.gradient, values);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            outputs[k] = F::value(inputs[k]);
            values[k] *= F::slope(inputs[k]);
        }
        Element<T>::store_vector(y + at, outputs);
        Element<T>::store_vector(dpre + at, values);
    }

    DEVICE float use_element(u64 at) const {
        const float input = Element<T>::load(pre + at);
        const float value = Element<T>::load(dpre + at) * F::slope(input);
        Element<T>::store(y + at, F::value(input));
        Element<T>::store(dpre + at, value);
        return value;
    }
};

// A lane's column of a tile: vectorized, a lane's are neighbours, else 32 apart.
template <u32 VECTOR, bool VECTORIZED>
DEVICE u32 column_of(u32 lane, u32 k) {
    return VECTORIZED ? lane * VECTOR + k : lane + 32 * k;
}

template <bool VECTORIZED, typename Source>
DEVICE void sum_rows(float* partial, const Source& source, u32 rows, u32 columns, u32 tiles, u32 part_rows) {
    constexpr u32 VECTOR = Source::VECTOR;
    constexpr u32 TILE = 32 * VECTOR;
    constexpr u32 ROWS = Source::ROWS;
    const u32 part = block_index() / tiles;
    const u32 first = (block_index() - part * tiles) * TILE;
    const u32 start = part * part_rows;
    const u32 end = minimum(rows, start + part_rows);
    float sums[VECTOR];
    UNROLL
    for (u32 k = 0; k < VECTOR; ++k) sums[k] = 0.0f;
    u32 row = start + warp_index();
    if constexpr (VECTORIZED) {
        const u32 column = first + lane_index() * VECTOR;
        if (column < columns) {
            u64 at = static_cast<u64>(row) * columns + column;
            const u64 step = static_cast<u64>(SUM_WARPS) * columns;
            for (; row < end; row += ROWS * SUM_WARPS, at += ROWS * step) {
                typename Source::Loaded loaded[ROWS];
                UNROLL
                for (u32 i = 0; i < ROWS; ++i) {
                    if (row + i * SUM_WARPS < end) loaded[i] = source.load(at + i * step);
                }
                UNROLL
                for (u32 i = 0; i < ROWS; ++i) {
                    if (row + i * SUM_WARPS >= end) continue;
                    float values[VECTOR];
                    source.use(at + i * step, loaded[i], values);
                    UNROLL
                    for (u32 k = 0; k < VECTOR; ++k) sums[k] += values[k];
                }
            }
        }
    } else {
        for (; row < end; row += SUM_WARPS) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) {
                const u32 column = first + column_of<VECTOR, false>(lane_index(), k);
                if (column < columns) sums[k] += source.use_element(static_cast<u64>(row) * columns + column);
            }
        }
    }
    // Element k of all lanes side by side: no bank conflicts.
    float* shared = shared_memory<float>();
    UNROLL
    for (u32 k = 0; k < VECTOR; ++k) shared[(warp_index() * VECTOR + k) * 32 + lane_index()] = sums[k];
    block_barrier();
    for (u32 i = thread_index(); i < TILE; i += THREADS) {
        const u32 column = first + column_of<VECTOR, VECTORIZED>(i % 32, i / 32);
        if (column >= columns) continue;
        float sum = 0.0f;
        UNROLL
        for (u32 warp = 0; warp < SUM_WARPS; ++warp) sum += shared[warp * TILE + i];
        partial[static_cast<u64>(part) * columns + column] = sum;
    }
}

// How the rows are cut, and whether vectors may be used. `RowSums` in src/cuda/linear.rs, same layout.
struct RowSums {
    u32 rows;
    u32 columns;
    u32 tiles;      // of columns
    u32 part_rows;  // rows per part
    u32 vectorized;
};

template <typename Source>
DEVICE void sum_rows(float* partial, const Source& source, const RowSums& shape) {
    if (shape.vectorized != 0) {
        sum_rows<true>(partial, source, shape.rows, shape.columns, shape.tiles, shape.part_rows);
    } else {
        sum_rows<false>(partial, source, shape.rows, shape.columns, shape.tiles, shape.part_rows);
    }
}

template <typename T>
DEVICE void activation_backward_bias(float* partial, T* dpre, T* y, const T* pre, const RowSums& shape, u32 function) {
    switch (function) {
        case 0: return sum_rows(partial, ActivationGradient<T, Gelu>{dpre, y, pre}, shape);
        case 1: return sum_rows(partial, ActivationGradient<T, GeluTanh>{dpre, y, pre}, shape);
        case 2: return sum_rows(partial, ActivationGradient<T, Relu>{dpre, y, pre}, shape);
        case 3: return sum_rows(partial, ActivationGradient<T, Silu>{dpre, y, pre}, shape);
        default: return sum_rows(partial, ActivationGradient<T, QuickGelu>{dpre, y, pre}, shape);
    }
}

constexpr u32 FINISH_THREADS = 512;
constexpr u32 FINISH_WARPS = FINISH_THREADS / 32;

KERNEL(256)
linear_activation_forward_f32(float* __restrict__ y, const float* __restrict__ pre, const u64 length, const u32 function,
                              const u32 vectorized) {
    activation<Forward>(y, pre, length, function, vectorized);
}

KERNEL(256)
linear_activation_forward_bf16(bf16* __restrict__ y, const bf16* __restrict__ pre, const u64 length, const u32 function,
                               const u32 vectorized) {
    activation<Forward>(y, pre, length, function, vectorized);
}

KERNEL(256)
linear_activation_backward_f32(float* __restrict__ dpre, const float* __restrict__ pre, const u64 length, const u32 function,
                               const u32 vectorized) {
    activation<Backward>(dpre, pre, length, function, vectorized);
}

KERNEL(256)
linear_activation_backward_bf16(bf16* __restrict__ dpre, const bf16* __restrict__ pre, const u64 length, const u32 function,
                                const u32 vectorized) {
    activation<Backward>(dpre, pre, length, function, vectorized);
}

KERNEL(256)
linear_activation_backward_bias_f32(float* __restrict__ partial, float* __restrict__ dpre, float* __restrict__ y,
                                    const float* __restrict__ pre, const RowSums shape, const u32 function) {
    activation_backward_bias(partial, dpre, y, pre, shape, function);
}

KERNEL(256)
linear_activation_backward_bias_bf16(float* __restrict__ partial, bf16* __restrict__ dpre, bf16* __restrict__ y,
                                     const bf16* __restrict__ pre, const RowSums shape, const u32 function) {
    activation_backward_bias(partial, dpre, y, pre, shape, function);
}

KERNEL(256)
linear_bias_backward_partial_f32(float* __restrict__ partial, const float* __restrict__ dy, const RowSums shape) {
    sum_rows(partial, Gradient<float>{dy}, shape);
}

KERNEL(256)
linear_bias_backward_partial_bf16(float* __restrict__ partial, const bf16* __restrict__ dy, const RowSums shape) {
    sum_rows(partial, Gradient<bf16>{dy}, shape);
}

KERNEL(512)
linear_bias_backward_finish_f32(float* __restrict__ dbias, const float* __restrict__ partial, const u32 parts,
                                const u32 columns) {
    const u32 column = block_index() * 32 + lane_index();
    const bool inside = column < columns;
    const float sum = sum_of_column<FINISH_WARPS>(shared_memory<float>(), partial + column, inside, parts, columns);
    if (warp_index() == 0 && inside) dbias[column] += sum;
}

KERNEL(128)
linear_bias_round_bf16(bf16* __restrict__ rounded, const float* __restrict__ bias, const u32 columns) {
    const u32 column = block_index() * 128 + thread_index();
    if (column < columns) Element<bf16>::store(rounded + column, bias[column]);
}
