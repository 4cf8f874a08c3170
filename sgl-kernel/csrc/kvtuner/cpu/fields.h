// The fields that Python hands over by name, said once: what the structs of C++ are filled from, and the lists that
// Python compares with the fields of its own classes when it loads the kernels.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

#include <type_traits>

#include <sgl_kernel/kvtuner/kv_codec.h>

namespace kvtuner {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

#define KVTUNER_CHECK(condition, text) \
  if (!(condition)) TVM_FFI_THROW(ValueError) << "kvtuner CPU kernels: " << text

using Fields = Map<String, Any>;

// TensorFormat (formats.py).
template <class Each>
void each_field(BlockFormat& f, const Each& each) {
  each("nbits", f.nbits);
  each("asym", f.asym);
  each("axis", f.axis);
  each("group_size", f.group_size);
  each("page_size", f.page_size);
  each("head_dim", f.head_dim);
  each("token_lanes", f.token_lanes);
  each("hadamard", f.hadamard);
}
static_assert(sizeof(BlockFormat) == 8 * sizeof(int), "a field of the format is not handed over");

// TensorStorage (storage.py).
struct TensorFields {
  BlockFormat format;
  Tensor pages, ring, sinks;
};

template <class Each>
void each_field(TensorFields& f, const Each& each) {
  each("format", f.format);
  each("pages", f.pages);
  each("ring", f.ring);
  each("sinks", f.sinks);
}

// LayerStorage (storage.py).
struct LayerFields {
  TensorFields key, value;
};

template <class Each>
void each_field(LayerFields& f, const Each& each) {
  each("key", f.key);
  each("value", f.value);
}

// StepPlan (steps.py).
struct StepFields {
  Tensor slots, query_start, prefix_lens, packed_end, pages;
};

template <class Each>
void each_field(StepFields& f, const Each& each) {
  each("slots", f.slots);
  each("query_start", f.query_start);
  each("prefix_lens", f.prefix_lens);
  each("packed_end", f.packed_end);
  each("pages", f.pages);
}

template <class T>
Array<String> names_of() {
  Array<String> names;
  T fields{};
  each_field(fields, [&](const char* name, auto&) { names.push_back(String(name)); });
  return names;
}

inline Map<String, Array<String>> field_names() {
  return {{"TensorFormat", names_of<BlockFormat>()},
          {"TensorStorage", names_of<TensorFields>()},
          {"LayerStorage", names_of<LayerFields>()},
          {"StepPlan", names_of<StepFields>()}};
}

// Raises ValueError for a field that is missing or not known, TypeError for one of another type.
template <class T>
T read_fields(const Fields& from) {
  T to{};
  size_t found = 0;
  each_field(to, [&](const char* name, auto& field) {
    using Field = std::remove_reference_t<decltype(field)>;
    const auto entry = from.find(String(name));
    KVTUNER_CHECK(entry != from.end(), "there is no field " << name);
    if constexpr (std::is_same_v<Field, int>)
      field = (int)(*entry).second.template cast<int64_t>();
    else if constexpr (std::is_same_v<Field, Tensor>)
      field = (*entry).second.template cast<Tensor>();
    else
      field = read_fields<Field>((*entry).second.template cast<Fields>());
    ++found;
  });
  for (const auto& [name, value] : from)
    KVTUNER_CHECK(found == from.size(),
                  "there are " << from.size() << " fields where " << found << " are known, such as " << name);
  return to;
}

}  // namespace kvtuner
