// The body of the CPU kernels in plain C++. It runs everywhere and is what the other bodies are compared with.
#include <sgl_kernel/kvtuner/cpu/attend_body.h>
#include <sgl_kernel/kvtuner/cpu/pack_page.h>

namespace kvtuner {
namespace {
bool supported() { return true; }
}  // namespace

const Body kPlainBody{"plain", supported, plain::scratch_bytes, plain::attend, plain::pack_page, plain::load_rows};
}  // namespace kvtuner
