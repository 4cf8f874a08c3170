// A layer's buffers and a step of a batch as objects that Python holds: checked once, when they are made.
#pragma once

#include <tvm/ffi/object.h>

#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

#include "fields.h"

namespace kvtuner {

inline Dtype dtype_of(DLDataType d) {
  if (d.code == kDLFloat && d.bits == 32) return Dtype::f32;
  if (d.code == kDLFloat && d.bits == 16) return Dtype::f16;
  KVTUNER_CHECK(d.code == kDLBfloat && d.bits == 16, "rows must be float32, float16 or bfloat16");
  return Dtype::bf16;
}

inline bool contiguous(const Tensor& x) { return x.numel() == 0 || x.IsContiguous(); }

// x as contiguous integers of T.
template <class T>
T* integers(const Tensor& x, int ndim, const char* name) {
  const DLDataType d = x.dtype();
  const auto code = std::is_signed_v<T> ? kDLInt : kDLUInt;
  KVTUNER_CHECK(d.code == code && d.bits == 8 * sizeof(T) && x.ndim() == ndim && contiguous(x),
                name << " must be contiguous, of " << 8 * sizeof(T) << "-bit integers and " << ndim << " dimensions");
  return (T*)x.data_ptr();
}

// x [outer, rows, heads, head_dim] as rows of heads.
inline RowSource contiguous_rows(const Tensor& x, int heads, int head_dim, const char* name) {
  KVTUNER_CHECK(x.ndim() == 4 && contiguous(x) && x.size(2) == heads && x.size(3) == head_dim,
                name << " must be contiguous, [., ., " << heads << ", " << head_dim << "]");
  return {x.data_ptr(), (int64_t)heads * head_dim, head_dim, dtype_of(x.dtype())};
}

class LayerObj : public tvm::ffi::Object {
 public:
  LayerFields fields;  // keeps the buffers alive
  Tensor counter;
  LayerBuffers buffers;

  LayerObj(const Fields& layer, const Tensor& nonfinite_blocks)
      : fields(read_fields<LayerFields>(layer)), counter(nonfinite_blocks) {
    const Tensor &pages = fields.key.pages, &ring = fields.key.ring;
    KVTUNER_CHECK(pages.ndim() == 3 && ring.ndim() == 4, "pages have 3 dimensions, rings 4");
    LayerBuffers& b = buffers;
    b.kv_heads = (int)pages.size(1), b.head_dim = (int)ring.size(3), b.page_size = fields.key.format.page_size;
    b.num_pages = pages.size(0), b.num_slots = ring.size(0), b.ring_length = ring.size(1);
    b.sink_length = (int)fields.key.sinks.size(1);
    b.nonfinite_blocks = integers<int64_t>(counter, 1, "nonfinite_blocks");
    b.key = half(fields.key, true), b.value = half(fields.value, false);
    KVTUNER_CHECK(b.key.ring.dtype == b.value.ring.dtype, "keys and values need one dtype");
    KVTUNER_CHECK(b.ring_length > 0 && b.ring_length % b.page_size == 0, "rings are not of whole pages");
    KVTUNER_CHECK(b.sink_length <= b.page_size, "sinks are more than a page");
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("kvtuner.cpu.Layer", LayerObj, tvm::ffi::Object);

 private:
  TensorBuffers half(const TensorFields& from, bool token_lanes) const {
    const LayerBuffers& b = buffers;
    const BlockFormat& f = from.format;
    KVTUNER_CHECK(f.page_size == b.page_size && f.head_dim == b.head_dim && (f.token_lanes != 0) == token_lanes &&
                      (token_lanes || !f.hadamard),
                  "the format does not fit the buffers");
    const TensorBuffers to{f, integers<uint8_t>(from.pages, 3, "pages"),
                           contiguous_rows(from.ring, b.kv_heads, b.head_dim, "rings"),
                           contiguous_rows(from.sinks, b.kv_heads, b.head_dim, "sinks")};
    KVTUNER_CHECK(
        from.pages.size(0) == b.num_pages && from.pages.size(1) == b.kv_heads && from.pages.size(2) == f.block_bytes(),
        "pages are not blocks of " << f.block_bytes() << " bytes");
    KVTUNER_CHECK(from.ring.size(0) == b.num_slots && from.ring.size(1) == b.ring_length, "rings differ in shape");
    KVTUNER_CHECK(from.sinks.size(0) == b.num_pages && from.sinks.size(1) == b.sink_length, "sinks differ in shape");
    KVTUNER_CHECK(to.ring.dtype == to.sinks.dtype, "rings and sinks need one dtype");
    return to;
  }
};

class Layer : public tvm::ffi::ObjectRef {
 public:
  explicit Layer(tvm::ffi::ObjectPtr<LayerObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Layer, tvm::ffi::ObjectRef, LayerObj);
};

class StepObj : public tvm::ffi::Object {
 public:
  StepFields fields;  // keeps the page table alive
  std::vector<RequestStep> requests;
  int64_t rows = 0;

  // layer: any of the cache's, whose sizes bound what the step may name.
  StepObj(const LayerBuffers& layer, const Fields& step) : fields(read_fields<StepFields>(step)) {
    const int64_t count = fields.slots.numel(), columns = fields.pages.ndim() == 2 ? fields.pages.size(1) : 0;
    const int64_t* slots = integers<int64_t>(fields.slots, 1, "slots");
    const int32_t* query_start = integers<int32_t>(fields.query_start, 1, "query_start");
    const int32_t* prefix_lens = integers<int32_t>(fields.prefix_lens, 1, "prefix_lens");
    const int32_t* packed_end = integers<int32_t>(fields.packed_end, 1, "packed_end");
    const int32_t* pages = integers<int32_t>(fields.pages, 2, "pages");
    KVTUNER_CHECK(fields.query_start.numel() == count + 1 && fields.prefix_lens.numel() == count &&
                      fields.packed_end.numel() == count && fields.pages.size(0) == count && query_start[0] == 0,
                  "the columns of a step differ in length");
    requests.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const RequestStep s{slots[i],       query_start[i], query_start[i + 1] - query_start[i],
                          prefix_lens[i], packed_end[i],  pages + i * columns};
      const int64_t whole = s.end() / layer.page_size;
      KVTUNER_CHECK(s.query_len >= 0 && s.slot >= 0 && s.slot < layer.num_slots, "request " << i << " has no slot");
      KVTUNER_CHECK(0 <= s.packed_end && s.packed_end <= s.prefix_len && s.packed_end % layer.page_size == 0 &&
                        s.prefix_len - s.packed_end <= layer.ring_length && whole <= columns,
                    "request " << i << " has tokens that are neither in pages nor in its ring");
      for (int64_t p = 0; p < whole; ++p)
        KVTUNER_CHECK(0 <= s.pages[p] && s.pages[p] < layer.num_pages, "there is no page " << s.pages[p]);
      requests.push_back(s);
    }
    rows = query_start[count];
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("kvtuner.cpu.Step", StepObj, tvm::ffi::Object);
};

class Step : public tvm::ffi::ObjectRef {
 public:
  explicit Step(tvm::ffi::ObjectPtr<StepObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Step, tvm::ffi::ObjectRef, StepObj);
};

}  // namespace kvtuner
