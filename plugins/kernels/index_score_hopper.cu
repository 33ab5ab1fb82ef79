// The indexer's second stage on SM90: as index_score.cu, with products of codes by warpgroups (64 or 128 values a head, heads by 32).
//
// A warpgroup has 64 keys in registers as they lie in the pool, and the keys of its next two tiles on their way; queries lie in shared
// memory, a head a row of codes in the order that the keys' fragments have. A thread sums over the heads that its products are of.
// Sums of e4m3 products keep 14 bits (docs/kernels.md); they begin at zero for each head and token.
#include <algorithm>
#include <type_traits>

#include "early.cuh"
#include "hopper.cuh"
#include "index_items.cuh"
#include "mma.cuh"

namespace mla {
namespace {

constexpr int warps = 8, threads = warps * warp_size, warp_keys = 16;
[[maybe_unused]] constexpr int group_keys = 4 * warp_keys, block_keys = warps * warp_keys;  // of a warpgroup; of a block
constexpr int line_bytes = 128;  // of a head's query in shared memory
constexpr int ahead = 2;         // items whose keys are on their way

// What is known of a run, in shared memory, at its first row.
struct RunFacts {
    int32_t sequence, count, keys, least;  // the most and the least keys that a token scores
};

// Where a warp's keys lie on their way, row by row: no other warp reads them. `chunks`: 64 values of a head each.
template <int chunks>
struct Stage {
    static constexpr int row_bytes = 64 * chunks, row_units = row_bytes / 16;

    uint4 rows[warps][warp_keys * row_units];
    float scales[warps][warp_size];

    // Byte of a key's 16 bytes `unit`: the units that a copy or a matrix's rows have at one time lie in all banks.
    __device__ static int place(int row, int unit) { return row * row_bytes + 16 * (unit ^ (chunks == 2 ? row & 7 : row >> 1 & 3)); }
};

// A lane's part in the copies of its warp's keys and in their fragments.
template <int chunks>
struct WarpKeys {
    using Place = Stage<chunks>;

    uint64_t rows, scales;       // of slot 0 of page 0
    uint32_t rows_shared, read;  // in the first stage
    const char* own_scale;

    __device__ WarpKeys(const IndexWindow& window, const Place& stage) {
        int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
        auto const pool = reinterpret_cast<uint64_t>(window.pool);
        uint32_t const first = shared_address(&stage.rows[warp]);
        rows = pool + 16 * lane;
        scales = pool + window.layout.scales_offset + 4 * (lane / 4 + 8 * (lane % 2));
        rows_shared = first + Place::place(lane / Place::row_units, lane % Place::row_units);
        own_scale = reinterpret_cast<const char*>(&stage.scales[warp][lane]);
        read = first + Place::place(lane % 16, lane / 16);
    }

    // Orders the keys of the page's 16 rows from `slot` on, whole lines at a time, and the scale of the key whose score the lane writes;
    // zeros where there is no page. `once`: no other run reads them, so that they leave the room in the L2 cache to the ranks, which the
    // selection reads.
    template <bool once>
    __device__ void order(const IndexWindow& window, int32_t page, bool there, uint32_t slot, uint32_t stage) const {
        uint32_t const known = there ? page : 0, page_bytes = static_cast<uint32_t>(window.layout.page_bytes);
        uint64_t const source = rows + uint64_t{known} * page_bytes + uint64_t{slot} * uint32_t{Place::row_bytes};
        uint32_t const target = rows_shared + stage;
#pragma unroll
        for (int i = 0; i < 2 * chunks; ++i) {
            constexpr int bytes = 16 * warp_size;
            uint32_t const to = (chunks == 2 && i % 2 == 1 ? target ^ 64 : target) + bytes * i;  // four rows further on the other half
            auto const* const from = reinterpret_cast<const char*>(source) + bytes * i;
            if constexpr (once) {
                copy_async_16_once(to, from, there);
            } else {
                copy_async_16(to, from, there);
            }
        }
        uint64_t const scale = scales + uint64_t{known} * page_bytes + uint64_t{slot} * 4u;
        copy_async_4(shared_address(own_scale + stage), reinterpret_cast<const void*>(scale), there);
    }

    __device__ void load(uint32_t (&fragments)[2 * chunks][4], uint32_t stage) const {
        uint32_t const address = read + stage;
#pragma unroll
        for (int step = 0; step < 2 * chunks; ++step) ldmatrix_x4(fragments[step], address ^ 32 * step);
    }

    __device__ float load_scale(uint32_t stage) const { return *reinterpret_cast<const float*>(own_scale + stage); }
};

// Not by a maximum: sums go through the pipe of products, maxima through one of half its rate. NaN stays.
[[maybe_unused]] __device__ inline float twice_relu(float value) { return value + fabsf(value); }

template <int columns>
using Products = float[columns / 2];

// Orders the products of a warpgroup's keys with the queries of `tile`.
template <int columns, int chunks>
__device__ void order_products(Products<columns>& products, const uint32_t (&fragments)[2 * chunks][4], uint32_t tile) {
    using namespace hopper;
    pin(products);
    product_fence();
    product_e4m3<0>(products, fragments[0], tile);
    product_e4m3<1>(products, fragments[1], tile);
    if constexpr (chunks == 2) {
        product_e4m3<2>(products, fragments[2], tile);
        product_e4m3<3>(products, fragments[3], tile);
    }
    product_commit();
}

// Adds them up, times the heads' weights. A thread's products are of its keys with heads 8 j + 2 quarter and the next; `weights` begin at
// the first of these.
template <int columns>
__device__ void add_products(Products<columns>& products, const float* weights, float (&sum)[2]) {
    hopper::pin(products);
#pragma unroll
    for (int eight = 0; eight < columns / 8; ++eight) {
        float2 const w = *reinterpret_cast<const float2*>(weights + 8 * eight);
        const float* const p = products + 4 * eight;
        sum[0] = fmaf(w.x, twice_relu(p[0]), fmaf(w.y, twice_relu(p[1]), sum[0]));
        sum[1] = fmaf(w.x, twice_relu(p[2]), fmaf(w.y, twice_relu(p[3]), sum[1]));
    }
}

// The sum of two lanes next to each other: for the even one of the upper half's key, for the other of the lower half's.
[[maybe_unused]] __device__ inline float sum_of_two(const float (&sum)[2]) {
    bool const low = threadIdx.x % 2 == 0;
    return (low ? sum[0] : sum[1]) + __shfl_xor_sync(0xffffffffu, low ? sum[1] : sum[0], 1);
}

// A warpgroup's tile of keys against a run's queries. A unit is `columns` heads of a token; units follow each other in shared memory.
// Products of one are made while another's are summed. `whole`: a unit is all heads.
template <int chunks, int columns, bool whole>
struct TileScores {
    const IndexWindow& window;
    const Rows& rows;
    uint32_t queries;      // descriptor of unit 0
    const float* weights;  // of unit 0, from the thread's first head on
    uint32_t (&fragments)[2 * chunks][4];
    int32_t row, count, blocks;  // first token, tokens, units of a token
    int32_t key;
    float scale;
    bool visible, all;  // all: every token scores every key of the tile
    uint32_t* target;  // where the lane's next score goes
    float sums[2][2] = {};  // of two tokens, each for a key in the upper and one in the lower half

    __device__ void order(Products<columns>& products, int32_t unit) {
        order_products<columns, chunks>(products, fragments, queries + unit * (columns * line_bytes / 16));
    }

    __device__ void add(Products<columns>& products, int32_t unit, float (&sum)[2]) {
        add_products<columns>(products, weights + unit * columns, sum);
    }

    // Of four lanes the first writes the first token's key in the upper half, then come the lower half, and the second token's.
    template <bool all_seen>
    __device__ void write(int32_t token, int32_t tokens) {
        int const quarter = threadIdx.x % 4;
        bool const second = quarter >= 2;
        float halves[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            halves[i] = sum_of_two(sums[i]);
            sums[i][0] = sums[i][1] = 0.0f;
        }
        float const score = (second ? halves[1] : halves[0]) + __shfl_xor_sync(0xffffffffu, second ? halves[0] : halves[1], 2);
        if (quarter < 2 * tokens && (all_seen || key < rows.keys[row + token + second])) *target = visible ? rank_of(score * scale) : 0;
        target += (whole ? 2 : 1) * window.stride;
    }

    template <bool odd, bool all_seen>
    __device__ void finish(Products<columns>& products, int32_t unit) {
        if constexpr (whole) {
            add(products, unit, sums[odd]);
            if (odd) write<all_seen>(unit - 1, 2);
        } else {
            add(products, unit, sums[0]);
            if (unit % blocks == blocks - 1) write<all_seen>(unit / blocks, 1);
        }
    }

    __device__ void run() {
        target = window.ranks + (row + (whole && threadIdx.x % 4 >= 2)) * window.stride + key;
        if (all) {
            run_seen<true>();
        } else {
            run_seen<false>();
        }
    }

    template <bool all_seen>
    __device__ void run_seen() {
        using namespace hopper;
        Products<columns> even, odd;
        int32_t const units = count * blocks;
        int32_t unit = 0;
        order(even, 0);
        for (; unit + 2 < units; unit += 2) {
            order(odd, unit + 1);
            product_wait<1>();
            finish<false, all_seen>(even, unit);
            order(even, unit + 2);
            product_wait<1>();
            finish<true, all_seen>(odd, unit + 1);
        }
        if (unit + 1 < units) {
            order(odd, unit + 1);
            product_wait<1>();
            finish<false, all_seen>(even, unit);
            product_wait();
            finish<true, all_seen>(odd, unit + 1);
        } else {
            product_wait();
            finish<false, all_seen>(even, unit);
            if (whole) write<all_seen>(unit, 1);
        }
    }
};

// How a kernel goes over keys: once and for one token, as where each sequence has one; once for several tokens; or again for further ones.
enum class Pass { of_a_token, once, again };
MLA_BOTH constexpr int blocks_of(Pass pass) { return pass == Pass::of_a_token ? 3 : 2; }  // on a multiprocessor

// `columns`: heads of one product, all where `whole`.
template <int chunks, int columns, bool whole, Pass pass>
__global__ void __launch_bounds__(threads, blocks_of(pass)) score_codes_kernel(IndexWindow window, QueryTile shape) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace hopper;
    constexpr int width = 64 * chunks;
    constexpr bool once = pass != Pass::again;
    constexpr uint32_t stage_bytes = sizeof(Stage<chunks>);
    static_assert(ahead == 2 && stage_bytes % 128 == 0);  // stages take turns; a row's units are permuted in the address's bits below
    extern __shared__ __align__(1024) char codes_shared[];
    __shared__ int32_t scan[warp_size];
    int32_t const lines = shape.slots * shape.heads;
    auto* const stages = reinterpret_cast<Stage<chunks>*>(codes_shared + int64_t{lines} * line_bytes);
    float* const weights = reinterpret_cast<float*>(stages + ahead);
    auto* const runs = reinterpret_cast<RunFacts*>(weights + lines);
    int32_t* const tables = reinterpret_cast<int32_t*>(runs + window.rows);
    Rows const rows{tables, tables + window.rows};

    let_next_kernel_begin();
    int32_t const total = list_items(window, shape.slots, block_keys, rows, scan);
    for (int32_t row = threadIdx.x; row < window.rows; row += threads) {
        Run const run = run_at(window, rows, row, shape.slots);
        int32_t least = run.keys;
        for (int32_t i = 0; i < run.count; ++i) least = min(least, rows.keys[row + i]);
        runs[row] = RunFacts{run.sequence, run.count, run.keys, least};
    }
    __syncthreads();
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const group = lane / 4, quarter = lane % 4, page_shift = __ffs(window.layout.page_size) - 1;
    WarpKeys<chunks> const own_keys(window, stages[0]);
    // from a lane, so that the compiler knows it to be uniform
    uint32_t const queries = __shfl_sync(0xffffffffu, tile_descriptor(shared_address(codes_shared)), 0);

    auto load_queries = [&](int32_t row, int32_t count) {
        __syncthreads();
        const uint8_t* const source = static_cast<const uint8_t*>(window.queries) + int64_t{row} * shape.heads * width;
#pragma unroll 2
        for (int32_t unit = threadIdx.x; unit < count * shape.heads * (width / 16); unit += threads) {
            int32_t const line = unit / (width / 16), column = unit % (width / 16);
            *reinterpret_cast<uint4*>(codes_shared + line * line_bytes + ((column ^ (line & 7)) << 4)) =
                __ldg(reinterpret_cast<const uint4*>(source) + unit);
        }
        const float* const source_weights = window.weights + int64_t{row} * shape.heads;
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < count * shape.heads; i += threads) weights[i] = source_weights[i];
        fence_async();
        __syncthreads();
    };

    // Pages of the warp's keys in 32 tiles of a run, a lane a tile; those of the next 32 are asked for in time.
    int32_t const first_key = warp * warp_keys, own_row = first_key + group, pages = static_cast<int32_t>(window.step.pages);
    auto look_up = [&](int32_t row, int32_t tile) {
        RunFacts const run = runs[row];
        int32_t const key = (tile & ~31) * block_keys + lane * block_keys + first_key;
        return key < run.keys ? window.step.block_table[run.sequence * window.step.max_pages + (key >> page_shift)] : -1;
    };
    Cursor ordered(Part(total, rows.ends, window.rows), rows.ends), cursor = ordered;
    int32_t table = -1, next_table = -1;
    if (ordered.there()) table = look_up(ordered.row, ordered.tile), next_table = look_up(ordered.row, ordered.tile + 32);
    uint32_t visible = 0;  // bit i: the tile ordered i tiles ago
    auto order = [&](uint32_t stage) {
        visible *= 2;
        if (ordered.there()) {
            int32_t const page = __shfl_sync(0xffffffffu, table, ordered.tile & 31);
            bool const there = page >= 0 && page < pages;
            visible |= there;
            own_keys.template order<once>(window, page, there, (ordered.tile * block_keys + first_key) & (window.layout.page_size - 1), stage);
            if (ordered.advance()) {
                table = look_up(ordered.row, 0);
                next_table = look_up(ordered.row, 32);
            } else if (ordered.there() && ordered.tile % 32 == 0) {
                table = next_table;
                next_table = look_up(ordered.row, ordered.tile + 32);
            }
        }
        copy_async_commit();
    };
    wait_for_kernel_before();  // which appends keys and makes queries
    for (int i = 0; i < ahead; ++i) order(i * stage_bytes);

    const float* const own_weights = weights + 2 * quarter;
    RunFacts run{};
    // Where each token has a sequence of its own: how many of the run's tiles the lane writes a score of, and where the first one's goes.
    int32_t own_tiles = 0;
    uint32_t* target = nullptr;
    auto begin_run = [&] {
        run = runs[cursor.row];
        load_queries(cursor.row, run.count);
        if constexpr (pass == Pass::of_a_token) {
            int32_t const key = own_row + 8 * (quarter % 2);
            own_tiles = quarter < 2 ? (run.keys - key + block_keys - 1) / block_keys : 0;
            target = window.ranks + cursor.row * window.stride + key;
        }
    };
    bool fresh = true;
    if (once && cursor.there()) {  // while the first keys are on their way
        begin_run();
        fresh = false;
    }
    for (uint32_t stage = 0; cursor.there(); stage = stage_bytes - stage, fresh = cursor.advance()) {
        copy_async_wait<ahead - 1>();
        __syncwarp();
        uint32_t fragments[2 * chunks][4];
        own_keys.load(fragments, stage);
        float const scale = 0.5f * own_keys.load_scale(stage);  // of twice the sum
        bool const there = visible >> (ahead - 1) & 1;
        __syncwarp();
        order(stage);
        if (fresh) begin_run();
        if constexpr (pass == Pass::of_a_token) {
            pin(fragments);
            Products<columns> products;
            order_products<columns, chunks>(products, fragments, queries);
            product_wait();
            float sum[2] = {};
            add_products<columns>(products, own_weights, sum);
            float score = sum_of_two(sum);
            score += __shfl_xor_sync(0xffffffffu, score, 2);
            if (cursor.tile < own_tiles) target[cursor.tile * block_keys] = there ? rank_of(score * scale) : 0;
        } else {
            int32_t const base = cursor.tile * block_keys;
            if (__any_sync(0xffffffffu, run.keys > base + warp / 4 * group_keys)) {
                pin(fragments);
                TileScores<chunks, columns, whole>{window, rows, queries, own_weights, fragments, cursor.row,
                                                   __shfl_sync(0xffffffffu, run.count, 0), shape.heads / columns, base + own_row + 8 * (quarter % 2),
                                                   scale, there, run.least >= base + block_keys, nullptr}
                    .run();
            }
        }
    }
    copy_async_wait_all();
#endif
}

constexpr int row_bytes = Rows::bytes + sizeof(RunFacts);

// Tokens whose queries fit into a block's part of a multiprocessor's shared memory.
int slots_of(const IndexWindow& window, const Device& device, int64_t rows, int blocks) {
    constexpr int64_t most_slots = 8, reserved = 2048, line = line_bytes + 4;
    int64_t const stage = window.width == 64 ? sizeof(Stage<1>) : sizeof(Stage<2>);
    int64_t const budget = device.shared_bytes / blocks - reserved - ahead * stage - row_bytes * rows;
    return static_cast<int>(std::min(most_slots, budget / (line * window.padded_heads)));
}

template <int chunks, int columns, bool whole, Pass pass>
int launch(const Call& call, const IndexWindow& window, const QueryTile& shape, const Device& device) {
    auto const kernel = score_codes_kernel<chunks, columns, whole, pass>;
    int const stages = ahead * static_cast<int>(sizeof(Stage<chunks>));
    int const shared = stages + shape.slots * shape.heads * (line_bytes + 4) + row_bytes * window.rows;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))) {
        return status;
    }
    return launch_early("MlaIndexer: scores", kernel, blocks_of(pass) * device.multiprocessors, threads, shared, device, call.stream, window, shape);
}

template <int chunks, int columns, bool whole>
int launch(const Call& call, const IndexWindow& window, const Device& device) {
    QueryTile const shape{slots_of(window, device, window.rows, blocks_of(Pass::once)), window.padded_heads};
    if constexpr (whole) {
        if (window.rows <= window.step.sequences && slots_of(window, device, window.rows, blocks_of(Pass::of_a_token)) >= 1) {
            return launch<chunks, columns, whole, Pass::of_a_token>(call, window, {1, window.padded_heads}, device);
        }
    }
    return window.rows <= shape.slots * window.step.sequences ? launch<chunks, columns, whole, Pass::once>(call, window, shape, device)
                                                              : launch<chunks, columns, whole, Pass::again>(call, window, shape, device);
}

}  // namespace

bool index_takes_hopper(const IndexWindow& window, const Device& device) {
    const IndexLayout& layout = window.layout;
    if (device.major != 9 || layout.format != index_format::fp8 || layout.head != window.width || window.width > 128 ||
        window.padded_heads % 32 != 0 || layout.page_size < warp_keys || (layout.page_size & (layout.page_size - 1)) != 0 ||
        layout.page_bytes > 0x7fffffff || slots_of(window, device, max_window_rows, blocks_of(Pass::once)) < 1) {
        return false;
    }
    return has_hopper_code();
}

int score_index_keys_hopper(const Call& call, const IndexWindow& window, const Device& device) {
    auto const take = [&](auto chunks) {
        constexpr int c = decltype(chunks)::value;
        if (window.padded_heads == 64) return launch<c, 64, true>(call, window, device);
        if (window.padded_heads == 32) return launch<c, 32, true>(call, window, device);
        return window.padded_heads % 64 == 0 ? launch<c, 64, false>(call, window, device) : launch<c, 32, false>(call, window, device);
    };
    return window.width == 64 ? take(std::integral_constant<int, 1>{}) : take(std::integral_constant<int, 2>{});
}

}  // namespace mla
