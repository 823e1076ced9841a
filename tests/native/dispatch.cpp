// Which kernels a CPU gets: prints the instruction set chosen at run time and one result. Run on emulated CPUs.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/dtype.h"
#include "cpu/packing.h"
#include "pointwise_conv/params.h"
using namespace effdet;
int main() {
  const std::int64_t c = 40, o = 70, n = 100;
  std::vector<float> x(n * c, 0.5f), w(o * c, 0.25f), y(n * o), one(80, 1.f), zero(80, 0.f);
  void* packed = std::aligned_alloc(64, (EFFDET_FOR_ISA(packed_dense_bytes)(kFloat32, o, 1, c) + 63) / 64 * 64);
  EFFDET_FOR_ISA(pack_dense)(WeightParams{w.data(), packed, o, c, 1, 1, c, 1, 1, 1, kFloat32}, 1);
  PointwiseParams p{};
  p.dtype = kFloat32;
  p.act = 1;
  p.batch = 1;
  p.pixels = n;
  p.in_channels = c;
  p.out_channels = o;
  p.x = x.data();
  p.x_batch_stride = n * c;
  p.x_pixel_stride = c;
  p.weights = packed;
  p.scale = one.data();
  p.shift = zero.data();
  p.y = y.data();
  const int s = EFFDET_FOR_ISA(pointwise_conv)(p, 1);
  std::printf("isa %d status %d y %.7g (5 * sigmoid(5) = 4.966536)\n", current_isa(), s, y[n * o - 1]);
}
