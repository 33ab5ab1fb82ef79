// How the blocks of a scoring kernel share its work, and what they do with keys and scores.
//
// Work items are (run, key tile). A run is some consecutive tokens of one sequence: a tile of keys is read once for all of them.
// The items of all runs lie one behind another and are cut into equal consecutive parts over a grid of fixed size, whatever the
// lengths are; every block finds its part from positions alone.
#pragma once

#include "indexer.cuh"

namespace mla {

// Tokens first .. first + count - 1 of the window, all of `sequence`; `keys`: the most that one of them scores.
struct Run {
    int32_t first = -1, count = 0, sequence = -1, keys = 0;
};

// What every block keeps of a window's rows, in shared memory.
struct Rows {
    int32_t* keys;  // that the row scores
    int32_t* ends;  // items of the runs that start at rows 0 to this one

    static constexpr int bytes = 8;
};

// The run that starts at row `first`. No run crosses a row that is a multiple of `group`.
__device__ inline Run run_at(const IndexWindow& window, const Rows& rows, int32_t first, int32_t group) {
    Run run{first, 0, window.step.sequence_of(window.first + first), 0};
    do {
        run.keys = max(run.keys, rows.keys[first + run.count]);
        ++run.count;
    } while (first + run.count < window.rows && (first + run.count) % group != 0 &&
             window.step.sequence_of(window.first + first + run.count) == run.sequence);
    return run;
}

// Fills `rows` and returns the number of all items. Every thread of the block calls.
__device__ inline int32_t list_items(const IndexWindow& window, int32_t group, int32_t tile, const Rows& rows, int32_t* scratch) {
    for (int32_t row = threadIdx.x; row < window.rows; row += blockDim.x) rows.keys[row] = window.scored_keys(row);
    __syncthreads();
    int32_t const share = ceil_div<int32_t>(window.rows, blockDim.x);
    int32_t const first = threadIdx.x * share, last = min(window.rows, first + share);
    int32_t own = 0;
    for (int32_t row = first; row < last; ++row) {
        bool const starts = row % group == 0 || window.step.sequence_of(window.first + row) !=
                                                    window.step.sequence_of(window.first + row - 1);
        if (starts) own += ceil_div(run_at(window, rows, row, group).keys, tile);
        rows.ends[row] = own;
    }
    int32_t total;
    int32_t const before = block_scan(own, scratch, &total) - own;
    for (int32_t row = first; row < last; ++row) rows.ends[row] += before;
    __syncthreads();
    return total;
}

// A block's part of the items.
struct Part {
    int32_t item, last, row;

    __device__ Part(int32_t total, const int32_t* ends, int32_t rows) : row(0) {
        int32_t const block = blockIdx.x, blocks = gridDim.x, share = total / blocks, rest = total % blocks;
        item = share * block + min(block, rest);
        last = item + share + (block < rest);
        for (int32_t end = rows; row < end;) {
            int32_t const middle = (row + end) / 2;
            if (ends[middle] <= item) {
                row = middle + 1;
            } else {
                end = middle;
            }
        }
    }

    // Moves `row` to the run of `item` and returns the item's key tile.
    __device__ int32_t tile(const int32_t* ends) {
        while (ends[row] <= item) ++row;
        return item - (row > 0 ? ends[row - 1] : 0);
    }
};

// A block's place among the items: a run, by its first row, and a tile of its keys.
struct Cursor {
    const int32_t* ends;
    int32_t row = 0, tile = 0, left = 0;  // left: of the run's tiles, this one among them, in the block's part
    int32_t rest;                         // of the part, behind them

    __device__ Cursor(Part part, const int32_t* ends) : ends(ends), rest(part.last - part.item) {
        if (rest <= 0) return;
        tile = part.tile(ends), row = part.row;
        take(ends[row] - part.item);
    }

    __device__ bool there() const { return left > 0; }

    // Whether the run is another one.
    __device__ bool advance() {
        ++tile;
        if (--left > 0 || rest <= 0) return false;
        int32_t const item = ends[row];
        do ++row;
        while (ends[row] <= item);
        tile = 0;
        take(ends[row] - item);
        return true;
    }

private:
    __device__ void take(int32_t tiles) { left = min(tiles, rest), rest -= left; }
};

__device__ inline void write_rank(const IndexWindow& window, const Rows& rows, int32_t row, int32_t key, bool visible,
                                  float score) {
    if (key < rows.keys[row]) window.ranks[row * window.stride + key] = visible ? rank_of(score) : 0;
}

// Queries in shared memory: `slots` tokens, or one token's heads in several parts.
struct QueryTile {
    int32_t slots, heads;
};

}  // namespace mla
