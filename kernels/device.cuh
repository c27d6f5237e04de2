// Helpers that several kernels share: division by launch constants, sums, Philox, element types. Plain C++ over ptx.cuh.
#ifndef VITMAE_DEVICE_CUH
#define VITMAE_DEVICE_CUH

#include "ptx.cuh"

DEVICE u32 minimum(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u64 minimum(u64 a, u64 b) { return a < b ? a : b; }

// What an id that exists nowhere gives.
DEVICE float quiet_nan() { return bits_float(0x7fc00000u); }

constexpr float LOG2_E = 1.4426950408889634f;

// e^x to about 2^-22.
DEVICE float exponential(float x) { return exp2_approximate(x * LOG2_E); }

DEVICE u32 multiply_high(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }

// Division by a number that is known at launch, in three instructions instead of about twenty (Granlund and Montgomery,
// "Division by Invariant Integers using Multiplication", 1994). Exact for dividends below 2^31. The launcher fills it in
// (`Divider` in src/cuda/launch.rs, same layout); the divisor is not 0.
struct Divider {
    u32 divisor;
    u32 multiplier;
    u32 shift;

    DEVICE u32 quotient(u32 dividend) const { return (multiply_high(dividend, multiplier) + dividend) >> shift; }
};

// Quotient and remainder; the remainder replaces the dividend.
DEVICE u32 divide(u32& dividend, const Divider& by) {
    const u32 quotient = by.quotient(dividend);
    dividend -= quotient * by.divisor;
    return quotient;
}

// The sum over a warp, the same bits in every lane: a butterfly adds equal pairs everywhere.
DEVICE float warp_sum(float value) {
    UNROLL
    for (u32 distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
}

// The sum over a block of THREADS threads, by halves through shared memory of 8 bytes per thread. Every thread gets it.
template <u32 THREADS>
DEVICE double block_sum(double value) {
    double* sums = shared_memory<double>();
    const u32 thread = thread_index();
    sums[thread] = value;
    block_barrier();
    for (u32 width = THREADS / 2; width > 0; width /= 2) {
        if (thread < width) sums[thread] += sums[thread + width];
        block_barrier();
    }
    return sums[0];
}

// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four random words from a counter and
// a key. The CPU side uses the rand_philox crate; both are held against Random123's known answers.
DEVICE u32x4 philox(u32x4 counter, u32 key_low, u32 key_high) {
    for (u32 round = 0; round < 10; ++round) {
        const u64 product_0 = static_cast<u64>(0xD2511F53u) * counter.x;
        const u64 product_1 = static_cast<u64>(0xCD9E8D57u) * counter.z;
        counter = {static_cast<u32>(product_1 >> 32) ^ counter.y ^ key_low, static_cast<u32>(product_1),
                   static_cast<u32>(product_0 >> 32) ^ counter.w ^ key_high, static_cast<u32>(product_0)};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

// What a random number is for: the top byte of the counter's last word, so that no two uses share a number.
constexpr u32 STREAM_MASKING = 1;

// Block `block` of the random numbers of one sample in one epoch.
DEVICE u32x4 philox_of_sample(u32 block, u32 stream, u64 sample, u32 epoch, u64 seed) {
    const u32 sample_high = static_cast<u32>(sample >> 32) & 0x00ffffffu;
    const u32x4 counter = {block, epoch, static_cast<u32>(sample), sample_high | (stream << 24)};
    return philox(counter, static_cast<u32>(seed), static_cast<u32>(seed >> 32));
}

// An element type: how many make 16 bytes, and how to load and store one and sixteen bytes of them as floats.
template <typename T>
struct Element;

template <>
struct Element<float> {
    static constexpr u32 PER_16_BYTES = 4;

    DEVICE static float load(const float* address) { return *address; }

    DEVICE static void unpack(const u32x4& words, float* values) {
        values[0] = bits_float(words.x);
        values[1] = bits_float(words.y);
        values[2] = bits_float(words.z);
        values[3] = bits_float(words.w);
    }

    DEVICE static void store(float* address, float value) { *address = value; }

    DEVICE static void store_vector(float* address, const float* values) {
        store_16(address, {float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3])});
    }
};

template <>
struct Element<bf16> {
    static constexpr u32 PER_16_BYTES = 8;

    DEVICE static float load(const bf16* address) { return bits_float(static_cast<u32>(address->bits) << 16); }

    DEVICE static void unpack(const u32x4& words, float* values) {
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
        UNROLL
        for (u32 i = 0; i < 4; ++i) {
            values[2 * i] = bits_float(pairs[i] << 16);
            values[2 * i + 1] = bits_float(pairs[i] & 0xffff0000u);
        }
    }

    DEVICE static void store(bf16* address, float value) { address->bits = round_bf16(value); }

    DEVICE static void store_vector(bf16* address, const float* values) {
        store_16(address, {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                           pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7])});
    }
};

// WIDTH elements as floats: one, or as many as make 16 bytes at an address that is a multiple of 16. Memory that nothing
// writes during the launch.
template <u32 WIDTH, typename T>
DEVICE void load_elements(const T* address, float* values) {
    if constexpr (WIDTH == 1) {
        values[0] = Element<T>::load(address);
    } else {
        constexpr u32 PER_LOAD = Element<T>::PER_16_BYTES;
        UNROLL
        for (u32 first = 0; first < WIDTH; first += PER_LOAD) Element<T>::unpack(load_16(address + first), values + first);
    }
}

// Rounds and stores WIDTH floats: one, or as many as make 16 bytes.
template <u32 WIDTH, typename T>
DEVICE void store_elements(T* address, const float* values) {
    if constexpr (WIDTH == 1) {
        Element<T>::store(address, values[0]);
    } else {
        Element<T>::store_vector(address, values);
    }
}

// Sums of 32 neighbouring columns of a matrix [rows, stride], one per lane, by a block of WARPS warps in a fixed order: warp w
// takes rows w, w + WARPS, ...; the first warp then adds up the warps and returns the sums, the others return anything.
// `column` points to the lane's column of row 0; a lane with no column passes inside = false. `shared`: WARPS * 32 floats.
template <u32 WARPS, typename T>
DEVICE float sum_of_column(float* shared, const T* column, bool inside, u32 rows, u64 stride) {
    float sum = 0.0f;
    if (inside) {
        for (u32 row = warp_index(); row < rows; row += WARPS) sum += Element<T>::load(column + row * stride);
    }
    shared[thread_index()] = sum;
    block_barrier();
    sum = 0.0f;
    if (warp_index() == 0) {
        UNROLL
        for (u32 warp = 0; warp < WARPS; ++warp) sum += shared[warp * 32 + lane_index()];
    }
    return sum;
}

#endif
