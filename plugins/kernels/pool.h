// Pools of pages: what happens to them before rows are appended.
#pragma once

#include "call.h"

namespace mla {

// Copies the pool where `out` is other memory than `in`, then copies the pages that `page_copies` names (rank -1: none).
// All pages are read before any is written; a pair with a page outside the pool is skipped.
int update_pool(Call& call, const MlaTensor& in, const MlaTensor& out, const MlaTensor& page_copies);

}  // namespace mla
