// Attention on tensor cores for blocks of 64 rows, whose phases would otherwise wait for each other: four warps make scores and
// weights of a tile of 32 keys while eight others multiply the weights of the tile before with its values, convert the tile
// after it and copy later ones.
//
//   score warp     16 rows x 32 keys: waits for a tile, scores, softmax within the warp, writes weights and the factors by
//                  which the sums so far shrink
//   value warp     64 rows x an eighth of the latent: waits for weights, shrinks its sums, adds weights x values; then makes
//                  the tile after the next ready
//
// Tile j lies in place j % places: four for bf16 rows, which are copied as they lie, two for others, which are copied to one of
// three raw places and converted. A tile's place is free once its values are used, a raw place once it is converted. Named
// barriers order the roles: `ready` (tile j can be read, by parity of j), `weighed` (weights of tile j are written, by parity)
// and one among value warps.
#include "attend_block.cuh"

namespace mla {
namespace {

constexpr int rows = 64, tile = 32;
constexpr int score_warps = rows / 16, value_warps = 8;
constexpr int score_threads = score_warps * warp_size, value_threads = value_warps * warp_size;
constexpr int threads = score_threads + value_threads;
constexpr int raw_places = 3;
constexpr int slots = 4;  // of positions and scales, by tile

enum Barrier { ready = 1, weighed = 3, among_values = 5 };

__device__ inline void wait_at(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void arrive_at(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Where things lie in shared memory, in bytes.
struct Shared {
    int tiles, raw, weights, positions, scales, limits, factors, total;

    Shared(int rank_padded, const KvLayout& layout, bool direct) {
        int const width = rank_padded + rope_padded;
        tiles = rows * width * 2;
        raw = tiles + (direct ? 4 : 2) * tile * width * 2;
        weights = raw + (direct ? 0 : raw_places * tile * layout.row_bytes);
        positions = weights + 2 * rows * tile * 2;
        scales = positions + slots * tile * 4;
        limits = scales + slots * tile * 4;
        factors = limits + rows * 4;
        total = factors + 2 * rows * 4;
    }
};

// Byte of a weight in [64][32] bf16: the four 16-byte units of a row are permuted by pairs of rows, so that eight rows at one
// column lie in different banks.
__device__ inline int weight_place(int row, int column) {
    return row * tile * 2 + (((column >> 3) ^ (row >> 1 & 3)) << 4) + (column & 7) * 2;
}

template <int rank_padded, bool direct>
__global__ void __launch_bounds__(threads, 1)
    two_roles_kernel(Attend work, Partials partials, Shared shared, bool fast, bool query_aligned) {
    constexpr int width = rank_padded + rope_padded;
    constexpr int places = direct ? 4 : 2;
    constexpr int latent_pairs = rank_padded / value_warps / 16;  // of 16 columns, for the output of a warp
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ Item shared_item;

    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4;
    if (warp == 0) {
        Item const found = work.indices == nullptr ? find_item(work, rows) : list_item(work, rows);
        if (lane == 0) shared_item = found;
    }
    __syncthreads();
    Item const item = shared_item;
    if (item.sequence < 0) {
        if (partials.splits == 1) zero_padding(work, item);
        return;
    }

    uint8_t* query = memory;
    uint8_t* tiles = memory + shared.tiles;
    uint8_t* weights = memory + shared.weights;
    auto* positions = reinterpret_cast<int32_t*>(memory + shared.positions);
    auto* scales = reinterpret_cast<float*>(memory + shared.scales);
    auto* limits = reinterpret_cast<int32_t*>(memory + shared.limits);
    auto* factors = reinterpret_cast<float*>(memory + shared.factors);  // [2][64], at the end [64]: what divides the output

    if (work.layout.rank != rank_padded || work.layout.rope != rope_padded) {  // the padding stays zero
        for (int i = threadIdx.x; i < (shared.raw - shared.tiles) / 16; i += threads) {
            reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
        }
    }
    load_queries<rows, rank_padded>(work, item, query, query_aligned);
    for (int row = threadIdx.x; row < rows; row += threads) {
        limits[row] = row < item.count ? last_key(work, item.first_token + (item.first_head + row) / work.heads) : -1;
    }
    __syncthreads();

    // the keys of this part
    int64_t const last_token = item.first_token + (item.first_head + item.count - 1) / work.heads;
    int32_t const end = last_key(work, last_token) + 1;
    int32_t const count = work.indices == nullptr ? end : list_length(work, item.first_token);
    int32_t const tile_count = ceil_div(max(count, 0), tile);
    auto const first = static_cast<int32_t>(static_cast<int64_t>(tile_count) * blockIdx.y / partials.splits);
    auto const last = static_cast<int32_t>(static_cast<int64_t>(tile_count) * (blockIdx.y + 1) / partials.splits);
    int32_t const own_tiles = last - first;

    // Where a lane's 16 bytes of an ldmatrix lie in a row's group of 128 bytes (`swizzled`): 16 columns with the second half
    // in lanes 16 to 31 (queries, values), and in every other eighth of the lanes (keys).
    auto by_halves = [&](int j) { return ((2 * j + lane / 16) ^ (lane & 7)) * 16; };

    if (warp < score_warps) {
        int const row0 = warp * 16;
        int const own_rows[2] = {row0 + g, row0 + g + 8};
        int32_t const own_limits[2] = {limits[own_rows[0]], limits[own_rows[1]]};
        float const scale = work.softmax_scale * log2e;
        float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
        uint32_t a_places[4], b_places[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            a_places[j] = shared_address(query) + (row0 + lane % 16) * width * 2 + by_halves(j);
            b_places[j] = (lane % 8 + lane / 16 * 8) * width * 2 + ((2 * j + lane / 8 % 2) ^ (lane & 7)) * 16;
        }
        for (int32_t j = 0; j < own_tiles; ++j) {
            wait_at(ready + (j & 1), threads);
            uint32_t const keys = shared_address(tiles + j % places * tile * width * 2);
            // fragments are read one step ahead, and even and odd steps have sums of their own
            constexpr int steps = width / 16;
            float scores[4][4] = {}, odd[4][4] = {};
            uint32_t a[2][4], b[2][2][4];
            auto load = [&](int step) {
                int const group = step / 4 * 128;
                ldmatrix_x4(a[step % 2], a_places[step % 4] + group);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    ldmatrix_x4(b[step % 2][n], keys + b_places[step % 4] + group + n * 16 * width * 2);
                }
            };
            load(0);
#pragma unroll
            for (int step = 0; step < steps; ++step) {
                if (step + 1 < steps) load(step + 1);
                auto& sums = step % 2 == 0 ? scores : odd;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    mma_bf16(sums[2 * n], a[step % 2], b[step % 2][n][0], b[step % 2][n][1]);
                    mma_bf16(sums[2 * n + 1], a[step % 2], b[step % 2][n][2], b[step % 2][n][3]);
                }
            }

            const float* tile_scales = scales + j % slots * tile;
            const int32_t* tile_positions = positions + j % slots * tile;
            float best[2] = {top[0], top[1]};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int const key = n * 8 + 2 * t + i % 2;
                    float const score = (scores[n][i] + odd[n][i]) * scale * tile_scales[key];
                    scores[n][i] = tile_positions[key] <= own_limits[i / 2] ? score : -INFINITY;
                    best[i / 2] = fmaxf(best[i / 2], scores[n][i]);
                }
            }
            uint8_t* tile_weights = weights + (j & 1) * rows * tile * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
                best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
                float const base = best[i] == -INFINITY ? 0.0f : best[i];
                float const factor = power_of_two(top[i] - base);
                top[i] = best[i];
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    int const key = n * 8 + 2 * t;
                    float const low = power_of_two(scores[n][2 * i] - base);
                    float const high = power_of_two(scores[n][2 * i + 1] - base);
                    sum += low + high;
                    *reinterpret_cast<__nv_bfloat162*>(tile_weights + weight_place(own_rows[i], key)) =
                        __floats2bfloat162_rn(low == 0.0f ? 0.0f : low * tile_scales[key],
                                              high == 0.0f ? 0.0f : high * tile_scales[key + 1]);
                }
                total[i] = total[i] * factor + sum;
                if (t == 0) factors[(j & 1) * rows + own_rows[i]] = factor;
            }
            arrive_at(weighed + (j & 1), threads);
        }
        __syncthreads();  // the last factors are read
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            total[i] += __shfl_xor_sync(0xffffffffu, total[i], 1);
            total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
            int const row = own_rows[i];
            if (t != 0 || row >= item.count) continue;
            int const flat = item.first_head + row;
            int64_t const token = item.first_token + flat / work.heads;
            int const head = flat % work.heads;
            int64_t const out_row = token * work.heads + head;
            float sum = total[i];
            float const lse = sum == 0.0f ? -INFINITY : top[i] + log2f(sum);
            if (partials.splits > 1) {
                partials.lse[out_row * partials.splits + blockIdx.y] = lse;
            } else {
                if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
                if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[i]);
            }
            factors[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
        }
        __syncthreads();
        return;
    }

    int const thread = threadIdx.x - score_threads, value_warp = warp - score_warps;
    // eight threads copy a row
    int const line = thread / 8, part = thread % 8;
    RowFinder<tile> finder(work, item, end, count, first, last, line);
    int const latent_pieces = work.layout.rank / 8;
    // Begins the copy of tile j; past the last an empty one, so that copies can be counted.
    auto copy = [&](int32_t j) {
        if (j < own_tiles) {
            const Row& row = finder.row;
            const uint8_t* source = row.bytes == nullptr ? work.pool : row.bytes;
            if constexpr (direct) {
                uint32_t const target = shared_address(tiles + j % places * tile * width * 2);
                for (int piece = part; piece < latent_pieces + work.layout.rope / 8; piece += 8) {
                    int const column = piece < latent_pieces ? piece * 8 : rank_padded + (piece - latent_pieces) * 8;
                    copy_async_16(target + swizzled(line, column, width), source + 16 * piece, row.bytes != nullptr);
                }
            } else {
                uint32_t const target =
                    shared_address(memory + shared.raw + (j % raw_places * tile + line) * work.layout.row_bytes);
                for (int piece = part; piece < work.layout.row_bytes / 16; piece += 8) {
                    copy_async_16(target + 16 * piece, source + 16 * piece, row.bytes != nullptr);
                }
            }
            if (part == 0) {
                positions[j % slots * tile + line] = row.position;
                scales[j % slots * tile + line] = row.scale;
            }
            finder.advance(first + j + 1);
        }
        copy_async_commit();
    };
    // Makes tile j ready for both roles. Called when all before are, and j - 2 is used up by this warp.
    auto prepare = [&](int32_t j) {
        copy_async_wait<1>();
        wait_at(among_values, value_threads);
        copy(j + 2);
        if constexpr (!direct) {
            convert<tile, value_threads, rank_padded>(work.layout,
                                                      memory + shared.raw + j % raw_places * tile * work.layout.row_bytes,
                                                      tiles + j % places * tile * width * 2, fast, thread);
        }
        arrive_at(ready + (j & 1), threads);
    };

    float sums[score_warps][2 * latent_pairs][4] = {};
    copy(0);
    copy(1);
    if (0 < own_tiles) prepare(0);
    if (1 < own_tiles) prepare(1);
    uint32_t value_columns[latent_pairs];
#pragma unroll
    for (int n = 0; n < latent_pairs; ++n) {
        value_columns[n] = lane % 16 * width * 2 +
                           swizzled(lane & 7, value_warp * (rank_padded / value_warps) + n * 16 + lane / 16 * 8, 0);
    }
    for (int32_t j = 0; j < own_tiles; ++j) {
        wait_at(weighed + (j & 1), threads);
        float factor[score_warps][2];
        bool changed = false;
#pragma unroll
        for (int m = 0; m < score_warps; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                factor[m][i] = factors[(j & 1) * rows + m * 16 + g + 8 * i];
                changed = changed || factor[m][i] != 1.0f;
            }
        }
        if (__any_sync(0xffffffffu, changed)) {
#pragma unroll
            for (int m = 0; m < score_warps; ++m) {
#pragma unroll
                for (int n = 0; n < 2 * latent_pairs; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor[m][i / 2];
                }
            }
        }
        uint32_t const a_base = shared_address(weights + (j & 1) * rows * tile * 2);
        uint32_t const values = shared_address(tiles + j % places * tile * width * 2);
#pragma unroll
        for (int k = 0; k < tile / 16; ++k) {
            uint32_t a[score_warps][4];
#pragma unroll
            for (int m = 0; m < score_warps; ++m) {
                ldmatrix_x4(a[m], a_base + weight_place(m * 16 + lane % 16, k * 16 + lane / 16 * 8));
            }
#pragma unroll
            for (int n = 0; n < latent_pairs; ++n) {
                uint32_t b[4];
                ldmatrix_x4_transposed(b, values + value_columns[n] + k * 16 * width * 2);
#pragma unroll
                for (int m = 0; m < score_warps; ++m) {
                    mma_bf16(sums[m][2 * n], a[m], b[0], b[1]);
                    mma_bf16(sums[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        if (j + 2 < own_tiles) prepare(j + 2);
    }
    copy_async_wait<0>();
    __syncthreads();
    __syncthreads();  // what divides the output is there
#pragma unroll
    for (int m = 0; m < score_warps; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const row = m * 16 + g + 8 * i;
            if (row >= item.count) continue;
            int const flat = item.first_head + row;
            int64_t const token = item.first_token + flat / work.heads;
            int const head = flat % work.heads;
            float const factor = factors[row];
#pragma unroll
            for (int n = 0; n < 2 * latent_pairs; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    int const column = value_warp * (rank_padded / value_warps) + n * 8 + 2 * t + c;
                    if (column >= work.layout.rank) continue;
                    float const value = sums[m][n][2 * i + c] * factor;
                    if (partials.splits > 1) {
                        int64_t const out_row = (token * work.heads + head) * partials.splits + blockIdx.y;
                        partials.output[out_row * work.layout.rank + column] = value;
                    } else {
                        store_float(work.output.data, work.output.type,
                                    token * work.output.token_stride + head * work.output.head_stride + column, value);
                    }
                }
            }
        }
    }
}

template <int rank_padded, bool direct>
int launch(const Attend& work, const Partials& partials, cudaStream_t stream) {
    Shared const shared(rank_padded, work.layout, direct);
    auto* kernel = two_roles_kernel<rank_padded, direct>;
    if (int status = check_cuda("attention", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                  shared.total))) {
        return status;
    }
    int64_t const blocks = block_count(work, rows);
    if (blocks > 0x7fffffff) {
        return fail(MLA_UNSUPPORTED, "%lld query tokens are too many for one step",
                    static_cast<long long>(work.step.tokens));
    }
    kernel<<<dim3(static_cast<unsigned>(blocks), partials.splits), threads, shared.total, stream>>>(
        work, partials, shared, converts_fast(work.layout), queries_aligned(work));
    return check_launch("attention");
}

template <bool direct>
int launch_rank(const Attend& work, const Partials& partials, cudaStream_t stream) {
    switch (padded_rank(work.layout)) {
        case 128: return launch<128, direct>(work, partials, stream);
        case 256: return launch<256, direct>(work, partials, stream);
        default: return launch<512, direct>(work, partials, stream);
    }
}

}  // namespace

bool attend_takes_two_roles(const Attend& work, const Device& device) {
    constexpr int beside = 128;  // static shared memory
    return rows_per_block(work) == rows &&
           Shared(padded_rank(work.layout), work.layout, is_direct(work.layout)).total + beside <= device.shared_bytes;
}

int attend_two_roles(const Attend& work, const Partials& partials, const Device&, cudaStream_t stream) {
    return is_direct(work.layout) ? launch_rank<true>(work, partials, stream) : launch_rank<false>(work, partials, stream);
}

}  // namespace mla
