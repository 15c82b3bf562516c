// What an action throws, as text; "" where it throws nothing.
#pragma once

#include <exception>
#include <functional>
#include <string>

namespace arc_topk::testing {

inline std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace arc_topk::testing
