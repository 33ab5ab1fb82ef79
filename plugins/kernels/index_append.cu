// The indexer's first stage: norm, rope, Hadamard transform and quantisation of new keys and queries, a warp a row at a time.
//
// The instructions are what takes time here, not the bytes. So a lane holds values that follow each other: it reads and writes
// several at once, and short strides of the transform stay in its registers.
//
// What the formats define to the bit is f32 in the order of the reference, without contraction; the norm and the transform are
// computed in f64 and rounded once.
#include "indexer.cuh"

#include <algorithm>

namespace mla {
namespace {

constexpr int warps = 8;
constexpr int most_pairs = 128;  // of a head of 256 values, the largest
static_assert(16 % warps == 0, "the rows of a block are heads of one token");

template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Packed {
    T v[count];
};

// Values of a row: lane l holds l * values + i.
template <int values>
using Row = Packed<float, values>;

// `count` values and zeros after them. `whole`: all of them or none, at an address for all at once.
template <int values, typename T>
__device__ Row<values> load_values(const T* data, int count, bool whole) {
    Row<values> row{};
    if (whole) {
        if (count <= 0) return row;
        auto const packed = *reinterpret_cast<const Packed<T, values>*>(data);
        for (int i = 0; i < values; ++i) row.v[i] = static_cast<float>(packed.v[i]);
    } else {
        for (int i = 0; i < values; ++i) {
            if (i < count) row.v[i] = static_cast<float>(data[i]);
        }
    }
    return row;
}

// A lane's values of the `size` from `start` on, which is a multiple of what the tensor has in a row.
template <int values>
__device__ Row<values> load_row(const void* data, int32_t type, int64_t start, int32_t size, bool whole, int lane) {
    start += lane * values;
    int const count = size - lane * values;
    switch (type) {
        case MLA_FLOAT: return load_values<values>(static_cast<const float*>(data) + start, count, whole);
        case MLA_FLOAT16: return load_values<values>(static_cast<const __half*>(data) + start, count, whole);
        default: return load_values<values>(static_cast<const __nv_bfloat16*>(data) + start, count, whole);
    }
}

template <int values>
__device__ void normalize(const IndexAppend& append, int32_t size, bool whole, Row<values>& row, int lane) {
    int const count = size - lane * values;
    double sum = 0.0;
    for (int i = 0; i < values; ++i) sum += row.v[i];
    double const mean = warp_sum(sum) / size;
    sum = 0.0;
    for (int i = 0; i < values; ++i) {
        double const centred = row.v[i] - mean;
        if (i < count) sum += centred * centred;
    }
    double const inverse = 1.0 / sqrt(warp_sum(sum) / size + append.epsilon);
    Row<values> const weight = load_row<values>(append.norm_weight, append.norm_type, 0, size, whole, lane);
    Row<values> bias{};
    if (append.norm_bias != nullptr) bias = load_row<values>(append.norm_bias, append.bias_type, 0, size, whole, lane);
    for (int i = 0; i < values; ++i) {
        if (i >= count) continue;
        double value = (row.v[i] - mean) * inverse * weight.v[i];
        if (append.norm_bias != nullptr) value += bias.v[i];
        row.v[i] = static_cast<float>(value);
    }
}

// A value of a pair: a cos - b sin of the first, b cos + a sin of the second.
__device__ inline float turn(float value, float other, float cos, float sin, bool second) {
    return __fadd_rn(__fmul_rn(value, cos), __fmul_rn(other, second ? sin : -sin));
}

// A token's row of cos and sin, for the lanes of its warp.
struct alignas(16) TableRow {
    float cos[most_pairs], sin[most_pairs];

    __device__ void load(const IndexAppend& append, int32_t row, int lane) {
#pragma unroll 1
        for (int pair = lane; pair < append.rope / 2; pair += warp_size) {
            uint32_t const of_cos = append.cos.bits(row, pair), of_sin = append.sin.bits(row, pair);
            cos[pair] = append.cos.value(of_cos);
            sin[pair] = append.sin.value(of_sin);
        }
        __syncwarp();
    }
};

// `shared` holds the row for the lanes of the warp.
template <int values>
__device__ void rotate(const IndexAppend& append, const TableRow& table, Row<values>& row, Row<values>* shared, int lane) {
    int32_t const half = append.rope / 2, first = lane * values;
    if (append.rope_interleaved) {
#pragma unroll
        for (int i = 0; i < values; i += 2) {
            if (first + i >= append.rope) continue;
            float const c = table.cos[(first + i) / 2], s = table.sin[(first + i) / 2];
            float const a = row.v[i], b = row.v[i + 1];
            row.v[i] = turn(a, b, c, s, false);
            row.v[i + 1] = turn(b, a, c, s, true);
        }
        return;
    }
    shared[lane] = row;
    __syncwarp();
    if (half % values == 0) {
        bool const second = first >= half;
        int const pair = second ? first - half : first;
        if (first < append.rope) {
            Row<values> const c = *reinterpret_cast<const Row<values>*>(table.cos + pair);
            Row<values> const s = *reinterpret_cast<const Row<values>*>(table.sin + pair);
            Row<values> const other = shared[(second ? pair : first + half) / values];
            for (int i = 0; i < values; ++i) row.v[i] = turn(row.v[i], other.v[i], c.v[i], s.v[i], second);
        }
    } else {
        for (int i = 0; i < values; ++i) {
            int const d = first + i;
            if (d >= append.rope) continue;
            bool const second = d >= half;
            int const pair = second ? d - half : d;
            float const other = reinterpret_cast<const float*>(shared)[second ? pair : d + half];
            row.v[i] = turn(row.v[i], other, table.cos[pair], table.sin[pair], second);
        }
    }
}

// Walsh-Hadamard transform in natural order, times size^-1/2.
template <int values>
__device__ void transform(int32_t size, Row<values>& row, int lane) {
    if (values > 2) size = values * warp_size;  // the only power of two that this many values a lane are for
    double u[values];
    for (int i = 0; i < values; ++i) u[i] = row.v[i];
#pragma unroll
    for (int stride = 1; stride < values; stride *= 2) {
        if (stride >= size) break;
#pragma unroll
        for (int i = 0; i < values; ++i) {
            if (i & stride) continue;
            double const low = u[i], high = u[i | stride];
            u[i] = low + high;
            u[i | stride] = low - high;
        }
    }
    for (int stride = 1; stride * values < size; stride *= 2) {
        for (int i = 0; i < values; ++i) {
            double const other = __shfl_xor_sync(0xffffffffu, u[i], stride);
            u[i] = lane & stride ? other - u[i] : u[i] + other;
        }
    }
    double const factor = 1.0 / sqrt(static_cast<double>(size));
    for (int i = 0; i < values; ++i) row.v[i] = static_cast<float>(u[i] * factor);
}

template <int values>
__device__ float scale_of(const IndexLayout& layout, const Row<values>& row) {
    float amax = 0.0f;
    for (int i = 0; i < values; ++i) amax = fmaxf(amax, fabsf(row.v[i]));
    amax = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(amax)));
    // amax / e4m3_max, rounded once: 448 = 7 * 64, and no float lies as near to a tie as the 48 bits of 1 / 448 leave open
    constexpr float high = 0x1.249248p-9f, low = 0x1.249248p-33f;
    float const scale = fmaxf(__fmaf_rn(amax, high, __fmul_rn(amax, low)), index_scale_floor);
    if (!layout.scale_ue8m0) return scale;
    return __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0xff800000u);
}

// Codes of value / scale, two a word. One step from the product with 1 / scale gives the rounded quotient wherever a code ends
// or begins (all mantissas of scales were tried there), and keeps the sign of zeros.
template <int values>
__device__ Packed<__nv_fp8x2_storage_t, values / 2> encode(const Row<values>& row, float scale) {
    float const inverse = __frcp_rn(scale);
    float const divisor = scale < INFINITY ? scale : 0.0f;  // not infinity times zero
    float quotient[values];
    for (int i = 0; i < values; ++i) {
        float const near = __fmul_rn(row.v[i], inverse);
        quotient[i] = __fmaf_rn(__fmaf_rn(divisor, near, -row.v[i]), -inverse, near);
    }
    Packed<__nv_fp8x2_storage_t, values / 2> codes;
    for (int i = 0; i < values / 2; ++i) {
        float2 const pair = make_float2(quotient[2 * i], quotient[2 * i + 1]);
        codes.v[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    return codes;
}

// As many values as there are up to `end`, a multiple of 4.
template <int values>
__device__ void store_floats(float* data, int end, const Row<values>& row, int lane) {
    constexpr int step = values < 4 ? values : 4;
    for (int i = 0; i < values; i += step) {
        int const d = lane * values + i;
        if (d < end) *reinterpret_cast<Packed<float, step>*>(data + d) = reinterpret_cast<const Packed<float, step>&>(row.v[i]);
    }
}

template <int values>
__device__ void store_key(const IndexWindow& window, char* pool, int64_t token, const Row<values>& row, int lane) {
    const IndexLayout& layout = window.layout;
    int32_t const sequence = window.step.sequence_of(token);
    int32_t const position = window.step.positions[token];
    int32_t const page = sequence < 0 ? -1 : window.page(sequence, position);
    if (page < 0) return;
    char* const page_data = pool + page * layout.page_bytes;
    int32_t const slot = position % layout.page_size;
    char* const bytes = page_data + int64_t{slot} * layout.row_bytes;
    if (layout.format == index_format::f32) {
        store_floats(reinterpret_cast<float*>(bytes), layout.row_bytes / 4, row, lane);
        return;
    }
    float const scale = scale_of(layout, row);
    auto const codes = encode(row, scale);
    if (lane * values < layout.row_bytes) reinterpret_cast<Packed<__nv_fp8x2_storage_t, values / 2>*>(bytes)[lane] = codes;
    if (lane == 0) reinterpret_cast<float*>(page_data + layout.scales_offset)[slot] = scale;
}

// All lanes together have `width` values, but for f32.
template <int values>
__device__ void store_query(const IndexWindow& window, int64_t place, float weight, const Row<values>& row, int lane) {
    int64_t const start = place * window.width;
    if (window.layout.format == index_format::f32) {
        store_floats(static_cast<float*>(window.queries) + start, window.width, row, lane);
    } else {
        float const scale = scale_of(window.layout, row);
        weight *= scale;
        auto const codes = encode(row, scale);
        if (window.query_codes) {
            reinterpret_cast<Packed<__nv_fp8x2_storage_t, values / 2>*>(static_cast<uint8_t*>(window.queries) + start)[lane] = codes;
        } else {
            __half* const halves = static_cast<__half*>(window.queries) + start;
            for (int i = 0; i < values; i += 2) {  // exact: every e4m3 value is an f16 value
                *reinterpret_cast<__half2_raw*>(halves + fragment_place(lane * values + i)) =
                    __nv_cvt_fp8x2_to_halfraw2(codes.v[i / 2], __NV_E4M3);
            }
        }
    }
    if (lane == 0) window.weights[place] = weight;
}

// A warp for `each` padded heads of a row of the window, `warps` apart; behind them, with append.keys, one for each token's key.
template <int values>
__global__ void __launch_bounds__(warps* warp_size) append_kernel(IndexWindow window, IndexAppend append, int32_t each) {
    let_next_kernel_begin();
    __shared__ Row<values> shared[warps][warp_size];
    __shared__ TableRow tables[warps];
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    uint32_t const blocks_per_row = window.padded_heads / (warps * each), query_blocks = window.rows * blocks_per_row;
    bool const is_key = blockIdx.x >= query_blocks;
    int32_t const window_row = is_key ? 0 : blockIdx.x / blocks_per_row;
    int32_t const first_head = is_key ? 0 : blockIdx.x % blocks_per_row * (warps * each) + warp;
    int64_t const token = is_key ? int64_t{blockIdx.x - query_blocks} * warps + warp : window.first + window_row;
    if (is_key && (!append.keys || token >= window.step.tokens)) return;
    if (!is_key && window.scored_keys(window_row) == 0) return;

    int32_t const size = window.layout.head;
    bool const whole = append.aligned && size % values == 0;
    auto load_query = [&](int32_t head) {
        return load_row<values>(append.query, append.type, (token * window.heads + head) * size, head < window.heads ? size : 0, whole, lane);
    };
    Row<values> next = is_key ? load_row<values>(append.key, append.type, token * size, size, whole, lane) : load_query(first_head);
    if (append.rope > 0) {  // meanwhile
        int32_t const last = static_cast<int32_t>(append.table_rows) - 1;
        int32_t const named = append.rope_rows != nullptr ? append.rope_rows[token] : static_cast<int32_t>(min(token, int64_t{last}));
        tables[warp].load(append, max(0, min(named, last)), lane);
    }
    if (is_key) {
        Row<values> row = next;
        if (append.norm_weight != nullptr) normalize(append, size, whole, row, lane);
        if (append.rope > 0) rotate(append, tables[warp], row, shared[warp], lane);
        if (append.hadamard) transform(size, row, lane);
        store_key(window, append.pool, token, row, lane);
        return;
    }
#pragma unroll 1
    for (int32_t i = 0; i < each; ++i) {
        int32_t const head = first_head + i * warps;
        Row<values> row = next;
        if (i + 1 < each) next = load_query(head + warps);  // on its way meanwhile
        float const weight = head < window.heads ? append.weights[token * window.heads + head] : 0.0f;
        if (append.rope > 0) {
            __syncwarp();  // all have read the row before
            rotate(append, tables[warp], row, shared[warp], lane);
        }
        if (append.hadamard) transform(size, row, lane);
        store_query(window, int64_t{window_row} * window.padded_heads + head, weight, row, lane);
    }
}

// Heads for a warp, so that there are blocks enough for all multiprocessors.
int heads_each(const IndexWindow& window, const Device& device) {
    int each = 1;
    while (window.padded_heads % (2 * each * warps) == 0 &&
           int64_t{window.rows} * window.padded_heads / (2 * each * warps) >= 4 * device.multiprocessors) {
        each *= 2;
    }
    return each;
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

int append_index_keys(const Call& call, const IndexWindow& window, const Device& device, IndexAppend append) {
    int const each = heads_each(window, device);
    int64_t const query_blocks = int64_t{window.rows} * window.padded_heads / (warps * each);
    int64_t const blocks = query_blocks + (append.keys ? ceil_div<int64_t>(window.step.tokens, warps) : 0);
    if (blocks > 0x7fffffff) return fail(MLA_UNSUPPORTED, "MlaIndexer: too many tokens for one call");
    append.aligned = aligned(append.query) && aligned(append.key) && aligned(append.norm_weight) &&
                     aligned(append.norm_bias);
    if (append.table_rows <= 0) append.rope = 0;
    append.table_rows = std::min<int64_t>(append.table_rows, 0x7fffffff);  // what rope_rows can name
    int32_t const size = window.layout.head;
    auto const kernel = size <= 64 ? append_kernel<2> : size <= 128 ? append_kernel<4> : append_kernel<8>;
    kernel<<<static_cast<unsigned>(blocks), warps * warp_size, 0, call.stream>>>(window, append, each);
    return check_launch("MlaIndexer: keys and queries");
}

}  // namespace mla
