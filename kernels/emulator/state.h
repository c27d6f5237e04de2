// The emulator: its memory, the shadows that say who touched what, threads and warps. A part of runtime.cpp.
#ifndef VITMAE_EMULATOR_STATE_H
#define VITMAE_EMULATOR_STATE_H

#include "fibres.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using emulator::Entry;
using emulator::Place;

constexpr u32 WARP = 32;
constexpr u32 MAX_THREADS = 1024;
constexpr std::size_t STACK_BYTES = 128 << 10;
constexpr std::size_t SHARED_CAPACITY = 256 << 10;
// Unmapped or at least unused bytes on both sides of every buffer.
constexpr u64 GUARD_BYTES = 64 << 10;
constexpr u64 CANARY = 0x5afe57acc0de1234ull;
// As f32 and bf16 a NaN, as an index far out of range.
constexpr int POISON = 0xff;

// One buffer of global memory. Who touched a byte in this launch is kept as block + 1; 0 is nobody.
struct Buffer {
    static constexpr u32 MANY = 0xffffffffu;

    u64 start;
    u64 bytes;
    u32 number;
    bool released = false;
    bool touched = false;
    std::vector<u8> written;  // 1: something wrote this byte since the buffer was reserved
    std::vector<u32> writer;
    std::vector<u32> reader;  // MANY: several blocks
    std::vector<u8> constant;  // 1: this launch read the byte through the read-only path
};

// Accesses to one byte of shared memory since the last write, and that write.
struct SharedByte {
    static constexpr u16 NOBODY = 0xffff;
    static constexpr u16 MANY = 0xfffe;

    u16 writer = NOBODY;
    u16 reader = NOBODY;       // MANY: several threads
    u16 reader_warp = NOBODY;  // MANY: several warps
    bool written = false;
    bool in_flight = false;  // an asynchronous copy was issued and not waited for
    u32 writer_block_epoch = 0;
    u32 writer_warp_epoch = 0;
    u32 reader_block_epoch = 0;
    u32 reader_warp_epoch = 0;
};

struct AsyncCopy {
    u8* target;
    const u8* source;
    bool early;  // the bytes were read when it was issued
    bool zero;   // zeros instead of the source
    u32 group;   // how many groups its thread had closed before
    u8 bytes[16];
};

enum class State { READY, AT_BLOCK_BARRIER, AT_COLLECTIVE, DONE };

enum class Collective {
    WARP_BARRIER,
    SHUFFLE,
    SHUFFLE_XOR,
    BALLOT,
    LDMATRIX_X4,
    LDMATRIX_X4_TRANSPOSED,
    MMA_M16N8K16,
};

const char* name_of(Collective collective) {
    switch (collective) {
        case Collective::WARP_BARRIER: return "warp_barrier";
        case Collective::SHUFFLE: return "shuffle";
        case Collective::SHUFFLE_XOR: return "shuffle_xor";
        case Collective::BALLOT: return "warp_ballot";
        case Collective::LDMATRIX_X4: return "ldmatrix_x4";
        case Collective::LDMATRIX_X4_TRANSPOSED: return "ldmatrix_x4_transposed";
        case Collective::MMA_M16N8K16: return "mma_m16n8k16";
    }
    return "?";
}

bool same(const Place& a, const Place& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// "attention.cuh:205".
std::string text_of(const Place& at) {
    const char* slash = std::strrchr(at.file_name(), '/');
    return std::string(slash != nullptr ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

struct Thread {
    Context context;
    State state;
    Collective collective;
    Place at;      // where the collective or barrier is called
    u32 operand;   // of the collective: the value or predicate
    u32 selector;  // of the collective: lane or mask
    u32 result;    // of the collective
    // Of ldmatrix_x4 and mma_m16n8k16, which have more to bring and to take away.
    const void* row;
    u32x4 a;
    u32 b[2];
    f32x4 sum;
    u32x4 loaded;
    std::vector<AsyncCopy> copies;
    u32 groups;  // of copies, closed so far
};

struct Warp {
    u32 arrived;
    u32 epoch;
};

struct Emulator;
// The emulator that is running a kernel in this operating-system thread; the hooks do nothing while it is null.
thread_local Emulator* running = nullptr;

struct Emulator {
    explicit Emulator(u64 seed) : seed(seed), random{seed * 0x9E3779B97F4A7C15ull + 1} {}

    ~Emulator() {
        if (region != nullptr) munmap(region, region_bytes);
        if (stacks != nullptr) munmap(stacks, MAX_THREADS * STACK_BYTES);
    }

    u64 seed;
    Random random;
    std::string message;

    // Global memory: one large reservation, so that a wild index lands in it and is caught. Addresses are never reused.
    char* region = nullptr;
    u64 region_bytes = 0;
    u64 next = 0;
    std::vector<Buffer> buffers;  // in the order of their addresses
    std::size_t last_buffer = 0;

    // Shared memory sits in the middle of a larger array, for the same reason.
    std::unique_ptr<char[]> shared_array = std::make_unique<char[]>(3 * SHARED_CAPACITY);
    char* shared = nullptr;
    u64 shared_bytes = 0;
    std::vector<SharedByte> shared_shadow;

    char* stacks = nullptr;
    Context scheduler;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<u32> ready;
    u32 current = 0;
    u32 block = 0;
    u32 block_epoch = 0;
    u32 thread_count = 0;
    bool failed = false;

    const Entry* entry = nullptr;
    void* const* arguments = nullptr;

    bool reserve();
    u64 allocate(u64 bytes);
    Buffer* buffer_at(u64 address, u64 slack);
    bool host_access(u64 address, u64 bytes, const char* what, Buffer** found);
    bool launch(const char* symbol, u32 blocks, u32 threads, u32 shared, void* const* arguments, const std::size_t* sizes,
                std::size_t count);
    void run_block();
    void order(std::vector<u32>& items);
    bool release_waiting();
    void report_deadlock();
    void yield();
    [[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 2, 3)));
    void check(u64 address, u64 bytes, bool write);
    void check_alignment(u64 address, u64 bytes, bool write);
    void check_constant(u64 address, u64 bytes);
    bool is_global(u64 address) const { return address - reinterpret_cast<u64>(region) < region_bytes; }
    bool is_shared(u64 address) const { return address - reinterpret_cast<u64>(shared_array.get()) < 3 * SHARED_CAPACITY; }
    void check_shared(u64 offset, u64 bytes, bool write);
    void check_global(u64 address, u64 bytes, bool write);
    bool ordered_after(u16 thread, u32 at_block_epoch, u32 at_warp_epoch) const;
    std::string describe(const Buffer& buffer, u64 address) const;
    u32 collective(Collective kind, u32 operand, u32 selector, const Place& at);
    void complete(u32 warp);
    void ldmatrix_x4(u32 warp, bool transposed);
    void issue_copy(void* target, const void* source, bool valid);
    void land_copies(u32 pending);
};

[[gnu::format(printf, 1, 0)]] std::string format_text(const char* format, va_list list) {
    char text[1024];
    std::vsnprintf(text, sizeof text, format, list);
    return text;
}

[[gnu::format(printf, 1, 2)]] std::string text_of(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string text = format_text(format, list);
    va_end(list);
    return text;
}

bool Emulator::reserve() {
    for (u64 bytes = 1ull << 36; bytes >= 1ull << 30; bytes /= 4) {
        void* start =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) continue;
        region = static_cast<char*>(start);
        region_bytes = bytes;
        // From the middle, so that a 32-bit element index that wrapped stays inside.
        next = bytes / 2;
        break;
    }
    void* start = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) stacks = static_cast<char*>(start);
    shared = shared_array.get() + SHARED_CAPACITY;
    shared += (128 - reinterpret_cast<u64>(shared) % 128) % 128;
    return region != nullptr && stacks != nullptr;
}

u64 Emulator::allocate(u64 bytes) {
    if (bytes > region_bytes - next || region_bytes - next - bytes < 2 * GUARD_BYTES) return 0;
    Buffer buffer;
    buffer.start = reinterpret_cast<u64>(region) + next;
    buffer.bytes = bytes;
    buffer.number = static_cast<u32>(buffers.size());
    buffer.written.assign(bytes, 0);
    std::memset(region + next, POISON, bytes);
    next = (next + bytes + GUARD_BYTES + 255) / 256 * 256;
    buffers.push_back(std::move(buffer));
    return buffers.back().start;
}

// The buffer that an address is in, or within `slack` bytes after or before.
Buffer* Emulator::buffer_at(u64 address, u64 slack) {
    const auto holds = [&](const Buffer& b) { return address + slack >= b.start && address < b.start + b.bytes + slack; };
    if (last_buffer < buffers.size() && slack == 0 && holds(buffers[last_buffer])) return &buffers[last_buffer];
    const auto after = [](u64 value, const Buffer& b) { return value < b.start; };
    auto found = std::upper_bound(buffers.begin(), buffers.end(), address, after);
    if (found != buffers.begin() && holds(*(found - 1))) {
        --found;
    } else if (found == buffers.end() || !holds(*found)) {
        return nullptr;
    }
    last_buffer = static_cast<std::size_t>(found - buffers.begin());
    return &*found;
}

std::string Emulator::describe(const Buffer& buffer, u64 address) const {
    std::string text = text_of("byte %lld of buffer %u (%llu bytes", static_cast<i64>(address - buffer.start), buffer.number,
                               buffer.bytes);
    for (std::size_t i = 0; entry != nullptr && i < entry->count; ++i) {
        u64 value = 0;
        if (entry->sizes[i] == sizeof value) std::memcpy(&value, arguments[i], sizeof value);
        if (value >= buffer.start && value < buffer.start + buffer.bytes) text += text_of(", argument %zu", i);
    }
    return text + (buffer.released ? ", released)" : ")");
}

bool Emulator::host_access(u64 address, u64 bytes, const char* what, Buffer** found) {
    Buffer* buffer = buffer_at(address, 0);
    if (buffer == nullptr || buffer->released || bytes > buffer->start + buffer->bytes - address) {
        entry = nullptr;
        message = std::string(what) + ": " + std::to_string(bytes) + " bytes at " +
                  (buffer != nullptr ? describe(*buffer, address) : std::string("an address in no buffer"));
        return false;
    }
    *found = buffer;
    return true;
}

}  // namespace

#endif
