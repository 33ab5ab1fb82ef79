// MlaFusedRopeRmsNormQuantization. One block a token makes its cache row in shared memory, from where the row leaves in 16-byte
// pieces, its padding zero; others rotate the token's queries.
//
// What is stored follows the formats' definitions operation by operation in f32 (mla_trt/formats.py); only the order of the
// norm's sum is free.
#include "append.h"

#include "early.cuh"
#include "pool.h"

namespace mla {
namespace {

constexpr int threads = 256;

struct Pair {
    float a, b;
};

__device__ Pair rotate(Pair x, float cosine, float sine) {
    // products rounded before the sum, as the bodies do it
    return {__fsub_rn(__fmul_rn(x.a, cosine), __fmul_rn(x.b, sine)), __fadd_rn(__fmul_rn(x.a, sine), __fmul_rn(x.b, cosine))};
}

// Four consecutive values as they lie, those of 16 bits two in a word; and what they say. `aligned`: they may be read at once.
__device__ uint4 load_four_bits(const View& x, int64_t index, bool aligned) {
    bool const wide = x.type == MLA_FLOAT;
    if (aligned && wide) return *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(x.data) + index);
    if (aligned) {
        uint2 const pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x.data) + index);
        return make_uint4(pairs.x, pairs.y, 0, 0);
    }
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = load_bits(x.data, x.type, index + i);
    return wide ? make_uint4(bits[0], bits[1], bits[2], bits[3]) : make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, 0, 0);
}

__device__ float4 floats_of_bits(uint4 bits, int32_t type) {
    if (type == MLA_FLOAT) {
        return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
    }
    auto value = [&](uint32_t of) { return float_of_bits(of & 0xffffu, type); };
    return {value(bits.x), value(bits.x >> 16), value(bits.y), value(bits.y >> 16)};
}

// Rotates pairs of a token's queries: those of `block` among `blocks` blocks. A thread takes `unit` pairs of a head at a time,
// four or one. `table_row` says which row of cos and sin is the token's.
template <int unit, typename TableRow>
__device__ void rotate_queries(const Append& work, int64_t token, const TableRow& table_row, int block, int blocks) {
    int const half = work.layout.rope / 2, units = half / unit;
    int64_t const from = token * work.query.token_stride, to = token * work.query_out.token_stride;
#pragma unroll 1
    for (int i = block * threads + threadIdx.x; i < work.heads * units; i += blocks * threads) {
        int const head = i / units, j = i % units * unit;
        int const first = work.interleaved ? 2 * j : j, second = work.interleaved ? first + unit : j + half;
        int64_t const read = from + head * work.query.head_stride, write = to + head * work.query_out.head_stride;
        if constexpr (unit == 1) {
            Pair const x = {load_float(work.query.data, work.query.type, read + first),
                            load_float(work.query.data, work.query.type, read + second)};
            int64_t const row = table_row();
            uint32_t const of_cos = work.cos.bits(row, j), of_sin = work.sin.bits(row, j);
            Pair const y = rotate(x, work.cos.value(of_cos), work.sin.value(of_sin));
            store_float(work.query_out.data, work.query_out.type, write + first, y.a);
            store_float(work.query_out.data, work.query_out.type, write + second, y.b);
        } else {
            uint4 const low_bits = load_four_bits(work.query, read + first, work.query_aligned);
            uint4 const high_bits = load_four_bits(work.query, read + second, work.query_aligned);
            int64_t const row = table_row();
            uint32_t cosines[4], sines[4];
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) cosines[pair] = work.cos.bits(row, j + pair), sines[pair] = work.sin.bits(row, j + pair);
            float4 low = floats_of_bits(low_bits, work.query.type), high = floats_of_bits(high_bits, work.query.type);
            auto turn = [&](float& a, float& b, int pair) {
                Pair const y = rotate({a, b}, work.cos.value(cosines[pair]), work.sin.value(sines[pair]));
                a = y.a;
                b = y.b;
            };
            if (work.interleaved) {
                turn(low.x, low.y, 0);
                turn(low.z, low.w, 1);
                turn(high.x, high.y, 2);
                turn(high.z, high.w, 3);
            } else {
                turn(low.x, high.x, 0);
                turn(low.y, high.y, 1);
                turn(low.z, high.z, 2);
                turn(low.w, high.w, 3);
            }
            store_four(work.query_out.data, work.query_out.type, write + first, low, work.query_out_aligned);
            store_four(work.query_out.data, work.query_out.type, write + second, high, work.query_out_aligned);
        }
    }
}

// To nearest, ties to even, in integers: where nvcc 13.0 stores the bytes of cvt.rn.bf16.f32's result one by one, the low
// byte comes out wrong.
__device__ void put_bf16(uint8_t* bytes, float value) {
    uint32_t bits = __float_as_uint(value);
    bits = value != value ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    bytes[0] = static_cast<uint8_t>(bits >> 16);
    bytes[1] = static_cast<uint8_t>(bits >> 24);
}

__device__ void put_float(uint8_t* bytes, float value) {
    uint32_t const bits = __float_as_uint(value);
    for (int i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(bits >> (8 * i));
}

// max(amax / 448, floor); a NaN among the values makes the scale NaN, as in the formats.
__device__ float amax_scale(float amax) { return fmaxf(divide(amax, e4m3_max), kv_scale_floor); }

// Writes the row of `latent` [R] and `rope` [Dr] (shared memory) to `row` (shared memory, zeroed). Returns the row's scale
// where the format keeps one behind the rows.
__device__ float make_row(const KvLayout& layout, const float* latent, const float* rope, uint8_t* row, float* scratch) {
    int const rank = layout.rank, width = layout.rope;
    uint8_t* rope_bytes = row + layout.rope_offset;
    float scale = 1.0f;
    if (layout.format == row_format::f32 || layout.format == row_format::bf16) {
        bool const wide = layout.format == row_format::f32;
#pragma unroll 1
        for (int i = threadIdx.x; i < rank + width; i += threads) {
            float const value = i < rank ? latent[i] : rope[i - rank];
            if (wide) {
                put_float(row + 4 * i, value);
            } else {
                put_bf16(row + 2 * i, value);
            }
        }
        return scale;
    }
    if (layout.format == row_format::fp8_ds_mla) {
        int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
        for (int group = warp; group * scale_group < rank; group += threads / warp_size) {
            int const end = min((group + 1) * scale_group, rank);
            float amax = 0.0f;
#pragma unroll 1
            for (int i = group * scale_group + lane; i < end; i += warp_size) amax = fmaxf(amax, fabsf(latent[i]));
            float const group_scale = amax_scale(warp_max(amax));
#pragma unroll 1
            for (int i = group * scale_group + lane; i < end; i += warp_size) {
                row[i] = encode_e4m3(divide(latent[i], group_scale));
            }
            if (lane == 0) put_float(row + rank + 4 * group, group_scale);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < width; i += threads) put_bf16(rope_bytes + 2 * i, rope[i]);
        return scale;
    }
    if (layout.format == row_format::fp8) {
        float amax = 0.0f;
#pragma unroll 1
        for (int i = threadIdx.x; i < rank; i += threads) amax = fmaxf(amax, fabsf(latent[i]));
        scale = amax_scale(block_max(amax, scratch));
#pragma unroll 1
        for (int i = threadIdx.x; i < width; i += threads) put_bf16(rope_bytes + 2 * i, divide(rope[i], scale));
    } else {
        scale = layout.kv_scale;
#pragma unroll 1
        for (int i = threadIdx.x; i < width; i += threads) rope_bytes[i] = encode_e4m3(divide(rope[i], scale));
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < rank; i += threads) row[i] = encode_e4m3(divide(latent[i], scale));
    return scale;
}

// Block (token, y): y 0 makes the token's cache row, the others rotate its queries. What does not follow from another read is asked for
// before anything is waited for: the reads' latency is what a step of few tokens takes.
__global__ void __launch_bounds__(threads) append_kernel(Append work) {
    let_next_kernel_begin();
    extern __shared__ uint4 shared[];
    __shared__ float scratch[warp_size];
    int64_t const token = blockIdx.x;
    int const rank = work.layout.rank, width = work.layout.rope, half = width / 2;
    bool const has_table = width > 0 && work.table_rows > 0;
    bool const has_rows = has_table && work.rope_rows != nullptr;
    int32_t const rope_row = has_rows ? work.rope_rows[token] : 0;
    auto table_row = [&] {  // of cos and sin
        int64_t const wanted = has_rows ? from_here(rope_row) : token;
        return min(max(wanted, int64_t{0}), work.table_rows - 1);
    };
    if (blockIdx.y > 0) {
        int const block = static_cast<int>(blockIdx.y) - 1, blocks = static_cast<int>(gridDim.y) - 1;
        if (half % 4 == 0) {
            rotate_queries<4>(work, token, table_row, block, blocks);
        } else {
            rotate_queries<1>(work, token, table_row, block, blocks);
        }
        if (work.beside) end_after_kernel_before();
        return;
    }

    auto* row = reinterpret_cast<uint8_t*>(shared);
    auto* latent = reinterpret_cast<float*>(row + work.layout.row_bytes);
    float* rope = latent + rank;
    int32_t const named = work.step.token_sequence[token], position = work.step.positions[token];
    auto latent_bits = [&](int i) { return load_bits(work.latent, work.latent_type, token * rank + i); };
    auto weight_bits = [&](int i) { return load_bits(work.norm_weight, work.norm_weight_type, i); };
    auto weight_of = [&](uint32_t bits) { return float_of_bits(bits, work.norm_weight_type); };
    constexpr int at_once = 2;
    uint32_t read[at_once] = {}, weights[at_once] = {};
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
        int const i = threadIdx.x + k * threads;
        if (i >= rank) continue;
        read[k] = latent_bits(i);
        if (work.norm_weight != nullptr) weights[k] = weight_bits(i);
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < half; j += threads) {
        int const first = work.interleaved ? 2 * j : j, second = work.interleaved ? 2 * j + 1 : j + half;
        uint32_t const a = load_bits(work.rope_key, work.rope_key_type, token * width + first);
        uint32_t const b = load_bits(work.rope_key, work.rope_key_type, token * width + second);
        uint32_t const of_cos = has_table ? work.cos.bits(table_row(), j) : 0, of_sin = has_table ? work.sin.bits(table_row(), j) : 0;
        float const cosine = has_table ? work.cos.value(of_cos) : 1.0f, sine = has_table ? work.sin.value(of_sin) : 0.0f;
        Pair const y = rotate({float_of_bits(a, work.rope_key_type), float_of_bits(b, work.rope_key_type)}, cosine, sine);
        rope[first] = y.a;
        rope[second] = y.b;
    }
    int32_t const sequence = from_here(named);
    bool const known = sequence >= 0 && sequence < work.step.sequences;
    const int32_t* entry =
        known ? page_entry(work.step.block_table, work.step.max_pages, work.layout.page_size, sequence, position) : nullptr;
    int32_t const listed = entry == nullptr ? -1 : *entry;
#pragma unroll 1
    for (int i = threadIdx.x; i < work.layout.row_bytes / 16; i += threads) shared[i] = make_uint4(0, 0, 0, 0);

    float values[at_once], squares = 0.0f;
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
        int const i = threadIdx.x + k * threads;
        values[k] = float_of_bits(read[k], work.latent_type);
        if (i < rank) latent[i] = values[k];
        squares += values[k] * values[k];
    }
#pragma unroll 1
    for (int i = threadIdx.x + at_once * threads; i < rank; i += threads) {
        float const value = float_of_bits(latent_bits(i), work.latent_type);
        latent[i] = value;
        squares += value * value;
    }
    if (work.norm_weight != nullptr) {
        float const mean = divide(block_sum(squares, scratch), static_cast<float>(rank));
        float const spread = __fsqrt_rn(__fadd_rn(mean, work.epsilon));
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
            int const i = threadIdx.x + k * threads;
            if (i < rank) latent[i] = __fmul_rn(divide(values[k], spread), weight_of(weights[k]));
        }
#pragma unroll 1
        for (int i = threadIdx.x + at_once * threads; i < rank; i += threads) {
            latent[i] = __fmul_rn(divide(latent[i], spread), weight_of(weight_bits(i)));
        }
    }
    __syncthreads();
    float const scale = make_row(work.layout, latent, rope, row, scratch);
    __syncthreads();

    int32_t const page = from_here(listed);
    if (page >= 0 && page < work.step.pages) {
        int const slot = position % work.layout.page_size;
        uint8_t* page_bytes = work.pool + page * work.layout.page_bytes;
        auto* target = reinterpret_cast<uint4*>(page_bytes + static_cast<int64_t>(slot) * work.layout.row_bytes);
#pragma unroll 1
        for (int i = threadIdx.x; i < work.layout.row_bytes / 16; i += threads) target[i] = shared[i];
        if (work.layout.has_page_scales() && threadIdx.x == 0) {
            reinterpret_cast<float*>(page_bytes + work.layout.scales_offset)[slot] = scale;
        }
    }
    if (work.beside) end_after_kernel_before();
}

// Whether four consecutive values, from every fourth one on, may be read at once.
bool aligned_for_four(const View& view) {
    int64_t const bytes = 4 * element_bytes(view.type);
    return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.token_stride % 4 == 0 && view.head_stride % 4 == 0;
}

}  // namespace

int append(const Append& given, cudaStream_t stream) {
    Append work = given;
    if (work.step.tokens == 0) return MLA_OK;
    if (work.layout.rope % 2 != 0) {
        return fail(MLA_BAD_CALL, "qk_rope_head_dim is %d: rope needs pairs of values", work.layout.rope);
    }
    size_t const shared = work.layout.row_bytes + 4 * (work.layout.rank + work.layout.rope);
    Device device;
    if (int status = current_device(&device)) return status;
    if (shared > static_cast<size_t>(device.shared_bytes)) {
        return fail(MLA_UNSUPPORTED, "a cache row of %d + %d values needs more shared memory than this GPU has",
                    work.layout.rank, work.layout.rope);
    }
    if (int status = check_cuda("MlaFusedRopeRmsNormQuantization",
                                cudaFuncSetAttribute(append_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared)))) {
        return status;
    }
    work.query_aligned = aligned_for_four(work.query);
    work.query_out_aligned = aligned_for_four(work.query_out);
    // as many blocks for the queries as fill the GPU, each with work for all of its threads
    int64_t const pairs = static_cast<int64_t>(work.heads) * (work.layout.rope / 2);
    int64_t const most = ceil_div<int64_t>(pairs, 4 * threads);
    int64_t const wanted = ceil_div<int64_t>(4 * device.multiprocessors, work.step.tokens);
    bool const rotates = pairs > 0 && work.table_rows > 0;
    dim3 const grid(static_cast<unsigned>(work.step.tokens),
                    1 + (rotates ? static_cast<unsigned>(wanted < most ? wanted : most) : 0));
    auto const bytes = static_cast<int>(shared);
    if (work.beside) return launch_early("MlaFusedRopeRmsNormQuantization", append_kernel, grid, threads, bytes, device, stream, work);
    append_kernel<<<grid, threads, bytes, stream>>>(work);
    return check_launch("MlaFusedRopeRmsNormQuantization");
}

int run_fused_rope_rms_norm_quantization(Call& call) {
    using namespace fused_rope_rms_norm_quantization;
    const MlaTensor& query = call.in[in::query_rope];
    if (int status = update_pool(call, call.in[in::kv_cache], call.out[out::kv_cache_out], call.in[in::page_copies])) {
        return status;
    }
    if (call.workspace.sizing()) return MLA_OK;
    Append work{};
    work.query = contiguous(query.data, query.type, call.dims.H, call.dims.Dr);
    const MlaTensor& query_out = call.out[out::query_rope_out];
    work.query_out = contiguous(query_out.data, query_out.type, call.dims.H, call.dims.Dr);
    work.latent = call.in[in::latent].data;
    work.latent_type = call.in[in::latent].type;
    work.rope_key = call.in[in::rope_key].data;
    work.rope_key_type = call.in[in::rope_key].type;
    work.norm_weight = call.given(in::norm_weight) ? call.in[in::norm_weight].data : nullptr;
    work.norm_weight_type = call.in[in::norm_weight].type;
    work.cos = rope_table(call.in[in::cos]);
    work.sin = rope_table(call.in[in::sin]);
    work.rope_rows = call.input<int32_t>(in::rope_rows);
    work.table_rows = call.dims.N;
    work.heads = static_cast<int32_t>(call.dims.H);
    work.epsilon = call.attributes.epsilon;
    work.interleaved = call.attributes.rope_interleaved != 0;
    work.layout = KvLayout(call.attributes);
    work.step.block_table = call.input<int32_t>(in::block_table);
    work.step.token_sequence = call.input<int32_t>(in::token_sequence);
    work.step.positions = call.input<int32_t>(in::positions);
    work.step.tokens = call.dims.T;
    work.step.sequences = call.dims.B;
    work.step.max_pages = call.dims.max_pages;
    work.step.pages = call.dims.pages;
    work.pool = call.output<uint8_t>(out::kv_cache_out);
    return append(work, call.stream);
}

}  // namespace mla
