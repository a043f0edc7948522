// Memory of packed weights.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "model.h"

namespace ownlm {

constexpr size_t HUGE_PAGE = size_t(2) << 20, LINE = 64, LARGEST_CHUNK = size_t(256) << 20;

#ifdef __SANITIZE_ADDRESS__
// From the heap, where a sanitizer sees what lies beyond the end.
Memory::Memory(size_t bytes) : data_((uint8_t*)std::calloc(bytes, 1)), bytes_(bytes) {
    if (!data_ && bytes) throw std::bad_alloc();
}

Memory::~Memory() { std::free(data_); }
#else
Memory::Memory(size_t bytes) : bytes_(bytes) {
    // Small blocks share pages with others; only what is read at length is worth pages of its own.
    mapped_ = bytes >= HUGE_PAGE ? (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : round_up(int(bytes) + 1, 4096);
    const size_t room = mapped_ + (bytes >= HUGE_PAGE ? HUGE_PAGE : 0);
    void* at = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    uint8_t* begin = (uint8_t*)at;
    if (bytes >= HUGE_PAGE) {  // cut both ends off, so that the block begins on a huge page
        uint8_t* aligned = (uint8_t*)(((size_t)begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        if (aligned > begin) munmap(begin, aligned - begin);
        if (begin + room > aligned + mapped_) munmap(aligned + mapped_, begin + room - aligned - mapped_);
        begin = aligned;
#ifdef MADV_HUGEPAGE
        madvise(begin, mapped_, MADV_HUGEPAGE);
#endif
    }
    data_ = begin;
}

Memory::~Memory() {
    if (data_) munmap(data_, mapped_);
}
#endif

uint8_t* Arena::take(size_t bytes) {
#ifndef __SANITIZE_ADDRESS__
    bytes = (bytes + LINE - 1) / LINE * LINE;
    if (bytes > left_) {
        next_size_ = std::min(2 * next_size_, LARGEST_CHUNK);
        chunks_.emplace_back(std::max(bytes, next_size_));
        next_ = chunks_.back().data(), left_ = chunks_.back().bytes();
    }
    uint8_t* found = next_;
    next_ += bytes, left_ -= bytes;
    return found;
#else
    chunks_.emplace_back(bytes);
    return chunks_.back().data();
#endif
}

void allocate(Arena& arena, Packed& matrix, Kind kind, int n, int k) {
    matrix.kind = kind, matrix.n = n, matrix.k = k;
    matrix.tiles = arena.take(matrix.bytes());
}

void pack(Matrix& matrix, int first, int count, const Source& source) {
    static const Kernels* best = supported().front();
    best->pack(matrix, first, count, source);
}

}  // namespace ownlm
