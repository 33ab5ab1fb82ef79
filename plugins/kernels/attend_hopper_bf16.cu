// Attention on SM90 with both products in bf16 (R 512, Dr 64, pages of 64 x 2^n), of all keys or of lists of them: over bf16 rows,
// and over codes (fp8, fp8_ds_mla), which are decoded.
//
// A block has up to 64 rows (heads, or tokens x heads of one sequence) and walks over tiles of 64 keys, two and more of which are in
// shared memory. One warpgroup makes the scores and the softmax, two make the output, each 256 of its 512 columns. Keys lie as
// rows, in nine pieces of 128 bytes of each: K-major for the scores, and for the output transposed by the tensor cores.
//
// - The queries come by the copy engine while the first keys are brought.
// - All keys come by the copy engine: each output group orders its side of a later tile to where the one was that it has used. More than
//   half of the queries go to registers, so that two and a half tiles have room, and the scores of a tile are ordered before the output of the
//   one before. Rows behind the end may be anything, so the values of the last tile's are cleared.
// - Listed keys are gathered, zeros where there is none, and codes decoded by a fourth group, while the tile before is multiplied. Codes
//   of one or two tiles are decoded by all groups.
// - The reference of a row is its first maximum, until one exceeds it by 2^8: the output is rarely rescaled.
#include "attend_hopper_bf16_feed.cuh"
#include "attend_hopper_bf16_scores.cuh"

namespace mla {
namespace {

using namespace hopper_bf16;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
    using Places = std::conditional_t<fed, FedPlaces, RingPlaces>;
    uint32_t const base = shared_address(memory);
    SideBringer<side> keys;
    if constexpr (!fed) {
        keys.begin(work, item, span, static_cast<int>(threadIdx.x) % group);
        for (int n = 0; n < keys.places; ++n) {
            keys.prepare(work, span, map, memory);
            if (n == 2 && n < span.count) barrier_wait(base + RingPlaces::queries_kept, 0);
            keys.bring(work, item, span, map, memory);
        }
    }
    int const warp = threadIdx.x / warp_size % 4, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    float sums[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
#pragma unroll 1
    for (int32_t n = 0, third = 0; n < span.count; ++n, third = third == first_places - 1 ? 0 : third + 1) {
        uint32_t const weights = tile_descriptor(base + Places::weights_of(n)), values = tile_descriptor(base + Places::values_of(side, n, third));
        barrier_wait(base + Places::ready + 8 * (n & 1), n / 2 & 1);
        if (fed) fence_async();
        // The second side's place is wanted sooner than the first one's, which has another place: the second side's products are first.
        if (!fed && side == 0) named_sync(second_side_first + (n & 1), 2 * group);
        int4 const changed = reinterpret_cast<const int4*>(memory + Places::changed)[n & 1];
        if ((changed.x | changed.y | changed.z | changed.w) != 0) {
            const auto* rescale = reinterpret_cast<const float*>(memory + Places::rescale) + (n & 1) * 64 + first_row;
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
        if (!fed && side == 1) named_arrive(second_side_first + (n & 1), 2 * group);
        if constexpr (!fed) keys.prepare(work, span, map, memory);
        product_wait();
        pin(sums);
        if (lane == 0) barrier_arrive(base + Places::used_of(side, n, third));
        if constexpr (!fed) keys.bring(work, item, span, map, memory);
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
                float const factor = reinterpret_cast<const float*>(memory + Places::factors)[row];
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
            float const factor = reinterpret_cast<const float*>(memory + Places::factors)[row];
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
        auto* target = reinterpret_cast<char*>(partials.output + partials.row(item.slot, warp * 16) * rank) + side * 256 * 4;
        uint32_t const source = shared_address(memory) + (warp * 16 * own_staged_row + side * 256) * 4;
#pragma unroll 1
        for (int i = 0; i < rows; ++i) store_bytes(target + i * rank * 4, source + i * own_staged_row * 4, bytes);
        store_commit();
        store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
    }
}

// By one thread.
__device__ void init_fed_barriers(uint32_t base, int full_arrivals) {
    for (int i = 0; i < 2; ++i) {
        barrier_init(base + FedPlaces::ready + 8 * i, group / warp_size);
        for (int side = 0; side < 2; ++side) {
            barrier_init(base + FedPlaces::full + 16 * i + 8 * side, full_arrivals);
            barrier_init(base + FedPlaces::used + 16 * i + 8 * side, group / warp_size);
        }
    }
    barrier_init(base + FedPlaces::queries_full, 1);
    fence_barrier_init();
}
__device__ void init_ring_barriers(uint32_t base) {
    for (int i = 0; i < first_places; ++i) {
        barrier_init(base + RingPlaces::first_full + 8 * i, 1);
        barrier_init(base + RingPlaces::first_used + 8 * i, group / warp_size);
    }
    for (int i = 0; i < second_places; ++i) {
        barrier_init(base + RingPlaces::second_full + 8 * i, 1);
        barrier_init(base + RingPlaces::second_used + 8 * i, group / warp_size);
        barrier_init(base + RingPlaces::rope_full + 8 * i, 1);
        barrier_init(base + RingPlaces::rope_used + 8 * i, group / warp_size);
        barrier_init(base + RingPlaces::ready + 8 * i, group / warp_size);
    }
    barrier_init(base + RingPlaces::queries_full, 1);
    barrier_init(base + RingPlaces::queries_kept, group / warp_size);
    fence_barrier_init();
}

#endif

template <bool lists, int format>
__global__ void __launch_bounds__(lists || format != row_format::bf16 ? fed_threads : block_threads, 1)
    attend_hopper_bf16_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ CUtensorMap query_map, Attend work,
                              Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr bool codes = format != row_format::bf16, fed = lists || codes, halves = hopper_bf16_halves(format);
    constexpr int feed_registers = lists && codes ? 96 : 88, score_registers = 192 - feed_registers;  // of blocks whose keys are fed
    using Places = std::conditional_t<fed, FedPlaces, RingPlaces>;
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ Item shared_item;
    int const warp = threadIdx.x / warp_size;
    if (threadIdx.x == 32) {
        if constexpr (fed) {
            init_fed_barriers(shared_address(memory), codes ? code_arrivals : gather_arrivals);
        } else {
            init_ring_barriers(shared_address(memory));
        }
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
        order_queries<hopper_bf16_rows>(work, &query_map, item, 0, shared_address(memory + Places::queries_full),
                                        [&](int column) { return shared_address(memory) + Places::query_piece(column); });
    }
    Span const span{item.first_tile, item.last_tile - item.first_tile, min(item.keys - (item.last_tile - 1) * tile, tile)};

    if constexpr (codes) TileDecoder<lists, format>{work, item, span}.run_few(memory);
    if (fed && warp >= block_threads / warp_size) {
        registers_decrease<feed_registers>();
        if constexpr (codes) {
            TileDecoder<lists, format>{work, item, span}.run(memory);
        } else if constexpr (lists) {
            TileGatherer{work, item, span}.run(memory);
        }
        __syncthreads();
    } else if (warp < group / warp_size) {
        if constexpr (fed) {
            registers_decrease<score_registers>();
            score_fed<lists, format>(work, partials, item, span, memory);
        } else {
            registers_increase<184>();
            score_ring(work, partials, item, span, memory);
        }
        __syncthreads();
    } else {
        if constexpr (fed) {
            registers_increase<160>();
        } else {
            registers_decrease<160>();
        }
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
    constexpr bool fed = lists || format != row_format::bf16;
    CUtensorMap map{}, query_map;
    if (int status = make_query_map(&query_map, work, hopper_bf16_rows)) return status;
    if (!fed) {
        if (int status = make_map(&map, work, pieces, 1)) return status;
    }
    return launch_blocks(attend_hopper_bf16_kernel<lists, format>, work, partials, fed ? fed_threads : block_threads,
                         fed ? FedPlaces::total : RingPlaces::total, stream, map, query_map, work, partials);
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
    if (device.major != 9 || (layout.format != row_format::bf16 && !codes) || !tensors_fit(work) ||
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
