#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace mixrank {
namespace {

struct Candidate {
  const KernelTable* table;
  bool supported;
};

// Best first. __builtin_cpu_supports also asks the operating system (XCR0) whether the registers are saved.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    found.push_back({&kAvx512Bf16Kernels, vnni && __builtin_cpu_supports("avx512bf16")});
    found.push_back({&kAvx512VnniKernels, vnni});
    found.push_back({&kAvx512Kernels, avx512});
    found.push_back({&kAvx2Kernels, avx2});
#endif
    found.push_back({&kPortableKernels, true});
    return found;
  }();
  return list;
}

const KernelTable* best() {
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) return candidate.table;
  }
  return &kPortableKernels;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

}  // namespace

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MIXRANK_FEATURE(key, name) {key, static_cast<bool>(__builtin_cpu_supports(name))}
#else
#define MIXRANK_FEATURE(key, name) {key, false}
#endif
  return {
      MIXRANK_FEATURE("avx2", "avx2"),
      MIXRANK_FEATURE("fma", "fma"),
      MIXRANK_FEATURE("f16c", "f16c"),
      MIXRANK_FEATURE("avx512f", "avx512f"),
      MIXRANK_FEATURE("avx512bw", "avx512bw"),
      MIXRANK_FEATURE("avx512vl", "avx512vl"),
      MIXRANK_FEATURE("avx512dq", "avx512dq"),
      MIXRANK_FEATURE("avx512_bf16", "avx512bf16"),
      MIXRANK_FEATURE("avx512_vnni", "avx512vnni"),
  };
#undef MIXRANK_FEATURE
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.table->isa);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.table->isa);
  }
  return names;
}

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
  if (name == "auto") {
    current().store(best());
    return;
  }
  std::string possible = "'auto'";
  for (const Candidate& candidate : candidates()) {
    if (!candidate.supported) continue;
    if (name == candidate.table->isa) {
      current().store(candidate.table);
      return;
    }
    possible += ", '" + std::string(candidate.table->isa) + "'";
  }
  throw std::invalid_argument("set_isa: name must be one of " + possible + " on this machine, but it was '" + name +
                              "'");
}

}  // namespace mixrank
