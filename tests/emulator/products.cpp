// Products of four warps: what each of them does of one.
#include <vector>

#include <immintrin.h>

#include "hopper.cuh"

namespace mla {
namespace hopper {
namespace {

constexpr int rows = 16, lanes = emulator::warp_size;  // of a warp

const float* code_values() {
    static const std::vector<float> values = [] {
        std::vector<float> all(256);
        for (int code = 0; code < 256; ++code) {
            __nv_fp8_e4m3 value;
            value.__x = static_cast<uint8_t>(code);
            all[static_cast<size_t>(code)] = static_cast<float>(value);
        }
        return all;
    }();
    return values.data();
}

float bf16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// Shared memory behind a descriptor: units of 16 bytes are permuted by the row of 128 bytes that they are in, or by two rows of 64.
struct Tile {
    uint32_t base, start, stride;  // the block's memory; the tile in it; from one tile of columns to the next
    uint32_t row;  // its bytes

    Tile(uint32_t block, uint32_t descriptor, int row_bytes = 128)
        : base(block), start((descriptor & 0x3fff) << 4), stride((descriptor >> 16 & 0x3fff) << 4), row(static_cast<uint32_t>(row_bytes)) {}

    const uint8_t* at(uint32_t offset) const {
        uint32_t const logical = start + offset;
        return reinterpret_cast<const uint8_t*>(size_t{base + (logical ^ (logical >> 3 & (row - 16)))});
    }
};

struct Slice {
    Product what;
    uint32_t block;
    int first_row;
    float* d[lanes];
    std::vector<uint32_t> a;  // four registers of each lane

    void compute() const {
        int const n = what.n, k = what.codes ? 32 : 16;
        std::vector<float> left(static_cast<size_t>(rows * k)), right(static_cast<size_t>(k * n)), sums(static_cast<size_t>(n));
        read_left(left.data(), k);
        read_right(right.data(), k);
        for (int row = 0; row < rows; ++row) {
            // A lane has two neighbours of every eight columns.
            auto const each_pair = [&](auto visit) {
                for (int lane = 0; lane < 4; ++lane) {
                    float* own = d[row % 8 * 4 + lane] + row / 8 * 2;
                    for (int eight = 0; eight < n / 8; ++eight) visit(own + 4 * eight, sums.data() + 8 * eight + 2 * lane);
                }
            };
            if (what.clear) {
                std::fill(sums.begin(), sums.end(), 0.0f);
            } else {
                each_pair([](const float* own, float* sum) { std::memcpy(sum, own, 2 * sizeof(float)); });
            }
            const float* factors = left.data() + row * k;
            if (what.codes) {
                add_codes(sums.data(), factors, right.data());
            } else {
                for (int i = 0; i < k; ++i) {
                    const float* line = right.data() + i * n;
                    for (int j = 0; j < n; ++j) sums[static_cast<size_t>(j)] += factors[i] * line[j];
                }
            }
            each_pair([](float* own, const float* sum) { std::memcpy(own, sum, 2 * sizeof(float)); });
        }
    }

    // Sums keep 14 bits, as on Hopper (docs/kernels.md): each of the terms, and the sum so far, is cut off at 2^-13 of the largest one's
    // leading bit. What is left are whole numbers below 2^14, whose f32 sum is exact. Eight columns at a time: left alone, the compiler
    // takes them one by one, which is most of the time of all emulated kernels.
    void add_codes(float* sums, const float* factors, const float* right) const {
        constexpr int terms = 32, some = 8, toward_zero = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
        auto const size = [](__m256 values) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values); };
        __m256i const exponent = _mm256_set1_epi32(0x7f800000), kept = _mm256_set1_epi32(13 << 23), least = _mm256_set1_epi32(20 << 23);
        for (int first = 0; first < what.n; first += some) {
            __m256 const sum = _mm256_loadu_ps(sums + first);
            __m256 products[terms], largest = size(sum);
            for (int i = 0; i < terms; ++i) {
                products[i] = _mm256_set1_ps(factors[i]) * _mm256_loadu_ps(right + i * what.n + first);
                largest = _mm256_max_ps(size(products[i]), largest);  // what is not a number is left out
            }
            __m256i const leading = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(largest), exponent), least);
            __m256i const unit = _mm256_sub_epi32(leading, kept);
            __m256 const inverse = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(254 << 23), unit));
            __m256 whole = _mm256_round_ps(sum * inverse, toward_zero);
            for (const __m256& product : products) whole += _mm256_round_ps(product * inverse, toward_zero);
            _mm256_storeu_ps(sums + first, whole * _mm256_castsi256_ps(unit));
        }
    }

    void read_rows(float* to, const Tile& tile, int first, int count, int k, int row_stride, int column_stride) const {
        const float* codes = code_values();
        for (int row = 0; row < count; ++row) {
            for (int unit = 0; unit < 2; ++unit) {
                const uint8_t* bytes = tile.at(static_cast<uint32_t>(first + row) * tile.row + static_cast<uint32_t>(unit * 16));
                for (int i = 0; i < k / 2; ++i) {
                    uint16_t bits;
                    std::memcpy(&bits, bytes + (what.codes ? 0 : 2 * i), 2);
                    to[row * row_stride + (unit * k / 2 + i) * column_stride] = what.codes ? codes[bytes[i]] : bf16_value(bits);
                }
            }
        }
    }

    void read_left(float* left, int k) const {
        if (a.empty()) {
            read_rows(left, Tile(block, what.a), first_row, rows, k, k, 1);
            return;
        }
        int const values = what.codes ? 4 : 2;  // of a register
        const float* codes = code_values();
        for (int lane = 0; lane < lanes; ++lane) {
            int const g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                uint32_t const bits = a[static_cast<size_t>(4 * lane + i)];
                float* to = left + (g + i % 2 * 8) * k + i / 2 * (k / 2) + values * t;
                for (int j = 0; j < values; ++j) {
                    to[j] = what.codes ? codes[bits >> 8 * j & 0xff] : bf16_value(static_cast<uint16_t>(bits >> 16 * j));
                }
            }
        }
    }

    void read_right(float* right, int k) const {
        Tile const tile(block, what.b, what.b_row);
        if (!what.columns) {
            read_rows(right, tile, 0, what.n, k, 1, what.n);
            return;
        }
        for (int i = 0; i < k; ++i) {
            for (int j = 0; j < what.n; ++j) {
                uint16_t bits;
                std::memcpy(&bits, tile.at(static_cast<uint32_t>(i * 128 + j % 64 * 2) + static_cast<uint32_t>(j / 64) * tile.stride), 2);
                right[i * what.n + j] = bf16_value(bits);
            }
        }
    }
};

}  // namespace

void order_product_of(void* const* given) {
    auto slice = std::make_shared<Slice>();
    slice->what = *static_cast<Product*>(given[0]);
    slice->block = emulator::shared_base();
    slice->first_row = rows * emulator::warp_in_group();
    const Product& what = slice->what;
    for (int lane = 0; lane < lanes; ++lane) {
        auto const& own = *static_cast<Product*>(given[lane]);
        if (own.a != what.a || own.b != what.b || own.n != what.n) emulator::fail("wgmma: lanes give different tiles");
        slice->d[lane] = own.d;
        if (own.a_registers != nullptr) slice->a.insert(slice->a.end(), own.a_registers, own.a_registers + 4);
    }
    uint64_t const mark = (uint64_t{what.a} << 32 | what.b) * 31 + static_cast<uint64_t>(what.n * 4 + what.codes * 2 + what.clear);
    emulator::order_product([slice] { slice->compute(); }, mark);
}

}  // namespace hopper
}  // namespace mla
