// Weights into tiles.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
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

namespace {

float from_half(uint16_t bits) {
    Half h;
    std::memcpy(&h, &bits, 2);
    return float(h);
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Numbers of a row into its row of a group. Bytes of the integers stand as in layout.h: four columns, then the next row's.
void put_numbers(Kind kind, uint8_t* group, int row, const float* w, int columns) {
    for (int k = 0; k < columns; k++) {
        if (kind == F32) ((float*)group)[k * TILE + row] = w[k];
        else ((uint16_t*)group)[k / 2 * 2 * TILE + 2 * row + k % 2] = to_bf16(w[k]);
    }
}

// Codes of a row, each moved up to be unsigned, into its row of a group: 32 bytes, or 16 whose high halves are columns 16 and up.
void put_bytes(Kind kind, uint8_t* group, int row, uint16_t scale, const uint8_t* bytes) {
    ((uint16_t*)group)[row] = scale;
    uint8_t* codes = group + 2 * TILE + 4 * row;
    const int quads = (kind == INT8 ? GROUP : GROUP / 2) / 4;
    for (int q = 0; q < quads; q++) std::memcpy(codes + q * 4 * TILE, bytes + 4 * q, 4);
}

void put_rounded(Kind kind, uint8_t* group, int row, const float* w, int columns) {
    float most = 0, signed_most = 0;
    for (int k = 0; k < columns; k++)
        if (std::fabs(w[k]) > most) most = std::fabs(w[k]), signed_most = w[k];
    // As llama.cpp's Q8_0 and Q4_0: the largest weight is 127, or -8 in its own sign.
    const uint16_t scale = to_half(kind == INT8 ? most / 127 : signed_most / -8);
    const float d = from_half(scale), inverse = d != 0 ? 1 / d : 0;
    const int middle = kind == INT8 ? 128 : 8, top = kind == INT8 ? 255 : 15, low = kind == INT8 ? 1 : 0;
    uint8_t bytes[GROUP];
    for (int k = 0; k < GROUP; k++) {
        const int code = k < columns ? int(std::lrintf(w[k] * inverse)) + middle : middle;
        bytes[k] = uint8_t(code < low ? low : code > top ? top : code);
    }
    if (kind == INT4)
        for (int k = 0; k < GROUP / 2; k++) bytes[k] = uint8_t(bytes[k] | bytes[k + GROUP / 2] << 4);
    put_bytes(kind, group, row, scale, bytes);
}

// Codes as they lie in memory or in a file -> bytes as `put_bytes` takes them.
void ordered(Order order, const uint8_t* from, uint8_t* bytes) {
    if (order == SIGNED) {
        for (int k = 0; k < GROUP; k++) bytes[k] = from[k] ^ 0x80;
    } else if (order == HALVES) {
        std::memcpy(bytes, from, GROUP / 2);
    } else {
        for (int k = 0; k < GROUP / 4; k++) {  // byte k: columns 2k and 2k + 1
            const uint8_t first = from[k], second = from[k + GROUP / 4];
            bytes[2 * k] = uint8_t((first & 0x0f) | second << 4);
            bytes[2 * k + 1] = uint8_t(first >> 4 | (second & 0xf0));
        }
    }
}

// put(group, row of the tile, row r of [0, count), g) for all groups: those of a tile together, for its rows share their memory.
template <class Put>
void by_group(Matrix& matrix, int first, int count, Put put) {
    for (int from = 0, to; from < count; from = to) {
        to = std::min(count, from + TILE - (first + from) % TILE);
        uint8_t* group = matrix.tiles + (first + from) / TILE * matrix.tile_bytes();
        for (int g = 0; g < matrix.groups(); g++, group += group_bytes(matrix.kind))
            for (int r = from; r < to; r++) put(group, (first + r) % TILE, r, g);
    }
}

}  // namespace

void pack_floats(Matrix& matrix, int first, int count, const float* rows) {
    const auto put_group = matrix.kind == F32 || matrix.kind == BF16 ? put_numbers : put_rounded;
    by_group(matrix, first, count, [&](uint8_t* group, int row, int r, int g) {
        put_group(matrix.kind, group, row, rows + size_t(r) * matrix.k + g * GROUP, std::min(GROUP, matrix.k - g * GROUP));
    });
}

void pack_bf16(Matrix& matrix, int first, int count, const uint16_t* rows) {
    const auto put_group = matrix.kind == F32 || matrix.kind == BF16 ? put_numbers : put_rounded;
    by_group(matrix, first, count, [&](uint8_t* group, int row, int r, int g) {
        const int columns = std::min(GROUP, matrix.k - g * GROUP);
        float wide[GROUP];
        for (int k = 0; k < columns; k++) {
            const uint32_t bits = uint32_t(rows[size_t(r) * matrix.k + g * GROUP + k]) << 16;
            std::memcpy(&wide[k], &bits, 4);
        }
        put_group(matrix.kind, group, row, wide, columns);
    });
}

void pack_codes(Matrix& matrix, int first, int count, const Coded& coded) {
    by_group(matrix, first, count, [&](uint8_t* group, int row, int r, int g) {
        const size_t at = size_t(r) * matrix.groups() + g;
        uint16_t scale;
        std::memcpy(&scale, coded.scales + at * coded.scale_stride, 2);
        uint8_t bytes[GROUP];
        ordered(coded.order, coded.codes + at * coded.code_stride, bytes);
        put_bytes(matrix.kind, group, row, scale, bytes);
    });
}

}  // namespace ownlm
