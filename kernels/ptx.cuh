// Everything in the kernels that is not plain C++, with two implementations of each name.
//
//   On a GPU (NVRTC, sm_80 and up): PTX and the compiler's built-ins, in this file.
//   On the host (VITMAE_EMULATOR, g++ or clang++, C++20): declared in emulator/host.h, defined in emulator/runtime.cpp.
//
// A kernel that uses nothing but plain C++ and the names below therefore runs on both. No CUDA header is included, so that
// NVRTC needs no include path. What each name promises, for both implementations:
//
//   UNROLL                                        before a loop: with a fixed count, it is unrolled, so that arrays indexed in
//                                                 it stay in registers
//   thread_index, block_index, block_threads      position in a one-dimensional block and grid
//   lane_index, warp_index                        thread_index modulo and over 32
//   shared_memory<T>()                            start of the launch's dynamic shared memory, 16-byte aligned; the only
//                                                 shared memory there is
//   block_barrier()                               every thread of the block arrives; orders shared and global memory
//   warp_barrier()                                every lane of the warp arrives; orders memory within the warp
//   shuffle(value, lane), shuffle_xor(value, m)   every lane of the warp takes part; does not order memory
//   warp_ballot(predicate)                             bit i is lane i's predicate; every lane takes part
//   load_16, store_16                             one 128-bit access; the address is a multiple of 16. load_16 is for memory
//                                                 that nothing writes during the launch, and takes the read-only path
//   load_own_16                                   the same for memory that this thread, and no other, writes in the launch
//   load_shared_16                                the same from shared memory
//   copy_async_16(shared, global)                 16 bytes, both addresses multiples of 16; lands any time before the wait
//   copy_async_16_or_zero(shared, global, valid)  the same; where not valid, zeros, and nothing is read
//   copy_async_commit()                           closes a group: this thread's copies since the last one
//   copy_async_wait_groups<N>()                   all but the N newest groups of this thread have landed
//   copy_async_wait()                             this thread's copies have landed; a barrier shows them to other threads
//   ldmatrix_x4(row)                            four 8x8 matrices of 16-bit elements from shared memory. Lane i gives the
//                                                 address, a multiple of 16, of row i % 8 of matrix i / 8; lane 4 r + c gets
//                                                 elements 2 c and 2 c + 1 of row r of each. Every lane takes part
//   ldmatrix_x4_transposed(row)                 the same of each matrix's transpose
//   mma_m16n8k16(a, b_0, b_1, sum)           sum + a b for a 16x16, b 16x8 (bf16) and sum 16x8 (f32) in fragments: lane
//                                                 4 r + c has rows r and r + 8 of a and sum, column r of b. a: columns 2 c,
//                                                 2 c + 1 of row r, of row r + 8, then the same 8 columns on; b_0: rows 2 c,
//                                                 2 c + 1, b_1: 8 rows on; sum: columns 2 c, 2 c + 1 of row r, of row r + 8.
//                                                 Every lane takes part
//   exp2_approximate(x)                           2 to the x, to about 2^-22 relative; 0 for minus infinity
//   natural_logarithm(x)                          to about one unit in the last place
//   multiply_rn, subtract_rn, divide_rn           one rounding, to nearest even; never contracted into another operation
//   multiply_add_rn                               a * b + c with one rounding
//   reciprocal_square_root                        1 / sqrt(value) to the nearest float, or the one beside it
//   opaque(value), value u32 or a pointer         the same value, of which the compiler knows nothing: it computes again what
//                                                 follows from it, where it would keep that in registers, and the value
//                                                 itself before any condition that comes later
//   square_root_rn(value), float or double        one rounding, to nearest even
//   is_finite(value), double                      neither NaN nor infinite
//   reciprocal_approximate(x)                     1 / x, to one unit in the last place; 0 for an infinity, and where x is above
//                                                 2^126
//   float_bits, bits_float                        the same 32 bits as another type
//   round_bf16, pack_bf16                         f32 to bf16, to nearest even; a NaN stays one. pack: first in the low half
#ifndef VITMAE_PTX_CUH
#define VITMAE_PTX_CUH

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// A bf16 number as its 16 bits, for pointers that own types must tell from other 16-bit data.
struct bf16 {
    u16 bits;
};

// Four 32-bit words that move in one 128-bit access.
struct alignas(16) u32x4 {
    u32 x, y, z, w;
};

// Four numbers: a lane's part of a 16x8 tile of sums, or 16 bytes of f32.
struct alignas(16) f32x4 {
    float x, y, z, w;
};

#ifdef VITMAE_EMULATOR
#include "emulator/host.h"
#else

#define DEVICE __device__ __forceinline__
// A kernel that is launched with at most `threads` threads per block.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

#define UNROLL _Pragma("unroll")

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_index() { return blockIdx.x; }
DEVICE u32 block_threads() { return blockDim.x; }
DEVICE u32 lane_index() { return threadIdx.x & 31; }
DEVICE u32 warp_index() { return threadIdx.x >> 5; }

extern __shared__ u32x4 dynamic_shared_memory[];

template <typename T>
DEVICE T* shared_memory() {
    return reinterpret_cast<T*>(dynamic_shared_memory);
}

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

DEVICE u32 shuffle(u32 value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE float shuffle(float value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

DEVICE u32x4 load_16(const void* address) {
    u32x4 value;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(__cvta_generic_to_global(address)));
    return value;
}

DEVICE void store_16(void* address, u32x4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// Volatile, as the stores that it must stay in order with.
DEVICE u32x4 load_own_16(const void* address) {
    u32x4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(__cvta_generic_to_global(address)));
    return value;
}

// Plain C++, so that the compiler may reorder and unroll it: a 16-byte aligned structure is one LDS.128.
DEVICE u32x4 load_shared_16(const void* address) { return *static_cast<const u32x4*>(address); }

// cp.async.cg: past the L1 cache, no registers in between.
DEVICE void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}

DEVICE void copy_async_16_or_zero(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 PENDING>
DEVICE void copy_async_wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE u32x4 ldmatrix_x4(const void* row) {
    u32x4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
    return value;
}

DEVICE u32x4 ldmatrix_x4_transposed(const void* row) {
    u32x4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
    return value;
}

// Not volatile: its result is all that it does, so a sum that nobody uses may go, and independent products may change places.
// What the loads do to memory is volatile above. No product may move past a condition that lanes decide differently: the
// whole warp uses each sum before one, in a loop that adds to it, in a shuffle or in `opaque`.
DEVICE f32x4 mma_m16n8k16(const u32x4& a, u32 b_0, u32 b_1, f32x4 sum) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_0), "r"(b_1));
    return sum;
}

DEVICE float exp2_approximate(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

DEVICE float natural_logarithm(float x) { return logf(x); }

DEVICE float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float subtract_rn(float a, float b) { return __fsub_rn(a, b); }
DEVICE float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float multiply_add_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float reciprocal_square_root(float value) { return __frsqrt_rn(value); }

DEVICE u32 opaque(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

template <typename T>
DEVICE T* opaque(T* address) {
    asm volatile("" : "+l"(address));
    return address;
}
DEVICE float square_root_rn(float value) { return __fsqrt_rn(value); }
DEVICE double square_root_rn(double value) { return __dsqrt_rn(value); }
DEVICE bool is_finite(double value) { return isfinite(value); }

DEVICE float reciprocal_approximate(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }

DEVICE u16 round_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

#endif
#endif
