// Entry points of the CPU kernels: attention over the packed cache, storing a step, packing pages.
//
// Which body runs is chosen from what the machine can do and SGLANG_KVTUNER_CPU_ISA (avx512, avx2, plain): the build
// itself does not depend on the machine.
#include <tvm/ffi/function.h>
#include <tvm/ffi/memory.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "attend_step.h"
#include "cache_objects.h"
#include "read_pages.h"
#include "store_step.h"

namespace kvtuner {
namespace {

uint16_t half_of(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (magnitude != magnitude) return (uint16_t)(sign | kHalfNan);
  if (magnitude >= 65520.f) return (uint16_t)(sign | 0x7c00);
  return (uint16_t)(sign | half_of_scale(magnitude));
}

void store_floats(Dtype dtype, void* to, const float* values, float factor, int64_t count) {
  if (dtype == Dtype::f32)
    for (int64_t i = 0; i < count; ++i) ((float*)to)[i] = values[i] * factor;
  else if (dtype == Dtype::bf16)
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)to)[i] = bf16_of(values[i] * factor);
  else
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)to)[i] = half_of(values[i] * factor);
}

// Asked per call, which costs nothing next to one: tests and benchmarks compare bodies in one process.
const Body& body() {
  const char* wanted = std::getenv("SGLANG_KVTUNER_CPU_ISA");
  const bool forced = wanted && *wanted;
  for (const Body* b : {&kAvx512Body, &kAvx2Body, &kPlainBody}) {
    if (forced && std::strcmp(wanted, b->name)) continue;
    if (b->supported()) return *b;
    KVTUNER_CHECK(!forced, "SGLANG_KVTUNER_CPU_ISA=" << wanted << " is beyond this machine");
  }
  TVM_FFI_THROW(ValueError) << "SGLANG_KVTUNER_CPU_ISA is " << wanted << "; valid are avx512, avx2, plain";
  return kPlainBody;
}

// x: rows of the step, [rows, heads, head_dim].
RowSource step_rows(TensorView x, const StepObj& step, const LayerBuffers& layer, const char* name) {
  KVTUNER_CHECK(x.ndim() == 3 && x.size(0) >= step.rows && x.size(2) == layer.head_dim && x.stride(2) == 1,
                name << " must be [" << step.rows << ", heads, " << layer.head_dim << "] with neighbouring channels");
  return {x.data_ptr(), x.stride(0), x.stride(1), dtype_of(x.dtype())};
}

RowSource own_rows(TensorView x, const StepObj& step, const LayerBuffers& layer, const char* name) {
  const RowSource rows = step_rows(x, step, layer, name);
  KVTUNER_CHECK(x.size(1) == layer.kv_heads && rows.dtype == layer.dtype(), name << " does not fit the cache");
  return rows;
}

Layer make_layer(Fields layer, Tensor nonfinite_blocks) {
  return Layer(tvm::ffi::make_object<LayerObj>(layer, nonfinite_blocks));
}

Step make_step(Layer layer, Fields step) { return Step(tvm::ffi::make_object<StepObj>(layer->buffers, step)); }

void attend(Layer layer, Step step, TensorView q, TensorView k, TensorView v, double scaling, TensorView out) {
  const LayerBuffers& b = layer->buffers;
  const RowSource to = step_rows(out, *step.get(), b, "out");
  const AttendCall c{b,
                     step->requests.data(),
                     step_rows(q, *step.get(), b, "q"),
                     own_rows(k, *step.get(), b, "k"),
                     own_rows(v, *step.get(), b, "v"),
                     (void*)to.data,
                     to.row_stride,
                     to.head_stride,
                     (int)(q.size(1) / b.kv_heads),
                     (float)scaling};
  KVTUNER_CHECK(q.size(1) % b.kv_heads == 0 && out.size(1) == q.size(1) && to.dtype == c.q.dtype, "out does not fit q");
  attend_step(body(), c, (int64_t)step->requests.size());
}

void store(Layer layer, Step step, TensorView k, TensorView v) {
  const LayerBuffers& b = layer->buffers;
  store_step(body(), b, own_rows(k, *step.get(), b, "k"), own_rows(v, *step.get(), b, "v"), step->requests);
}

// x: [pages, page_size, head_dim] to blocks uint8 [pages, block_bytes].
void pack_pages(TensorView x, TensorView blocks, Fields format) {
  const BlockFormat f = read_fields<BlockFormat>(format);
  KVTUNER_CHECK(x.ndim() == 3 && x.size(1) == f.page_size && x.size(2) == f.head_dim && x.IsContiguous(),
                "pages must be contiguous, [., " << f.page_size << ", " << f.head_dim << "]");
  KVTUNER_CHECK(blocks.ndim() == 2 && blocks.size(0) == x.size(0) && blocks.size(1) == f.block_bytes(),
                "blocks are not " << f.block_bytes() << " bytes");
  const Dtype dtype = dtype_of(x.dtype());
  const Body& b = body();
  const int64_t count = (int64_t)f.page_size * f.head_dim;
#pragma omp parallel
  {
    std::vector<float> rows(count);
    std::vector<uint8_t> codes(count);
#pragma omp for
    for (int64_t i = 0; i < x.size(0); ++i) {
      b.load_rows(dtype, (const char*)x.data_ptr() + i * count * size_of(dtype), count, rows.data());
      b.pack_page(f, rows.data(), (uint8_t*)blocks.data_ptr() + i * f.block_bytes(), codes.data());
    }
  }
}

// For tests against layout.py: the places of all codes, int64 [page_size, head_dim, 2] of first byte and lowest bit,
// and of all parameters, int64 [page_size, head_dim].
void code_places(Fields format, TensorView codes, TensorView parameters) {
  const BlockFormat f = read_fields<BlockFormat>(format);
  int64_t *code = (int64_t*)codes.data_ptr(), *parameter = (int64_t*)parameters.data_ptr();
  for (int t = 0; t < f.page_size; ++t)
    for (int c = 0; c < f.head_dim; ++c) {
      *code++ = f.byte_of(t, c);
      *code++ = f.shift_of(t, c);
      *parameter++ = f.parameter_index(t, c);
    }
}

// For benchmarks.
int64_t read(Layer layer, Step step) { return (int64_t)read_pages(layer->buffers, step->requests); }

String body_name() { return String(body().name); }

}  // namespace

void store_out(const AttendCall& c, int64_t row, int64_t head, const float* values, float factor) {
  char* to = (char*)c.out + (row * c.out_row_stride + head * c.out_head_stride) * size_of(c.q.dtype);
  store_floats(c.q.dtype, to, values, factor, c.layer.head_dim);
}

}  // namespace kvtuner

TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer, kvtuner::make_layer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(step, kvtuner::make_step);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend, kvtuner::attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(store, kvtuner::store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_pages, kvtuner::pack_pages);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(code_places, kvtuner::code_places);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_pages, kvtuner::read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(field_names, kvtuner::field_names);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(body_name, kvtuner::body_name);
