// The masked reconstruction loss and its gradient in one pass (He et al., arXiv 2111.06377, section 3).
//
//   patch_loss[r] = mean over (p, q, c) of (prediction[r, (p, q, c)] - target(b, i, (p, q, c)))^2     r = b * n + k, i = ids[b, k]
//   dprediction[r, :] = (prediction[r, :] - target) * 2 * scale / length
//   loss += scale * sum over r of patch_loss[r]
//
// target: the pixels of patch i of sample b, rebuilt here; with norm_pix_loss each patch is (t - mean) / sqrt(variance + 1e-6)
// with the unbiased variance. Where mask[b, i] is 0 (visible), patch_loss and dprediction are 0 and nothing is read.
//
//   loss_forward_backward_u8_*    pixels [B, H, W, C], u8; the value is (v / 255 - mean[c]) / deviation[c], computed as one
//                                 multiply-add: within a few units in the last place of the divisions
//   loss_forward_backward_f32_*   pixels [B, C, H, W], f32, already normalised
//   loss_sum                      loss [1] += scale * sum of patch_loss [rows], in f64, in a fixed order
//
// prediction, dprediction [B * n, ph * pw * C], f32 or bf16, in the order (p, q, c); ids [B, n], u32; mask [B, L], f32; mean,
// deviation [C], f32; patch_loss [B * n], f32. Outputs are assigned, but for loss. Arithmetic in f32, two passes for mean and
// variance. An id that is no patch gives NaN everywhere in its row. No aliasing.
//
// Method: one warp per patch. Its targets stay in registers (up to 1024 numbers of 4 or 8 to a vector), and are computed again
// for each pass where there are more, or where vectors do not fit. Every lane takes every 32nd vector; sums over the warp are
// butterflies. In the order (p, q, c) a vector of a patch line is a vector of an interleaved picture's bytes, which is one
// load where alignment allows.
//
// Preconditions, checked by the launcher (src/cuda/loss.rs): ph | H, pw | W, C * H * W < 2^31, B * n < 2^31, buffer lengths,
// C <= 2048; `vector` is 8 or 4 only where it divides a row and prediction and dprediction are 16-byte (f32, or 8 bf16) or
// 8-byte aligned (4 bf16), else 1; `wide` is 1 only where it divides a patch line and every line starts at a multiple of it.
// Launch: grid ceil(B * n / 4), block 128; u8: 8 C bytes of dynamic shared memory. loss_sum: grid 1, block 512, 4 KiB.
// Bytes, m = B * n * C * ph * pw: m (u8) or 4 m (f32), 2 m or 4 m read and written. FLOPs: 9 m, and 5 m with norm_pix_loss.
// Bound by: memory.
#include "device.cuh"

constexpr u32 WARPS = 4;
// Targets that a lane keeps in registers.
constexpr u32 KEPT = 32;
constexpr u32 SUM_THREADS = 512;

// Everything about a launch that is the same for all threads. `LossParameters` in src/cuda/loss.rs, same layout.
struct LossShape {
    u32 rows;           // B * n
    u32 patches;        // L
    u32 channels;       // C
    u32 height;         // H
    u32 width;          // W
    u32 patch_height;   // ph
    u32 patch_width;    // pw
    u32 length;         // C * ph * pw
    u32 vector;         // 8, 4 or 1
    u32 wide;           // u8: whether the bytes of a vector are one aligned load
    u32 normalise;      // norm_pix_loss
    float factor;       // 2 * scale / length
    Divider predicted;  // row -> sample; n
    Divider grid_width; // patch -> (py, px); W / pw
    Divider line;       // element -> (p, element of the line); pw * C
    Divider channel;    // element of the line -> (q, c); C
};

// value = byte * scale + offset, of one channel.
struct alignas(8) Channel {
    float scale;
    float offset;
};

// A patch of an interleaved picture of bytes.
struct BytePatch {
    const u8* origin;
    const Channel* channels;

    DEVICE BytePatch(const u8* pixels, const Channel* channels, u64 sample, u32 y, u32 x, const LossShape& shape)
        : channels(channels) {
        const u64 image = shape.height * shape.width * shape.channels;
        origin = pixels + sample * image + (y * shape.width + x) * shape.channels;
    }

    // VECTOR targets from an element on.
    template <u32 VECTOR>
    DEVICE void targets(float* values, u32 element, const LossShape& shape) const {
        u32 p = 0, channel = element;
        p = divide(channel, shape.line);
        u32 in_line = channel;
        divide(channel, shape.channel);
        const u32 pitch = shape.width * shape.channels;
        const u8* line = origin + p * pitch;
        u64 bytes = 0;
        if (VECTOR == 8 && shape.wide) bytes = *reinterpret_cast<const u64*>(line + in_line);
        if (VECTOR == 4 && shape.wide) bytes = *reinterpret_cast<const u32*>(line + in_line);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            u32 byte;
            if (VECTOR > 1 && shape.wide) {
                byte = static_cast<u32>(bytes >> (8 * k)) & 255;
            } else {
                byte = line[in_line];
                if (++in_line == shape.line.divisor) {
                    in_line = 0;
                    line += pitch;
                }
            }
            const Channel constants = channels[channel];
            values[k] = multiply_add_rn(static_cast<float>(byte), constants.scale, constants.offset);
            if (++channel == shape.channels) channel = 0;
        }
    }
};

// A patch of a planar picture of floats.
struct FloatPatch {
    const float* origin;

    DEVICE FloatPatch(const float* pixels, const Channel*, u64 sample, u32 y, u32 x, const LossShape& shape) {
        const u64 image = shape.height * shape.width * shape.channels;
        origin = pixels + sample * image + y * shape.width + x;
    }

    template <u32 VECTOR>
    DEVICE void targets(float* values, u32 element, const LossShape& shape) const {
        u32 channel = element;
        u32 p = divide(channel, shape.line);
        u32 q = divide(channel, shape.channel);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            values[k] = origin[(channel * shape.height + p) * shape.width + q];
            if (k + 1 < VECTOR && ++channel == shape.channels) {
                channel = 0;
                if (++q == shape.patch_width) {
                    q = 0;
                    ++p;
                }
            }
        }
    }
};

// VECTOR numbers of a row as floats.
template <u32 VECTOR>
DEVICE void load_vector(const float* address, float* values) {
    if constexpr (VECTOR == 1) {
        values[0] = *address;
    } else {
        UNROLL
        for (u32 k = 0; k < VECTOR; k += 4) Element<float>::unpack(load_16(address + k), values + k);
    }
}

template <u32 VECTOR>
DEVICE void load_vector(const bf16* address, float* values) {
    if constexpr (VECTOR == 1) {
        values[0] = Element<bf16>::load(address);
    } else if constexpr (VECTOR == 4) {
        const u64 words = *reinterpret_cast<const u64*>(address);
        values[0] = bits_float(static_cast<u32>(words) << 16);
        values[1] = bits_float(static_cast<u32>(words) & 0xffff0000u);
        values[2] = bits_float(static_cast<u32>(words >> 32) << 16);
        values[3] = bits_float(static_cast<u32>(words >> 32) & 0xffff0000u);
    } else {
        Element<bf16>::unpack(load_16(address), values);
    }
}

template <u32 VECTOR>
DEVICE void store_vector(float* address, const float* values) {
    if constexpr (VECTOR == 1) {
        *address = values[0];
    } else {
        UNROLL
        for (u32 k = 0; k < VECTOR; k += 4) Element<float>::store_vector(address + k, values + k);
    }
}

template <u32 VECTOR>
DEVICE void store_vector(bf16* address, const float* values) {
    if constexpr (VECTOR == 1) {
        Element<bf16>::store(address, values[0]);
    } else if constexpr (VECTOR == 4) {
        const u64 high = pack_bf16(values[2], values[3]);
        *reinterpret_cast<u64*>(address) = pack_bf16(values[0], values[1]) | high << 32;
    } else {
        Element<bf16>::store_vector(address, values);
    }
}

// A lane's share of a patch's targets: kept in registers, or computed at every pass.
template <typename P, u32 VECTOR, bool IN_REGISTERS>
struct Targets {
    const P& patch;
    const LossShape& shape;
    u32 vectors;
    float kept[IN_REGISTERS ? KEPT : 1];

    DEVICE Targets(const P& patch, const LossShape& shape)
        : patch(patch), shape(shape), vectors(shape.length / VECTOR) {
        if constexpr (IN_REGISTERS) {
            UNROLL
            for (u32 i = 0; i < KEPT / VECTOR; ++i) {
                const u32 vector = 32 * i + lane_index();
                if (vector < vectors) patch.template targets<VECTOR>(kept + i * VECTOR, vector * VECTOR, shape);
            }
        }
    }

    // Calls visit(element, targets) for each of the lane's vectors, in order.
    template <typename F>
    DEVICE void each(F visit) const {
        if constexpr (IN_REGISTERS) {
            UNROLL
            for (u32 i = 0; i < KEPT / VECTOR; ++i) {
                const u32 vector = 32 * i + lane_index();
                if (vector < vectors) visit(vector * VECTOR, kept + i * VECTOR);
            }
        } else {
            for (u32 vector = lane_index(); vector < vectors; vector += 32) {
                float values[VECTOR];
                patch.template targets<VECTOR>(values, vector * VECTOR, shape);
                visit(vector * VECTOR, values);
            }
        }
    }
};

// One patch, by one warp.
template <typename T, typename P, u32 VECTOR, bool IN_REGISTERS>
DEVICE void compare(float* patch_loss, T* dprediction, const T* prediction, const P& patch, const LossShape& shape) {
    const Targets<P, VECTOR, IN_REGISTERS> targets(patch, shape);
    const float count = static_cast<float>(shape.length);
    float mean = 0.0f, scale = 1.0f;
    if (shape.normalise) {
        float sum = 0.0f;
        targets.each([&](u32, const float* values) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) sum += values[k];
        });
        mean = divide_rn(warp_sum(sum), count);
        float squares = 0.0f;
        targets.each([&](u32, const float* values) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) squares += (values[k] - mean) * (values[k] - mean);
        });
        // Unbiased, but for a patch of one number.
        const float variance = divide_rn(warp_sum(squares), shape.length > 1 ? count - 1.0f : 1.0f);
        scale = divide_rn(1.0f, square_root_rn(variance + 1e-6f));
    }
    float squares = 0.0f;
    targets.each([&](u32 element, const float* values) {
        float predicted[VECTOR];
        load_vector<VECTOR>(prediction + element, predicted);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            const float difference = predicted[k] - (values[k] - mean) * scale;
            squares += difference * difference;
            predicted[k] = difference * shape.factor;
        }
        store_vector<VECTOR>(dprediction + element, predicted);
    });
    squares = warp_sum(squares);
    if (lane_index() == 0) *patch_loss = divide_rn(squares, count);
}

template <typename T, typename P, u32 VECTOR>
DEVICE void compare(float* patch_loss, T* dprediction, const T* prediction, const P& patch, const LossShape& shape) {
    // Without vectors there is nothing to gain that is worth the code.
    if (VECTOR > 1 && shape.length <= 32 * KEPT) {
        compare<T, P, VECTOR, (VECTOR > 1)>(patch_loss, dprediction, prediction, patch, shape);
    } else {
        compare<T, P, VECTOR, false>(patch_loss, dprediction, prediction, patch, shape);
    }
}

template <typename T, typename P, typename V>
DEVICE void loss_forward_backward(float* patch_losses, T* dpredictions, const T* predictions, const V* pixels,
                                  const Channel* channels, const u32* ids, const float* mask, const LossShape& shape) {
    const u32 row = block_index() * WARPS + warp_index();
    if (row >= shape.rows) return;
    const u64 sample = shape.predicted.quotient(row);
    const u32 id = ids[row];
    const bool exists = id < shape.patches;
    const u64 start = static_cast<u64>(row) * shape.length;
    T* dprediction = dpredictions + start;
    if (!exists || mask[sample * shape.patches + id] == 0.0f) {
        const float nothing = exists ? 0.0f : bits_float(0x7fc00000u);
        for (u32 element = lane_index(); element < shape.length; element += 32) Element<T>::store(dprediction + element, nothing);
        if (lane_index() == 0) patch_losses[row] = nothing;
        return;
    }
    u32 px = id;
    const u32 py = divide(px, shape.grid_width);
    const P patch(pixels, channels, sample, py * shape.patch_height, px * shape.patch_width, shape);
    float* patch_loss = patch_losses + row;
    const T* prediction = predictions + start;
    if (shape.vector == 8) return compare<T, P, 8>(patch_loss, dprediction, prediction, patch, shape);
    if (shape.vector == 4) return compare<T, P, 4>(patch_loss, dprediction, prediction, patch, shape);
    compare<T, P, 1>(patch_loss, dprediction, prediction, patch, shape);
}

template <typename T>
DEVICE void loss_of_bytes(float* patch_loss, T* dprediction, const T* prediction, const u8* pixels, const float* mean,
                          const float* deviation, const u32* ids, const float* mask, const LossShape& shape) {
    Channel* channels = shared_memory<Channel>();
    for (u32 channel = thread_index(); channel < shape.channels; channel += block_threads()) {
        channels[channel].scale = divide_rn(1.0f / 255.0f, deviation[channel]);
        channels[channel].offset = divide_rn(-mean[channel], deviation[channel]);
    }
    block_barrier();
    loss_forward_backward<T, BytePatch>(patch_loss, dprediction, prediction, pixels, channels, ids, mask, shape);
}

KERNEL(128)
loss_forward_backward_u8_f32(float* __restrict__ patch_loss, float* __restrict__ dprediction,
                             const float* __restrict__ prediction, const u8* __restrict__ pixels,
                             const float* __restrict__ mean, const float* __restrict__ deviation,
                             const u32* __restrict__ ids, const float* __restrict__ mask, const LossShape shape) {
    loss_of_bytes(patch_loss, dprediction, prediction, pixels, mean, deviation, ids, mask, shape);
}

KERNEL(128)
loss_forward_backward_u8_bf16(float* __restrict__ patch_loss, bf16* __restrict__ dprediction,
                              const bf16* __restrict__ prediction, const u8* __restrict__ pixels,
                              const float* __restrict__ mean, const float* __restrict__ deviation,
                              const u32* __restrict__ ids, const float* __restrict__ mask, const LossShape shape) {
    loss_of_bytes(patch_loss, dprediction, prediction, pixels, mean, deviation, ids, mask, shape);
}

KERNEL(128)
loss_forward_backward_f32_f32(float* __restrict__ patch_loss, float* __restrict__ dprediction,
                              const float* __restrict__ prediction, const float* __restrict__ pixels,
                              const u32* __restrict__ ids, const float* __restrict__ mask, const LossShape shape) {
    loss_forward_backward<float, FloatPatch>(patch_loss, dprediction, prediction, pixels, nullptr, ids, mask, shape);
}

KERNEL(128)
loss_forward_backward_f32_bf16(float* __restrict__ patch_loss, bf16* __restrict__ dprediction,
                               const bf16* __restrict__ prediction, const float* __restrict__ pixels,
                               const u32* __restrict__ ids, const float* __restrict__ mask, const LossShape shape) {
    loss_forward_backward<bf16, FloatPatch>(patch_loss, dprediction, prediction, pixels, nullptr, ids, mask, shape);
}

KERNEL(512)
loss_sum(float* __restrict__ loss, const float* __restrict__ patch_loss, u32 rows, float scale) {
    double sum = 0.0;
    for (u32 row = thread_index(); row < rows; row += SUM_THREADS) sum += patch_loss[row];
    sum = block_sum<SUM_THREADS>(sum);
    if (thread_index() == 0) *loss += static_cast<float>(scale * sum);
}
