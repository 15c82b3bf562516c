#include "build_info.h"

#include <sstream>

namespace arc_topk {
namespace {

#ifdef ARC_TOPK_CUDA_TOOLKIT
// "80-real 90", as CMake names them: machine code for 80; for 90 PTX too.
std::vector<std::string> architectures_of(const std::string& list) {
  const std::string real = "-real";
  std::vector<std::string> names;
  std::istringstream stream(list);
  for (std::string name; stream >> name;) {
    const bool is_real = name.size() > real.size() && name.ends_with(real);
    names.push_back(is_real ? name.substr(0, name.size() - real.size()) : name + "+PTX");
  }
  return names;
}
#endif

}  // namespace

BuildInfo build_info() {
  BuildInfo info{ARC_TOPK_TORCH, ARC_TOPK_COMPILER, std::nullopt};
#ifdef ARC_TOPK_CUDA_TOOLKIT
  info.cuda = CudaBuild{ARC_TOPK_CUDA_TOOLKIT, architectures_of(ARC_TOPK_CUDA_ARCHS)};
#endif
  return info;
}

}  // namespace arc_topk
