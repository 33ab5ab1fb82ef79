// A step of its own for the sequences with few new tokens, beside others with long prompts.
#pragma once

#include "device.cuh"

namespace mla {

// Sequences with at most this many new tokens are attended absorbed, longer ones with expanded keys and values.
constexpr int32_t few_new_tokens = 8;

// The tokens of those sequences, close together: at most few_new_tokens for each sequence.
struct FewTokens {
    int32_t* tokens;  // [capacity] their place in the whole step, -1 behind the last
    int32_t* query_offsets;  // [B + 1]; the other sequences have no new tokens
    int32_t* token_sequence;  // [capacity]
    int32_t* positions;  // [capacity]
    int64_t capacity;

    static FewTokens take(Workspace& workspace, int64_t sequences);

    // The step over these tokens alone.
    Step step(const Step& whole) const;
};

int gather_few_tokens(const Step& whole, const FewTokens& few, cudaStream_t stream);

}  // namespace mla
