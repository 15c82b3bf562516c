// What this build was made with and for. The definitions come from CMakeLists.txt.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace arc_topk {

struct CudaBuild {
  std::string toolkit;                     // "13.0.88"
  std::vector<std::string> architectures;  // "90", or "90+PTX"
};

struct BuildInfo {
  std::string torch;              // the version it loads beside, "2.15.0+cu132"
  std::string compiler;           // "g++ 12.2.0"
  std::optional<CudaBuild> cuda;  // none: kernels for the CPU alone
};

BuildInfo build_info();

}  // namespace arc_topk
