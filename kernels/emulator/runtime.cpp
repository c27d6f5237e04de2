// Runs kernels on the CPU, one fibre per CUDA thread and one block at a time, and checks every access to memory.
//
// What is caught, always with kernel, block and thread: an access outside a buffer, to a released one, or to an address near
// null; a misaligned 128-bit access; a read of memory that nothing wrote; two threads of a block that touch the same byte of
// shared memory, one of them writing, with no barrier between; two blocks that do so in global memory in one launch; a
// lane that never arrives at a warp collective, or arrives at another one; a barrier that cannot be passed; a read of an
// asynchronous copy before its wait; arguments of the wrong number or size; a block larger than the kernel allows.
//
// Blocks and threads run in an order drawn from the seed. Seed 0 runs them in order, seed 1 backwards.
//
// What it cannot see: bank conflicts, weak memory ordering, speed, and mistakes in the PTX half of ptx.cuh.
//
// The interface for the Rust side (src/cuda/emulator.rs) is the extern "C" block at the end. One emulator serves one caller at
// a time; several emulators in several threads do not know of each other.

#include "../ptx.cuh"

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

#ifndef __x86_64__
#include <ucontext.h>
#endif

// From the generated table: all kernels, closed by an entry without a symbol.
extern const emulator::Entry* const vitmae_emulator_entries[];

namespace {

using emulator::Entry;

constexpr u32 WARP = 32;
constexpr u32 MAX_THREADS = 1024;
constexpr std::size_t STACK_BYTES = 128 << 10;
constexpr std::size_t SHARED_CAPACITY = 256 << 10;
// Unmapped or at least unused bytes on both sides of every buffer.
constexpr u64 GUARD_BYTES = 64 << 10;
constexpr u64 CANARY = 0x5afe57acc0de1234ull;
// As f32 and bf16 a NaN, as an index far out of range.
constexpr int POISON = 0xff;

// ---------------------------------------------------------------------------------------------------------------------
// Fibres

#ifdef __x86_64__

using Context = void*;

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void vitmae_emulator_switch(Context* from, Context to);
asm(R"(
.text
.p2align 4
.globl vitmae_emulator_switch
.hidden vitmae_emulator_switch
.type vitmae_emulator_switch, @function
vitmae_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size vitmae_emulator_switch, .-vitmae_emulator_switch
)");

void switch_to(Context& from, Context& to) { vitmae_emulator_switch(&from, to); }

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    // As after a call: the return address is on top of a stack that was 16-byte aligned before it.
    u64* top = reinterpret_cast<u64*>(stack + bytes);
    *--top = 0;
    *--top = reinterpret_cast<u64>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context = top;
}

#else

using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

// SplitMix64: enough to draw orders from.
struct Random {
    u64 state;

    u64 next() {
        u64 z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }

    u32 below(u32 bound) { return static_cast<u32>(next() % bound); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Memory and its shadows

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
    LOAD_MATRICES,
    LOAD_MATRICES_TRANSPOSED,
    MULTIPLY_MATRICES,
};

const char* name_of(Collective collective) {
    switch (collective) {
        case Collective::WARP_BARRIER: return "warp_barrier";
        case Collective::SHUFFLE: return "shuffle";
        case Collective::SHUFFLE_XOR: return "shuffle_xor";
        case Collective::BALLOT: return "ballot";
        case Collective::LOAD_MATRICES: return "load_matrices";
        case Collective::LOAD_MATRICES_TRANSPOSED: return "load_matrices_transposed";
        case Collective::MULTIPLY_MATRICES: return "multiply_matrices";
    }
    return "?";
}

struct Thread {
    Context context;
    State state;
    Collective collective;
    u32 operand;   // of the collective: the value or predicate
    u32 selector;  // of the collective: lane or mask
    u32 result;    // of the collective
    // Of load_matrices and multiply_matrices, which have more to bring and to take away.
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
    void check_shared(u64 offset, u64 bytes, bool write);
    void check_global(u64 address, u64 bytes, bool write);
    bool ordered_after(u16 thread, u32 at_block_epoch, u32 at_warp_epoch) const;
    std::string describe(const Buffer& buffer, u64 address) const;
    u32 collective(Collective kind, u32 operand, u32 selector);
    void complete(u32 warp);
    void load_matrices(u32 warp, bool transposed);
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

// ---------------------------------------------------------------------------------------------------------------------
// Faults

// Ends the launch: the other fibres are never resumed.
void Emulator::fault(const char* format, ...) {
    va_list list;
    va_start(list, format);
    message = text_of("kernel %s, block %u, thread %u: ", entry->symbol, block, current) + format_text(format, list);
    va_end(list);
    failed = true;
    switch_to(threads[current].context, scheduler);
    std::abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks of accesses

void Emulator::check(u64 address, u64 bytes, bool write) {
    const u64 shared_start = reinterpret_cast<u64>(shared);
    const u64 array_start = reinterpret_cast<u64>(shared_array.get());
    if (address >= array_start && address < array_start + 3 * SHARED_CAPACITY) {
        if (address < shared_start || address + bytes > shared_start + shared_bytes) {
            fault("%s of %llu bytes at byte %lld of shared memory, which has %llu bytes", write ? "write" : "read", bytes,
                  static_cast<i64>(address - shared_start), shared_bytes);
        }
        check_shared(address - shared_start, bytes, write);
    } else if (address - reinterpret_cast<u64>(region) < region_bytes) {
        check_global(address, bytes, write);
    } else if (address < GUARD_BYTES) {
        fault("%s of %llu bytes at address %#llx, a null pointer", write ? "write" : "read", bytes, address);
    }
    // Everything else is the thread's own stack, a constant, or an argument.
}

// Whether what `thread` did at these epochs comes before what the current thread does now.
bool Emulator::ordered_after(u16 thread, u32 at_block_epoch, u32 at_warp_epoch) const {
    if (thread == current || at_block_epoch < block_epoch) return true;
    return thread / WARP == current / WARP && at_warp_epoch < warps[current / WARP].epoch;
}

void Emulator::check_shared(u64 offset, u64 bytes, bool write) {
    const u32 warp_epoch = warps[current / WARP].epoch;
    const u16 me = static_cast<u16>(current);
    const u16 my_warp = static_cast<u16>(current / WARP);
    for (u64 i = offset; i < offset + bytes; ++i) {
        SharedByte& byte = shared_shadow[i];
        const auto at = static_cast<unsigned long long>(i);
        if (byte.in_flight) {
            fault("%s of byte %llu of shared memory, where an asynchronous copy has not landed: wait for it first",
                  write ? "write" : "read", at);
        }
        if (!write && !byte.written) fault("read of byte %llu of shared memory, which nothing wrote", at);
        if (byte.writer != SharedByte::NOBODY && !ordered_after(byte.writer, byte.writer_block_epoch, byte.writer_warp_epoch)) {
            fault("%s of byte %llu of shared memory, which thread %u wrote with no barrier between", write ? "write" : "read",
                  at, byte.writer);
        }
        if (write) {
            bool conflict = false;
            if (byte.reader != SharedByte::NOBODY && byte.reader_block_epoch == block_epoch) {
                const bool other_warp = byte.reader_warp != my_warp;
                const bool unordered_lanes = byte.reader != me && byte.reader_warp_epoch == warp_epoch;
                conflict = other_warp || unordered_lanes;
            }
            if (conflict) {
                const bool one = byte.reader != SharedByte::MANY;
                fault("write of byte %llu of shared memory, which %s %u read with no barrier between", at,
                      one ? "thread" : "several threads, not only", one ? byte.reader : current);
            }
            byte.writer = me;
            byte.writer_block_epoch = block_epoch;
            byte.writer_warp_epoch = warp_epoch;
            byte.written = true;
            byte.reader = byte.reader_warp = SharedByte::NOBODY;
        } else {
            const bool first = byte.reader == SharedByte::NOBODY || byte.reader_block_epoch != block_epoch;
            if (first) {
                byte.reader = me;
                byte.reader_warp = my_warp;
            } else if (byte.reader_warp != my_warp) {
                byte.reader = byte.reader_warp = SharedByte::MANY;
            } else if (byte.reader_warp_epoch != warp_epoch) {
                // Earlier reads of this warp are ordered before anything the warp does now; those of others do not exist.
                byte.reader = me;
            } else if (byte.reader != me) {
                byte.reader = SharedByte::MANY;
            }
            byte.reader_block_epoch = block_epoch;
            byte.reader_warp_epoch = warp_epoch;
        }
    }
}

void Emulator::check_global(u64 address, u64 bytes, bool write) {
    Buffer* buffer = buffer_at(address, 0);
    if (buffer == nullptr || buffer->released || address + bytes > buffer->start + buffer->bytes) {
        if (buffer == nullptr) buffer = buffer_at(address, GUARD_BYTES / 2);
        fault("%s of %llu bytes out of bounds: %s", write ? "write" : "read", bytes,
              buffer == nullptr ? "an address far from any buffer" : describe(*buffer, address).c_str());
    }
    if (!buffer->touched) {
        buffer->touched = true;
        buffer->writer.assign(buffer->bytes, 0);
        buffer->reader.assign(buffer->bytes, 0);
    }
    const u32 me = block + 1;
    for (u64 i = address - buffer->start; i < address - buffer->start + bytes; ++i) {
        if (!write && buffer->written[i] == 0) {
            fault("read of memory that nothing wrote: %s", describe(*buffer, buffer->start + i).c_str());
        }
        const u32 writer = buffer->writer[i];
        if (writer != 0 && writer != me) {
            fault("%s of what block %u wrote in the same launch: %s", write ? "write" : "read", writer - 1,
                  describe(*buffer, buffer->start + i).c_str());
        }
        u32& reader = buffer->reader[i];
        if (write) {
            if (reader != 0 && reader != me) {
                fault("write of what another block read in the same launch: %s",
                      describe(*buffer, buffer->start + i).c_str());
            }
            buffer->writer[i] = me;
            buffer->written[i] = 1;
        } else {
            reader = reader == 0 || reader == me ? me : Buffer::MANY;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads of a block

void thread_main() {
    Emulator& emulator = *running;
    emulator.entry->call(emulator.arguments);
    emulator.threads[emulator.current].state = State::DONE;
    emulator.yield();
}

void Emulator::yield() {
    const u64* canary = reinterpret_cast<const u64*>(stacks + current * STACK_BYTES);
    if (*canary != CANARY) fault("its stack overflowed (%zu bytes)", STACK_BYTES);
    switch_to(threads[current].context, scheduler);
}

// Seed 0: as they are; 1: reversed; else shuffled.
void Emulator::order(std::vector<u32>& items) {
    if (seed == 1) std::reverse(items.begin(), items.end());
    if (seed < 2) return;
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(static_cast<u32>(i))]);
}

void Emulator::run_block() {
    block_epoch = 1;
    shared_shadow.assign(shared_bytes, SharedByte{});
    std::memset(shared, POISON, shared_bytes);
    warps.assign((thread_count + WARP - 1) / WARP, Warp{0, 1});
    ready.clear();
    for (u32 i = 0; i < thread_count; ++i) {
        char* stack = stacks + i * STACK_BYTES;
        std::memcpy(stack, &CANARY, sizeof CANARY);
        threads[i].state = State::READY;
        threads[i].copies.clear();
        threads[i].groups = 0;
        start_at(threads[i].context, stack, STACK_BYTES, thread_main);
        ready.push_back(i);
    }
    do {
        order(ready);
        // Threads that a collective releases on the way are appended and run in this round too.
        for (std::size_t i = 0; i < ready.size() && !failed; ++i) {
            current = ready[i];
            switch_to(scheduler, threads[current].context);
        }
        ready.clear();
    } while (!failed && release_waiting());
}

// Passes the block barrier if every thread that is left waits at it. False: nothing is left to run.
bool Emulator::release_waiting() {
    bool at_barrier = false, stuck = false;
    for (u32 i = 0; i < thread_count; ++i) {
        at_barrier |= threads[i].state == State::AT_BLOCK_BARRIER;
        stuck |= threads[i].state == State::AT_COLLECTIVE;
    }
    if (stuck) report_deadlock();
    if (stuck || !at_barrier) return false;
    ++block_epoch;
    for (u32 i = 0; i < thread_count; ++i) {
        if (threads[i].state != State::AT_BLOCK_BARRIER) continue;
        threads[i].state = State::READY;
        ready.push_back(i);
    }
    return true;
}

// Some lane waits at a warp collective that not all of its warp will reach.
void Emulator::report_deadlock() {
    u32 waiting = 0;
    while (threads[waiting].state != State::AT_COLLECTIVE) ++waiting;
    const u32 first = waiting / WARP * WARP;
    u32 missing = first;
    while (missing < first + WARP && missing < thread_count && threads[missing].state == State::AT_COLLECTIVE) ++missing;
    const char* where = "the block is too small to have it";
    if (missing < thread_count && missing < first + WARP) {
        where = threads[missing].state == State::DONE ? "it has returned" : "it waits at a block barrier";
    }
    message = text_of("kernel %s, block %u, thread %u: lane %u waits at %s, and lane %u never arrives: %s", entry->symbol,
                      block, waiting, waiting % WARP, name_of(threads[waiting].collective), missing % WARP, where);
    failed = true;
}

float of_bf16(u32 bits) {
    const u32 wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Fragments to matrices, the product, and back. A GPU adds the sixteen products of an element in an order and with a
// rounding of its own; here they are added in f64 and rounded once.
void multiply(Thread* lanes) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 row = lane / 4, column = 2 * (lane % 4);
        const u32 left[4] = {lanes[lane].a.x, lanes[lane].a.y, lanes[lane].a.z, lanes[lane].a.w};
        for (u32 half = 0; half < 2; ++half) {
            const u32 shift = 16 * half;
            for (u32 i = 0; i < 4; ++i) {
                a[row + 8 * (i % 2)][column + half + 8 * (i / 2)] = of_bf16(left[i] >> shift & 0xffff);
            }
            for (u32 i = 0; i < 2; ++i) b[column + half + 8 * i][row] = of_bf16(lanes[lane].b[i] >> shift & 0xffff);
        }
    }
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 row = lane / 4, column = 2 * (lane % 4);
        const auto add = [&](float& sum, u32 i, u32 j) {
            double value = sum;
            for (u32 k = 0; k < 16; ++k) value += static_cast<double>(a[i][k]) * b[k][j];
            sum = static_cast<float>(value);
        };
        f32x4& sum = lanes[lane].sum;
        add(sum.x, row, column);
        add(sum.y, row, column + 1);
        add(sum.z, row + 8, column);
        add(sum.w, row + 8, column + 1);
    }
}

// Each row is read on behalf of the lane that gave its address and, as all lanes get some of it, of one more; then it counts
// as read by several.
void Emulator::load_matrices(u32 warp, bool transposed) {
    Thread* lanes = &threads[warp * WARP];
    u16 elements[4][8][8];
    const u32 last = current;
    for (u32 lane = 0; lane < WARP; ++lane) {
        current = warp * WARP + lane;
        const u64 address = reinterpret_cast<u64>(lanes[lane].row);
        const u64 start = reinterpret_cast<u64>(shared);
        if (address % 16 != 0) fault("a matrix row at an address that is not a multiple of 16");
        if (address - start >= shared_bytes && address - reinterpret_cast<u64>(shared_array.get()) >= 3 * SHARED_CAPACITY) {
            fault("a matrix row at an address outside shared memory");
        }
        check(address, 16, false);
        current ^= 1;
        check(address, 2, false);
        for (u64 i = address - start; i < address - start + 16; ++i) shared_shadow[i].reader = SharedByte::MANY;
        std::memcpy(elements[lane / 8][lane % 8], lanes[lane].row, 16);
    }
    current = last;
    for (u32 lane = 0; lane < WARP; ++lane) {
        u32 words[4];
        for (u32 matrix = 0; matrix < 4; ++matrix) {
            const auto& m = elements[matrix];
            const u32 row = lane / 4, column = 2 * (lane % 4);
            const u32 low = transposed ? m[column][row] : m[row][column];
            const u32 high = transposed ? m[column + 1][row] : m[row][column + 1];
            words[matrix] = low | high << 16;
        }
        lanes[lane].loaded = {words[0], words[1], words[2], words[3]};
    }
}

u32 Emulator::collective(Collective kind, u32 operand, u32 selector) {
    Thread& thread = threads[current];
    thread.collective = kind;
    thread.operand = operand;
    thread.selector = selector;
    thread.state = State::AT_COLLECTIVE;
    Warp& warp = warps[current / WARP];
    if (++warp.arrived == WARP) complete(current / WARP);
    if (thread.state == State::AT_COLLECTIVE) yield();
    return thread.result;
}

// All lanes have arrived: compute for all of them. The last one simply goes on.
void Emulator::complete(u32 warp) {
    Thread* lanes = &threads[warp * WARP];
    const Collective kind = threads[current].collective;
    u32 votes = 0;
    for (u32 lane = 0; lane < WARP; ++lane) {
        if (lanes[lane].collective != kind) {
            fault("lane %u is at %s while lane %u is at %s", current % WARP, name_of(kind), lane,
                  name_of(lanes[lane].collective));
        }
        votes |= (lanes[lane].operand != 0 ? 1u : 0u) << lane;
    }
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32 selector = lanes[lane].selector;
        switch (kind) {
            case Collective::WARP_BARRIER: lanes[lane].result = 0; break;
            case Collective::SHUFFLE: lanes[lane].result = lanes[selector % WARP].operand; break;
            case Collective::SHUFFLE_XOR: lanes[lane].result = lanes[(lane ^ selector) % WARP].operand; break;
            case Collective::BALLOT: lanes[lane].result = votes; break;
            default: break;
        }
    }
    if (kind == Collective::MULTIPLY_MATRICES) multiply(lanes);
    if (kind == Collective::LOAD_MATRICES) load_matrices(warp, false);
    if (kind == Collective::LOAD_MATRICES_TRANSPOSED) load_matrices(warp, true);
    if (kind == Collective::WARP_BARRIER) ++warps[warp].epoch;
    warps[warp].arrived = 0;
    std::vector<u32> released;
    for (u32 lane = 0; lane < WARP; ++lane) {
        lanes[lane].state = State::READY;
        if (warp * WARP + lane != current) released.push_back(warp * WARP + lane);
    }
    order(released);
    ready.insert(ready.end(), released.begin(), released.end());
}

// The bytes arrive at a moment that nobody knows: read now or at the wait, and not to be touched in between.
void Emulator::issue_copy(void* target, const void* source, bool valid) {
    const u64 to = reinterpret_cast<u64>(target), from = reinterpret_cast<u64>(source);
    const u64 start = reinterpret_cast<u64>(shared);
    if (to % 16 != 0 || from % 16 != 0) fault("copy_async_16 between addresses that are not multiples of 16");
    if (to < start || to + 16 > start + shared_bytes) fault("copy_async_16 to an address outside shared memory");
    if (from - reinterpret_cast<u64>(region) >= region_bytes) fault("copy_async_16 from an address outside global memory");
    if (valid) check(from, 16, false);
    check(to, 16, true);
    Thread& thread = threads[current];
    AsyncCopy copy{static_cast<u8*>(target), static_cast<const u8*>(source), random.below(2) == 0, !valid, thread.groups, {}};
    if (valid) std::memcpy(copy.bytes, source, 16);
    std::memset(target, POISON, 16);
    for (u64 i = 0; i < 16; ++i) shared_shadow[to - start + i].in_flight = true;
    thread.copies.push_back(copy);
}

// Lands this thread's copies, except those of the `pending` newest groups.
void Emulator::land_copies(u32 pending) {
    Thread& thread = threads[current];
    const auto lands = [&](const AsyncCopy& copy) { return copy.group + pending < thread.groups; };
    for (const AsyncCopy& copy : thread.copies) {
        if (!lands(copy)) continue;
        const u64 to = reinterpret_cast<u64>(copy.target);
        std::memcpy(copy.target, copy.early || copy.zero ? copy.bytes : copy.source, 16);
        for (u64 i = 0; i < 16; ++i) shared_shadow[to - reinterpret_cast<u64>(shared) + i].in_flight = false;
        check(to, 16, true);
    }
    std::erase_if(thread.copies, lands);
}

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
    }
    return !failed;
}

void check_vector(const void* address, bool write) {
    if (reinterpret_cast<u64>(address) % 16 != 0) {
        running->fault("128-bit %s at an address that is not a multiple of 16", write ? "write" : "read");
    }
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

void block_barrier() {
    running->threads[running->current].state = State::AT_BLOCK_BARRIER;
    running->yield();
}

void warp_barrier() { running->collective(Collective::WARP_BARRIER, 0, 0); }
u32 shuffle(u32 value, u32 lane) { return running->collective(Collective::SHUFFLE, value, lane); }
float shuffle(float value, u32 lane) { return float_of(shuffle(bits_of(value), lane)); }
u32 shuffle_xor(u32 value, u32 mask) { return running->collective(Collective::SHUFFLE_XOR, value, mask); }
float shuffle_xor(float value, u32 mask) { return float_of(shuffle_xor(bits_of(value), mask)); }
u32 ballot(bool predicate) { return running->collective(Collective::BALLOT, predicate, 0); }

u32x4 load_16(const void* address) {
    check_vector(address, false);
    return *static_cast<const u32x4*>(address);
}

u32x4 load_own_16(const void* address) { return load_16(address); }
u32x4 load_shared_16(const void* address) { return load_16(address); }

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

u32x4 load_matrices(const void* row) {
    Thread& thread = running->threads[running->current];
    thread.row = row;
    running->collective(Collective::LOAD_MATRICES, 0, 0);
    return thread.loaded;
}

u32x4 load_matrices_transposed(const void* row) {
    Thread& thread = running->threads[running->current];
    thread.row = row;
    running->collective(Collective::LOAD_MATRICES_TRANSPOSED, 0, 0);
    return thread.loaded;
}

f32x4 multiply_matrices(const u32x4& a, u32 b_0, u32 b_1, const f32x4& sum) {
    Thread& thread = running->threads[running->current];
    thread.a = a;
    thread.b[0] = b_0;
    thread.b[1] = b_1;
    thread.sum = sum;
    running->collective(Collective::MULTIPLY_MATRICES, 0, 0);
    return thread.sum;
}

float exp2_approximate(float x) { return std::exp2(x); }
float natural_logarithm(float x) { return std::log(x); }

float multiply_rn(float a, float b) { return a * b; }
float add_rn(float a, float b) { return a + b; }
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

#define HOOKS(bytes)                                                                      \
    void __tsan_read##bytes(void* address) {                                              \
        if (running != nullptr) running->check(reinterpret_cast<u64>(address), bytes, false); \
    }                                                                                     \
    void __tsan_write##bytes(void* address) {                                             \
        if (running != nullptr) running->check(reinterpret_cast<u64>(address), bytes, true);  \
    }                                                                                     \
    void __tsan_unaligned_read##bytes(void* address) { __tsan_read##bytes(address); }     \
    void __tsan_unaligned_write##bytes(void* address) { __tsan_write##bytes(address); }

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
