// A list of kernel calls that runs in one call from Python, each time on other buffers.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/status.h"

namespace effdet {

// A plan's addresses are ordinary ones (weights), or (slot << 48) + offset for slot 1 and up, resolved when it runs.
// User space ends below 2^47 on all supported systems.
constexpr int kSlotShift = 48;

class Bases {
 public:
  explicit Bases(const std::vector<std::uintptr_t>& bases) : bases_(bases) {}

  // The slot's base plus the offset; an ordinary address as it is.
  template <typename T>
  T* resolve(T* pointer) const {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    const std::uintptr_t slot = address >> kSlotShift;
    if (slot == 0) return pointer;
    const std::uintptr_t offset = address & ((std::uintptr_t{1} << kSlotShift) - 1);
    return reinterpret_cast<T*>(bases_[slot - 1] + offset);
  }

 private:
  const std::vector<std::uintptr_t>& bases_;
};

class Plan {
 public:
  using Step = std::function<Status(const Bases&, int threads)>;

  template <typename Params>
  void add(const Params& params, Status (*kernel)(const Params&, int)) {
    steps_.push_back([params, kernel](const Bases& bases, int threads) {
      Params bound = params;
      bound.pointers([&](auto& pointer) { pointer = bases.resolve(pointer); });
      return kernel(bound, threads);
    });
  }

  // One base per slot. Any number of threads may run one plan at a time, on buffers of their own.
  Status run(const std::vector<std::uintptr_t>& bases, int threads) const {
    const Bases resolver(bases);
    for (const Step& step : steps_) {
      const Status status = step(resolver, threads);
      if (status != kOk) return status;
    }
    return kOk;
  }

  // One step, for measurements.
  Status run_step(std::size_t step, const std::vector<std::uintptr_t>& bases, int threads) const {
    return step < steps_.size() ? steps_[step](Bases(bases), threads) : kBadParameter;
  }

  std::size_t size() const { return steps_.size(); }

 private:
  std::vector<Step> steps_;
};

}  // namespace effdet
