// LayerNorm over the D features of each row (Ba et al., "Layer Normalization", arXiv 1607.06450), and its gradients.
//
//   layernorm_forward_*              n = (x - mean) * rstd,   y = n * gamma + beta,   rstd = 1 / sqrt(variance + epsilon)
//                                    mean and the (biased) variance over the row, in two passes over registers: the mean
//                                    first, then the squares of what is left, so that a large mean costs no digits
//   layernorm_backward_dx_WIDTH_*    g = dy * gamma,   dx = rstd * (g - mean(g) - n * mean(g * n));
//                                    and, per block, partial sums over rows of dy * n (for dgamma) and of dy (for dbeta).
//                                    WIDTH is the largest D that the kernel's registers hold: layernorm_backward_dx_256,
//                                    layernorm_backward_dx_512, layernorm_backward_dx_768, layernorm_backward_dx_1024,
//                                    layernorm_backward_dx_1280; or layernorm_backward_dx_any
//   layernorm_backward_parameters    dgamma += sum of the first partials, dbeta += sum of the second ones
//
// x, y, dy, dx [rows, D], f32 or bf16; gamma, beta, dgamma, dbeta [D], mean, rstd [rows], f32; partials [blocks, 2, D], f32.
// Forward assigns y, mean and rstd; backward needs x, mean and rstd again. dx is assigned, or, with `accumulate`, added to
// the gradient of the residual that is there. dgamma and dbeta accumulate. All arithmetic is in f32, with one rounding per
// output. Sums have a fixed order, which depends on the grid: the same on the same device. No aliasing.
//
// Method: a warp takes a row. Up to D = 1280 the row stays in registers between its one read and the write: lane l holds the
// 16-byte vectors l, l + 32, ... UNITS counts registers in units of 256 columns; narrow rows are taken several at a time, so
// that a warp always has 1 to 2 KB of loads in flight and gamma and beta are read once for all of them. In backward the
// blocks stay (a few per multiprocessor), so that each lane sums its columns of dgamma and dbeta in registers over all rows
// of its warp; the block adds its four warps at the end. Wider rows are read again for each pass, out of the caches, in
// vectors; rows that are no whole number of vectors, and buffers that are not 16-byte aligned, element by element. There
// the sums over rows are a second walk of the block, with a thread per column.
//
// Preconditions, checked by the launcher (src/cuda/layernorm.rs): 1 <= D < 2^30, rows < 2^31, buffer lengths, and for every
// path but 0 that D is a multiple of the vector and all pointers but mean, rstd, dgamma and dbeta of 16 bytes.
// Launch: forward grid ceil(rows / (4 * rows per warp)), block 128, no shared memory; dx grid `blocks`, block 128, shared
// memory 2048 * UNITS bytes (none for _any_); parameters grid ceil(2 D / 32), block 512, shared memory 2048 bytes.
// Bytes, e per element, n = rows * D: forward 2 e n; dx 3 e n, 4 e n where it accumulates, 2 e n more for _any_, which reads
// x and dy again for the sums; 8 D blocks for the partials, written and read. FLOPs: 8 n forward, 14 n backward.
// Bound by: memory.
#include "layernorm.cuh"

constexpr u32 WARPS = 4;
constexpr u32 PARAMETER_WARPS = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Forward

template <typename T, u32 UNITS, u32 ROWS>
DEVICE void forward_in_registers(T* y, float* mean, float* rstd, const T* x, const float* gamma, const float* beta,
                                 const LayerNormShape& shape) {
    using Row = Registers<T, UNITS, ROWS>;
    constexpr u32 WIDTH = Row::WIDTH;
    const u32 first = (block_index() * WARPS + warp_index()) * ROWS;
    if (first >= shape.rows) return;
    Row rows;
    rows.template load<false>(x, first, shape);
    float means[ROWS], rstds[ROWS];
    UNROLL
    for (u32 r = 0; r < ROWS; ++r) {
        float sum = 0.0f;
        UNROLL
        for (u32 v = 0; v < Row::VECTORS; ++v) {
            float values[WIDTH];
            rows.unpack(r, v, values);
            UNROLL
            for (u32 k = 0; k < WIDTH; ++k) sum += values[k];
        }
        means[r] = sum;
    }
    // Shuffles of several rows between the loops overlap.
    UNROLL
    for (u32 r = 0; r < ROWS; ++r) means[r] = warp_sum(means[r]) * shape.inverse_width;
    UNROLL
    for (u32 r = 0; r < ROWS; ++r) {
        float sum = 0.0f;
        UNROLL
        for (u32 v = 0; v < Row::VECTORS; ++v) {
            float values[WIDTH];
            rows.unpack(r, v, values);
            if (Row::column(v) < shape.width) {
                UNROLL
                for (u32 k = 0; k < WIDTH; ++k) sum += (values[k] - means[r]) * (values[k] - means[r]);
            }
        }
        rstds[r] = sum;
    }
    UNROLL
    for (u32 r = 0; r < ROWS; ++r) {
        rstds[r] = reciprocal_square_root(warp_sum(rstds[r]) * shape.inverse_width + shape.epsilon);
        if (lane_index() == 0 && first + r < shape.rows) {
            mean[first + r] = means[r];
            rstd[first + r] = rstds[r];
        }
    }
    UNROLL
    for (u32 v = 0; v < Row::VECTORS; ++v) {
        const u32 column = Row::column(v);
        if (column >= shape.width) continue;
        float gammas[WIDTH], betas[WIDTH];
        load_elements<WIDTH>(gamma + column, gammas);
        load_elements<WIDTH>(beta + column, betas);
        UNROLL
        for (u32 r = 0; r < ROWS; ++r) {
            if (first + r >= shape.rows) continue;
            float values[WIDTH];
            rows.unpack(r, v, values);
            UNROLL
            for (u32 k = 0; k < WIDTH; ++k) values[k] = (values[k] - means[r]) * rstds[r] * gammas[k] + betas[k];
            store_elements<WIDTH>(row_of(y, first + r, shape) + column, values);
        }
    }
}

// WIDTH: elements per access.
template <u32 WIDTH, typename T>
DEVICE void forward_of_any_width(T* y, float* mean, float* rstd, const T* x, const float* gamma, const float* beta,
                                 const LayerNormShape& shape) {
    const u32 row = block_index() * WARPS + warp_index();
    if (row >= shape.rows) return;
    const T* x_row = row_of(x, row, shape);
    T* y_row = row_of(y, row, shape);
    const u32 start = lane_index() * WIDTH;
    float sum = 0.0f;
    for (u32 column = start; column < shape.width; column += 32 * WIDTH) {
        float values[WIDTH];
        load_elements<WIDTH>(x_row + column, values);
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) sum += values[k];
    }
    const float row_mean = warp_sum(sum) * shape.inverse_width;
    sum = 0.0f;
    for (u32 column = start; column < shape.width; column += 32 * WIDTH) {
        float values[WIDTH];
        load_elements<WIDTH>(x_row + column, values);
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) sum += (values[k] - row_mean) * (values[k] - row_mean);
    }
    const float row_rstd = reciprocal_square_root(warp_sum(sum) * shape.inverse_width + shape.epsilon);
    if (lane_index() == 0) {
        mean[row] = row_mean;
        rstd[row] = row_rstd;
    }
    for (u32 column = start; column < shape.width; column += 32 * WIDTH) {
        float values[WIDTH], gammas[WIDTH], betas[WIDTH];
        load_elements<WIDTH>(x_row + column, values);
        load_elements<WIDTH>(gamma + column, gammas);
        load_elements<WIDTH>(beta + column, betas);
        UNROLL
        for (u32 k = 0; k < WIDTH; ++k) values[k] = (values[k] - row_mean) * row_rstd * gammas[k] + betas[k];
        store_elements<WIDTH>(y_row + column, values);
    }
}

// Rows per warp are `ROWS_PER_WARP` of src/cuda/layernorm.rs.
template <typename T>
DEVICE void layernorm_forward(T* y, float* mean, float* rstd, const T* x, const float* gamma, const float* beta,
                              const LayerNormShape& shape) {
    switch (shape.path) {
        case PATH_ELEMENTS: return forward_of_any_width<1>(y, mean, rstd, x, gamma, beta, shape);
        case 1: return forward_in_registers<T, 1, 4>(y, mean, rstd, x, gamma, beta, shape);
        case 2: return forward_in_registers<T, 2, 2>(y, mean, rstd, x, gamma, beta, shape);
        case 3: return forward_in_registers<T, 3, 1>(y, mean, rstd, x, gamma, beta, shape);
        case 4: return forward_in_registers<T, 4, 1>(y, mean, rstd, x, gamma, beta, shape);
        case 5: return forward_in_registers<T, 5, 1>(y, mean, rstd, x, gamma, beta, shape);
        default: return forward_of_any_width<Element<T>::PER_16_BYTES>(y, mean, rstd, x, gamma, beta, shape);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// Adds the four warps' sums and writes them as this block's partials. `sums` is indexed [vector][k] for the lane's columns.
template <typename T, u32 UNITS>
DEVICE void write_partials(float* partials, float* dgamma, float* dbeta, const LayerNormShape& shape) {
    using Row = Registers<T, UNITS, 1>;
    constexpr u32 COUNT = UNITS * 8;
    float* sums = shared_memory<float>();  // [2 * COUNT][32]: whatever the columns are, lanes lie side by side
    for (u32 turn = 0; turn < WARPS; ++turn) {
        if (warp_index() == turn) {
            UNROLL
            for (u32 k = 0; k < COUNT; ++k) {
                float* gamma_sum = sums + k * 32 + lane_index();
                float* beta_sum = gamma_sum + COUNT * 32;
                if (turn > 0) {
                    dgamma[k] += *gamma_sum;
                    dbeta[k] += *beta_sum;
                }
                *gamma_sum = dgamma[k];
                *beta_sum = dbeta[k];
            }
        }
        block_barrier();
    }
    if (warp_index() != WARPS - 1) return;
    float* block_partials = partials + static_cast<u64>(block_index()) * 2 * shape.width;
    UNROLL
    for (u32 v = 0; v < Row::VECTORS; ++v) {
        const u32 column = Row::column(v);
        if (column >= shape.width) continue;
        UNROLL
        for (u32 k = 0; k < Row::WIDTH; k += 4) {
            store_elements<4>(block_partials + column + k, dgamma + v * Row::WIDTH + k);
            store_elements<4>(block_partials + shape.width + column + k, dbeta + v * Row::WIDTH + k);
        }
    }
}

template <typename T, u32 UNITS, u32 ROWS>
DEVICE void backward_in_registers(T* dx, float* partials, const T* dy, const T* x, const float* mean, const float* rstd,
                                  const float* gamma, const LayerNormShape& shape) {
    using Row = Registers<T, UNITS, ROWS>;
    constexpr u32 WIDTH = Row::WIDTH;
    float dgamma[UNITS * 8], dbeta[UNITS * 8];
    UNROLL
    for (u32 k = 0; k < UNITS * 8; ++k) dgamma[k] = dbeta[k] = 0.0f;

    const u32 step = shape.blocks * WARPS * ROWS;
    for (u32 first = (block_index() * WARPS + warp_index()) * ROWS; first < shape.rows; first += step) {
        Row x_rows, dy_rows, old_rows;
        x_rows.template load<false>(x, first, shape);
        dy_rows.template load<false>(dy, first, shape);
        if (shape.accumulate) old_rows.template load<true>(dx, first, shape);
        float means[ROWS], rstds[ROWS], mean_g[ROWS], mean_gn[ROWS];
        UNROLL
        for (u32 r = 0; r < ROWS; ++r) {
            const bool inside = first + r < shape.rows;
            means[r] = inside ? mean[first + r] : 0.0f;
            rstds[r] = inside ? rstd[first + r] : 0.0f;
            mean_g[r] = mean_gn[r] = 0.0f;
        }
        UNROLL
        for (u32 v = 0; v < Row::VECTORS; ++v) {
            const u32 column = Row::column(v);
            if (column >= shape.width) continue;
            float gammas[WIDTH];
            load_elements<WIDTH>(gamma + column, gammas);
            UNROLL
            for (u32 r = 0; r < ROWS; ++r) {
                float values[WIDTH], slopes[WIDTH];
                x_rows.unpack(r, v, values);
                dy_rows.unpack(r, v, slopes);
                UNROLL
                for (u32 k = 0; k < WIDTH; ++k) {
                    const float n = (values[k] - means[r]) * rstds[r];
                    const float g = slopes[k] * gammas[k];
                    mean_g[r] += g;
                    mean_gn[r] += g * n;
                    dgamma[v * WIDTH + k] += slopes[k] * n;
                    dbeta[v * WIDTH + k] += slopes[k];
                }
            }
        }
        UNROLL
        for (u32 r = 0; r < ROWS; ++r) {
            mean_g[r] = warp_sum(mean_g[r]) * shape.inverse_width;
            mean_gn[r] = warp_sum(mean_gn[r]) * shape.inverse_width;
        }
        x_rows.forget_unpacked();
        dy_rows.forget_unpacked();
        const float* gamma_again = opaque(gamma);
        UNROLL
        for (u32 v = 0; v < Row::VECTORS; ++v) {
            const u32 column = Row::column(v);
            if (column >= shape.width) continue;
            float gammas[WIDTH];
            load_elements<WIDTH>(gamma_again + column, gammas);
            UNROLL
            for (u32 r = 0; r < ROWS; ++r) {
                if (first + r >= shape.rows) continue;
                float values[WIDTH], slopes[WIDTH], old[WIDTH];
                x_rows.unpack(r, v, values);
                dy_rows.unpack(r, v, slopes);
                if (shape.accumulate) old_rows.unpack(r, v, old);
                UNROLL
                for (u32 k = 0; k < WIDTH; ++k) {
                    const float n = (values[k] - means[r]) * rstds[r];
                    values[k] = rstds[r] * (slopes[k] * gammas[k] - mean_g[r] - n * mean_gn[r]);
                    if (shape.accumulate) values[k] += old[k];
                }
                store_elements<WIDTH>(row_of(dx, first + r, shape) + column, values);
            }
        }
    }
    write_partials<T, UNITS>(partials, dgamma, dbeta, shape);
}

// As load_elements, of memory that the thread writes later.
template <u32 WIDTH, typename T>
DEVICE void load_own_elements(const T* address, float* values) {
    if constexpr (WIDTH == 1) {
        values[0] = Element<T>::load(address);
    } else {
        Element<T>::unpack(load_own_16(address), values);
    }
}

template <u32 WIDTH, typename T>
DEVICE void backward_of_any_width(T* dx, float* partials, const T* dy, const T* x, const float* mean, const float* rstd,
                                  const float* gamma, const LayerNormShape& shape) {
    const u32 start = lane_index() * WIDTH;
    for (u32 row = block_index() * WARPS + warp_index(); row < shape.rows; row += shape.blocks * WARPS) {
        const T* x_row = row_of(x, row, shape);
        const T* dy_row = row_of(dy, row, shape);
        T* dx_row = row_of(dx, row, shape);
        const float row_mean = mean[row], row_rstd = rstd[row];
        float mean_g = 0.0f, mean_gn = 0.0f;
        for (u32 column = start; column < shape.width; column += 32 * WIDTH) {
            float values[WIDTH], slopes[WIDTH], gammas[WIDTH];
            load_elements<WIDTH>(x_row + column, values);
            load_elements<WIDTH>(dy_row + column, slopes);
            load_elements<WIDTH>(gamma + column, gammas);
            UNROLL
            for (u32 k = 0; k < WIDTH; ++k) {
                const float g = slopes[k] * gammas[k];
                mean_g += g;
                mean_gn += g * ((values[k] - row_mean) * row_rstd);
            }
        }
        mean_g = warp_sum(mean_g) * shape.inverse_width;
        mean_gn = warp_sum(mean_gn) * shape.inverse_width;
        for (u32 column = start; column < shape.width; column += 32 * WIDTH) {
            float values[WIDTH], slopes[WIDTH], gammas[WIDTH];
            load_elements<WIDTH>(x_row + column, values);
            load_elements<WIDTH>(dy_row + column, slopes);
            load_elements<WIDTH>(gamma + column, gammas);
            float old[WIDTH];
            if (shape.accumulate) load_own_elements<WIDTH>(dx_row + column, old);
            UNROLL
            for (u32 k = 0; k < WIDTH; ++k) {
                const float n = (values[k] - row_mean) * row_rstd;
                values[k] = row_rstd * (slopes[k] * gammas[k] - mean_g - n * mean_gn);
                if (shape.accumulate) values[k] += old[k];
            }
            store_elements<WIDTH>(dx_row + column, values);
        }
    }
    float* block_partials = partials + static_cast<u64>(block_index()) * 2 * shape.width;
    for (u32 column = thread_index(); column < shape.width; column += block_threads()) {
        float dgamma = 0.0f, dbeta = 0.0f;
        for (u32 row = block_index(); row < shape.rows; row += shape.blocks) {
            const float slope = Element<T>::load(row_of(dy, row, shape) + column);
            const float value = Element<T>::load(row_of(x, row, shape) + column);
            dgamma += slope * ((value - mean[row]) * rstd[row]);
            dbeta += slope;
        }
        block_partials[column] = dgamma;
        block_partials[shape.width + column] = dbeta;
    }
}

template <typename T>
DEVICE void layernorm_backward_dx_any(T* dx, float* partials, const T* dy, const T* x, const float* mean, const float* rstd,
                                      const float* gamma, const LayerNormShape& shape) {
    if (shape.path == PATH_ELEMENTS) return backward_of_any_width<1>(dx, partials, dy, x, mean, rstd, gamma, shape);
    backward_of_any_width<Element<T>::PER_16_BYTES>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_forward_f32(float* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, const float* __restrict__ x,
                      const float* __restrict__ gamma, const float* __restrict__ beta, const LayerNormShape shape) {
    layernorm_forward(y, mean, rstd, x, gamma, beta, shape);
}

KERNEL(128)
layernorm_forward_bf16(bf16* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, const bf16* __restrict__ x,
                       const float* __restrict__ gamma, const float* __restrict__ beta, const LayerNormShape shape) {
    layernorm_forward(y, mean, rstd, x, gamma, beta, shape);
}

KERNEL(128)
layernorm_backward_dx_any_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                              const float* __restrict__ x, const float* __restrict__ mean,
                              const float* __restrict__ rstd, const float* __restrict__ gamma,
                              const LayerNormShape shape) {
    layernorm_backward_dx_any(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_256_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                              const float* __restrict__ x, const float* __restrict__ mean,
                              const float* __restrict__ rstd, const float* __restrict__ gamma,
                              const LayerNormShape shape) {
    backward_in_registers<float, 1, 4>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_512_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                              const float* __restrict__ x, const float* __restrict__ mean,
                              const float* __restrict__ rstd, const float* __restrict__ gamma,
                              const LayerNormShape shape) {
    backward_in_registers<float, 2, 2>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_768_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                              const float* __restrict__ x, const float* __restrict__ mean,
                              const float* __restrict__ rstd, const float* __restrict__ gamma,
                              const LayerNormShape shape) {
    backward_in_registers<float, 3, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_1024_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                               const float* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    backward_in_registers<float, 4, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_1280_f32(float* __restrict__ dx, float* __restrict__ partials, const float* __restrict__ dy,
                               const float* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    backward_in_registers<float, 5, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_any_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                               const bf16* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    layernorm_backward_dx_any(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_256_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                               const bf16* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    backward_in_registers<bf16, 1, 4>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_512_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                               const bf16* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    backward_in_registers<bf16, 2, 2>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_768_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                               const bf16* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, const float* __restrict__ gamma,
                               const LayerNormShape shape) {
    backward_in_registers<bf16, 3, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_1024_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                                const bf16* __restrict__ x, const float* __restrict__ mean,
                                const float* __restrict__ rstd, const float* __restrict__ gamma,
                                const LayerNormShape shape) {
    backward_in_registers<bf16, 4, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(128)
layernorm_backward_dx_1280_bf16(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dy,
                                const bf16* __restrict__ x, const float* __restrict__ mean,
                                const float* __restrict__ rstd, const float* __restrict__ gamma,
                                const LayerNormShape shape) {
    backward_in_registers<bf16, 5, 1>(dx, partials, dy, x, mean, rstd, gamma, shape);
}

KERNEL(512)
layernorm_backward_parameters(float* __restrict__ dgamma, float* __restrict__ dbeta, const float* __restrict__ partials,
                              const u32 blocks, const u32 width) {
    const u32 column = block_index() * 32 + lane_index();
    const bool inside = column < 2 * width;
    const float sum = sum_of_column<PARAMETER_WARPS>(shared_memory<float>(), partials + column, inside, blocks, 2 * width);
    if (warp_index() != 0 || !inside) return;
    if (column < width) {
        dgamma[column] += sum;
    } else {
        dbeta[column - width] += sum;
    }
}
