// Attention over bf16 rows on SM90, all keys or lists of them, with both products in bf16 (R 512, Dr 64, pages of 64 x 2^n).
//
// A block has up to 64 rows (heads, or tokens x heads of one sequence) and walks over tiles of 64 keys, two of which are in
// shared memory. One warpgroup makes the scores and the softmax, two make the output, each 256 of its 512 columns. Keys lie as
// rows, in nine pieces of 128 bytes of each: K-major for the scores, and for the output transposed by the tensor cores.
//
// - The output groups bring the tile that takes the place of the one that they have used. All keys come by the copy engine, a
//   tile at once; rows behind the end may be anything, so the values of the last tile's are cleared. Listed keys are gathered,
//   zeros where there is none.
// - The reference of a row is its first maximum, until one exceeds it by 2^8: the output is rarely rescaled.
#include <type_traits>

#include "attend_hopper.cuh"

namespace mla {
namespace {

using namespace hopper;

constexpr int block_threads = 3 * group;
constexpr int tile = 64;
constexpr int pieces = (rank + rope) / 64;
constexpr int piece_bytes = tile * 128;
constexpr int tile_bytes = pieces * piece_bytes;

// Where things lie in shared memory, in bytes.
namespace place {
constexpr int tiles = tile_bytes;  // [2], behind the queries
constexpr int weights = tiles + 2 * tile_bytes;  // [64][64], bf16
constexpr int rescale = weights + 64 * 128;  // [64]
constexpr int changed = rescale + 64 * 4;  // [4], of the score group's warps
constexpr int factors = changed + 4 * 4;  // [64]
constexpr int limits = factors + 64 * 4;  // [64]
constexpr int offsets = limits + 64 * 4;  // [2][64], of listed rows
constexpr int there = offsets + 2 * tile * 4;  // [2], a bit for each key of a tile
constexpr int full = there + 2 * 2 * 4;  // [2] barriers: a tile is there
constexpr int used = full + 2 * 8;  // [2]: the output has it
constexpr int ready = used + 2 * 8;  // the weights are there
constexpr int total = ready + 8;
}  // namespace place

enum : int { keys_read = 1, rows_found = 2 };  // named barriers

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int value_pieces = rank / 64;
constexpr float spare_bits = 8.0f;

// The block's tiles.
struct Span {
    int32_t first, count;
    int32_t last_keys;  // of the last tile

    __device__ int keys(int32_t n) const { return n + 1 < count ? tile : last_keys; }
};

__device__ uint32_t barrier_of(const uint8_t* memory, int barriers, int32_t n) {
    return shared_address(memory + barriers) + 8 * (n & 1);
}

// All keys up to the last one that a row sees: tile n, whose page was asked for a tile's time before. By one thread.
struct TileBringer {
    int32_t page;

    __device__ void ask(const Attend& work, const Item& item, const Span& span, int32_t n) {
        if (n >= span.count) return;
        page = work.step.block_table[item.sequence * work.step.max_pages + (span.first + n) * tile / work.layout.page_size];
    }
    __device__ void bring(const Attend& work, const Item& item, const Span& span, const CUtensorMap* map, uint8_t* memory,
                          int32_t n) {
        if (n >= span.count) return;
        bool const there = page >= 0 && page < work.step.pages;
        int const keys = there ? span.keys(n) : 0;
        reinterpret_cast<uint64_t*>(memory + place::there)[n & 1] = keys == 64 ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
        uint32_t const barrier = barrier_of(memory, place::full, n);
        barrier_expect(barrier, tile_bytes);  // a page outside of the map is zeros
        copy_box(shared_address(memory + place::tiles) + (n & 1) * tile_bytes, map, barrier, 0,
                 (span.first + n) * tile & (work.layout.page_size - 1), 0,
                 there ? page : static_cast<int32_t>(work.step.pages));
        ask(work, item, span, n + 1);
    }
};

// Listed keys, by the threads of both output groups; of the rows' finding each of the first 64 has one key of every tile, whose
// entry and page are asked for two tiles and one ahead.
struct TileGatherer {
    int32_t entry, next_entry, page;

    __device__ void begin(const Attend& work, const Item& item, const Span& span, int thread) {
        entry = entry_of(work, item, span, 0, thread);
        next_entry = entry_of(work, item, span, 1, thread);
        page = page_of_entry(work, item, entry);
    }
    __device__ void bring(const Attend& work, const Item& item, const Span& span, uint8_t* memory, int32_t n, int thread) {
        if (n >= span.count) return;
        int const unit = thread % 8, first_row = thread / 8;
        auto* offsets = reinterpret_cast<uint32_t*>(memory + place::offsets) + (n & 1) * tile;
        if (thread < tile) {
            bool const there = page >= 0 && page < work.step.pages;
            int64_t const at = static_cast<int64_t>(page) * work.layout.page_bytes +
                               (entry & (work.layout.page_size - 1)) * work.layout.row_bytes;
            offsets[thread] = there ? static_cast<uint32_t>(at / 16) : no_row;
            uint32_t const bits = __ballot_sync(0xffffffffu, there);
            if (thread % warp_size == 0) {
                reinterpret_cast<uint32_t*>(memory + place::there)[(n & 1) * 2 + thread / warp_size] = bits;
            }
            entry = next_entry;
            page = page_of_entry(work, item, entry);
            next_entry = entry_of(work, item, span, n + 2, thread);
        }
        named_sync(rows_found, 2 * group);
        uint32_t const target =
            shared_address(memory + place::tiles) + (n & 1) * tile_bytes + first_row * 128 + ((unit ^ (first_row & 7)) << 4);
#pragma unroll 1
        for (int k = 0; k < tile / 32; ++k) {
            uint32_t const offset = offsets[first_row + 32 * k];
            bool const there = offset != no_row;
            const uint8_t* source = work.pool + (there ? static_cast<uint64_t>(offset) * 16 : 0) + unit * 16;
#pragma unroll
            for (int i = 0; i < pieces; ++i) copy_async_16(target + k * 4096 + i * piece_bytes, source + i * 128, there);
        }
        barrier_arrive_after_copies(barrier_of(memory, place::full, n));
        if (thread == 0) barrier_arrive(barrier_of(memory, place::full, n));  // for what was written besides
    }

private:
    __device__ static int32_t entry_of(const Attend& work, const Item& item, const Span& span, int32_t n, int thread) {
        if (thread >= tile || n >= span.count || thread >= span.keys(n)) return -1;
        int32_t const found = work.indices[item.first_token * work.top_k + (span.first + n) * tile + thread];
        return found <= last_key(work, item.first_token) ? found : -1;
    }
    __device__ static int32_t page_of_entry(const Attend& work, const Item& item, int32_t entry) {
        if (entry < 0) return -1;
        return work.step.block_table[item.sequence * work.step.max_pages + entry / work.layout.page_size];
    }
};

// The rows' queries, by all threads.
__device__ void load_query(const Attend& work, const Item& item, uint8_t* memory) {
    int const thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < 64 * pieces * 8; i += block_threads) {
        int const row = i / (pieces * 8), unit = i % (pieces * 8), flat = item.first_head + row;
        int64_t const at = (item.first_token + flat / work.heads) * work.query.token_stride +
                           (flat % work.heads) * work.query.head_stride + unit * 8;
        bool const there = row < item.count;
        copy_async_16(shared_address(memory) + unit / 8 * piece_bytes + row * 128 + ((unit % 8 ^ (row & 7)) << 4),
                      static_cast<const __nv_bfloat16*>(work.query.data) + (there ? at : 0), there);
    }
    if (thread < 64) {
        reinterpret_cast<int32_t*>(memory + place::limits)[thread] =
            thread < item.count ? last_key(work, item.first_token + (item.first_head + thread) / work.heads) : -1;
    }
    copy_async_wait_all();
    fence_async();
}

// Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8, and of each 8 keys 2 t and 2 t + 1.
template <bool lists>
__device__ void score_group(const Attend& work, const Partials& partials, const Item& item, const Span& span, uint8_t* memory) {
    int const thread = threadIdx.x % group, warp = thread / warp_size, lane = thread % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    float const scale = work.softmax_scale * log2e;
    int32_t const limits[2] = {reinterpret_cast<const int32_t*>(memory + place::limits)[first_row],
                               reinterpret_cast<const int32_t*>(memory + place::limits)[first_row + 8]};
    uint32_t const query = tile_descriptor(shared_address(memory));
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

#pragma unroll 1
    for (int32_t n = 0; n < span.count; ++n) {
        float scores[32];
        pin(scores);
        uint32_t const keys = tile_descriptor(shared_address(memory + place::tiles) + (n & 1) * tile_bytes);
        barrier_wait(barrier_of(memory, place::full, n), n / 2 & 1);
        if (lists) fence_async();  // those rows were not written by the copy engine
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
        piece(std::integral_constant<int, 4>());
        piece(std::integral_constant<int, 5>());
        piece(std::integral_constant<int, 6>());
        piece(std::integral_constant<int, 7>());
        piece(std::integral_constant<int, 8>());
        product_commit();
        uint64_t const present = reinterpret_cast<const uint64_t*>(memory + place::there)[n & 1];
        product_wait();
        pin(scores);

        int32_t const first_key = (span.first + n) * tile;
        bool const masks = present != ~uint64_t{0} || (!lists && first_key + tile > min(limits[0], limits[1]) + 1);
        if (masks) {
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                int const key = j / 4 * 8 + 2 * t + j % 2;
                bool const seen = (present >> key & 1) != 0 && (lists || first_key + key <= limits[j / 2 % 2]);
                if (!seen) scores[j] = -INFINITY;
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
            __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] = fmaf(total[r], factor[r], sum[r][0] + sum[r][1]);

        if (n > 0) barrier_wait(barrier_of(memory, place::used, n - 1), (n - 1) / 2 & 1);  // the weights before
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // lanes 0 to 15 name the rows of the first eight keys, the others those of the next eight
            int const row = warp * 16 + lane % 16, unit = 2 * i + lane / 16;
            store_matrices(shared_address(memory + place::weights) + row * 128 + ((unit ^ (row & 7)) << 4), words + 4 * i);
        }
        if (t == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) reinterpret_cast<float*>(memory + place::rescale)[first_row + 8 * r] = factor[r];
        }
        bool const any = __any_sync(0xffffffffu, changed);
        if (lane == 0) reinterpret_cast<int32_t*>(memory + place::changed)[warp] = any ? 1 : 0;
        if (!lists && n + 1 == span.count && span.last_keys < tile) {  // values that were never written may be NaN
            named_sync(keys_read, group);
            for (int i = thread; i < value_pieces * (tile - span.last_keys) * 8; i += group) {
                int const of_piece = (tile - span.last_keys) * 8;
                reinterpret_cast<uint4*>(memory + place::tiles + (n & 1) * tile_bytes + i / of_piece * piece_bytes +
                                         span.last_keys * 128)[i % of_piece] = make_uint4(0, 0, 0, 0);
            }
        }
        fence_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(memory + place::ready));
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
        if (partials.splits > 1) {
            partials.lse[out_row * partials.splits + part_of_block(partials)] = lse;
        } else {
            if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
            if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[r]);
        }
        reinterpret_cast<float*>(memory + place::factors)[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
}

// 256 columns of the output, which are staged in shared memory in the end; `side` says which.
template <bool lists>
__device__ void output_group(const Attend& work, const Item& item, const Span& span, const CUtensorMap* map, uint8_t* memory,
                             int side) {
    int const thread = static_cast<int>(threadIdx.x) - group;
    std::conditional_t<lists, TileGatherer, TileBringer> next;
    if constexpr (lists) {
        next.begin(work, item, span, thread);
        for (int n = 0; n < 2; ++n) next.bring(work, item, span, memory, n, thread);
    } else if (thread == 0) {
        next.ask(work, item, span, 0);
        for (int n = 0; n < 2; ++n) next.bring(work, item, span, map, memory, n);
    }
    int const warp = threadIdx.x / warp_size % 4, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * 16 + g;
    float sums[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
    uint32_t const weights = tile_descriptor(shared_address(memory + place::weights));
#pragma unroll 1
    for (int32_t n = 0; n < span.count; ++n) {
        uint32_t const values = tile_descriptor(shared_address(memory + place::tiles) + (n & 1) * tile_bytes +
                                                side * (value_pieces / 2) * piece_bytes);
        barrier_wait(shared_address(memory + place::ready), n & 1);
        if (lists) fence_async();
        int4 const changed = *reinterpret_cast<const int4*>(memory + place::changed);
        if ((changed.x | changed.y | changed.z | changed.w) != 0) {
            float const low = reinterpret_cast<const float*>(memory + place::rescale)[first_row];
            float const high = reinterpret_cast<const float*>(memory + place::rescale)[first_row + 8];
#pragma unroll
            for (int i = 0; i < 128; ++i) sums[i] *= i / 2 % 2 == 0 ? low : high;
        }
        pin(sums);
        product_fence();
        product_bf16_wide<0, piece_bytes>(sums, weights, values);
        product_bf16_wide<1, piece_bytes>(sums, weights, values);
        product_bf16_wide<2, piece_bytes>(sums, weights, values);
        product_bf16_wide<3, piece_bytes>(sums, weights, values);
        product_commit();
        product_wait();
        pin(sums);
        if (lane == 0) barrier_arrive(barrier_of(memory, place::used, n));
        if constexpr (lists) {
            barrier_wait(barrier_of(memory, place::used, n), n / 2 & 1);
            next.bring(work, item, span, memory, n + 2, thread);
        } else if (thread == 0) {
            barrier_wait(barrier_of(memory, place::used, n), n / 2 & 1);
            next.bring(work, item, span, map, memory, n + 2);
        }
    }
    __syncthreads();  // the factors are there, and nobody needs keys and queries any more
    auto* staged = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int const row = first_row + 8 * r;
        float const factor = reinterpret_cast<const float*>(memory + place::factors)[row];
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            *reinterpret_cast<float2*>(staged + row * staged_row + side * 256 + 8 * j + 2 * t) =
                make_float2(sums[4 * j + 2 * r] * factor, sums[4 * j + 2 * r + 1] * factor);
        }
    }
}

#endif

template <bool lists>
__global__ void __launch_bounds__(block_threads, 1)
    attend_hopper_bf16_kernel(const __grid_constant__ CUtensorMap map, Attend work, Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ Item shared_item;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    if (warp == 0) {
        Item const found = lists ? list_item(work, partials, 64) : find_item(work, partials, 64);
        if (lane == 0) shared_item = found;
    }
    if (threadIdx.x == 32) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(barrier_of(memory, place::full, i), lists ? 2 * group + 1 : 1);
            barrier_init(barrier_of(memory, place::used, i), 2 * group / warp_size);
        }
        barrier_init(shared_address(memory + place::ready), group / warp_size);
        fence_barrier_init();
    }
    __syncthreads();
    Item const& item = shared_item;
    if (item.sequence < 0) {
        if (partials.splits == 1) zero_padding(work, item);
        return;
    }
    int64_t const last_token = item.first_token + (item.first_head + item.count - 1) / work.heads;
    int32_t const end = lists ? list_length(work, item.first_token) : max(last_key(work, last_token) + 1, 0);
    int32_t const tile_count = ceil_div(end, tile);
    int const part = part_of_block(partials);
    auto const first = static_cast<int32_t>(static_cast<int64_t>(tile_count) * part / partials.splits);
    auto const last = static_cast<int32_t>(static_cast<int64_t>(tile_count) * (part + 1) / partials.splits);
    Span const span{first, last - first, min(end - (last - 1) * tile, tile)};

    load_query(work, item, memory);
    __syncthreads();
    if (warp < group / warp_size) {
        score_group<lists>(work, partials, item, span, memory);
        __syncthreads();
    } else {
        output_group<lists>(work, item, span, &map, memory, warp / 4 - 1);
    }
    __syncthreads();
    write_rows(work, partials, item, memory);
#endif
}

template <bool lists>
int launch(const Attend& work, const Partials& partials, cudaStream_t stream) {
    CUtensorMap map;
    if (int status = make_map(&map, work, pieces, pieces)) return status;
    return launch_blocks(attend_hopper_bf16_kernel<lists>, work, partials, 64, block_threads, place::total, stream, map, work,
                         partials);
}

}  // namespace

bool attend_takes_hopper_bf16(const Attend& work, const Device& device) {
    const KvLayout& layout = work.layout;
    if (device.major != 9 || layout.format != row_format::bf16 || work.query.type != MLA_BFLOAT16 || !queries_aligned(work) ||
        work.step.pages <= 0 || layout.rank != rank || layout.rope != rope || layout.page_size < tile ||
        (layout.page_size & (layout.page_size - 1)) != 0 || reinterpret_cast<uintptr_t>(work.pool) % 16 != 0) {
        return false;
    }
    if (work.indices != nullptr && work.step.pages * layout.page_bytes / 16 >= no_row) return false;
    // code for sm_90a alone has the kernel's body, and with it its static shared memory
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, attend_hopper_bf16_kernel<false>) == cudaSuccess &&
           attributes.sharedSizeBytes > 0;
}

int attend_hopper_bf16(const Attend& work, const Partials& partials, cudaStream_t stream) {
    return work.indices == nullptr ? launch<false>(work, partials, stream) : launch<true>(work, partials, stream);
}

}  // namespace mla
