// Rows of a LayerNorm: the sizes that all its kernels get, and rows in registers.
#ifndef VITMAE_LAYERNORM_CUH
#define VITMAE_LAYERNORM_CUH

#include "device.cuh"

// The path of a launch other than a number of units: how a row is walked.
constexpr u32 PATH_ELEMENTS = 0;

// What is the same for all threads. `LayerNormParameters` in src/cuda/layernorm.rs, same layout.
struct LayerNormShape {
    u32 rows;
    u32 width;            // D
    float inverse_width;  // 1 / D
    float epsilon;        // forward
    u32 path;             // 0: by elements; 1 to 5: units of 256 columns in registers; beyond: by vectors
    u32 blocks;           // backward: of the grid
    u32 accumulate;       // backward: 1 to add to dx
};

template <typename T>
DEVICE T* row_of(T* matrix, u32 row, const LayerNormShape& shape) {
    return matrix + static_cast<u64>(row) * shape.width;
}

// Rows in registers: a lane's vectors of ROWS consecutive rows. What is outside the matrix is zero.
template <typename T, u32 UNITS, u32 ROWS>
struct Registers {
    static constexpr u32 WIDTH = Element<T>::PER_16_BYTES;
    static constexpr u32 VECTORS = UNITS * 8 / WIDTH;

    u32x4 words[ROWS][VECTORS];

    // First column of a lane's vector.
    DEVICE static u32 column(u32 vector) { return (vector * 32 + lane_index()) * WIDTH; }

    // OWN: the matrix is written later in the launch.
    template <bool OWN>
    DEVICE void load(const T* matrix, u32 first, const LayerNormShape& shape) {
        UNROLL
        for (u32 r = 0; r < ROWS; ++r) {
            const T* row = row_of(matrix, first + r, shape);
            UNROLL
            for (u32 v = 0; v < VECTORS; ++v) {
                words[r][v] = {0, 0, 0, 0};
                if (first + r < shape.rows && column(v) < shape.width) {
                    words[r][v] = OWN ? load_own_16(row + column(v)) : load_16(row + column(v));
                }
            }
        }
    }

    DEVICE void unpack(u32 row, u32 vector, float* values) const { Element<T>::unpack(words[row][vector], values); }

    // Before a further pass: unpack again, instead of keeping twice as many registers of unpacked bf16 from the pass before.
    DEVICE void forget_unpacked() {
        UNROLL
        for (u32 r = 0; r < ROWS; ++r) {
            UNROLL
            for (u32 v = 0; v < VECTORS; ++v) {
                u32x4& w = words[r][v];
                w = {opaque(w.x), opaque(w.y), opaque(w.z), opaque(w.w)};
            }
        }
    }
};

#endif
