// The host half of ptx.cuh: the same names, declared for a C++20 compiler and defined in runtime.cpp.
//
// Kernel files are compiled with -fsanitize=thread, which makes the compiler report every access to memory that is not a
// plain local variable through __tsan_* calls. runtime.cpp defines those calls itself (the sanitizer's own library is not
// linked) and checks each access. That is why the kernels need no wrapper types, and why everything here that touches
// memory is defined out of line, in a file that is compiled without the option.
#ifndef VITMAE_EMULATOR_HOST_H
#define VITMAE_EMULATOR_HOST_H

#include <cstddef>
#include <source_location>
#include <type_traits>
#include <utility>

#define DEVICE inline __attribute__((always_inline))
#define KERNEL(threads) extern "C" void
#define UNROLL

u32 thread_index();
u32 block_index();
u32 block_threads();
u32 lane_index();
u32 warp_index();

// What all threads must call together takes down where it is called, which must be the same place for all. A return address
// would not do: the compiler may make two calls of one.
namespace emulator {
using Place = std::source_location;
}

void block_barrier(emulator::Place at = emulator::Place::current());
void warp_barrier(emulator::Place at = emulator::Place::current());
u32 shuffle(u32 value, u32 lane, emulator::Place at = emulator::Place::current());
float shuffle(float value, u32 lane, emulator::Place at = emulator::Place::current());
u32 shuffle_xor(u32 value, u32 mask, emulator::Place at = emulator::Place::current());
float shuffle_xor(float value, u32 mask, emulator::Place at = emulator::Place::current());
u32 warp_ballot(bool predicate, emulator::Place at = emulator::Place::current());

u32x4 load_16(const void* address);
// By reference: the compiler does not report reads of structures that it passes by value.
void store_16(void* address, const u32x4& value);
u32x4 load_own_16(const void* address);
u32x4 load_shared_16(const void* address);
void copy_async_16(void* shared, const void* global);
void copy_async_16_or_zero(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait();
u32x4 ldmatrix_x4(const void* row, emulator::Place at = emulator::Place::current());
u32x4 ldmatrix_x4_transposed(const void* row, emulator::Place at = emulator::Place::current());
f32x4 mma_m16n8k16(const u32x4& a, u32 b_0, u32 b_1, const f32x4& sum, emulator::Place at = emulator::Place::current());
float exp2_approximate(float x);
float natural_logarithm(float x);

float multiply_rn(float a, float b);
float subtract_rn(float a, float b);
float divide_rn(float a, float b);
float multiply_add_rn(float a, float b, float c);
float reciprocal_square_root(float value);
float square_root_rn(float value);
double square_root_rn(double value);
bool is_finite(double value);
float reciprocal_approximate(float x);
u32 float_bits(float value);
float bits_float(u32 bits);
u16 round_bf16(float value);
u32 pack_bf16(float low, float high);

DEVICE u32 opaque(u32 value) { return value; }

template <typename T>
DEVICE T* opaque(T* address) {
    return address;
}

namespace emulator {

void* shared_memory();
void wait_for_groups(u32 pending);

// A kernel as the launcher sees it: a name, a limit, and a call with untyped arguments.
struct Entry {
    const char* symbol;
    u32 max_threads;
    void (*call)(void* const* arguments);
    const std::size_t* sizes;
    std::size_t count;
};

// Turns `void f(A, B, ...)` into an Entry.
template <auto FUNCTION>
struct Thunk;

template <typename... A, void (*FUNCTION)(A...)>
struct Thunk<FUNCTION> {
    static constexpr std::size_t sizes[] = {sizeof(A)...};

    static void call(void* const* arguments) { call_with(arguments, std::index_sequence_for<A...>{}); }

    template <std::size_t... I>
    static void call_with(void* const* arguments, std::index_sequence<I...>) {
        FUNCTION(*static_cast<const std::remove_cv_t<A>*>(arguments[I])...);
    }

    static constexpr Entry entry(const char* symbol, u32 max_threads) {
        return {symbol, max_threads, call, sizes, sizeof...(A)};
    }
};

}  // namespace emulator

template <typename T>
DEVICE T* shared_memory() {
    return static_cast<T*>(emulator::shared_memory());
}

template <u32 PENDING>
DEVICE void copy_async_wait_groups() {
    emulator::wait_for_groups(PENDING);
}

#endif
