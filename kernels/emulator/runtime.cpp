// Runs kernels on the CPU, one fibre per CUDA thread and one block at a time, and checks every access to memory.
//
// What is caught, always with kernel, block and thread: an access outside a buffer, to a released one, or to an address near
// null; an access at an address that is not a multiple of its size; a read of memory that nothing wrote; two threads of a block
// that touch the same byte of shared memory, one of them writing, with no barrier between; two blocks that do so in global memory
// in one launch; a lane that never arrives at a warp collective, or arrives at another one or at one in another place of the
// source; a barrier that cannot be passed, or that threads reach in different places; a read of an asynchronous copy before its
// wait; a load, matrix or copy from the wrong kind of memory, or through the read-only path of what the launch writes;
// arguments of the wrong number or size; a block larger than the kernel allows.
//
// Blocks and threads run in an order drawn from the seed. Seed 0 runs them in order, seed 1 backwards.
//
// What it cannot see: bank conflicts, weak memory ordering, speed, and mistakes in the PTX half of ptx.cuh; lanes that reach one
// line of a helper from different callers; threads of one block that share global memory without a barrier, and so also
// load_own_16 of what another thread of the block wrote; a thread's own arrays, read before they are written or beyond their
// end; a copy that is under way when its thread returns.
//
// The interface for the Rust side (src/cuda/emulator.rs) is the extern "C" block at the end. One emulator serves one caller at
// a time; several emulators in several threads do not know of each other.

// In four parts, each on the one before: fibres.h, state.h, checks.h, block.h; here are launches, the names of ptx.cuh, and the
// interfaces.
#include "block.h"

// From the generated table: all kernels, closed by an entry without a symbol.
extern const emulator::Entry* const vitmae_emulator_entries[];

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Launch

const Entry* find_entry(const char* symbol) {
    for (const Entry* const* table = vitmae_emulator_entries; *table != nullptr; ++table) {
        for (const Entry* entry = *table; entry->symbol != nullptr; ++entry) {
            if (std::strcmp(entry->symbol, symbol) == 0) return entry;
        }
    }
    return nullptr;
}

bool Emulator::launch(const char* symbol, u32 blocks, u32 thread_count_, u32 shared_bytes_, void* const* arguments_,
                      const std::size_t* sizes, std::size_t count) {
    entry = find_entry(symbol);
    const auto refuse = [&](const std::string& reason) {
        message = text_of("kernel %s: ", symbol) + reason;
        return false;
    };
    if (entry == nullptr) return refuse("there is no such kernel");
    if (count != entry->count) return refuse(text_of("%zu arguments for %zu parameters", count, entry->count));
    for (std::size_t i = 0; i < count; ++i) {
        if (sizes[i] != entry->sizes[i]) {
            return refuse(text_of("argument %zu has %zu bytes, its parameter %zu", i, sizes[i], entry->sizes[i]));
        }
    }
    if (thread_count_ == 0 || thread_count_ > entry->max_threads || thread_count_ % WARP != 0) {
        return refuse(text_of("%u threads per block, expected a multiple of 32 up to %u", thread_count_, entry->max_threads));
    }
    if (shared_bytes_ > SHARED_CAPACITY) return refuse(text_of("%u bytes of shared memory", shared_bytes_));
    arguments = arguments_;
    thread_count = thread_count_;
    shared_bytes = shared_bytes_;
    threads.resize(std::max<std::size_t>(threads.size(), thread_count));
    failed = false;
    std::vector<u32> grid(blocks);
    for (u32 i = 0; i < blocks; ++i) grid[i] = i;
    order(grid);
    running = this;
    for (std::size_t i = 0; i < grid.size() && !failed; ++i) {
        block = grid[i];
        run_block();
    }
    running = nullptr;
    for (Buffer& buffer : buffers) {
        if (!buffer.touched) continue;
        buffer.touched = false;
        buffer.writer = {};
        buffer.reader = {};
        buffer.constant = {};
    }
    return !failed;
}

void check_vector(const void* address, bool write) {
    running->check_alignment(reinterpret_cast<u64>(address), 16, write);
    running->check(reinterpret_cast<u64>(address), 16, write);
}

u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The names of ptx.cuh

u32 thread_index() { return running->current; }
u32 block_index() { return running->block; }
u32 block_threads() { return running->thread_count; }
u32 lane_index() { return running->current % WARP; }
u32 warp_index() { return running->current / WARP; }

void* emulator::shared_memory() { return running->shared; }

void block_barrier(Place at) {
    Thread& thread = running->threads[running->current];
    thread.at = at;
    thread.state = State::AT_BLOCK_BARRIER;
    running->yield();
}

void warp_barrier(Place at) { running->collective(Collective::WARP_BARRIER, 0, 0, at); }
u32 shuffle(u32 value, u32 lane, Place at) { return running->collective(Collective::SHUFFLE, value, lane, at); }
float shuffle(float value, u32 lane, Place at) { return float_of(shuffle(bits_of(value), lane, at)); }
u32 shuffle_xor(u32 value, u32 mask, Place at) { return running->collective(Collective::SHUFFLE_XOR, value, mask, at); }
float shuffle_xor(float value, u32 mask, Place at) { return float_of(shuffle_xor(bits_of(value), mask, at)); }
u32 warp_ballot(bool predicate, Place at) { return running->collective(Collective::BALLOT, predicate, 0, at); }

u32x4 load_16(const void* address) {
    running->check_alignment(reinterpret_cast<u64>(address), 16, false);
    running->check_constant(reinterpret_cast<u64>(address), 16);
    return *static_cast<const u32x4*>(address);
}

u32x4 load_own_16(const void* address) {
    if (!running->is_global(reinterpret_cast<u64>(address))) running->fault("load_own_16 of an address outside global memory");
    check_vector(address, false);
    return *static_cast<const u32x4*>(address);
}

u32x4 load_shared_16(const void* address) {
    if (!running->is_shared(reinterpret_cast<u64>(address))) running->fault("load_shared_16 of an address outside shared memory");
    check_vector(address, false);
    return *static_cast<const u32x4*>(address);
}

void store_16(void* address, const u32x4& value) {
    running->check(reinterpret_cast<u64>(&value), 16, false);
    check_vector(address, true);
    *static_cast<u32x4*>(address) = value;
}

void copy_async_16(void* shared, const void* global) { running->issue_copy(shared, global, true); }
void copy_async_16_or_zero(void* shared, const void* global, bool valid) { running->issue_copy(shared, global, valid); }
void copy_async_commit() { ++running->threads[running->current].groups; }
void emulator::wait_for_groups(u32 pending) { running->land_copies(pending); }

// Also what is in no group yet.
void copy_async_wait() {
    copy_async_commit();
    running->land_copies(0);
}

u32x4 ldmatrix_x4(const void* row, Place at) {
    Thread& thread = running->threads[running->current];
    thread.row = row;
    running->collective(Collective::LDMATRIX_X4, 0, 0, at);
    return thread.loaded;
}

u32x4 ldmatrix_x4_transposed(const void* row, Place at) {
    Thread& thread = running->threads[running->current];
    thread.row = row;
    running->collective(Collective::LDMATRIX_X4_TRANSPOSED, 0, 0, at);
    return thread.loaded;
}

f32x4 mma_m16n8k16(const u32x4& a, u32 b_0, u32 b_1, const f32x4& sum, Place at) {
    Thread& thread = running->threads[running->current];
    thread.a = a;
    thread.b[0] = b_0;
    thread.b[1] = b_1;
    thread.sum = sum;
    running->collective(Collective::MMA_M16N8K16, 0, 0, at);
    return thread.sum;
}

float exp2_approximate(float x) { return std::exp2(x); }
float natural_logarithm(float x) { return std::log(x); }

float multiply_rn(float a, float b) { return a * b; }
float subtract_rn(float a, float b) { return a - b; }
float divide_rn(float a, float b) { return a / b; }
float multiply_add_rn(float a, float b, float c) { return std::fma(a, b, c); }
float reciprocal_square_root(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }
float square_root_rn(float value) { return std::sqrt(value); }
double square_root_rn(double value) { return std::sqrt(value); }
bool is_finite(double value) { return std::isfinite(value); }

// As the GPU's: what is below the smallest normal number is zero.
float without_subnormals(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }
float reciprocal_approximate(float x) { return without_subnormals(1.0f / without_subnormals(x)); }

u32 float_bits(float value) { return bits_of(value); }
float bits_float(u32 bits) { return float_of(bits); }

u16 round_bf16(float value) {
    const u32 bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

u32 pack_bf16(float low, float high) { return round_bf16(low) | static_cast<u32>(round_bf16(high)) << 16; }

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize=thread calls

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

static void on_access(void* address, u64 bytes, bool write, bool aligned) {
    if (running == nullptr) return;
    if (aligned) running->check_alignment(reinterpret_cast<u64>(address), bytes, write);
    running->check(reinterpret_cast<u64>(address), bytes, write);
}

#define HOOKS(bytes)                                                                                  \
    void __tsan_read##bytes(void* address) { on_access(address, bytes, false, true); }                \
    void __tsan_write##bytes(void* address) { on_access(address, bytes, true, true); }                \
    void __tsan_unaligned_read##bytes(void* address) { on_access(address, bytes, false, false); }     \
    void __tsan_unaligned_write##bytes(void* address) { on_access(address, bytes, true, false); }

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* address, unsigned long bytes) {
    if (running != nullptr) running->check(reinterpret_cast<u64>(address), bytes, false);
}

void __tsan_write_range(void* address, unsigned long bytes) {
    if (running != nullptr) running->check(reinterpret_cast<u64>(address), bytes, true);
}

// clang turns copies of structures into these.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes);
    __tsan_write_range(to, bytes);
    return std::memcpy(to, from, bytes);
}

void* __tsan_memset(void* to, int value, unsigned long bytes) {
    __tsan_write_range(to, bytes);
    return std::memset(to, value, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// The interface. Functions that return an int return 1 where all is well; else vitmae_emulator_message says what is not.

void* vitmae_emulator_new(unsigned long long seed) {
    auto emulator = std::make_unique<Emulator>(seed);
    return emulator->reserve() ? emulator.release() : nullptr;
}

void vitmae_emulator_delete(void* emulator) { delete static_cast<Emulator*>(emulator); }

const char* vitmae_emulator_message(void* emulator) { return static_cast<Emulator*>(emulator)->message.c_str(); }

unsigned long long vitmae_emulator_allocate(void* emulator, unsigned long long bytes) {
    return static_cast<Emulator*>(emulator)->allocate(bytes);
}

int vitmae_emulator_release(void* emulator, unsigned long long address) {
    Buffer* buffer = nullptr;
    if (!static_cast<Emulator*>(emulator)->host_access(address, 0, "release", &buffer)) return 0;
    buffer->released = true;
    buffer->written = {};
    return 1;
}

int vitmae_emulator_upload(void* emulator, unsigned long long to, const void* from, unsigned long long bytes) {
    Buffer* buffer = nullptr;
    if (!static_cast<Emulator*>(emulator)->host_access(to, bytes, "upload", &buffer)) return 0;
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    std::memset(&buffer->written[to - buffer->start], 1, bytes);
    return 1;
}

int vitmae_emulator_download(void* emulator, void* to, unsigned long long from, unsigned long long bytes) {
    Buffer* buffer = nullptr;
    if (!static_cast<Emulator*>(emulator)->host_access(from, bytes, "download", &buffer)) return 0;
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return 1;
}

// Whether something wrote all of these bytes.
int vitmae_emulator_readable(void* emulator, unsigned long long from, unsigned long long bytes) {
    Emulator& self = *static_cast<Emulator*>(emulator);
    Buffer* buffer = nullptr;
    if (!self.host_access(from, bytes, "read", &buffer)) return 0;
    const void* unwritten = std::memchr(&buffer->written[from - buffer->start], 0, bytes);
    if (unwritten == nullptr) return 1;
    self.entry = nullptr;
    const u64 at = buffer->start + (static_cast<const u8*>(unwritten) - buffer->written.data());
    self.message = "read of memory that nothing wrote: " + self.describe(*buffer, at);
    return 0;
}

int vitmae_emulator_copy(void* emulator, unsigned long long to, unsigned long long from, unsigned long long bytes) {
    Buffer *source = nullptr, *target = nullptr;
    if (!static_cast<Emulator*>(emulator)->host_access(from, bytes, "copy", &source)) return 0;
    if (!static_cast<Emulator*>(emulator)->host_access(to, bytes, "copy", &target)) return 0;
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    std::memmove(&target->written[to - target->start], &source->written[from - source->start], bytes);
    return 1;
}

int vitmae_emulator_fill(void* emulator, unsigned long long to, int value, unsigned long long bytes) {
    Buffer* buffer = nullptr;
    if (!static_cast<Emulator*>(emulator)->host_access(to, bytes, "fill", &buffer)) return 0;
    std::memset(reinterpret_cast<void*>(to), value, bytes);
    std::memset(&buffer->written[to - buffer->start], 1, bytes);
    return 1;
}

int vitmae_emulator_launch(void* emulator, const char* symbol, unsigned blocks, unsigned threads, unsigned shared_bytes,
                           void* const* arguments, const std::size_t* sizes, std::size_t count) {
    return static_cast<Emulator*>(emulator)->launch(symbol, blocks, threads, shared_bytes, arguments, sizes, count);
}

}  // extern "C"
