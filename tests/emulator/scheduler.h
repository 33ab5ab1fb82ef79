// What the emulator's parts share.
#pragma once

#include <algorithm>
#include <string>

#include "emulator.h"

namespace emulator {

struct Settings {
    int multiprocessors = 16;  // as many blocks live at a time
    Order order = Order::late;
    bool hopper = true;  // code for sm_90a is there
};
extern Settings settings;

// Why `synchronize` gave up; "" where it did not.
std::string take_error();

}  // namespace emulator
