// Entry points of the CPU kernels: attention over the packed cache, storing a step, packing pages.
//
// Work is shared out with OpenMP, whose runtime torch has loaded already. Which body runs is chosen from what the
// machine can do and SGLANG_KVTUNER_CPU_ISA (avx512, avx2, plain): the build itself does not depend on the machine.
#include <omp.h>
#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "read_pages.h"
#include "schedule.h"

namespace kvtuner {
namespace {

using tvm::ffi::TensorView;

#define KVTUNER_CHECK(condition, text) \
  if (!(condition)) TVM_FFI_THROW(ValueError) << "kvtuner CPU kernels: " << text

uint16_t half_of(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (magnitude != magnitude) return (uint16_t)(sign | 0x7e00);
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

Dtype dtype_of(TensorView t) {
  const DLDataType d = t.dtype();
  if (d.code == kDLFloat && d.bits == 32) return Dtype::f32;
  if (d.code == kDLFloat && d.bits == 16) return Dtype::f16;
  KVTUNER_CHECK(d.code == kDLBfloat && d.bits == 16, "rows must be float32, float16 or bfloat16");
  return Dtype::bf16;
}

// t: [rows, heads, head_dim]; ring: [slots, rows, heads, head_dim].
RowSource rows_of(TensorView t) {
  const int n = t.ndim();
  KVTUNER_CHECK(t.stride(n - 1) == 1 || t.size(n - 1) == 1, "channels of a row must be neighbours");
  return {t.data_ptr(), t.stride(n - 3), t.stride(n - 2), dtype_of(t)};
}

void check_format(const BlockFormat& f) {
  KVTUNER_CHECK(f.bits == 2 || f.bits == 4 || f.bits == 8 || f.bits == 16, f.bits << " bits are not supported");
  KVTUNER_CHECK(f.tiled() && f.reduction() % 16 == 0 && f.vector_groups(),
                "page " << f.page << ", head_dim " << f.head_dim << ", group " << f.group << " at " << f.bits
                        << " bits do not fill vectors");
  KVTUNER_CHECK(f.hadamard == 0 || ((f.hadamard & (f.hadamard - 1)) == 0 && f.head_dim % f.hadamard == 0),
                "rotation blocks of " << f.hadamard << " do not divide head_dim " << f.head_dim);
}

struct Cache {
  RowSource k_new, v_new, k_ring, v_ring, k_sinks, v_sinks;
  uint8_t *k_pages, *v_pages;
  BlockFormat key, value;
  const Sequence* sequences;
  int64_t count;
  const int32_t* pages;
  int64_t ring_length;
  int kv_heads, head_dim, sinks;
};

// k_sinks, v_sinks: [pages, sinks, heads, head_dim], none where sinks is 0.
// formats: int64 [2, 5], bits, asym, axis, group and rotation block of keys and of values.
Cache read_cache(TensorView k_new, TensorView v_new, TensorView k_ring, TensorView v_ring, TensorView k_pages,
                 TensorView v_pages, TensorView k_sinks, TensorView v_sinks, TensorView sequences, TensorView pages,
                 TensorView formats, int64_t page) {
  Cache c{};
  c.k_new = rows_of(k_new), c.v_new = rows_of(v_new), c.k_ring = rows_of(k_ring), c.v_ring = rows_of(v_ring);
  c.kv_heads = (int)k_new.size(1), c.head_dim = (int)k_new.size(2), c.ring_length = k_ring.size(1);
  KVTUNER_CHECK(v_new.size(2) == c.head_dim && k_ring.size(3) == c.head_dim && v_ring.size(3) == c.head_dim,
                "K and V need one head_dim");
  KVTUNER_CHECK(
      k_ring.stride(0) == c.ring_length * k_ring.stride(1) && v_ring.stride(0) == c.ring_length * v_ring.stride(1),
      "rings must be contiguous");
  c.k_sinks = rows_of(k_sinks), c.v_sinks = rows_of(v_sinks), c.sinks = (int)k_sinks.size(1);
  for (const RowSource* s : {&c.v_new, &c.k_ring, &c.v_ring, &c.k_sinks, &c.v_sinks})
    KVTUNER_CHECK(s->dtype == c.k_new.dtype, "keys, values, rings and sinks need one dtype");
  for (const TensorView& s : {k_sinks, v_sinks})
    KVTUNER_CHECK(s.size(0) == k_pages.size(0) && s.size(1) == c.sinks && c.sinks <= page && s.size(2) == c.kv_heads &&
                      s.size(3) == c.head_dim && (c.sinks == 0 || s.stride(0) == c.sinks * s.stride(1)),
                  "sinks are [pages, sinks, heads, head_dim]");
  const int64_t* f = (const int64_t*)formats.data_ptr();
  const int dim = c.head_dim;
  KVTUNER_CHECK(formats.ndim() == 2 && formats.size(0) == 2 && formats.size(1) == 5, "formats are [2, 5]");
  c.key = {(int)f[0], (int)f[1], (int)f[2], (int)f[3], (int)page, dim, 1, (int)f[4]};
  c.value = {(int)f[5], (int)f[6], (int)f[7], (int)f[8], (int)page, dim, 0, (int)f[9]};
  check_format(c.key), check_format(c.value);
  KVTUNER_CHECK(c.value.hadamard == 0, "only keys are rotated");
  KVTUNER_CHECK(k_pages.size(1) == c.kv_heads && k_pages.size(2) == c.key.block_bytes(),
                "key pages have another format");
  KVTUNER_CHECK(v_pages.size(1) == c.kv_heads && v_pages.size(2) == c.value.block_bytes(),
                "value pages have another format");
  KVTUNER_CHECK(sequences.ndim() == 2 && sequences.size(1) * sizeof(int64_t) == sizeof(Sequence),
                "sequences are [n, 6]");
  c.k_pages = (uint8_t*)k_pages.data_ptr(), c.v_pages = (uint8_t*)v_pages.data_ptr();
  c.sequences = (const Sequence*)sequences.data_ptr(), c.count = sequences.size(0);
  c.pages = (const int32_t*)pages.data_ptr();
  return c;
}

// Merges the partial results of one block of queries by their log-sum-exp.
void merge(const AttendCall& c, const WorkItem* items, int count) {
  const int dim = c.head_dim, rows = (int)(items->token_end - items->token_begin) * c.group;
  std::vector<float> sum(dim);
  for (int r = 0; r < rows; ++r) {
    float most = -1e38f, total = 0.f;
    for (int i = 0; i < count; ++i) most = std::max(most, items[i].partial[(int64_t)rows * dim + r]);
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int i = 0; i < count; ++i) {
      const float* p = items[i].partial;
      const float weight = std::exp2(p[(int64_t)rows * dim + r] - most);
      total += weight * p[(int64_t)rows * (dim + 1) + r];
      for (int d = 0; d < dim; ++d) sum[d] += weight * p[(int64_t)r * dim + d];
    }
    const int64_t row = c.sequences[items->sequence].first + items->token_begin + r / c.group;
    store_out(c, row, items->kv_head * c.group + r % c.group, sum.data(), 1.f / total);
  }
}

void attend(TensorView q, TensorView k_new, TensorView v_new, TensorView k_ring, TensorView v_ring, TensorView k_pages,
            TensorView v_pages, TensorView k_sinks, TensorView v_sinks, TensorView sequences, TensorView pages,
            TensorView formats, int64_t page, double scaling, TensorView out) {
  const Cache cache =
      read_cache(k_new, v_new, k_ring, v_ring, k_pages, v_pages, k_sinks, v_sinks, sequences, pages, formats, page);
  KVTUNER_CHECK(q.size(1) % cache.kv_heads == 0 && q.size(2) == cache.head_dim, "q does not fit K");
  KVTUNER_CHECK(out.stride(2) == 1 && dtype_of(out) == dtype_of(q), "out does not fit q");
  const AttendCall c{rows_of(q),
                     cache.k_new,
                     cache.v_new,
                     cache.k_ring,
                     cache.v_ring,
                     out.data_ptr(),
                     out.stride(0),
                     out.stride(1),
                     cache.k_pages,
                     cache.v_pages,
                     cache.key,
                     cache.value,
                     cache.sequences,
                     cache.pages,
                     cache.ring_length,
                     cache.kv_heads,
                     (int)(q.size(1) / cache.kv_heads),
                     cache.head_dim,
                     (float)scaling,
                     cache.k_sinks,
                     cache.v_sinks,
                     cache.sinks};
  const Body& b = body();
  const int threads = omp_get_max_threads();
  Schedule plan = make_schedule(c, cache.count, threads);
  const std::unique_ptr<float[]> partials(new float[partial_floats(plan.partial_rows, c.head_dim)]);
  float* partial = partials.get();
  for (size_t m = 0; m < plan.first.size(); ++m)
    for (int i = plan.first[m]; i < plan.first[m] + plan.count[m]; ++i) {
      plan.items[i].partial = partial;
      partial += partial_floats((plan.items[i].token_end - plan.items[i].token_begin) * c.group, c.head_dim);
    }
  const int64_t bytes = b.scratch_bytes(c);
  const bool merges = !plan.first.empty();
#pragma omp parallel num_threads(threads) if (plan.threads > 1)
  {
    static thread_local std::vector<char> scratch;
    if ((int64_t)scratch.size() < bytes + 64) scratch.resize(bytes + 64);
    void* aligned = (void*)(((uintptr_t)scratch.data() + 63) / 64 * 64);
    // Only merging needs everybody's results: each barrier saved is one less wait for a thread that lost its core.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < (int64_t)plan.items.size(); ++i) b.attend(c, plan.items[i], aligned);
    if (merges) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t m = 0; m < (int64_t)plan.first.size(); ++m)
        merge(c, plan.items.data() + plan.first[m], plan.count[m]);
    }
  }
}

struct PackTask {
  const Sequence* sequence;
  int64_t page_index;
};

void store(TensorView k_new, TensorView v_new, TensorView k_ring, TensorView v_ring, TensorView k_pages,
           TensorView v_pages, TensorView k_sinks, TensorView v_sinks, TensorView sequences, TensorView pages,
           TensorView formats, int64_t page) {
  const Cache c =
      read_cache(k_new, v_new, k_ring, v_ring, k_pages, v_pages, k_sinks, v_sinks, sequences, pages, formats, page);
  const Body& b = body();
  const int dim = c.head_dim;
  std::vector<PackTask> tasks;
  for (int64_t i = 0; i < c.count; ++i) {
    const Sequence& s = c.sequences[i];
    for (int64_t p = s.prior / page; p < (s.prior + s.fresh) / page; ++p) tasks.push_back({&s, p});
  }
  const int64_t halves = 2 * c.kv_heads, packs = (int64_t)tasks.size() * halves;
  const auto pack_one = [&](int64_t i, std::vector<float>& rows, std::vector<uint8_t>& codes) {
    const PackTask& task = tasks[i / halves];
    const int64_t head = i % halves / 2;
    const bool value = i % 2;
    const Sequence& s = *task.sequence;
    const RowSource &fresh = value ? c.v_new : c.k_new, &ring = value ? c.v_ring : c.k_ring;
    const BlockFormat& f = value ? c.value : c.key;
    const RowSource& sinks = value ? c.v_sinks : c.k_sinks;
    const int64_t id = c.pages[s.page_begin + task.page_index];
    rows.resize(page * dim), codes.resize(page * dim);
    for (int64_t t = 0; t < page; ++t) {
      const int64_t position = task.page_index * page + t;
      const RowSource& from = s.is_fresh(position) ? fresh : ring;
      const char* source = from.at(s.row_of(position, c.ring_length), head);
      b.load_rows(from.dtype, source, dim, rows.data() + t * dim);
      if (position < c.sinks)
        std::memcpy((char*)sinks.at(id * c.sinks + position, head), source, dim * size_of(from.dtype));
    }
    b.pack(f, rows.data(), (value ? c.v_pages : c.k_pages) + (id * c.kv_heads + head) * f.block_bytes(), codes.data());
  };
  const auto keep_one = [&](int64_t i) {
    const Sequence& s = c.sequences[i];
    const int64_t end = s.prior + s.fresh;
    for (const auto& [from, to] : {std::pair(&c.k_new, &c.k_ring), std::pair(&c.v_new, &c.v_ring)})
      for (int64_t p = std::max(s.prior, end - c.ring_length); p < end; ++p)
        for (int h = 0; h < c.kv_heads; ++h) {
          const char* source = from->at(s.first + p - s.prior, h);
          char* target = (char*)to->at(s.slot * c.ring_length + p % c.ring_length, h);
          std::memcpy(target, source, dim * size_of(to->dtype));
        }
  };
  if (packs == 0) {  // most decode steps: copying a row per sequence is not worth waking threads
    for (int64_t i = 0; i < c.count; ++i) keep_one(i);
    return;
  }
#pragma omp parallel
  {
    std::vector<float> rows;
    std::vector<uint8_t> codes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < packs; ++i) pack_one(i, rows, codes);
    // Only now may new rows take the place of ring rows that the pages above were packed from.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < c.count; ++i) keep_one(i);
  }
}

// x: [pages, page, head_dim] to blocks uint8 [pages, block_bytes]. bits 16 packs bfloat16.
void pack_pages(TensorView x, TensorView blocks, int64_t bits, int64_t asym, int64_t axis, int64_t group,
                int64_t token_lanes, int64_t hadamard) {
  const BlockFormat f{(int)bits,      (int)asym,      (int)axis,        (int)group,
                      (int)x.size(1), (int)x.size(2), (int)token_lanes, (int)hadamard};
  check_format(f);
  KVTUNER_CHECK(blocks.size(1) == f.block_bytes() && blocks.size(0) == x.size(0), "blocks have another format");
  KVTUNER_CHECK(x.stride(2) == 1 && x.stride(1) == f.head_dim, "pages must be contiguous");
  const Dtype dtype = dtype_of(x);
  const Body& b = body();
#pragma omp parallel
  {
    std::vector<float> rows(f.page * f.head_dim);
    std::vector<uint8_t> codes(f.page * f.head_dim);
#pragma omp for
    for (int64_t i = 0; i < x.size(0); ++i) {
      b.load_rows(dtype, (const char*)x.data_ptr() + i * x.stride(0) * size_of(dtype), (int64_t)rows.size(),
                  rows.data());
      b.pack(f, rows.data(), (uint8_t*)blocks.data_ptr() + i * f.block_bytes(), codes.data());
    }
  }
}

// For benchmarks. pages of `sequences` as in attend().
int64_t read(TensorView k_pages, TensorView v_pages, TensorView sequences, TensorView pages, int64_t page) {
  const PageBlocks blocks{{(const uint8_t*)k_pages.data_ptr(), (const uint8_t*)v_pages.data_ptr()},
                          {k_pages.size(2), v_pages.size(2)},
                          k_pages.size(1)};
  return (int64_t)read_pages(blocks, (const Sequence*)sequences.data_ptr(), sequences.size(0),
                             (const int32_t*)pages.data_ptr(), page);
}

tvm::ffi::String body_name() { return tvm::ffi::String(body().name); }

}  // namespace

void store_out(const AttendCall& c, int64_t row, int64_t head, const float* values, float factor) {
  char* to = (char*)c.out + (row * c.out_row_stride + head * c.out_head_stride) * size_of(c.q.dtype);
  store_floats(c.q.dtype, to, values, factor, c.head_dim);
}

}  // namespace kvtuner

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend, kvtuner::attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(store, kvtuner::store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_pages, kvtuner::pack_pages);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_pages, kvtuner::read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(body_name, kvtuner::body_name);
