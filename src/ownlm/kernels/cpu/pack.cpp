// Weights into tiles.
#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "model.h"

namespace ownlm {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

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

void allocate(Packed& matrix, Kind kind, int n, int k) {
    matrix.kind = kind, matrix.n = n, matrix.k = k;
    matrix.memory = Memory(matrix.bytes());
    matrix.tiles = matrix.memory.data();
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

// A place in a tile: byte i of column k in the row, for the integers.
uint8_t& byte_of(uint8_t* codes, int row, int k) { return codes[k / 4 * 64 + 4 * row + k % 4]; }

void put(Kind kind, uint8_t* group, int row, int k, int code) {  // code: value + 128, or value + 8
    uint8_t* codes = group + 2 * TILE;
    if (kind == INT8) {
        byte_of(codes, row, k) = uint8_t(code);
    } else {
        uint8_t& both = byte_of(codes, row, k % 16);
        both = k < 16 ? uint8_t((both & 0xf0) | code) : uint8_t((both & 0x0f) | code << 4);
    }
}

void put_group(Kind kind, uint8_t* group, int row, const float* w, int columns) {
    if (kind == F32 || kind == BF16) {
        for (int k = 0; k < columns; k++) {
            if (kind == F32) ((float*)group)[k * TILE + row] = w[k];
            else ((uint16_t*)group)[k / 2 * 2 * TILE + 2 * row + k % 2] = to_bf16(w[k]);
        }
        return;
    }
    float most = 0, signed_most = 0;
    for (int k = 0; k < columns; k++)
        if (std::fabs(w[k]) > most) most = std::fabs(w[k]), signed_most = w[k];
    // As llama.cpp's Q8_0 and Q4_0: the largest weight is 127, or -8 in its own sign.
    const uint16_t scale = to_half(kind == INT8 ? most / 127 : signed_most / -8);
    ((uint16_t*)group)[row] = scale;
    const float d = from_half(scale), inverse = d != 0 ? 1 / d : 0;
    const int middle = kind == INT8 ? 128 : 8, top = kind == INT8 ? 255 : 15, low = kind == INT8 ? 1 : 0;
    for (int k = 0; k < GROUP; k++) {
        const int code = k < columns ? int(std::lrintf(w[k] * inverse)) + middle : middle;
        put(kind, group, row, k, code < low ? low : code > top ? top : code);
    }
}

uint8_t* place(Matrix& matrix, int row) { return matrix.tiles + row / TILE * matrix.tile_bytes(); }

}  // namespace

void pack_floats(Matrix& matrix, int first, int count, const float* rows) {
    for (int r = 0; r < count; r++) {
        uint8_t* group = place(matrix, first + r);
        for (int k = 0; k < matrix.k; k += GROUP, group += group_bytes(matrix.kind))
            put_group(matrix.kind, group, (first + r) % TILE, rows + size_t(r) * matrix.k + k, std::min(GROUP, matrix.k - k));
    }
}

void pack_bf16(Matrix& matrix, int first, int count, const uint16_t* rows) {
    std::vector<float> wide(matrix.k);
    for (int r = 0; r < count; r++) {
        for (int k = 0; k < matrix.k; k++) {
            const uint32_t bits = uint32_t(rows[size_t(r) * matrix.k + k]) << 16;
            std::memcpy(&wide[k], &bits, 4);
        }
        pack_floats(matrix, first + r, 1, wide.data());
    }
}

void pack_codes(Matrix& matrix, int first, int count, const uint8_t* codes, const uint16_t* scales) {
    const int groups = matrix.groups(), width = groups * GROUP;
    for (int r = 0; r < count; r++) {
        const int row = (first + r) % TILE;
        uint8_t* group = place(matrix, first + r);
        const uint8_t* from = codes + size_t(r) * width / (matrix.kind == INT4 ? 2 : 1);
        for (int g = 0; g < groups; g++, group += group_bytes(matrix.kind)) {
            ((uint16_t*)group)[row] = scales[size_t(r) * groups + g];
            for (int k = 0; k < GROUP; k++) {
                const int column = g * GROUP + k;
                const int code = matrix.kind == INT8 ? int8_t(from[column]) + 128 : from[column / 2] >> (column % 2 * 4) & 15;
                put(matrix.kind, group, row, k, code);
            }
        }
    }
}

}  // namespace ownlm
