// The indexer's first stage: norm, rope, Hadamard transform and quantisation of new keys and queries, a warp a row.
//
// What the formats define to the bit is f32 in the order of the reference, without contraction; the norm and the transform are
// computed in f64 and rounded once.
#include "indexer.cuh"

namespace mla {
namespace {

constexpr int warps = 8;

// Values of a row: lane l holds l, l + 32, ...
template <int values>
struct Row {
    float v[values];
};

template <int values>
__device__ void normalize(const IndexAppend& append, int32_t size, Row<values>& row, int lane) {
    double sum = 0.0;
    for (int i = 0; i < values; ++i) sum += lane + 32 * i < size ? row.v[i] : 0.0f;
    double const mean = warp_sum(sum) / size;
    sum = 0.0;
    for (int i = 0; i < values; ++i) {
        double const centred = row.v[i] - mean;
        if (lane + 32 * i < size) sum += centred * centred;
    }
    double const spread = sqrt(warp_sum(sum) / size + append.epsilon);
    for (int i = 0; i < values; ++i) {
        int const d = lane + 32 * i;
        if (d >= size) continue;
        double value = (row.v[i] - mean) / spread * load_float(append.norm_weight, append.norm_type, d);
        if (append.norm_bias != nullptr) value += load_float(append.norm_bias, append.bias_type, d);
        row.v[i] = static_cast<float>(value);
    }
}

// `shared` holds the row for the lanes of the warp.
template <int values>
__device__ void rotate(const IndexAppend& append, int64_t token, Row<values>& row, float* shared, int lane) {
    int64_t table_row = append.rope_rows != nullptr ? append.rope_rows[token] : token;
    table_row = max(int64_t{0}, min(table_row, append.table_rows - 1));
    int32_t const half = append.rope / 2;
    const float* cos = append.cos + table_row * half;
    const float* sin = append.sin + table_row * half;
    for (int i = 0; i < values; ++i) shared[lane + 32 * i] = row.v[i];
    __syncwarp();
    for (int i = 0; i < values; ++i) {
        int const d = lane + 32 * i;
        if (d >= append.rope) continue;
        bool const second = append.rope_interleaved ? d & 1 : d >= half;
        int const pair = append.rope_interleaved ? d >> 1 : second ? d - half : d;
        float const a = shared[append.rope_interleaved ? d & ~1 : pair];
        float const b = shared[append.rope_interleaved ? d | 1 : pair + half];
        row.v[i] = second ? __fadd_rn(__fmul_rn(a, sin[pair]), __fmul_rn(b, cos[pair]))
                          : __fsub_rn(__fmul_rn(a, cos[pair]), __fmul_rn(b, sin[pair]));
    }
    __syncwarp();
}

// Walsh-Hadamard transform in natural order, times size^-1/2.
template <int values>
__device__ void transform(int32_t size, Row<values>& row, int lane) {
    double u[values];
    for (int i = 0; i < values; ++i) u[i] = row.v[i];
    for (int stride = 1; stride < size && stride < warp_size; stride *= 2) {
        for (int i = 0; i < values; ++i) {
            double const other = __shfl_xor_sync(0xffffffffu, u[i], stride);
            u[i] = lane & stride ? other - u[i] : u[i] + other;
        }
    }
#pragma unroll
    for (int stride = 1; stride < values; stride *= 2) {
        if (stride * warp_size >= size) break;
#pragma unroll
        for (int i = 0; i < values; ++i) {
            if (i & stride) continue;
            double const low = u[i], high = u[i | stride];
            u[i] = low + high;
            u[i | stride] = low - high;
        }
    }
    double const factor = 1.0 / sqrt(static_cast<double>(size));
    for (int i = 0; i < values; ++i) row.v[i] = static_cast<float>(u[i] * factor);
}

template <int values>
__device__ float scale_of(const IndexLayout& layout, const Row<values>& row) {
    float amax = 0.0f;
    for (int i = 0; i < values; ++i) amax = fmaxf(amax, fabsf(row.v[i]));
    float const scale = fmaxf(divide(warp_max(amax), e4m3_max), index_scale_floor);
    if (!layout.scale_ue8m0) return scale;
    return __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0xff800000u);
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
        for (int i = 0; i < values; ++i) {
            int const d = lane + 32 * i;
            if (4 * d < layout.row_bytes) reinterpret_cast<float*>(bytes)[d] = row.v[i];
        }
        return;
    }
    float const scale = scale_of(layout, row);
    for (int i = 0; i < values; ++i) {
        int const d = lane + 32 * i;
        if (d < layout.row_bytes) bytes[d] = static_cast<char>(d < layout.head ? encode_e4m3(divide(row.v[i], scale)) : 0);
    }
    if (lane == 0) reinterpret_cast<float*>(page_data + layout.scales_offset)[slot] = scale;
}

template <int values>
__device__ void store_query(const IndexWindow& window, int64_t place, float weight, const Row<values>& row, int lane) {
    int64_t const start = place * window.width;
    if (window.layout.format == index_format::f32) {
        for (int i = 0; i < values; ++i) {
            int const d = lane + 32 * i;
            if (d < window.width) static_cast<float*>(window.queries)[start + d] = row.v[i];
        }
    } else {
        float const scale = scale_of(window.layout, row);
        weight *= scale;
        __half* const codes = static_cast<__half*>(window.queries) + start;
        for (int d = lane; d < window.width; d += warp_size) {
            int const i = d / warp_size;
            float value = 0.0f;
#pragma unroll
            for (int j = 0; j < values; ++j) value = i == j ? row.v[j] : value;
            // exact: every e4m3 value is an f16 value
            codes[fragment_place(d)] = __float2half_rn(decode_e4m3(encode_e4m3(divide(value, scale))));
        }
    }
    if (lane == 0) window.weights[place] = weight;
}

// One warp for each (row, padded head) of the window and then, with append.keys, for each token's key.
template <int values>
__global__ void __launch_bounds__(warps* warp_size) append_kernel(IndexWindow window, IndexAppend append) {
    __shared__ float shared[warps][values * warp_size];
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int64_t const item = int64_t{blockIdx.x} * warps + warp;
    int64_t const queries = int64_t{window.rows} * window.padded_heads;
    bool const is_key = item >= queries;
    int64_t const token = is_key ? item - queries : window.first + item / window.padded_heads;
    int32_t const head = is_key ? 0 : static_cast<int32_t>(item % window.padded_heads);
    if (is_key && (!append.keys || token >= window.step.tokens)) return;
    if (!is_key && window.scored_keys(static_cast<int32_t>(token - window.first)) == 0) return;

    int32_t const size = window.layout.head;
    bool const given = is_key || head < window.heads;
    int64_t const start = (is_key ? token : token * window.heads + head) * size;
    Row<values> row;
    for (int i = 0; i < values; ++i) {
        int const d = lane + 32 * i;
        row.v[i] = given && d < size ? load_float(is_key ? append.key : append.query, append.type, start + d) : 0.0f;
    }
    if (is_key && append.norm_weight != nullptr) normalize(append, size, row, lane);
    if (append.rope > 0 && append.table_rows > 0) rotate(append, token, row, shared[warp], lane);
    if (append.hadamard) transform(size, row, lane);
    if (is_key) {
        store_key(window, append.pool, token, row, lane);
    } else {
        store_query(window, item, given ? append.weights[token * window.heads + head] : 0.0f, row, lane);
    }
}

}  // namespace

int append_index_keys(const Call& call, const IndexWindow& window, const IndexAppend& append) {
    int64_t const items = int64_t{window.rows} * window.padded_heads + (append.keys ? window.step.tokens : 0);
    int64_t const blocks = ceil_div<int64_t>(items, warps);
    if (blocks > 0x7fffffff) return fail(MLA_UNSUPPORTED, "MlaIndexer: too many tokens for one call");
    int32_t const size = window.layout.head;
    auto const kernel = size <= 32    ? append_kernel<1>
                        : size <= 64  ? append_kernel<2>
                        : size <= 128 ? append_kernel<4>
                                      : append_kernel<8>;
    kernel<<<static_cast<unsigned>(blocks), warps * warp_size, 0, call.stream>>>(window, append);
    return check_launch("MlaIndexer: keys and queries");
}

}  // namespace mla
