// What a launch did wrong: accesses outside of buffers, of what nobody wrote, and races in shared memory.
//
// Kernels are not changed for it: their file is compiled with -fsanitize=thread and linked with the functions at the
// end instead of that sanitizer's runtime, so that the compiler reports every access here.
#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <string>

#include "machine.h"

namespace machine {
namespace {

// The last write of four bytes of shared memory, and the reads since. Threads are counted from 1; 0 is nobody.
struct Word {
  uint16_t writer = 0, reader = 0;
  uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;  // epochs
};
constexpr uint16_t kSeveralWarps = 0xffff;

struct Buffer {
  const uint8_t *begin, *end;
  std::string name;
  bool writable;
  std::vector<uint8_t> written;  // by byte; empty where all of it has been
};

std::vector<Word> words;
std::vector<Buffer> buffers;
std::vector<std::string> findings;
bool checking_;
constexpr size_t kFindings = 20;

// Whether a barrier lies between that access and the current thread's.
bool ordered(uint16_t thread, uint32_t of_block, uint32_t of_warp) {
  const int other = thread - 1;
  if (other == current->index || of_block != block_epoch) return true;
  return other / kLanes == current->index / kLanes && of_warp != current->warp->epoch;
}

bool reads_ordered(const Word& w) {
  if (!w.reader) return true;
  return w.reader == kSeveralWarps ? w.read_block != block_epoch : ordered(w.reader, w.read_block, w.read_warp);
}

void note_write(Word& w) {
  w = Word();
  w.writer = (uint16_t)(current->index + 1), w.write_block = block_epoch, w.write_warp = current->warp->epoch;
}

void note_read(Word& w) {
  const bool joins = !reads_ordered(w);
  const bool same_warp = w.reader != kSeveralWarps && (w.reader - 1) / kLanes == current->index / kLanes;
  w.reader = joins && !same_warp ? kSeveralWarps : (uint16_t)(current->index + 1);
  w.read_block = block_epoch, w.read_warp = current->warp->epoch;
}

void check_shared(size_t at, size_t n, bool write) {
  if (at + n > shared_size) return report("shared access of %zu bytes at %zu crosses the end, %zu", n, at, shared_size);
  for (size_t i = at / 4; i <= (at + n - 1) / 4; ++i) {
    Word& w = words[i];
    if (!write && !w.writer) report("read of uninitialised shared memory at byte %zu", i * 4);
    if (w.writer && !ordered(w.writer, w.write_block, w.write_warp))
      report("race: %s shared byte %zu, written by thread %d without a barrier", write ? "writes" : "reads", i * 4,
             w.writer - 1);
    if (write && !reads_ordered(w)) report("race: writes shared byte %zu, read by others without a barrier", i * 4);
    write ? note_write(w) : note_read(w);
  }
}

void check_buffer(Buffer& b, const uint8_t* p, size_t n, bool write) {
  const size_t at = p - b.begin;
  if (p < b.begin || p + n > b.end)
    return report("%s of %zu bytes crosses the end of %s", write ? "write" : "read", n, b.name.c_str());
  if (write && !b.writable) return report("write to %s at byte %zu, which is only read", b.name.c_str(), at);
  if (b.written.empty()) return;
  for (size_t i = at; i < at + n; ++i) {
    if (write)
      b.written[i] = 1;
    else if (!b.written[i])
      return report("read of uninitialised %s at byte %zu", b.name.c_str(), i);
  }
}

// Constants that the compiler made are in the library's own segments.
bool in_this_library(const uint8_t* p) {
  struct Search {
    const uint8_t* p;
    bool found;
  } search{p, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Search& s = *(Search*)data;
        bool holds_machine = false, holds_address = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const uint8_t* begin = (const uint8_t*)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
          const uint8_t* end = begin + info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          holds_machine |= (const uint8_t*)&options >= begin && (const uint8_t*)&options < end;
          holds_address |= s.p >= begin && s.p < end;
        }
        s.found |= holds_machine && holds_address;
        return 0;
      },
      &search);
  return search.found;
}

}  // namespace

void report(const char* format, ...) {
  if (findings.size() >= kFindings) return;
  char text[300];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const uint3 b = kvtuner::cuda::block_index();
  const std::string where = " [block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z);
  findings.push_back(text + where + (current ? " thread " + std::to_string(current->index) : "") + "]");
}

void check_access(const uint8_t* p, size_t n, bool write) {
  if (!current || on_a_stack(p)) return;
  if ((n & (n - 1)) == 0 && (uintptr_t)p % n) report("%s of %zu bytes is not aligned", write ? "write" : "read", n);
  if (p >= shared_begin && p < shared_begin + shared_size) return check_shared(p - shared_begin, n, write);
  for (Buffer& b : buffers)
    if (p < b.end && p + n > b.begin) return check_buffer(b, p, n, write);
  if (!in_this_library(p)) report("%s of %zu bytes in no buffer", write ? "write" : "read", n);
}

void check_copy_start(const uint8_t* to) {
  const size_t at = to - shared_begin;
  for (size_t i = at / 4; i < at / 4 + 4; ++i)
    if (!reads_ordered(words[i]))
      return report("race: a copy starts over shared byte %zu, read by others without a barrier", i * 4);
}

void reset_shared_checks() { words.assign(shared_size / 4 + 1, Word()); }

bool checking() { return checking_; }

}  // namespace machine

extern "C" {

void machine_set_options(const machine::Options* to) { machine::options = *to; }

// initialised: whether reading is right before anything was written.
void machine_add_buffer(const void* p, size_t bytes, const char* name, int writable, int initialised) {
  const uint8_t* begin = (const uint8_t*)p;
  machine::buffers.push_back(
      {begin, begin + bytes, name, writable != 0, std::vector<uint8_t>(initialised ? 0 : bytes)});
}

void machine_forget() {
  machine::buffers.clear();
  machine::findings.clear();
}

int machine_findings() { return (int)machine::findings.size(); }

const char* machine_finding(int i) { return machine::findings[i].c_str(); }

// What the compiler calls.
#define MACHINE_ACCESSES(n)                                                                      \
  void __tsan_read##n(void* p) { machine::check_access((const uint8_t*)p, n, false); }           \
  void __tsan_write##n(void* p) { machine::check_access((const uint8_t*)p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { machine::check_access((const uint8_t*)p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { machine::check_access((const uint8_t*)p, n, true); }
MACHINE_ACCESSES(1)
MACHINE_ACCESSES(2)
MACHINE_ACCESSES(4)
MACHINE_ACCESSES(8)
MACHINE_ACCESSES(16)
void __tsan_read_range(void* p, size_t n) { machine::check_access((const uint8_t*)p, n, false); }
void __tsan_write_range(void* p, size_t n) { machine::check_access((const uint8_t*)p, n, true); }
void __tsan_init() { machine::checking_ = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
