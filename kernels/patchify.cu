// Patchify: the visible patches of an image batch as the rows of the patch embedding's matrix product.
//
//   row[r, (c, p, q)] = value(b, c, y, x)   r = b * keep + k, (py, px) = ids_keep[b, k], y = py * ph + p, x = px * pw + q
//
//   patchify_visible_forward_u8_*    pixels [B, H, W, C], u8, interleaved as decoders give them;
//                                    value = (v / 255 - mean[c]) / deviation[c], each operation rounded to f32
//   patchify_visible_forward_f32_*   pixels [B, C, H, W], f32, already normalised; value = v
//
// Inputs: ids_keep [B, keep], u32, patches numbered row by row, W / pw to a row; mean, deviation [C], f32, in units of the
// 0..1 range, deviation not 0. Output (assigned): rows [B * keep, C * ph * pw], f32 or bf16, in the order of the embedding's
// weight [D, C, ph, pw], so that the embedding is one matrix product. Arithmetic in f32; one rounding to bf16 at the end.
// An id that is no patch reads nothing and gives a row of NaN. No aliasing. Hidden patches are never read.
// Division: Markstein's correction of a product with the reciprocal (two fused operations). It gives the bits of an IEEE
// division for v / 255 and for the usual constants (a test walks through all of them) and is within one unit otherwise.
//
// Method, u8: a block takes `tile` consecutive rows. Each patch line (p of one patch) is pw * C consecutive bytes of the
// image; the 16-byte words that cover it are copied to shared memory with cp.async, whatever the alignment, and every
// thread then gathers the 16 bytes of one output vector from there. f32: lines are read where they are, four at a time
// where pw and the address allow. The tile is chosen so that it holds a whole number of vectors: every store but the
// last tile's tail is 16 bytes even where a row is not a multiple of them (pw = 14). An output that is not 16-byte aligned
// is written element by element.
//
// Preconditions, checked by the launcher (src/cuda/patchify.rs): H % ph = 0, W % pw = 0, H * W * C < 2^31, B * keep < 2^31,
// tile * C * ph * pw < 2^31, buffer lengths. Launch: grid ceil(B * keep / tile), block 128.
// Dynamic shared memory: u8: tile * ph * (8 + 16 * words) bytes, f32: tile * 8 bytes.
// Bytes, n = B * keep * C * ph * pw: n (u8) or 4 n (f32) read, 2 n or 4 n written, 4 B keep for the ids. FLOPs: 9 n (u8).
// Bound by: memory.
#include "device.cuh"

// Everything about a launch that is the same for all threads. `PatchifyParameters` in src/cuda/patchify.rs, same layout.
struct PatchifyShape {
    u32 rows;              // B * keep
    u32 batch;             // B
    u32 channels;          // C
    u32 height;            // H
    u32 width;             // W
    u32 patches;           // L = (H / ph) * (W / pw)
    u32 tile;              // rows per block
    Divider keep;          // row -> sample
    Divider grid_width;    // patch -> (py, px); W / pw
    Divider row_length;    // element of a tile -> (row, element of the row); C * ph * pw
    Divider patch_area;    // element of a row -> (c, element of the plane); ph * pw
    Divider patch_width;   // element of a plane -> (p, q); pw
    Divider patch_height;  // line of a tile -> (row, p); ph
    Divider words;         // 16-byte words of shared memory per patch line; multiplier and shift unused if not staged
    u32 staged;            // u8: 1 if patch lines fit into shared memory, 0 to read them in place
};

// Where one element of a tile sits.
struct Place {
    u32 row;      // of the tile
    u32 channel;  // c
    u32 p;
    u32 q;

    DEVICE Place(u32 element, const PatchifyShape& shape) {
        row = divide(element, shape.row_length);
        channel = divide(element, shape.patch_area);
        p = divide(element, shape.patch_width);
        q = element;
    }

    // Moves to the next element. True where it is not the neighbour in the same patch line.
    DEVICE bool advance(const PatchifyShape& shape) {
        if (++q < shape.patch_width.divisor) return false;
        q = 0;
        if (++p < shape.patch_height.divisor) return true;
        p = 0;
        if (++channel < shape.channels) return true;
        channel = 0;
        ++row;
        return true;
    }
};

// (v / 255 - mean) / deviation of one channel.
struct Normaliser {
    float mean;
    float deviation;
    float reciprocal;

    DEVICE Normaliser(const float* means, const float* deviations, u32 channel) {
        mean = means[channel];
        deviation = deviations[channel];
        reciprocal = divide_rn(1.0f, deviation);
    }

    DEVICE static float quotient(float dividend, float divisor, float reciprocal) {
        const float estimate = multiply_rn(dividend, reciprocal);
        return multiply_add_rn(multiply_add_rn(-divisor, estimate, dividend), reciprocal, estimate);
    }

    DEVICE float operator()(u8 value) const {
        const float unit = quotient(static_cast<float>(value), 255.0f, 1.0f / 255.0f);
        return quotient(subtract_rn(unit, mean), deviation, reciprocal);
    }
};

// The bytes of patch lines, in shared memory or where they are.
template <bool STAGED>
struct Lines {
    const u64* addresses;  // [tile * ph] in shared memory: of each line's first byte; 0 where there is no such patch
    const u8* words;       // [tile * ph, 16 * words] in shared memory

    // First byte of a line; only for lines that exist.
    DEVICE const u8* line(u32 index, const PatchifyShape& shape) const {
        if (STAGED) return words + index * (16 * shape.words.divisor) + (addresses[index] & 15);
        return reinterpret_cast<const u8*>(addresses[index]);
    }

    DEVICE bool exists(u32 index) const { return addresses[index] != 0; }
};

// Writes the addresses of a tile's patch lines.
DEVICE void find_lines(u64* addresses, const u8* pixels, const u32* ids_keep, u32 first_row, u32 lines,
                       const PatchifyShape& shape) {
    const u64 sample_bytes = shape.height * shape.width * shape.channels;
    for (u32 line = thread_index(); line < lines; line += block_threads()) {
        u32 p = line;
        const u32 row = first_row + divide(p, shape.patch_height);
        u32 px = ids_keep[row];
        if (px >= shape.patches) {
            addresses[line] = 0;
            continue;
        }
        const u32 py = divide(px, shape.grid_width);
        const u32 y = py * shape.patch_height.divisor + p;
        const u32 x = px * shape.patch_width.divisor;
        const u64 sample = shape.keep.quotient(row);
        const u8* line_start = pixels + sample * sample_bytes + (y * shape.width + x) * shape.channels;
        addresses[line] = reinterpret_cast<u64>(line_start);
    }
}

// Copies the 16-byte words that cover a tile's patch lines to shared memory. Words that stick out of the pixel buffer, at
// either end, are copied byte by byte as far as they lie inside.
DEVICE void stage_lines(u8* words, const u64* addresses, const u8* pixels, u32 lines, const PatchifyShape& shape) {
    const u64 begin = reinterpret_cast<u64>(pixels);
    const u64 sample_bytes = shape.height * shape.width * shape.channels;
    const u64 end = begin + shape.batch * sample_bytes;
    const u32 line_bytes = shape.patch_width.divisor * shape.channels;
    const u32 count = lines * shape.words.divisor;
    for (u32 index = thread_index(); index < count; index += block_threads()) {
        u32 word = index;
        const u64 line_start = addresses[divide(word, shape.words)];
        const u64 source = (line_start & ~15ull) + 16 * word;
        if (line_start == 0 || source >= line_start + line_bytes) continue;
        u8* target = words + 16 * index;
        if (source >= begin && source + 16 <= end) {
            copy_async_16(target, reinterpret_cast<const void*>(source));
        } else {
            for (u32 byte = 0; byte < 16; ++byte) {
                const u64 address = source + byte;
                if (address >= begin && address < end) target[byte] = *reinterpret_cast<const u8*>(address);
            }
        }
    }
    copy_async_wait();
}

// Normalises a tile's elements and writes them, 16 bytes at a time where the output allows.
template <typename T, bool STAGED>
DEVICE void write_from_lines(T* rows, const Lines<STAGED>& lines, const float* mean, const float* deviation, u32 elements,
                             const PatchifyShape& shape) {
    constexpr u32 VECTOR = Element<T>::PER_16_BYTES;
    const u32 height = shape.patch_height.divisor;
    const bool aligned = (reinterpret_cast<u64>(rows) & 15) == 0;
    const u32 vectors = aligned ? elements / VECTOR : 0;
    // A vector stays in one patch line: its bytes are `channels` apart.
    const bool within_line = shape.patch_width.divisor % VECTOR == 0;
    for (u32 vector = thread_index(); vector < vectors; vector += block_threads()) {
        Place place(vector * VECTOR, shape);
        float values[VECTOR];
        u32 line = place.row * height + place.p;
        u32 channel = place.channel;
        Normaliser normalise(mean, deviation, channel);
        bool exists = lines.exists(line);
        const u8* source = exists ? lines.line(line, shape) + place.q * shape.channels + channel : nullptr;
        UNROLL
        for (u32 k = 0; k < VECTOR; ++k) {
            values[k] = exists ? normalise(*source) : quiet_nan();
            source += shape.channels;
            if (!within_line && k + 1 < VECTOR && place.advance(shape)) {
                line = place.row * height + place.p;
                exists = lines.exists(line);
                source = exists ? lines.line(line, shape) + place.channel : nullptr;
                if (place.channel != channel) {
                    channel = place.channel;
                    normalise = Normaliser(mean, deviation, channel);
                }
            }
        }
        Element<T>::store_vector(rows + vector * VECTOR, values);
    }
    for (u32 element = vectors * VECTOR + thread_index(); element < elements; element += block_threads()) {
        const Place place(element, shape);
        const u32 line = place.row * height + place.p;
        float value = quiet_nan();
        if (lines.exists(line)) {
            const Normaliser normalise(mean, deviation, place.channel);
            value = normalise(lines.line(line, shape)[place.q * shape.channels + place.channel]);
        }
        Element<T>::store(rows + element, value);
    }
}

template <typename T>
DEVICE void patchify_visible_u8(T* rows, const u8* pixels, const u32* ids_keep, const float* mean, const float* deviation,
                                const PatchifyShape& shape) {
    const u32 first_row = block_index() * shape.tile;
    const u32 tile = minimum(shape.tile, shape.rows - first_row);
    const u32 lines = tile * shape.patch_height.divisor;
    const u32 elements = tile * shape.row_length.divisor;
    T* tile_rows = rows + static_cast<u64>(first_row) * shape.row_length.divisor;
    // Words first: they need the alignment. The addresses follow them.
    u8* words = shared_memory<u8>();
    if (shape.staged) {
        u64* addresses = reinterpret_cast<u64*>(words + shape.tile * shape.patch_height.divisor * 16 * shape.words.divisor);
        find_lines(addresses, pixels, ids_keep, first_row, lines, shape);
        block_barrier();
        stage_lines(words, addresses, pixels, lines, shape);
        block_barrier();
        write_from_lines(tile_rows, Lines<true>{addresses, words}, mean, deviation, elements, shape);
    } else {
        u64* addresses = shared_memory<u64>();
        find_lines(addresses, pixels, ids_keep, first_row, lines, shape);
        block_barrier();
        write_from_lines(tile_rows, Lines<false>{addresses, words}, mean, deviation, elements, shape);
    }
}

template <typename T>
DEVICE void patchify_visible_f32(T* rows, const float* pixels, const u32* ids_keep, const PatchifyShape& shape) {
    constexpr u32 VECTOR = Element<T>::PER_16_BYTES;
    const u32 first_row = block_index() * shape.tile;
    const u32 tile = minimum(shape.tile, shape.rows - first_row);
    const u32 elements = tile * shape.row_length.divisor;
    T* tile_rows = rows + static_cast<u64>(first_row) * shape.row_length.divisor;

    // Address of each patch's first element in channel 0; 0 where there is no such patch.
    u64* patches = shared_memory<u64>();
    const u64 sample_length = shape.channels * shape.height * shape.width;
    for (u32 local = thread_index(); local < tile; local += block_threads()) {
        const u32 row = first_row + local;
        u32 px = ids_keep[row];
        if (px >= shape.patches) {
            patches[local] = 0;
            continue;
        }
        const u32 py = divide(px, shape.grid_width);
        const u32 y = py * shape.patch_height.divisor;
        const u32 x = px * shape.patch_width.divisor;
        const u64 sample = shape.keep.quotient(row);
        patches[local] = reinterpret_cast<u64>(pixels + sample * sample_length + y * shape.width + x);
    }
    block_barrier();

    const bool aligned = (reinterpret_cast<u64>(tile_rows) & 15) == 0;
    const u32 vectors = aligned ? elements / VECTOR : 0;
    const bool in_fours = shape.patch_width.divisor % 4 == 0 && (reinterpret_cast<u64>(pixels) & 15) == 0;
    for (u32 vector = thread_index(); vector < vectors; vector += block_threads()) {
        float values[VECTOR];
        if (in_fours) {
            UNROLL
            for (u32 k = 0; k < VECTOR; k += 4) {
                const Place place(vector * VECTOR + k, shape);
                const float* patch = reinterpret_cast<const float*>(patches[place.row]);
                const u32 offset = (place.channel * shape.height + place.p) * shape.width + place.q;
                const u32 nan = float_bits(quiet_nan());
                u32x4 four = {nan, nan, nan, nan};
                if (patch != nullptr) four = load_16(patch + offset);
                values[k] = bits_float(four.x);
                values[k + 1] = bits_float(four.y);
                values[k + 2] = bits_float(four.z);
                values[k + 3] = bits_float(four.w);
            }
        } else {
            Place place(vector * VECTOR, shape);
            UNROLL
            for (u32 k = 0; k < VECTOR; ++k) {
                const float* patch = reinterpret_cast<const float*>(patches[place.row]);
                const u32 offset = (place.channel * shape.height + place.p) * shape.width + place.q;
                values[k] = patch != nullptr ? patch[offset] : quiet_nan();
                if (k + 1 < VECTOR) place.advance(shape);
            }
        }
        Element<T>::store_vector(tile_rows + vector * VECTOR, values);
    }
    for (u32 element = vectors * VECTOR + thread_index(); element < elements; element += block_threads()) {
        const Place place(element, shape);
        const float* patch = reinterpret_cast<const float*>(patches[place.row]);
        const u32 offset = (place.channel * shape.height + place.p) * shape.width + place.q;
        Element<T>::store(tile_rows + element, patch != nullptr ? patch[offset] : quiet_nan());
    }
}

KERNEL(128)
patchify_visible_forward_u8_f32(float* __restrict__ rows, const u8* __restrict__ pixels, const u32* __restrict__ ids_keep,
                                const float* __restrict__ mean, const float* __restrict__ deviation,
                                const PatchifyShape shape) {
    patchify_visible_u8(rows, pixels, ids_keep, mean, deviation, shape);
}

KERNEL(128)
patchify_visible_forward_u8_bf16(bf16* __restrict__ rows, const u8* __restrict__ pixels, const u32* __restrict__ ids_keep,
                                 const float* __restrict__ mean, const float* __restrict__ deviation,
                                 const PatchifyShape shape) {
    patchify_visible_u8(rows, pixels, ids_keep, mean, deviation, shape);
}

KERNEL(128)
patchify_visible_forward_f32_f32(float* __restrict__ rows, const float* __restrict__ pixels,
                                 const u32* __restrict__ ids_keep, const PatchifyShape shape) {
    patchify_visible_f32(rows, pixels, ids_keep, shape);
}

KERNEL(128)
patchify_visible_forward_f32_bf16(bf16* __restrict__ rows, const float* __restrict__ pixels,
                                  const u32* __restrict__ ids_keep, const PatchifyShape shape) {
    patchify_visible_f32(rows, pixels, ids_keep, shape);
}
