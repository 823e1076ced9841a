// Fields that describe a fusion, for every op that fuses.
#pragma once

#include "common/bind.h"
#include "weighted_fusion/params.h"

namespace effdet {

Fusion read_fusion(const Fields& fields);  // resample, weight, method, pool_left, pool_top
void read_maps(const Fields& fields, const pybind11::handle& value, const Fusion& fusion, Map* maps);

}  // namespace effdet
