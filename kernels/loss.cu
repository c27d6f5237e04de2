// The masked reconstruction loss and its gradient in one pass (He et al., arXiv 2111.06377, section 3).
//
//   patch_loss[r] = mean over (p, q, c) of (prediction[r, (p, q, c)] - target(b, i, (p, q, c)))^2
//                   of row r = b * n + k, patch i = ids[b, k]
//   dprediction[r, :] = (prediction[r, :] - target) * 2 * scale / length
//   loss += scale * sum over r of patch_loss[r]
//
// target: the pixels of patch i of sample b, rebuilt here; with norm_pix_loss each patch is
// (t - mean) / sqrt(variance + 1e-6), with the unbiased variance. Where mask[b, i] is 0 (visible), patch_loss and dprediction
// are 0 and nothing is read.
//
//   loss_forward_backward_u8_*    pixels [B, H, W, C], u8; the value is (v / 255 - mean[c]) / deviation[c], computed as one
//                                 multiply-add: within a few units in the last place of the divisions
//   loss_forward_backward_f32_*   pixels [B, C, H, W], f32, already normalised
//   loss_sum                      loss [1] += scale * sum of patch_loss [rows], in f64, in a fixed order
//
// Ops of loss_sum: loss_forward_backward, cross_entropy_forward_backward
//
// prediction, dprediction [B * n, ph * pw * C], f32 or bf16, in the order (p, q, c); ids [B, n], u32; mask [B, L], f32; mean,
// deviation [C], f32; patch_loss [B * n], f32. Outputs are assigned, but for loss. Arithmetic in f32, two passes for mean and
// variance. An id that is no patch gives NaN everywhere in its row. No aliasing.
//
// Method: one warp per patch. Its predictions and targets stay in registers (up to 1024 numbers, 4 or 8 to a vector), and are
// read and computed again for each pass where there are more, or where vectors do not fit. Every lane takes every 32nd
// vector; sums over the warp are butterflies. In the order (p, q, c) a vector of a patch line is a vector of an interleaved
// picture's bytes, which is one load where alignment allows.
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

    // The bytes of VECTOR targets from an element on, where they are one load.
    template <u32 VECTOR>
    DEVICE u64 fetch(u32 element, const LossShape& shape) const {
        const u32 p = divide(element, shape.line);
        const u8* address = origin + p * (shape.width * shape.channels) + element;
        if constexpr (VECTOR == 8) return *reinterpret_cast<const u64*>(address);
        return *reinterpret_cast<const u32*>(address);
    }

    // The targets themselves; `bytes`: what was fetched.
    template <u32 VECTOR>
    DEVICE void targets(float* values, u32 element, u64 bytes, const LossShape& shape) const {
        const u32 p = divide(element, shape.line);
        u32 channel = element;
        divide(channel, shape.channel);
        const auto next = [&](u32 byte) {
            const Channel constants = channels[channel];
            if (++channel == shape.channels) channel = 0;
            return multiply_add_rn(static_cast<float>(byte), constants.scale, constants.offset);
        };
        if (VECTOR > 1 && shape.wide) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) values[k] = next(static_cast<u32>(bytes >> (8 * k)) & 255);
        } else {
            const u32 pitch = shape.width * shape.channels;
            const u8* line = origin + p * pitch;
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) {
                values[k] = next(line[element]);
                if (k + 1 < VECTOR && ++element == shape.line.divisor) {
                    element = 0;
                    line += pitch;
                }
            }
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

    // Nothing: every number is a load of its own.
    template <u32 VECTOR>
    DEVICE u64 fetch(u32, const LossShape&) const {
        return 0;
    }

    template <u32 VECTOR>
    DEVICE void targets(float* values, u32 element, u64, const LossShape& shape) const {
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

// VECTOR numbers of a row as they are in memory.
template <typename T, u32 VECTOR>
struct Packed {
    static constexpr u32 BYTES = VECTOR * sizeof(T);
    u32 words[(BYTES + 3) / 4];

    DEVICE void load(const T* address) {
        if constexpr (VECTOR == 1) {
            words[0] = float_bits(Element<T>::load(address));
        } else if constexpr (BYTES == 8) {
            const u64 both = *reinterpret_cast<const u64*>(address);
            words[0] = static_cast<u32>(both);
            words[1] = static_cast<u32>(both >> 32);
        } else {
            UNROLL
            for (u32 i = 0; i < BYTES / 16; ++i) {
                const u32x4 four = load_16(reinterpret_cast<const u8*>(address) + 16 * i);
                words[4 * i] = four.x;
                words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z;
                words[4 * i + 3] = four.w;
            }
        }
    }

    DEVICE void unpack(float* values) const {
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            if constexpr (VECTOR == 1 || sizeof(T) == 4) {
                values[k] = bits_float(words[k]);
            } else {
                values[k] = bits_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u);
            }
        }
    }
};

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

// A lane's share of a patch: predictions and targets, kept in registers, or read and computed at every pass.
template <typename T, typename P, u32 VECTOR, bool IN_REGISTERS>
struct Share {
    static constexpr u32 COUNT = IN_REGISTERS ? KEPT / VECTOR : 1;
    const P& patch;
    const T* prediction;
    const LossShape& shape;
    u32 vectors;
    float targets[COUNT * VECTOR];
    Packed<T, VECTOR> predicted[COUNT];

    DEVICE Share(const P& patch, const T* prediction, const LossShape& shape)
        : patch(patch), prediction(prediction), shape(shape), vectors(shape.length / VECTOR) {
        if constexpr (IN_REGISTERS) {
            // All loads first, so that they are in flight together.
            u64 bytes[COUNT];
            UNROLL
            for (u32 i = 0; i < COUNT; ++i) {
                const u32 vector = 32 * i + lane_index();
                bytes[i] = shape.wide && vector < vectors ? patch.template fetch<VECTOR>(vector * VECTOR, shape) : 0;
            }
            UNROLL
            for (u32 i = 0; i < COUNT; ++i) {
                const u32 vector = 32 * i + lane_index();
                if (vector < vectors) predicted[i].load(prediction + vector * VECTOR);
            }
            UNROLL
            for (u32 i = 0; i < COUNT; ++i) {
                const u32 vector = 32 * i + lane_index();
                if (vector < vectors) {
                    patch.template targets<VECTOR>(targets + i * VECTOR, vector * VECTOR, bytes[i], shape);
                }
            }
        }
    }

    // Calls visit(element, targets, predicted) for each of the lane's vectors, in order.
    template <typename F>
    DEVICE void each(F visit) {
        if constexpr (IN_REGISTERS) {
            UNROLL
            for (u32 i = 0; i < COUNT; ++i) {
                const u32 vector = 32 * i + lane_index();
                if (vector < vectors) visit(vector * VECTOR, targets + i * VECTOR, predicted[i]);
            }
        } else {
            for (u32 vector = lane_index(); vector < vectors; vector += 32) {
                const u32 element = vector * VECTOR;
                predicted[0].load(prediction + element);
                const u64 bytes = VECTOR > 1 && shape.wide ? patch.template fetch<VECTOR>(element, shape) : 0;
                patch.template targets<VECTOR>(targets, element, bytes, shape);
                visit(element, targets, predicted[0]);
            }
        }
    }
};

// One patch, by one warp.
template <typename T, typename P, u32 VECTOR, bool IN_REGISTERS>
DEVICE void compare(float* patch_loss, T* dprediction, const T* prediction, const P& patch, const LossShape& shape) {
    using Predicted = Packed<T, VECTOR>;
    Share<T, P, VECTOR, IN_REGISTERS> share(patch, prediction, shape);
    const float count = static_cast<float>(shape.length);
    float mean = 0.0f, scale = 1.0f;
    if (shape.normalise) {
        float sum = 0.0f;
        share.each([&](u32, const float* targets, const Predicted&) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) sum += targets[k];
        });
        mean = divide_rn(warp_sum(sum), count);
        float squares = 0.0f;
        share.each([&](u32, const float* targets, const Predicted&) {
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) squares += (targets[k] - mean) * (targets[k] - mean);
        });
        // Unbiased, but for a patch of one number.
        const float variance = divide_rn(warp_sum(squares), shape.length > 1 ? count - 1.0f : 1.0f);
        scale = divide_rn(1.0f, square_root_rn(variance + 1e-6f));
    }
    float squares = 0.0f;
    share.each([&](u32 element, const float* targets, const Predicted& predicted) {
        float values[VECTOR];
        predicted.unpack(values);
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            const float difference = values[k] - (targets[k] - mean) * scale;
            squares += difference * difference;
            values[k] = difference * shape.factor;
        }
        store_vector<VECTOR>(dprediction + element, values);
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
        const float nothing = exists ? 0.0f : quiet_nan();
        for (u32 element = lane_index(); element < shape.length; element += 32) {
            Element<T>::store(dprediction + element, nothing);
        }
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
