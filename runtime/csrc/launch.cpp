#include "launch.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace {

// The driver's library, which a process that uses a GPU has loaded; linking it would ask for it on machines without one.
template <typename F>
F driver_function(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* function = driver == nullptr ? nullptr : dlsym(driver, name);
  TORCH_CHECK(function != nullptr, "the NVIDIA driver has no ", name);
  return reinterpret_cast<F>(function);
}

void check_driver(CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return;
  static const auto describe = driver_function<decltype(&cuGetErrorString)>("cuGetErrorString");
  const char* reason = nullptr;
  describe(result, &reason);
  TORCH_CHECK(false, what, ": ", reason == nullptr ? "unknown error" : reason);
}

// The fat binary of the kernels, loaded at the first launch.
const void* fat_binary = nullptr;

CUfunction kernel(const std::string& name) {
  static std::mutex mutex;
  static std::unordered_map<std::string, CUfunction> known;
  static CUlibrary library = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(name);
  if (found != known.end()) return found->second;
  if (library == nullptr) {
    static const auto load = driver_function<decltype(&cuLibraryLoadData)>("cuLibraryLoadData");
    check_driver(load(&library, fat_binary, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading m6's kernels");
  }
  static const auto get = driver_function<decltype(&cuLibraryGetKernel)>("cuLibraryGetKernel");
  CUkernel made = nullptr;
  check_driver(get(&made, library, name.c_str()), name);
  return known[name] = reinterpret_cast<CUfunction>(made);
}

CUdevice current_device() {
  static const auto of_context = driver_function<decltype(&cuCtxGetDevice)>("cuCtxGetDevice");
  CUdevice device = 0;
  check_driver(of_context(&device), "the current device");
  return device;
}

int64_t attribute(CUdevice_attribute which) {
  static const auto get = driver_function<decltype(&cuDeviceGetAttribute)>("cuDeviceGetAttribute");
  int value = 0;
  check_driver(get(&value, which, current_device()), "an attribute of the device");
  return value;
}

// What a kernel has without asking.
constexpr int64_t SHARED_BYTES = 48 << 10;

// Lets `function` have more shared memory on the current device.
void allow_shared_bytes(CUfunction function, int64_t shared_bytes) {
  static const auto set = driver_function<decltype(&cuKernelSetAttribute)>("cuKernelSetAttribute");
  const auto most = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  const auto kernel = reinterpret_cast<CUkernel>(function);
  check_driver(set(most, static_cast<int>(shared_bytes), kernel, current_device()), "shared memory");
}

}  // namespace

void launch_with(const std::string& name, Grid grid, int64_t threads, int64_t shared_bytes, void** pointers) {
  static const auto launch_kernel = driver_function<decltype(&cuLaunchKernel)>("cuLaunchKernel");
  const CUfunction function = kernel(name);
  if (shared_bytes > SHARED_BYTES) allow_shared_bytes(function, shared_bytes);
  check_driver(
      launch_kernel(
          function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1, static_cast<unsigned>(threads), 1, 1,
          static_cast<unsigned>(shared_bytes), c10::cuda::getCurrentCUDAStream().stream(), pointers, nullptr),
      name);
}

int64_t most_shared_bytes() { return attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN); }

int64_t blocks_at_once(int64_t threads, int64_t shared_bytes) {
  const int64_t by_threads = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR) / threads;
  const int64_t by_memory = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) / shared_bytes;
  return std::min(by_threads, by_memory) * attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
}

extern "C" void m6_set_kernels(const void* image) { fat_binary = image; }
