#include "copies.h"

#include <c10/core/GradMode.h>

#include <mutex>
#include <unordered_map>

namespace {

using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct Copy {
  Weak parameter;
  int64_t version;
  at::Tensor values;

  void renew(const at::Tensor& from) {
    if (version == from._version()) return;
    values.copy_(from);
    version = from._version();
  }
};

std::mutex mutex;
std::unordered_map<const c10::TensorImpl*, Copy> copies;

// The copy of a parameter, if there is one. Where a parameter was, another may be now.
Copy* copy_of(const at::Tensor& parameter) {
  const auto found = copies.find(parameter.unsafeGetTensorImpl());
  return found == copies.end() || found->second.parameter.expired() ? nullptr : &found->second;
}

bool is_parameter(const at::Tensor& tensor) {
  return tensor.is_leaf() && tensor.requires_grad() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
      tensor.storage_offset() == 0;
}

}  // namespace

at::Tensor in_bf16(const at::Tensor& weight) {
  const at::Tensor parameter = weight.is_view() ? at::Tensor(weight._base()) : weight;
  if (!is_parameter(parameter)) return weight.to(at::kBFloat16);
  const at::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(mutex);
  Copy* copy = copy_of(parameter);
  if (copy == nullptr) {
    std::erase_if(copies, [](const auto& entry) { return entry.second.parameter.expired(); });
    Copy made{Weak(parameter.getIntrusivePtr()), parameter._version(), parameter.to(at::kBFloat16)};
    copy = &copies.insert_or_assign(parameter.unsafeGetTensorImpl(), std::move(made)).first->second;
  }
  copy->renew(parameter);
  return apart(copy->values.as_strided(weight.sizes(), weight.strides(), weight.storage_offset()));
}

void* bf16_copy(const at::Tensor& parameter) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Copy* copy = copy_of(parameter);
  const bool is_new = copy != nullptr && copy->version == parameter._version();
  return is_new ? copy->values.mutable_data_ptr() : nullptr;
}

void renew_bf16_copies() {
  const at::NoGradGuard no_grad;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [key, copy] : copies) {
    const auto parameter = copy.parameter.lock();
    if (parameter.defined()) copy.renew(at::Tensor(parameter));
  }
}

at::Tensor apart(const at::Tensor& view) {
  return at::empty({0}, view.options()).set_(view.storage(), view.storage_offset(), view.sizes(), view.strides());
}
