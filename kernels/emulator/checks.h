// Faults, and the checks of every access. A part of runtime.cpp.
#ifndef VITMAE_EMULATOR_CHECKS_H
#define VITMAE_EMULATOR_CHECKS_H

#include "state.h"

namespace {

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
    if (is_shared(address)) {
        if (address < shared_start || address + bytes > shared_start + shared_bytes) {
            fault("%s of %llu bytes at byte %lld of shared memory, which has %llu bytes", write ? "write" : "read", bytes,
                  static_cast<i64>(address - shared_start), shared_bytes);
        }
        check_shared(address - shared_start, bytes, write);
    } else if (is_global(address)) {
        check_global(address, bytes, write);
    } else if (address < GUARD_BYTES) {
        fault("%s of %llu bytes at address %#llx, a null pointer", write ? "write" : "read", bytes, address);
    }
    // Everything else is the thread's own stack, a constant, or an argument.
}

// Every access at a multiple of its size, as a GPU wants it. Only for what the compiler takes to be one access: of a structure
// that may lie anywhere it reports the bytes.
void Emulator::check_alignment(u64 address, u64 bytes, bool write) {
    if (address % bytes != 0) {
        fault("%s of %llu bytes at an address that is not a multiple of %llu", write ? "write" : "read", bytes, bytes);
    }
}

// A read through the read-only path, of memory that nothing writes while the launch runs.
void Emulator::check_constant(u64 address, u64 bytes) {
    if (!is_global(address)) fault("load_16 of an address outside global memory");
    check(address, bytes, false);
    Buffer* buffer = buffer_at(address, 0);
    const u64 offset = address - buffer->start;
    for (u64 i = offset; i < offset + bytes; ++i) {
        if (buffer->writer[i] != 0) {
            fault("load_16 of what the same launch wrote: %s", describe(*buffer, buffer->start + i).c_str());
        }
        buffer->constant[i] = 1;
    }
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
        buffer->constant.assign(buffer->bytes, 0);
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
            if (buffer->constant[i] != 0) {
                fault("write of what load_16 read in the same launch: %s", describe(*buffer, buffer->start + i).c_str());
            }
            buffer->writer[i] = me;
            buffer->written[i] = 1;
        } else {
            reader = reader == 0 || reader == me ? me : Buffer::MANY;
        }
    }
}

}  // namespace

#endif
