// The barrier of all blocks that were launched together.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

struct grid_group {
    void sync() const { emulator::grid_sync(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
