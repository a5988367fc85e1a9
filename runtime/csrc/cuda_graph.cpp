// Work of a GPU that is recorded once and launched as one. Compiled with the feature `cuda` only.

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>
#include <optional>

#include "copies.h"
#include "guarded.h"

namespace {

struct Recording {
  at::cuda::CUDAGraph graph;
  // While it is recorded: what is launched goes to a stream of its own.
  std::optional<c10::StreamGuard> stream;
};

}  // namespace

extern "C" {

char* m6_graph_begin(int64_t device, Recording** out) {
  return guarded([&] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::DeviceGuard guard(c10::Device(c10::kCUDA, index));
    renew_bf16_copies();
    c10::cuda::device_synchronize();
    // The graph has memory of its own, so that what was kept for the same work before is not needed beside it.
    c10::cuda::CUDACachingAllocator::emptyCache();
    auto recording = std::make_unique<Recording>();
    recording->stream.emplace(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index).unwrap());
    recording->graph.capture_begin();
    *out = recording.release();
  });
}

char* m6_graph_end(Recording* recording) {
  char* const problem = guarded([&] { recording->graph.capture_end(); });
  recording->stream.reset();
  return problem;
}

char* m6_graph_replay(Recording* recording) {
  return guarded([&] {
    renew_bf16_copies();
    recording->graph.replay();
  });
}

void m6_graph_drop(Recording* recording) { delete recording; }

}  // extern "C"
