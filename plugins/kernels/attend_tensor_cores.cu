// Attention on tensor cores of every GPU from SM80 on: bf16 products, f32 sums, R up to 512.
//
// A block has M rows (heads, or tokens x heads of one sequence) and walks over tiles of 64 keys. Eight warps: for the scores
// they share rows and keys (and, over codes, columns), for the output each has all rows and an eighth of the latent: the latent
// part is the value too. Two barriers separate scores, weights and products; a third lets the next tile in, whose rows are copied
// while this one is at work. What finding a row needs (list entry, page, scale) is fetched three, two and one tile ahead, so
// that nothing waits for it. How keys lie in shared memory, by `keys_as`:
// - direct, and converted by the block from what was copied: bf16 [64][W], W = latent padded to `rank_padded`, then rope padded
//   to 64. A row's scale multiplies its scores and its weights instead; only rows with several scales are rounded.
// - codes: as they are cached (attend_codes.cuh). Scales of the latent's groups multiply their parts of the scores, and weights
//   are stored once for each group, with its scale in them.
#include "attend_codes.cuh"

namespace mla {
namespace {

constexpr int threads = 256, warps = threads / warp_size;
constexpr int tile = attend_tile;

enum class keys_as { direct, converted, codes, grouped_codes };

MLA_BOTH constexpr bool are_codes(keys_as keys) { return keys == keys_as::codes || keys == keys_as::grouped_codes; }

// Warps that share a block's rows and keys share the columns of its scores too: so many parts.
MLA_BOTH constexpr int column_parts(int rows, keys_as keys) { return are_codes(keys) && rows == 64 ? 2 : 1; }

// Where things lie in shared memory, in bytes.
struct Shared {
    int stages;  // tiles that are copied at a time: 1 or 2
    int tiles, tile_bytes, raw, weights, group_scales, positions, scales, limits, reduction, factors, total;

    Shared(int rows, int rank_padded, const KvLayout& layout, keys_as keys, int stage_count) : stages(stage_count) {
        int const width = rank_padded + rope_padded;
        int const groups = rows == 16 ? warps : 2;
        bool const converted = keys == keys_as::converted, grouped = keys == keys_as::grouped_codes;
        int const weights_bytes = rows * tile * 2 * (grouped ? code_groups : 1);
        int const exchange_bytes = column_parts(rows, keys) == 2 ? rows * tile * 4 : 0;  // of scores, in the weights' place
        tiles = rows * width * 2;
        tile_bytes = tile * (are_codes(keys) ? rank_padded + 2 * rope_padded : width * 2);
        raw = tiles + (converted ? 1 : stages) * tile_bytes;
        weights = raw + (converted ? stages * tile * layout.row_bytes : 0);
        group_scales = weights + (weights_bytes > exchange_bytes ? weights_bytes : exchange_bytes);
        positions = group_scales + (grouped ? stages * tile * code_scales_bytes : 0);
        scales = positions + 2 * tile * 4;
        limits = scales + 2 * tile * 4;
        reduction = limits + rows * 4;
        factors = reduction + groups * rows * 4;
        total = factors + rows * 4;
    }
};

// Waits for the other warp of a pair; barrier 0 is the block's.
__device__ inline void pair_sync(int pair) { named_sync(1 + pair, 64); }

template <int rows, int rank_padded, keys_as keys_mode>
__global__ void __launch_bounds__(threads, rows == 16 ? 2 : 1)
    attend_kernel(Attend work, Partials partials, Shared shared, bool query_aligned) {
    constexpr bool codes = are_codes(keys_mode), grouped = keys_mode == keys_as::grouped_codes;
    constexpr int parts = column_parts(rows, keys_mode);
    constexpr int row_warps = rows / 16, key_warps = warps / row_warps;
    constexpr int key_tiles = tile / key_warps / 8;  // of 8 keys, for the scores of a warp
    constexpr int latent_tiles = rank_padded / warps / 8;  // of 8 columns, for the output of a warp
    constexpr int width = rank_padded + rope_padded;
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ Item shared_item;

    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4;
    if (warp == 0) take_item(work, partials, &shared_item);
    __syncthreads();
    Item const item = shared_item;
    if (item.sequence < 0) {
        zero_padding(work, partials, item);
        return;
    }

    uint8_t* query = memory;
    uint8_t* tiles = memory + shared.tiles;
    uint8_t* raw = memory + shared.raw;
    uint8_t* weights = memory + shared.weights;
    auto* positions = reinterpret_cast<int32_t*>(memory + shared.positions);
    auto* scales = reinterpret_cast<float*>(memory + shared.scales);
    auto* limits = reinterpret_cast<int32_t*>(memory + shared.limits);
    auto* reduction = reinterpret_cast<float*>(memory + shared.reduction);
    auto* factors = reinterpret_cast<float*>(memory + shared.factors);

    if (work.layout.rank != rank_padded || work.layout.rope != rope_padded) {  // the padding stays zero
        for (int i = threadIdx.x; i < (shared.raw - shared.tiles) / 16; i += threads) {
            reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }

    // the keys that there are, and those of this part
    int32_t const end = work.indices == nullptr ? item.keys : last_key(work, item.first_token) + 1;
    int32_t const first = item.first_tile, last = item.last_tile;

    // four threads copy a row
    int const line = threadIdx.x / 4, quarter = threadIdx.x % 4;
    RowFinder<tile> finder(work, item, end, item.keys, first, last, line);
    int const latent_pieces = work.layout.rank / (codes ? 16 : 8), pieces = work.layout.row_bytes / 16;
    int const rope_pieces = work.layout.rope / (codes && work.layout.format == row_format::fp8_flat ? 16 : 8);
    auto copy = [&](int stage, int slot, const Row& row) {
        bool const there = row.bytes != nullptr;
        const uint8_t* source = there ? row.bytes : work.pool;
        if constexpr (codes) {
            constexpr int row_bytes = code_row_bytes<rank_padded>;
            uint32_t const target = shared_address(tiles + stage * tile * row_bytes) + line * row_bytes;
            source += 16 * quarter;
            const uint8_t* rope_source = source + work.layout.rope_offset;
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // of eight units each, which are permuted alike
                int const unit = 4 * half + quarter, at = (unit ^ code_key(line)) * 16;
#pragma unroll
                for (int piece = 0; piece < rank_padded / 16; piece += 8) {
                    if (piece + unit < latent_pieces) {
                        copy_async_16(target + at + 16 * piece, source + 16 * (piece + 4 * half), there);
                    }
                }
                if (unit < rope_pieces) copy_async_16(target + at + rank_padded, rope_source + 64 * half, there);
            }
            if (grouped && quarter == 0) {
                copy_async_16(shared_address(memory + shared.group_scales) + (stage * tile + line) * code_scales_bytes,
                              source + work.layout.rank, there);
            }
        } else if constexpr (keys_mode == keys_as::direct) {
            uint32_t const target = shared_address(tiles + stage * tile * width * 2);
            for (int piece = quarter; piece < latent_pieces + rope_pieces; piece += 4) {
                int const column = piece < latent_pieces ? piece * 8 : rank_padded + (piece - latent_pieces) * 8;
                copy_async_16(target + swizzled(line, column, width), source + 16 * piece, there);
            }
        } else {
            uint32_t const target = shared_address(raw + (stage * tile + line) * work.layout.row_bytes);
            for (int piece = quarter; piece < pieces; piece += 4) {
                copy_async_16(target + 16 * piece, source + 16 * piece, there);
            }
        }
        copy_async_commit();
        if (quarter == 0) {
            positions[slot * tile + line] = row.position;
            scales[slot * tile + line] = codes ? row.scale * code_scale_factor : row.scale;
        }
    };
    if (first < last) {
        copy(0, 0, finder.row);
        finder.advance(first + 1);
    }

    // queries, while the first tile is copied
    if constexpr (codes) {
        load_code_queries<rows, rank_padded, warps>(work, item, query, query_aligned);
    } else {
        load_queries<rows, rank_padded>(work, item, query, query_aligned);
    }
    for (int row = threadIdx.x; row < rows; row += threads) {
        limits[row] =
            row < item.count ? last_key(work, item.first_token + (item.first_head + row) / work.heads) : -1;
    }
    __syncthreads();

    int const row_warp = warp / key_warps, key_warp = warp % key_warps;
    // Where a lane's 16 bytes of an ldmatrix lie in a row's group of 128 bytes (`swizzled`, all rows of a lane being alike
    // modulo 8): for 16 columns with the second half in lanes 16 to 31 (queries, weights, values), in every other eighth of
    // the lanes (keys), and for 32 columns over the four eighths of 8 lanes (keys, few rows).
    uint32_t by_halves[4], by_eighths[4], by_quarters[2], value_columns[latent_tiles / 2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        by_halves[j] = ((2 * j + lane / 16) ^ (lane & 7)) * 16;
        by_eighths[j] = ((2 * j + lane / 8 % 2) ^ (lane & 7)) * 16;
        if (j < 2) by_quarters[j] = ((4 * j + lane / 8) ^ (lane & 7)) * 16;
    }
#pragma unroll
    for (int n = 0; n < latent_tiles / 2; ++n) {
        value_columns[n] = swizzled(lane & 7, warp * (rank_padded / warps) + n * 16 + lane / 16 * 8, 0);
    }
    int const own_rows[2] = {row_warp * 16 + g, row_warp * 16 + g + 8};
    int32_t const own_limits[2] = {limits[own_rows[0]], limits[own_rows[1]]};
    float const scale = work.softmax_scale * log2e * (codes ? code_score_factor : 1.0f);
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    float sums[row_warps][latent_tiles][4] = {};

    for (int32_t index = first; index < last; ++index) {
        int const slot = (index - first) % 2, stage = shared.stages == 2 ? slot : 0;
        copy_async_wait<0>();
        __syncthreads();
        bool const more = index + 1 < last;
        if (more && shared.stages == 2) {
            copy(1 - stage, 1 - slot, finder.row);
            finder.advance(index + 2);
        }
        uint8_t* keys = tiles;
        if constexpr (keys_mode != keys_as::converted) {
            keys += stage * shared.tile_bytes;
        } else {
            convert<tile, threads, rank_padded>(work.layout, raw + stage * tile * work.layout.row_bytes, keys, threadIdx.x);
            __syncthreads();
            if (more && shared.stages == 1) {
                copy(0, 1 - slot, finder.row);
                finder.advance(index + 2);
            }
        }

        // scores of 16 rows and tile / key_warps keys; a group is 64 columns, 128 bytes
        float scores[key_tiles][4] = {};
        const auto* group_scales = reinterpret_cast<const float*>(memory + shared.group_scales) + stage * tile * code_groups;
        if constexpr (codes) {
            // a pair of warps has twice as many rows and half of the columns each, and then exchanges; own rows come first
            int const first_key = key_warp * (tile / key_warps);
            float sums_of_part[parts][key_tiles][4];
            const uint8_t* fragments[parts];
#pragma unroll
            for (int m = 0; m < parts; ++m) fragments[m] = query + (row_warp ^ m) * 16 * width * 2 + lane * 16;
            code_scores<rank_padded, parts, key_tiles, parts, grouped>(
                sums_of_part, fragments, keys + (first_key + g) * code_row_bytes<rank_padded>,
                group_scales + (first_key + 2 * t) * code_groups, work.layout.format == row_format::fp8_flat, row_warp % 2, g,
                t);
#pragma unroll
            for (int n = 0; n < key_tiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[n][i] = sums_of_part[0][n][i];
            }
            if constexpr (parts == 2) {
                auto* const exchange = reinterpret_cast<float4*>(weights) + lane;
                auto place = [&](int row_warp_of, int n) {
                    return exchange + ((row_warp_of * key_warps + key_warp) * key_tiles + n) * warp_size;
                };
#pragma unroll
                for (int n = 0; n < key_tiles; ++n) {
                    const float(&sent)[4] = sums_of_part[1][n];
                    *place(row_warp ^ 1, n) = make_float4(sent[0], sent[1], sent[2], sent[3]);
                }
                pair_sync(row_warp / 2 * key_warps + key_warp);
#pragma unroll
                for (int n = 0; n < key_tiles; ++n) {
                    float4 const other = *place(row_warp, n);
                    scores[n][0] += other.x;
                    scores[n][1] += other.y;
                    scores[n][2] += other.z;
                    scores[n][3] += other.w;
                }
            }
        } else {
            uint32_t const a_row = shared_address(query) + (row_warp * 16 + lane % 16) * width * 2;
            uint32_t const keys_base = shared_address(keys);
            if constexpr (key_tiles == 1) {
                float odd[4] = {};
                uint32_t const b_row = keys_base + (key_warp * 8 + lane % 8) * width * 2;
#pragma unroll
                for (int group = 0; group < width / 64; ++group) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        uint32_t a0[4], a1[4], b[4];
                        ldmatrix_x4(a0, a_row + by_halves[2 * j] + group * 128);
                        ldmatrix_x4(a1, a_row + by_halves[2 * j + 1] + group * 128);
                        ldmatrix_x4(b, b_row + by_quarters[j] + group * 128);
                        mma_bf16(scores[0], a0, b[0], b[1]);
                        mma_bf16(odd, a1, b[2], b[3]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[0][i] += odd[i];
            } else {
                uint32_t const b_row =
                    keys_base + (key_warp * (tile / key_warps) + lane % 8 + lane / 16 * 8) * width * 2;
                // fragments are read two steps ahead: nothing waits for what was just begun
                constexpr int steps = width / 16, pairs = key_tiles / 2, ahead = 2;
                uint32_t a[ahead + 1][4], b[ahead + 1][pairs][4];
                auto load = [&](int step) {
                    int const group = step / 4 * 128, j = step % 4, slot = step % (ahead + 1);
                    ldmatrix_x4(a[slot], a_row + by_halves[j] + group);
#pragma unroll
                    for (int n = 0; n < pairs; ++n) ldmatrix_x4(b[slot][n], b_row + by_eighths[j] + group + n * 16 * width * 2);
                };
#pragma unroll
                for (int step = 0; step < ahead; ++step) load(step);
#pragma unroll
                for (int step = 0; step < steps; ++step) {
                    int const slot = step % (ahead + 1);
                    if (step + ahead < steps) load(step + ahead);
#pragma unroll
                    for (int n = 0; n < pairs; ++n) {
                        mma_bf16(scores[2 * n], a[slot], b[slot][n][0], b[slot][n][1]);
                        mma_bf16(scores[2 * n + 1], a[slot], b[slot][n][2], b[slot][n][3]);
                    }
                }
            }
        }

        // masks, and the largest score of each row over all warps
        float best[2] = {top[0], top[1]};
        const float* tile_scales = scales + slot * tile;
        const int32_t* tile_positions = positions + slot * tile;
#pragma unroll
        for (int n = 0; n < key_tiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const key = key_warp * (tile / key_warps) + n * 8 + 2 * t + i % 2;
                float const score = scores[n][i] * scale * tile_scales[key];
                scores[n][i] = tile_positions[key] <= own_limits[i / 2] ? score : -INFINITY;
                best[i / 2] = fmaxf(best[i / 2], scores[n][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
            best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
            if (t == 0) reduction[key_warp * rows + own_rows[i]] = best[i];
        }
        __syncthreads();

        // weights, times the scale of their value row
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int other = 0; other < key_warps; ++other) {
                best[i] = fmaxf(best[i], reduction[other * rows + own_rows[i]]);
            }
            float const base = best[i] == -INFINITY ? 0.0f : best[i];
            float const factor = power_of_two(top[i] - base);
            top[i] = best[i];
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < key_tiles; ++n) {
                int const key = key_warp * (tile / key_warps) + n * 8 + 2 * t;
                float const low = power_of_two(scores[n][2 * i] - base), high = power_of_two(scores[n][2 * i + 1] - base);
                sum += low + high;
                auto* const place = weights + swizzled(own_rows[i], key, tile);
                float const scaled_low = low == 0.0f ? 0.0f : low * tile_scales[key];
                float const scaled_high = high == 0.0f ? 0.0f : high * tile_scales[key + 1];
                if constexpr (grouped) {
                    float4 const a = *reinterpret_cast<const float4*>(group_scales + key * code_groups);
                    float4 const b = *reinterpret_cast<const float4*>(group_scales + (key + 1) * code_groups);
                    float const low_scales[code_groups] = {a.x, a.y, a.z, a.w}, high_scales[code_groups] = {b.x, b.y, b.z, b.w};
#pragma unroll
                    for (int group = 0; group < code_groups; ++group) {
                        *reinterpret_cast<__nv_bfloat162*>(place + group * rows * tile * 2) =
                            __floats2bfloat162_rn(low == 0.0f ? 0.0f : scaled_low * low_scales[group],
                                                  high == 0.0f ? 0.0f : scaled_high * high_scales[group]);
                    }
                } else {
                    *reinterpret_cast<__nv_bfloat162*>(place) = __floats2bfloat162_rn(scaled_low, scaled_high);
                }
            }
            total[i] = total[i] * factor + sum;
            if (key_warp == 0 && t == 0) factors[own_rows[i]] = factor;
        }
        __syncthreads();

        // all rows x rank_padded / 8 columns of the output
        {
            float factor[row_warps][2];
            bool changed = false;
#pragma unroll
            for (int m = 0; m < row_warps; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    factor[m][i] = factors[m * 16 + g + 8 * i];
                    changed = changed || factor[m][i] != 1.0f;
                }
            }
            if (__any_sync(0xffffffffu, changed)) {
#pragma unroll
                for (int m = 0; m < row_warps; ++m) {
#pragma unroll
                    for (int n = 0; n < latent_tiles; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor[m][i / 2];
                    }
                }
            }
            if constexpr (codes) {
                int const group = grouped ? warp * (rank_padded / warps) / scale_group : 0;
                add_code_output<rank_padded, tile>(sums, shared_address(weights) + group * rows * tile * 2, by_halves,
                                                   shared_address(keys), warp, lane);
            } else {
                uint32_t const a_row = shared_address(weights) + lane % 16 * tile * 2;
                uint32_t const b_row = shared_address(keys) + lane % 16 * width * 2;
                constexpr int pairs = latent_tiles / 2, steps = tile / 16 * pairs, ahead = 2;
                uint32_t a[row_warps][4], b[ahead + 1][4];
                auto load = [&](int step) {
                    int const k = step / pairs, n = step % pairs;
                    ldmatrix_x4_transposed(b[step % (ahead + 1)], b_row + value_columns[n] + k * 16 * width * 2);
                };
#pragma unroll
                for (int step = 0; step < ahead; ++step) load(step);
#pragma unroll
                for (int step = 0; step < steps; ++step) {
                    int const k = step / pairs, n = step % pairs;
                    if (n == 0) {
#pragma unroll
                        for (int m = 0; m < row_warps; ++m) ldmatrix_x4(a[m], a_row + by_halves[k] + m * 16 * tile * 2);
                    }
                    if (step + ahead < steps) load(step + ahead);
                    const uint32_t(&values)[4] = b[step % (ahead + 1)];
#pragma unroll
                    for (int m = 0; m < row_warps; ++m) {
                        mma_bf16(sums[m][2 * n], a[m], values[0], values[1]);
                        mma_bf16(sums[m][2 * n + 1], a[m], values[2], values[3]);
                    }
                }
            }
        }
        if (keys_mode != keys_as::converted && more && shared.stages == 1) {
            __syncthreads();
            copy(0, 1 - slot, finder.row);
            finder.advance(index + 2);
        }
    }

    // the sums of each row over all warps, and what divides its output
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] += __shfl_xor_sync(0xffffffffu, total[i], 1);
        total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
        if (t == 0) reduction[key_warp * rows + own_rows[i]] = total[i];
    }
    __syncthreads();
    if (key_warp == 0 && t == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const r = own_rows[i];
            if (r >= item.count) continue;
            float sum = 0.0f;
            for (int other = 0; other < key_warps; ++other) sum += reduction[other * rows + r];
            int const flat = item.first_head + r;
            int64_t const token = item.first_token + flat / work.heads;
            int const head = flat % work.heads;
            int64_t const out_row = token * work.heads + head;
            float const lse = sum == 0.0f ? -INFINITY : top[i] + log2f(sum);
            if (item.slot >= 0) {
                partials.lse[partials.row(item.slot, r)] = lse;
            } else {
                if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
                if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[i]);
            }
            factors[r] = sum == 0.0f ? 0.0f : (codes ? code_output_factor : 1.0f) / sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < row_warps; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const r = m * 16 + g + 8 * i;
            if (r >= item.count) continue;
            int const flat = item.first_head + r;
            int64_t const token = item.first_token + flat / work.heads;
            int const head = flat % work.heads;
            float const factor = factors[r];
            int64_t const part_row = partials.row(item.slot, r) * work.layout.rank;
            int64_t const output_row = token * work.output.token_stride + head * work.output.head_stride;
            if constexpr (codes) {
#pragma unroll
                for (int n = 0; n < latent_tiles; n += 2) {
                    int const column = warp * (rank_padded / warps) + n * 8 + 4 * t;
                    if (column >= work.layout.rank) continue;
                    float4 const value = make_float4(sums[m][n][2 * i] * factor, sums[m][n + 1][2 * i] * factor,
                                                     sums[m][n][2 * i + 1] * factor, sums[m][n + 1][2 * i + 1] * factor);
                    if (item.slot >= 0) {
                        *reinterpret_cast<float4*>(partials.output + part_row + column) = value;
                    } else {
                        store_four(work.output.data, work.output.type, output_row + column, value, partials.output_aligned);
                    }
                }
            } else {
#pragma unroll
                for (int n = 0; n < latent_tiles; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        int const column = warp * (rank_padded / warps) + n * 8 + 2 * t + j;
                        if (column >= work.layout.rank) continue;
                        float const value = sums[m][n][2 * i + j] * factor;
                        if (item.slot >= 0) {
                            partials.output[part_row + column] = value;
                        } else {
                            store_float(work.output.data, work.output.type, output_row + column, value);
                        }
                    }
                }
            }
        }
    }
}

keys_as keys_of(const KvLayout& layout) {
    if (is_direct(layout)) return keys_as::direct;
    if (!keeps_codes(layout)) return keys_as::converted;
    return layout.format == row_format::fp8_ds_mla ? keys_as::grouped_codes : keys_as::codes;
}

int shared_bytes(const KvLayout& layout, int rows, int stages) {
    return Shared(rows, padded_rank(layout), layout, keys_of(layout), stages).total;
}

constexpr int static_shared_bytes = 1024;  // what the kernel takes beside, and what the driver keeps

template <int rows, int rank_padded, keys_as keys>
int launch(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream) {
    int const limit = device.shared_bytes - 64;
    int const stages = Shared(rows, rank_padded, work.layout, keys, 2).total <= limit ? 2 : 1;
    Shared const shared(rows, rank_padded, work.layout, keys, stages);
    return launch_blocks(attend_kernel<rows, rank_padded, keys>, work, partials, threads, shared.total, stream, work, partials,
                         shared, queries_aligned(work));
}

template <int rows, keys_as keys>
int launch_rank(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream) {
    switch (padded_rank(work.layout)) {
        case 128: return launch<rows, 128, keys>(work, partials, device, stream);
        case 256: return launch<rows, 256, keys>(work, partials, device, stream);
        default: return launch<rows, 512, keys>(work, partials, device, stream);
    }
}

template <int rows>
int launch_keys(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream) {
    switch (keys_of(work.layout)) {
        case keys_as::direct: return launch_rank<rows, keys_as::direct>(work, partials, device, stream);
        case keys_as::converted: return launch_rank<rows, keys_as::converted>(work, partials, device, stream);
        case keys_as::codes: return launch_rank<rows, keys_as::codes>(work, partials, device, stream);
        default: return launch<rows, 512, keys_as::grouped_codes>(work, partials, device, stream);  // others have fewer groups
    }
}

}  // namespace

bool attend_takes_tensor_cores(const Attend& work, const Device& device) {
    return work.layout.format != row_format::f32 && work.layout.rank <= 512 && work.layout.rope <= rope_padded &&
           shared_bytes(work.layout, 16, 1) + static_shared_bytes <= device.shared_bytes;
}

int tensor_core_rows(const Attend& work, const Device& device) {
    bool const few = work.indices != nullptr || work.step.tokens <= work.step.sequences;  // more rows than 16 would stay empty
    bool const fits = shared_bytes(work.layout, 64, 1) + static_shared_bytes <= device.shared_bytes;
    return (work.heads <= 16 && few) || !fits ? 16 : 64;
}

int attend_tensor_cores(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream) {
    return partials.rows == 64 ? launch_keys<64>(work, partials, device, stream) : launch_keys<16>(work, partials, device, stream);
}

}  // namespace mla
