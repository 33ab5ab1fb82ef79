// Page pools that an op updates.
#pragma once

#include "call.h"

namespace mla {

// Copies the pool where the output is not the input's own memory, then applies `page_copies` (i32 [n, 2], may be absent):
// all pages are read before any is written, pairs with a page outside the pool are skipped.
int update_pool(Call& call, const MlaTensor& in, const MlaTensor& out, const MlaTensor& page_copies);

}  // namespace mla
