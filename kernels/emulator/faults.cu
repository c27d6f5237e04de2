// Kernels for the emulator's own tests: one that is right in every respect, one per fault that the emulator must catch, and
// Philox by itself. Never compiled for a GPU.
//
// Shared by all: out [blocks * threads], u32, one element per thread; in, likewise.
#include "../device.cuh"

DEVICE u32 global_index() { return block_index() * block_threads() + thread_index(); }

// words [count] = Philox of counters [count] under keys [count, 2].
KERNEL(128)
fault_none_philox(u32x4* words, const u32x4* counters, const u32* keys, u32 count) {
    const u32 index = global_index();
    if (index < count) store_16(words + index, philox(load_16(counters + index), keys[2 * index], keys[2 * index + 1]));
}

// out = in of the next thread, through shared memory, then the sum over the warp, then how many lanes are odd.
KERNEL(128)
fault_none_exchange(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index()] = in[global_index()];
    block_barrier();
    u32 value = shared[(thread_index() + 1) % block_threads()];
    for (u32 mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    const u32 odd = warp_ballot(lane_index() % 2 == 1);
    out[global_index()] = value + shuffle(odd, 3);
}

// A warp that talks through shared memory with no more than a warp barrier.
KERNEL(128)
fault_none_warp(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index()] = in[global_index()];
    warp_barrier();
    out[global_index()] = shared[thread_index() ^ 1];
}

// Copies 16 bytes per thread through shared memory asynchronously.
KERNEL(128)
fault_none_copy(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    copy_async_16(shared + thread_index(), in + 4 * global_index());
    copy_async_wait();
    block_barrier();
    store_16(out + 4 * global_index(), shared[block_threads() - 1 - thread_index()]);
}

// Four rows of 16 bytes per thread group: the matrices of each warp come back as fragments, straight or transposed.
DEVICE u32x4* matrix_rows(const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    shared[thread_index()] = load_16(in + 4 * global_index());
    return shared + 32 * warp_index();
}

KERNEL(128)
fault_race_in_shared_memory(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[0] = in[global_index()];
    block_barrier();
    out[global_index()] = shared[0];
}

KERNEL(128)
fault_missing_barrier(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index()] = in[global_index()];
    out[global_index()] = shared[(thread_index() + 1) % block_threads()];
}

// The next round overwrites what slower threads may still read.
KERNEL(128)
fault_missing_second_barrier(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    u32 sum = 0;
    for (u32 round = 0; round < 2; ++round) {
        shared[thread_index()] = in[global_index()] + round;
        block_barrier();
        sum += shared[(thread_index() + 1) % block_threads()];
    }
    out[global_index()] = sum;
}

// A warp barrier where two warps talk.
KERNEL(128)
fault_warp_barrier_for_a_block(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index()] = in[global_index()];
    warp_barrier();
    out[global_index()] = shared[(thread_index() + 32) % block_threads()];
}

KERNEL(128)
fault_read_past_the_end(u32* out, const u32* in) {
    out[global_index()] = in[global_index() + 1];
}

KERNEL(128)
fault_write_before_the_start(u32* out, const u32* in) {
    out[static_cast<i64>(global_index()) - 1] = in[global_index()];
}

KERNEL(128)
fault_past_the_end_of_shared_memory(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index() + 1] = in[global_index()];
    block_barrier();
    out[global_index()] = shared[thread_index() + 1];
}

KERNEL(128)
fault_null_pointer(u32* out, const u32* in) {
    const u32* nothing = in + block_threads() < in ? in : nullptr;
    out[global_index()] = nothing[thread_index()];
}

KERNEL(128)
fault_divergent_shuffle(u32* out, const u32* in) {
    u32 value = in[global_index()];
    if (lane_index() != 7) value = shuffle_xor(value, 1);
    out[global_index()] = value;
}

KERNEL(128)
fault_shuffle_against_ballot(u32* out, const u32* in) {
    u32 value = in[global_index()];
    value = lane_index() < 16 ? shuffle_xor(value, 1) : warp_ballot(value > 0);
    out[global_index()] = value;
}

KERNEL(128)
fault_barrier_against_shuffle(u32* out, const u32* in) {
    u32 value = in[global_index()];
    if (lane_index() == 0) {
        block_barrier();
    } else {
        value = shuffle_xor(value, 1);
    }
    out[global_index()] = value;
}

KERNEL(128)
fault_uninitialised_shared_memory(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    if (thread_index() != 5) shared[thread_index()] = in[global_index()];
    block_barrier();
    out[global_index()] = shared[thread_index()];
}

// `in` is fresh memory.
KERNEL(128)
fault_uninitialised_global_memory(u32* out, const u32* in) {
    out[global_index()] = in[global_index()];
}

KERNEL(128)
fault_copy_without_wait(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    copy_async_16(shared + thread_index(), in + 4 * global_index());
    block_barrier();
    store_16(out + 4 * global_index(), shared[thread_index()]);
}

KERNEL(128)
fault_copy_without_barrier(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    copy_async_16(shared + thread_index(), in + 4 * global_index());
    copy_async_wait();
    const u32x4 value = shared[block_threads() - 1 - thread_index()];
    store_16(out + 4 * global_index(), value);
}

KERNEL(128)
fault_misaligned_vector(u32* out, const u32* in) {
    const u32x4 value = load_16(in + 1);
    out[global_index()] = value.x;
}

KERNEL(128)
fault_misaligned_pair(u32* out, const u32* in) {
    out[global_index()] = *reinterpret_cast<const u16*>(reinterpret_cast<const u8*>(in) + 1);
}

KERNEL(128)
fault_misaligned_word(u32* out, const u32* in) {
    out[global_index()] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(in) + 2);
}

KERNEL(128)
fault_misaligned_double_word(u32* out, const u32* in) {
    out[global_index()] = static_cast<u32>(*reinterpret_cast<const u64*>(in + 1));
}

KERNEL(128)
fault_misaligned_write(u32* out, const u32* in) {
    u8* shared = shared_memory<u8>();
    *reinterpret_cast<u16*>(shared + 3) = static_cast<u16>(in[global_index()]);
    out[global_index()] = 0;
}

// All lanes shuffle, but not all in the same place.
KERNEL(128)
fault_shuffles_in_two_places(u32* out, const u32* in) {
    u32 value = in[global_index()];
    if (lane_index() < 16) {
        value = shuffle_xor(value, 1) + 1;
    } else {
        value = shuffle_xor(value, 1) * 3;
    }
    out[global_index()] = value;
}

KERNEL(128)
fault_products_in_two_places(u32* out, const u32* in) {
    const u32x4 a = load_16(in + 4 * global_index());
    f32x4 sum = {0, 0, 0, 0};
    if (lane_index() % 2 == 0) {
        sum = mma_m16n8k16(a, a.x, a.y, sum);
    } else {
        sum = mma_m16n8k16(a, a.y, a.x, sum);
    }
    out[global_index()] = float_bits(sum.x);
}

KERNEL(128)
fault_barriers_in_two_places(u32* out, const u32* in) {
    u32* shared = shared_memory<u32>();
    shared[thread_index()] = in[global_index()];
    if (thread_index() < 40) {
        block_barrier();
        out[global_index()] = shared[thread_index() + 1];
    } else {
        block_barrier();
        out[global_index()] = shared[thread_index() - 1];
    }
}

KERNEL(128)
fault_global_load_of_shared_memory(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    out[global_index()] = load_16(rows + lane_index()).x;
}

KERNEL(128)
fault_own_load_of_shared_memory(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    out[global_index()] = load_own_16(rows + lane_index()).x;
}

KERNEL(128)
fault_shared_load_of_global_memory(u32* out, const u32* in) {
    out[global_index()] = load_shared_16(in + 4 * global_index()).x;
}

// In place through the read-only path: the cache may be older than the memory.
KERNEL(128)
fault_read_only_load_of_a_result(u32* out, const u32* in) {
    store_16(out + 4 * global_index(), load_16(in + 4 * global_index()));
    out[4 * global_index()] = load_16(out + 4 * global_index()).y;
}

KERNEL(128)
fault_write_after_a_read_only_load(u32* out, const u32* in) {
    const u32x4 value = load_16(out + 4 * global_index());
    out[4 * global_index()] = value.x + in[global_index()];
}

// Thread 0 of every block writes the same element.
KERNEL(128)
fault_two_blocks_write(u32* out, const u32* in) {
    out[thread_index()] = in[thread_index()];
}

// Every block reads what another one writes.
KERNEL(128)
fault_block_reads_another(u32* out, const u32* in) {
    out[global_index()] = in[global_index()];
    block_barrier();
    if (block_index() > 0) out[global_index()] = out[global_index() - block_threads()];
}

KERNEL(128)
fault_none_matrices(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    store_16(out + 4 * global_index(), ldmatrix_x4(rows + lane_index()));
}

KERNEL(128)
fault_none_matrices_transposed(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    store_16(out + 4 * global_index(), ldmatrix_x4_transposed(rows + lane_index()));
}

// sums += a b, in fragments: one per lane.
KERNEL(128)
fault_none_multiply(f32x4* sums, const u32x4* a, const u32* b) {
    const u32 lane = global_index();
    const f32x4 sum = mma_m16n8k16(load_16(a + lane), b[2 * lane], b[2 * lane + 1], sums[lane]);
    sums[lane] = sum;
}

// Two groups of copies; the second is waited for only after the first has been used.
KERNEL(128)
fault_none_copy_groups(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    const u32 half = block_threads() / 2;
    const u32 other = (thread_index() + half) % block_threads();
    const u32* from = in + 4 * global_index();
    const bool early = thread_index() < half;
    if (early) copy_async_16_or_zero(shared + thread_index(), from, thread_index() % 2 == 0);
    copy_async_commit();
    if (!early) copy_async_16_or_zero(shared + thread_index(), from, thread_index() % 2 == 0);
    copy_async_commit();
    copy_async_wait_groups<1>();
    block_barrier();
    if (!early) store_16(out + 4 * global_index(), shared[other]);
    copy_async_wait_groups<0>();
    block_barrier();
    if (early) store_16(out + 4 * global_index(), shared[other]);
}

KERNEL(128)
fault_copy_group_too_new(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    copy_async_16_or_zero(shared + thread_index(), in + 4 * global_index(), true);
    copy_async_commit();
    copy_async_wait_groups<1>();
    store_16(out + 4 * global_index(), shared[thread_index()]);
}

KERNEL(128)
fault_divergent_multiply(u32* out, const u32* in) {
    const u32x4 a = load_16(in + 4 * global_index());
    f32x4 sum = {0, 0, 0, 0};
    if (lane_index() != 3) sum = mma_m16n8k16(a, a.x, a.y, sum);
    out[global_index()] = float_bits(sum.x);
}

KERNEL(128)
fault_divergent_matrices(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    u32x4 value = {0, 0, 0, 0};
    if (lane_index() < 8) value = ldmatrix_x4(rows + lane_index());
    out[global_index()] = value.x;
}

KERNEL(128)
fault_multiply_against_matrices(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    u32x4 value = {0, 0, 0, 0};
    if (lane_index() % 2 == 0) {
        value = ldmatrix_x4(rows + lane_index());
    } else {
        const f32x4 sum = mma_m16n8k16(value, 0, 0, {0, 0, 0, 0});
        value.x = float_bits(sum.x);
    }
    out[global_index()] = value.x;
}

KERNEL(128)
fault_matrices_without_barrier(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    out[global_index()] = ldmatrix_x4(rows + lane_index()).x;
}

// The next round overwrites rows that are still read.
KERNEL(128)
fault_matrices_overwritten(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    const u32x4 value = ldmatrix_x4(rows + lane_index());
    matrix_rows(in);
    out[global_index()] = value.x;
}

KERNEL(128)
fault_uninitialised_matrices(u32* out, const u32* in) {
    u32x4* shared = shared_memory<u32x4>();
    if (thread_index() != 9) shared[thread_index()] = load_16(in + 4 * global_index());
    block_barrier();
    out[global_index()] = ldmatrix_x4(shared + 32 * warp_index() + lane_index()).x;
}

KERNEL(128)
fault_misaligned_matrices(u32* out, const u32* in) {
    const u32x4* rows = matrix_rows(in);
    block_barrier();
    out[global_index()] = ldmatrix_x4(reinterpret_cast<const u32*>(rows) + lane_index()).x;
}
