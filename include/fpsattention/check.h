// Checks that throw C++ exceptions, which pybind11 turns into Python's: FPS_CHECK for a mistake of the caller
// (ValueError), FPS_CUDA_CHECK for a CUDA call that failed (RuntimeError).
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace fps {

template <class... Parts>
std::string join(const Parts &...parts) {
    std::ostringstream s;
    (s << ... << parts);
    return s.str();
}

}  // namespace fps

#define FPS_CHECK(condition, ...)                                \
    do {                                                         \
        if (!(condition)) {                                      \
            throw std::invalid_argument(fps::join(__VA_ARGS__)); \
        }                                                        \
    } while (0)

#define FPS_CUDA_CHECK(call)                                                                                       \
    do {                                                                                                           \
        const cudaError_t fps_error = (call);                                                                      \
        if (fps_error != cudaSuccess) {                                                                            \
            throw std::runtime_error(fps::join(#call, " failed at ", __FILE__, ":", __LINE__, ": ",                \
                                               cudaGetErrorName(fps_error), ": ", cudaGetErrorString(fps_error))); \
        }                                                                                                          \
    } while (0)
