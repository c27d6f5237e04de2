// Softmax cross-entropy with hard labels and label smoothing (Szegedy et al., arXiv 1512.00567, section 7), and its gradient.
//
//   p = softmax(logits[r, :])          t = (1 - smoothing) * one_hot(labels[r]) + smoothing / K
//   row_loss[r] = -sum of t * ln(p)    dlogits[r, :] = scale * (p - t)
//
//   cross_entropy_forward_backward_f32, cross_entropy_forward_backward_bf16
//
// logits, dlogits [rows, K], f32 or bf16; labels [rows], u32; row_loss [rows], f32. Outputs are assigned. The step's loss is
// scale times the sum of row_loss: loss_sum in kernels/loss.cu. Arithmetic in f32, logits relative to the largest. A label
// that is no class gives NaN everywhere in its row. No aliasing.
//
// Method: one warp per row, in two passes. The first keeps, per lane, the largest logit so far and the sum of exponentials
// relative to it (Milakov and Gimelshein, arXiv 1805.02867), and merges the lanes; the second reads the row again, from the
// caches, and writes the gradient.
//
// Preconditions, checked by the launcher (src/cuda/cross_entropy.rs): 1 <= K < 2^31, rows < 2^31, buffer lengths; `vectorized`
// is 1 only where 16-byte vectors divide a row and logits and dlogits are 16-byte aligned.
// Launch: grid ceil(rows / 4), block 128, no shared memory.
// Bytes, m = rows * K: 2 m or 4 m read (twice, the second time from the caches) and written. FLOPs: 10 m, and 2 m
// exponentials.
// Bound by: memory; at the usual sizes (1024 x 1000) by latency and the launch.
#include "device.cuh"

constexpr u32 WARPS = 4;

// `CrossEntropyParameters` in src/cuda/cross_entropy.rs, same layout.
struct CrossEntropyShape {
    u32 rows;
    u32 classes;
    u32 vectorized;   // whether rows are whole aligned vectors
    float hit;        // 1 - smoothing
    float smoothing;
    float spread;     // smoothing / K
    float scale;
};

// WIDTH logits as floats.
template <u32 WIDTH, typename T>
DEVICE void load_logits(const T* address, float* values) {
    if constexpr (WIDTH == 1) {
        values[0] = Element<T>::load(address);
    } else {
        Element<T>::unpack(load_16(address), values);
    }
}

template <typename T, u32 WIDTH>
DEVICE void cross_entropy_of_row(float* row_loss, T* dlogits, const T* logits, u32 label, const CrossEntropyShape& shape) {
    // Finite, so that a difference of two is never infinity less infinity.
    float largest = -3.4e38f, sum = 0.0f, total = 0.0f;
    for (u32 column = lane_index() * WIDTH; column < shape.classes; column += 32 * WIDTH) {
        float values[WIDTH];
        load_logits<WIDTH>(logits + column, values);
        float larger = largest;
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) {
            if (values[k] > larger) larger = values[k];
            total += values[k];
        }
        sum *= exponential(largest - larger);
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) sum += exponential(values[k] - larger);
        largest = larger;
    }
    float over_all = largest;
    UNROLL
    for (u32 distance = 16; distance > 0; distance /= 2) {
        const float other = shuffle_xor(over_all, distance);
        if (other > over_all) over_all = other;
    }
    sum = warp_sum(sum * exponential(largest - over_all));
    total = warp_sum(total);
    if (lane_index() == 0) {
        const float logit = Element<T>::load(logits + label) - over_all;
        float expected = shape.hit * logit;
        // Only then: an infinite logit costs nothing where the target has no share of it.
        if (shape.smoothing != 0.0f) {
            const float mean = divide_rn(total, static_cast<float>(shape.classes)) - over_all;
            expected = multiply_add_rn(shape.smoothing, mean, expected);
        }
        *row_loss = natural_logarithm(sum) - expected;
    }
    const float factor = divide_rn(shape.scale, sum);
    for (u32 column = lane_index() * WIDTH; column < shape.classes; column += 32 * WIDTH) {
        float values[WIDTH];
        load_logits<WIDTH>(logits + column, values);
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) {
            const float target = column + k == label ? shape.hit + shape.spread : shape.spread;
            values[k] = multiply_add_rn(exponential(values[k] - over_all), factor, -(target * shape.scale));
        }
        if constexpr (WIDTH == 1) {
            Element<T>::store(dlogits + column, values[0]);
        } else {
            Element<T>::store_vector(dlogits + column, values);
        }
    }
}

template <typename T>
DEVICE void cross_entropy(float* row_loss, T* dlogits, const T* logits, const u32* labels, const CrossEntropyShape& shape) {
    const u32 row = block_index() * WARPS + warp_index();
    if (row >= shape.rows) return;
    const u64 start = static_cast<u64>(row) * shape.classes;
    const u32 label = labels[row];
    if (label >= shape.classes) {
        const float nan = quiet_nan();
        for (u32 column = lane_index(); column < shape.classes; column += 32) {
            Element<T>::store(dlogits + start + column, nan);
        }
        if (lane_index() == 0) row_loss[row] = nan;
    } else if (shape.vectorized) {
        cross_entropy_of_row<T, Element<T>::PER_16_BYTES>(row_loss + row, dlogits + start, logits + start, label, shape);
    } else {
        cross_entropy_of_row<T, 1>(row_loss + row, dlogits + start, logits + start, label, shape);
    }
}

KERNEL(128)
cross_entropy_forward_backward_f32(float* __restrict__ row_loss, float* __restrict__ dlogits,
                                   const float* __restrict__ logits, const u32* __restrict__ labels,
                                   const CrossEntropyShape shape) {
    cross_entropy(row_loss, dlogits, logits, labels, shape);
}

KERNEL(128)
cross_entropy_forward_backward_bf16(float* __restrict__ row_loss, bf16* __restrict__ dlogits,
                                    const bf16* __restrict__ logits, const u32* __restrict__ labels,
                                    const CrossEntropyShape shape) {
    cross_entropy(row_loss, dlogits, logits, labels, shape);
}
