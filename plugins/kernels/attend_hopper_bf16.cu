// Attention on SM90 with both products in bf16 (R 512, Dr 64, pages of 64 x 2^n), of all keys or of lists of them: over bf16 rows,
// and over codes (fp8, fp8_ds_mla), which are decoded.
//
// A block has up to 64 rows (heads, or tokens x heads of one sequence) and walks over tiles of 64 keys, two of which are in
// shared memory. One warpgroup makes the scores and the softmax, two make the output, each 256 of its 512 columns. Keys lie as
// rows, in nine pieces of 128 bytes of each: K-major for the scores, and for the output transposed by the tensor cores.
//
// - The queries come by the copy engine while the first keys are brought.
// - All keys come by the copy engine: each output group orders its side of the tile that takes the place of the one that it has used,
//   and the scores begin when the first side is there: a tile's place is empty for less time. Rows behind the end may be anything, so
//   the values of the last tile's are cleared.
// - Listed keys are gathered, zeros where there is none, and codes decoded by a fourth group, while the tile before is multiplied. Codes
//   of one or two tiles are decoded by all groups.
// - The reference of a row is its first maximum, until one exceeds it by 2^8: the output is rarely rescaled.
#include "attend_hopper_bf16_feed.cuh"

namespace mla {
namespace {

using namespace hopper_bf16;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr float spare_bits = 8.0f;

// Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8, and of each 8 keys 2 t and 2 t + 1.
template <bool lists, int format>
__device__ void score_group(const Attend& work, const Partials& partials, const Item& item, const Span& span, uint8_t* memory) {
    constexpr bool codes = format != row_format::bf16, row_scales = format == row_format::fp8;
    int const thread = threadIdx.x % group, warp = thread / warp_size, lane = thread % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    float const scale = work.softmax_scale * log2e;
    uint32_t const query = tile_descriptor(shared_address(memory));
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    if constexpr (!lists) {
        if (thread < 64) {
            reinterpret_cast<int32_t*>(memory + place::limits)[thread] =
                thread < item.count ? last_key(work, item.first_token + (item.first_head + thread) / work.heads) : -1;
        }
        named_sync(limits_there, group);
    }
    barrier_wait(shared_address(memory + place::queries_full), 0);

#pragma unroll 1
    for (int32_t n = 0; n < span.count; ++n) {
        float scores[32];
        uint32_t const keys = tile_descriptor(shared_address(memory + place::tiles) + (n & 1) * tile_bytes);
        auto wait_for_side = [&](int side) {
            barrier_wait(barrier_of(memory, place::full, n, side), n / 2 & 1);
            if (lists || codes) fence_async();  // those rows were not written by the copy engine
        };
        wait_for_side(0);
        pin(scores);
        product_fence();
        auto piece = [&](auto number) {
            constexpr int i = decltype(number)::value;
            product_bf16<0, i == 0>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<1>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<2>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<3>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
        };
        piece(std::integral_constant<int, 0>());
        piece(std::integral_constant<int, 1>());
        piece(std::integral_constant<int, 2>());
        piece(std::integral_constant<int, 3>());
        if (!codes) {
            wait_for_side(1);
            product_fence();
        }
        piece(std::integral_constant<int, 4>());
        piece(std::integral_constant<int, 5>());
        piece(std::integral_constant<int, 6>());
        piece(std::integral_constant<int, 7>());
        piece(std::integral_constant<int, 8>());
        product_commit();
        product_wait();
        pin(scores);
        const auto* row_scale = reinterpret_cast<const volatile float*>(memory + place::scales) + (n & 1) * tile + 2 * t;
        if (row_scales) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float const even = row_scale[8 * j], odd = row_scale[8 * j + 1];
                scores[4 * j] *= even, scores[4 * j + 1] *= odd, scores[4 * j + 2] *= even, scores[4 * j + 3] *= odd;
            }
        }
        uint64_t const present = reinterpret_cast<const uint64_t*>(memory + place::there)[n & 1];
        int32_t const first_key = (span.first + n) * tile;
        const auto* limits = reinterpret_cast<const volatile int32_t*>(memory + place::limits) + first_row;  // not kept in registers
        bool const masks = present != ~uint64_t{0} || (!lists && first_key + tile > min(limits[0], limits[8]) + 1);
        if (masks) {
            uint64_t const own = present >> 2 * t;
            int32_t const before = first_key + 2 * t, room[2] = {lists ? 0 : limits[0] - before, lists ? 0 : limits[8] - before};
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                int const key = j / 4 * 8 + j % 2;
                bool const there = (own >> key & 1) != 0, seen = lists || key <= room[j / 2 % 2];
                scores[j] = there && seen ? scores[j] : -INFINITY;
            }
        }
        // both rows side by side, and sums in two parts: fewer waits for what came just before
        float best[2][2], factor[2], base[2], sum[2][2] = {};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            float& own = best[j / 2 % 2][j % 2];
            own = j < 4 ? scores[j] : fmaxf(own, scores[j]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) best[r][0] = fmaxf(best[r][0], best[r][1]);
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
            for (int r = 0; r < 2; ++r) best[r][0] = fmaxf(best[r][0], __shfl_xor_sync(0xffffffffu, best[r][0], lanes));
        }
        bool changed = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float const largest = scale * best[r][0];
            float const highest = largest > top[r] + spare_bits || top[r] == -INFINITY ? largest : top[r];
            base[r] = highest == -INFINITY ? 0.0f : highest;
            factor[r] = power_of_two(top[r] - base[r]);
            changed = changed || highest != top[r];
            top[r] = highest;
        }
        uint32_t words[16];  // row r's keys 8 j + 2 t and the next: 2 j + r
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float const low = power_of_two(fmaf(scores[2 * i], scale, -base[i % 2]));
            float const high = power_of_two(fmaf(scores[2 * i + 1], scale, -base[i % 2]));
            sum[i % 2][0] += low;
            sum[i % 2][1] += high;
            float const even = row_scales ? row_scale[i / 2 * 8] : 1.0f, odd = row_scales ? row_scale[i / 2 * 8 + 1] : 1.0f;
            __nv_bfloat162 const pair = __floats2bfloat162_rn(low * even, high * odd);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] = fmaf(total[r], factor[r], sum[r][0] + sum[r][1]);

        named_sync(keys_read, group);  // by all warps: the weights come where the tile's rope was
        uint32_t const weights = shared_address(memory + place::weights) + (n & 1) * tile_bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // lanes 0 to 15 name the rows of the first eight keys, the others those of the next eight
            int const row = warp * 16 + lane % 16, unit = 2 * i + lane / 16;
            store_matrices(weights + row * 128 + ((unit ^ (row & 7)) << 4), words + 4 * i);
        }
        if (t == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) reinterpret_cast<float*>(memory + place::rescale)[(n & 1) * 64 + first_row + 8 * r] = factor[r];
        }
        bool const any = __any_sync(0xffffffffu, changed);
        if (lane == 0) reinterpret_cast<int32_t*>(memory + place::changed)[(n & 1) * 4 + warp] = any ? 1 : 0;
        if (!lists && !codes && n + 1 == span.count && span.last_keys < tile) {  // values that were never written may be NaN
            for (int i = thread; i < value_pieces * (tile - span.last_keys) * 8; i += group) {
                int const of_piece = (tile - span.last_keys) * 8;
                reinterpret_cast<uint4*>(memory + place::tiles + (n & 1) * tile_bytes + i / of_piece * piece_bytes +
                                         span.last_keys * 128)[i % of_piece] = make_uint4(0, 0, 0, 0);
            }
        }
        fence_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(memory + place::ready) + 8 * (n & 1));
    }

    // what divides the output
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        int const row = first_row + 8 * r;
        if (t != 0 || row >= item.count) continue;
        float sum = total[r];
        int const flat = item.first_head + row;
        int64_t const token = item.first_token + flat / work.heads;
        int const head = flat % work.heads;
        int64_t const out_row = token * work.heads + head;
        float const lse = sum == 0.0f ? -INFINITY : top[r] + log2f(sum);
        if (item.slot >= 0) {
            partials.lse[partials.row(item.slot, row)] = lse;
        } else {
            if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
            if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[r]);
        }
        reinterpret_cast<float*>(memory + place::factors)[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
}

// Adds weights [64][16] x values [16][256] at step `step` of the keys. A block with four groups has no more than 128 registers a thread
// for one instruction.
template <bool fed, int step>
__device__ void add_product(float (&sums)[128], uint32_t weights, uint32_t values) {
    if constexpr (fed) {
        auto& [left, right] = reinterpret_cast<float (&)[2][64]>(sums);
        product_bf16_wide<step, piece_bytes>(left, weights, values);
        product_bf16_wide<step, piece_bytes>(right, weights, values + (2 * piece_bytes >> 4));
    } else {
        product_bf16_wide<step, piece_bytes>(sums, weights, values);
    }
}

// Whether a thread's values of a row may become float16, the largest of them being `largest`: an error of 2^-12 of it at most.
__device__ inline bool fits_float16(float largest) { return largest == 0.0f || (largest >= 0x1p-10f && largest <= 0x1p15f); }

// 256 columns of the output, which are staged in shared memory in the end. `fed`: a group of its own brings the keys. Parts go on from
// there by the copy engine, each warp's as soon as it has staged them.
template <bool fed, bool halves, int side>
__device__ void output_group(const Attend& work, const Partials& partials, const Item& item, const Span& span, const CUtensorMap* map,
                             uint8_t* memory) {
    int const thread = static_cast<int>(threadIdx.x) % group;
    TileBringer<side> keys;
    if constexpr (!fed) {
        keys.begin(work, item, span, thread);
        for (int n = 0; n < 2; ++n) {
            keys.prepare(work, item, span, memory, n, thread);
            keys.bring(work, item, span, map, memory, n, thread);
        }
    }
    int const warp = threadIdx.x / warp_size % 4, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    float sums[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
#pragma unroll 1
    for (int32_t n = 0; n < span.count; ++n) {
        uint32_t const weights = tile_descriptor(shared_address(memory + place::weights)) + (n & 1) * (tile_bytes >> 4);
        uint32_t const values = tile_descriptor(shared_address(memory + place::tiles) + (n & 1) * tile_bytes +
                                                side * (value_pieces / 2) * piece_bytes);
        barrier_wait(shared_address(memory + place::ready) + 8 * (n & 1), n / 2 & 1);
        if (fed) fence_async();
        int4 const changed = reinterpret_cast<const int4*>(memory + place::changed)[n & 1];
        if ((changed.x | changed.y | changed.z | changed.w) != 0) {
            const auto* rescale = reinterpret_cast<const float*>(memory + place::rescale) + (n & 1) * 64 + first_row;
            float const low = rescale[0], high = rescale[8];
#pragma unroll
            for (int i = 0; i < 128; ++i) sums[i] *= i / 2 % 2 == 0 ? low : high;
        }
        pin(sums);
        product_fence();
        add_product<fed, 0>(sums, weights, values);
        add_product<fed, 1>(sums, weights, values);
        add_product<fed, 2>(sums, weights, values);
        add_product<fed, 3>(sums, weights, values);
        product_commit();
        if constexpr (!fed) keys.prepare(work, item, span, memory, n + 2, thread);
        product_wait();
        pin(sums);
        if (lane == 0) barrier_arrive(barrier_of(memory, place::used, n, side));
        if constexpr (!fed) keys.bring(work, item, span, map, memory, n + 2, thread);
    }
    __syncthreads();  // the factors are there, and nobody needs keys and queries any more
    auto* staged = reinterpret_cast<float*>(memory);
    bool narrow = false;
    if constexpr (halves) {
        if (item.slot >= 0 && partials.type == MLA_FLOAT16) {
            bool fits = true;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int const row = first_row + 8 * r;
                float const factor = reinterpret_cast<const float*>(memory + place::factors)[row];
                float largest = 0.0f;
#pragma unroll
                for (int j = 0; j < 32; ++j) {
                    float const first = sums[4 * j + 2 * r] * factor, second = sums[4 * j + 2 * r + 1] * factor;
                    largest = fmaxf(largest, fmaxf(fabsf(first), fabsf(second)));
                    // where the warp's f32 would begin, so that no warp meets another one's, whatever each says
                    reinterpret_cast<__half2*>(staged + row * own_staged_row + side * 256)[4 * j + t] = __floats2half2_rn(first, second);
                }
                fits = fits && (row >= item.count || fits_float16(largest));
            }
            narrow = __all_sync(0xffffffffu, fits);
            if (lane == 0) partials.narrow[item.slot * 8 + warp * 2 + side] = narrow ? 1 : 0;
        }
    }
    if (!narrow) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int const row = first_row + 8 * r;
            float const factor = reinterpret_cast<const float*>(memory + place::factors)[row];
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                *reinterpret_cast<float2*>(staged + row * own_staged_row + side * 256 + 8 * j + 2 * t) =
                    make_float2(sums[4 * j + 2 * r] * factor, sums[4 * j + 2 * r + 1] * factor);
            }
        }
    }
    if (item.slot < 0) return;
    fence_async();
    __syncwarp();
    if (elect_lane()) {
        int const rows = min(item.count - warp * 16, 16), bytes = narrow ? 256 * 2 : 256 * 4;
        auto* target = reinterpret_cast<char*>(partials.output + partials.row(item.slot, warp * 16) * rank) + side * bytes;
        uint32_t const source = shared_address(memory) + (warp * 16 * own_staged_row + side * 256) * 4;
#pragma unroll 1
        for (int i = 0; i < rows; ++i) store_bytes(target + i * rank * 4, source + i * own_staged_row * 4, bytes);
        store_commit();
        store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
    }
}

#endif

template <bool lists, int format>
__global__ void __launch_bounds__(lists || format != row_format::bf16 ? fed_threads : block_threads, 1)
    attend_hopper_bf16_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap query_map, Attend work,
                              Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr bool codes = format != row_format::bf16, fed = lists || codes, halves = hopper_bf16_halves(format);
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ Item shared_item;
    int const warp = threadIdx.x / warp_size;
    if (threadIdx.x == 32) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared_address(memory + place::ready) + 8 * i, group / warp_size);
            for (int side = 0; side < 2; ++side) {
                barrier_init(barrier_of(memory, place::full, i, side), codes ? group : lists ? group + 2 : 1);
                barrier_init(barrier_of(memory, place::used, i, side), group / warp_size);
            }
        }
        barrier_init(shared_address(memory + place::queries_full), 1);
        fence_barrier_init();
        prefetch_map(&query_map);
        if (!fed) prefetch_map(&map);
    }
    if (warp == 0) take_item(work, partials, &shared_item);
    if (lists && warp == 2) prefetch_list(work, partials);
    __syncthreads();
    Item const& item = shared_item;
    if (item.sequence < 0) {
        zero_padding(work, partials, item);
        return;
    }
    constexpr int ordering_warp = codes ? fed_threads / warp_size - 1 : 0;  // not one that is waited for first
    if (warp == ordering_warp && elect_lane()) {
        order_queries(work, &query_map, item, hopper_bf16_rows, shared_address(memory + place::queries_full),
                      [&](int column) { return shared_address(memory) + column * piece_bytes; });
    }
    Span const span{item.first_tile, item.last_tile - item.first_tile, min(item.keys - (item.last_tile - 1) * tile, tile)};

    if constexpr (codes) TileDecoder<lists, format>{work, item, span}.run_few(memory);
    if (fed && warp >= block_threads / warp_size) {
        registers_decrease<88>();
        if constexpr (codes) {
            TileDecoder<lists, format>{work, item, span}.run(memory);
        } else if constexpr (lists) {
            TileGatherer{work, item, span}.run(memory);
        }
        __syncthreads();
    } else if (warp < group / warp_size) {
        if constexpr (fed) registers_decrease<104>();
        score_group<lists, format>(work, partials, item, span, memory);
        __syncthreads();
    } else {
        if constexpr (fed) registers_increase<160>();
        if (warp < 2 * group / warp_size) {
            output_group<fed, halves, 0>(work, partials, item, span, &map, memory);
        } else {
            output_group<fed, halves, 1>(work, partials, item, span, &map, memory);
        }
    }
    if (item.slot >= 0) return;
    __syncthreads();
    write_rows<own_staged_row>(work, partials, item, memory);
#endif
}

template <bool lists, int format>
int launch(const Attend& work, const Partials& partials, cudaStream_t stream) {
    CUtensorMap map{}, query_map;
    if (int status = make_query_map(&query_map, work, hopper_bf16_rows)) return status;
    if (!lists && format == row_format::bf16) {
        if (int status = make_map(&map, work, pieces, 1)) return status;
    }
    return launch_blocks(attend_hopper_bf16_kernel<lists, format>, work, partials,
                         lists || format != row_format::bf16 ? fed_threads : block_threads, place::total, stream, map, query_map, work, partials);
}

template <bool lists>
int launch(const Attend& work, const Partials& partials, cudaStream_t stream) {
    switch (work.layout.format) {
        case row_format::fp8: return launch<lists, row_format::fp8>(work, partials, stream);
        case row_format::fp8_ds_mla: return launch<lists, row_format::fp8_ds_mla>(work, partials, stream);
        default: return launch<lists, row_format::bf16>(work, partials, stream);
    }
}

}  // namespace

bool attend_takes_hopper_bf16(const Attend& work, const Device& device) {
    const KvLayout& layout = work.layout;
    bool const codes = layout.format == row_format::fp8 || layout.format == row_format::fp8_ds_mla;
    if (device.major != 9 || (layout.format != row_format::bf16 && !codes) || !queries_lie_together(work) ||
        work.step.pages <= 0 || layout.rank != rank || layout.rope != rope || layout.page_size < tile ||
        (layout.page_size & (layout.page_size - 1)) != 0 || reinterpret_cast<uintptr_t>(work.pool) % 16 != 0) {
        return false;
    }
    if ((work.indices != nullptr || codes) && work.step.pages * layout.page_bytes / 16 >= no_row) return false;
    return has_hopper_code();
}

int attend_hopper_bf16(const Attend& work, const Partials& partials, cudaStream_t stream) {
    return work.indices == nullptr ? launch<false>(work, partials, stream) : launch<true>(work, partials, stream);
}

}  // namespace mla
