// SPDX-License-Identifier: Apache-2.0
// A small life cycle through every verb on device memory, for compute-sanitizer (sanitize.sh): prompts, decode, drafts
// and chunks, all shapes of the build, or those that are named: kvarn_sanitized [k4v2_g128_d128 ...]. Pages are
// compared with the CPU's, rows must be finite. Every buffer is an allocation of its own, as long as need be and no
// longer.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kvarn/cuda.h"
#include "kvarn/kvarn.hpp"
#include "support/hashed.hpp"

namespace kvarn::test {
namespace {

void require(bool right, const char* what) {
  if (right) return;
  std::printf("%s: %s; CUDA: %s\n", what, kvarn_last_error(), cudaGetErrorString(cudaGetLastError()));
  std::exit(1);
}

// Device memory of its own, with a copy of what it was made from.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& from) : size_(from.size()) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(T) + (size_ == 0)) == cudaSuccess,
            "cudaMalloc");
    require(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess, "cudaMemcpy");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> out(size_);
    require(cudaMemcpy(out.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "a kernel");
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

struct Attention {
  int32_t group;
  float soft_cap;
  int32_t window;
  bool sinks;
};

struct Life {
  static constexpr int32_t kHeads = 2, kRequests = 3, kLongest = 700;
  Layout layout;
  int32_t head_dim;
  std::vector<int32_t> lengths = std::vector<int32_t>(kRequests, 0), table;
  std::vector<uint8_t> cpu_memory;
  kvarn_pages cpu_pages;
  std::unique_ptr<OnDevice<uint8_t>> pages, memory;
  kvarn_cuda_workspace workspace{nullptr, 0, {900, kRequests, 16 * kHeads, kLongest, 5}};
  uint32_t seed = 1, steps = 0;
  std::vector<float> feedback, balance;

  Life(const std::string& preset, int32_t d) : head_dim(d) {
    require(bool(Layout::make(preset, d, kHeads, layout)), "layout");
    for (int32_t head = 0; head < kHeads; ++head)
      for (const float b : hashed_feedback(static_cast<uint32_t>(d))) feedback.push_back(b);
    for (int32_t i = 0; i < kHeads * d; ++i) balance.push_back(std::ldexp(1.0f, i * 5 % 9 - 4));
    const auto each = static_cast<int32_t>(layout.pages_of(kLongest));
    for (int32_t i = 0; i < kRequests * each; ++i) table.push_back((i * 7 + 3) % (kRequests * each));
    if (kRequests * each % 7 == 0)
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    cpu_memory.assign(table.size() * static_cast<size_t>(layout.page_bytes) + 64, 0);
    for (size_t i = 0; i < cpu_memory.size(); ++i) cpu_memory[i] = static_cast<uint8_t>(mix(static_cast<uint32_t>(i)));
    cpu_pages = {cpu_memory.data() + (64 - reinterpret_cast<uintptr_t>(cpu_memory.data()) % 64) % 64,
                 static_cast<int64_t>(table.size()), layout.page_bytes};
    pages = std::make_unique<OnDevice<uint8_t>>(cpu_bytes());
    require(kvarn_cuda_workspace_bytes(&layout, &workspace.limits, &workspace.bytes) == KVARN_OK, "workspace_bytes");
    memory = std::make_unique<OnDevice<uint8_t>>(std::vector<uint8_t>(static_cast<size_t>(workspace.bytes)));
    workspace.data = memory->get();
  }

  std::vector<uint8_t> cpu_bytes() const {
    return {cpu_pages.data, cpu_pages.data + cpu_pages.count * cpu_pages.stride};
  }

  // Every second step leaves what it can to pack.
  void step(const std::vector<int32_t>& news, kvarn_encoder encoder, const Attention& how, bool feed = false) {
    const int32_t defer = ++steps % 2 == 0;
    std::vector<int32_t> starts{0};
    int32_t longest = 1;
    for (size_t r = 0; r < news.size(); ++r) {
      lengths[r] += news[r];
      longest = std::max(longest, news[r]);
      starts.push_back(starts.back() + news[r]);
    }
    const int32_t tokens = starts.back(), width = static_cast<int32_t>(table.size()) / kRequests,
                  heads = how.group * kHeads;
    const std::vector<float> k = hashed_rows(static_cast<size_t>(tokens * kHeads * head_dim), ++seed),
                             v = hashed_rows(k.size(), ++seed),
                             q = hashed_rows(static_cast<size_t>(tokens * heads * head_dim), ++seed);
    const kvarn_batch on_cpu{kRequests, width, width, table.data(), lengths.data(), starts.data()};
    WorkspaceBuffer scratch(layout.workspace_bytes(tokens, kRequests, heads, kLongest, 1));
    require(bool(append(layout, cpu_pages, on_cpu, rows(k.data(), KVARN_FLOAT32, tokens, kHeads, head_dim),
                        rows(v.data(), KVARN_FLOAT32, tokens, kHeads, head_dim), scratch, encoder, nullptr, nullptr,
                        feed ? feedback.data() : nullptr, feed ? balance.data() : nullptr)),
            "append on the CPU");

    const OnDevice<int32_t> tables(table), after(lengths), first(starts);
    const OnDevice<float> k_rows(k), v_rows(v), q_rows(q), out(std::vector<float>(q.size(), NAN)),
        sinks(std::vector<float>(static_cast<size_t>(heads), 0.5f));
    const OnDevice<float> fed(feedback), balanced(balance);
    const kvarn_pages pool{pages->get(), cpu_pages.count, cpu_pages.stride};
    const kvarn_cuda_step now{
        {kRequests, width, width, tables.get(), after.get(), first.get()}, nullptr, tokens, longest, defer};
    require(kvarn_cuda_plan(&layout, &now, heads, how.window, &workspace, nullptr) == KVARN_OK, "plan");
    const kvarn_rows k_in = rows(k_rows.get(), KVARN_FLOAT32, tokens, kHeads, head_dim),
                     v_in = rows(v_rows.get(), KVARN_FLOAT32, tokens, kHeads, head_dim),
                     q_in = rows(q_rows.get(), KVARN_FLOAT32, tokens, heads, head_dim);
    const kvarn_rows_out result = rows_out(out.get(), KVARN_FLOAT32, tokens, heads, head_dim);
    require(kvarn_cuda_append(&layout, &pool, &now, &k_in, &v_in, encoder, feed ? fed.get() : nullptr,
                              feed ? balanced.get() : nullptr, nullptr, &workspace, nullptr) == KVARN_OK,
            "append");
    const kvarn_cuda_attention attention{0.1f, how.soft_cap, how.window, how.sinks ? sinks.get() : nullptr,
                                         feed ? balanced.get() : nullptr};
    require(kvarn_cuda_attend(&layout, &pool, &now, &q_in, &result, &attention, &workspace, nullptr) == KVARN_OK,
            "attend");
    const kvarn_cuda_layer layer{pool, feed ? fed.get() : nullptr};
    if (defer != 0)
      require(kvarn_cuda_pack(&layout, &layer, 1, &now, encoder, &workspace, nullptr) == KVARN_OK, "pack");
    prefill(pool, now);
    expand(pool, now.batch);
    const kvarn_rows_out back = rows_out(out.get(), KVARN_FLOAT32, tokens, heads, head_dim);
    for (const float x : out.read()) require(std::isfinite(x), "a row is not finite");
    require(kvarn_cuda_rotate(head_dim, &q_in, &back, nullptr) == KVARN_OK, "rotate");
    require(out.read().size() == q.size(), "rotate");
    require(pages->read() == cpu_bytes(), "the pages are not the CPU's");
  }

  void prefill(const kvarn_pages& pool, const kvarn_cuda_step& now) const {
    const int32_t width = kLongest / layout.page_tokens + 1,
                  sequences = now.tokens / layout.page_tokens + 2 * kRequests, count = 2 * width;
    const OnDevice<int32_t> tables(std::vector<int32_t>(static_cast<size_t>(sequences * width))),
        after(std::vector<int32_t>(static_cast<size_t>(sequences))),
        first(std::vector<int32_t>(static_cast<size_t>(sequences + 1))), overflow(std::vector<int32_t>(1));
    const OnDevice<uint16_t> k(
        std::vector<uint16_t>(static_cast<size_t>(count * layout.page_tokens * kHeads * head_dim))),
        v(k.read());
    const kvarn_cuda_prefill where{1,           now.batch.requests, width, sequences,     tables.get(),
                                   after.get(), first.get(),        count, overflow.get()};
    const kvarn_rows_out k_out = rows_out(k.get(), KVARN_BFLOAT16, count * layout.page_tokens, kHeads, head_dim),
                         v_out = rows_out(v.get(), KVARN_BFLOAT16, count * layout.page_tokens, kHeads, head_dim);
    require(kvarn_cuda_prefill_pages(&layout, &pool, &now, &where, &k_out, &v_out, &workspace, nullptr) == KVARN_OK,
            "prefill_pages");
    require(overflow.read().size() == 1, "prefill_pages");
  }

  void expand(const kvarn_pages& pool, const kvarn_batch& batch) const {
    int64_t tokens = 0;
    for (const int32_t length : lengths) tokens += length / layout.page_tokens * layout.page_tokens;
    for (const kvarn_dtype dtype : {KVARN_FLOAT32, KVARN_FLOAT16}) {
      const OnDevice<uint8_t> k(std::vector<uint8_t>(static_cast<size_t>(4 * tokens * kHeads * head_dim))), v(k.read());
      const kvarn_rows_out k_out = rows_out(k.get(), dtype, tokens, kHeads, head_dim),
                           v_out = rows_out(v.get(), dtype, tokens, kHeads, head_dim);
      require(kvarn_cuda_expand(&layout, &pool, &batch, &k_out, &v_out, nullptr, nullptr) == KVARN_OK, "expand");
      require(k.read().size() == v.read().size(), "expand");
    }
  }
};

void live(const std::string& shape) {
  const size_t at = shape.rfind("_d");
  Life life("kvarn_" + shape.substr(0, at), std::stoi(shape.substr(at + 2)));
  life.step({1, 130, 300}, KVARN_WEIGHTED, {4, 0, 0, false});  // prompts
  life.step({1, 1, 1}, KVARN_WEIGHTED, {8, 0, 0, true});       // decode
  life.step({3, 8, 5}, KVARN_VARNORM, {1, 20, 0, false});      // drafts
  life.step({200, 1, 40}, KVARN_VARNORM, {4, 0, 100, false});  // a chunk that stages
  life.step({1, 0, 2}, KVARN_WEIGHTED, {16, 0, 0, false});
  life.step({130, 1, 5}, KVARN_WEIGHTED, {4, 0, 0, false}, true);  // tiles complete with feedback: a chunk, then decode
  for (int32_t last = life.lengths[2] % 128; last < 128; last += 8)
    life.step({1, 1, 8}, KVARN_WEIGHTED, {4, 0, 0, false}, true);
  std::vector<int32_t> to_edge;  // then all complete a tile with one row, and leave it to pack
  for (const int32_t length : life.lengths) to_edge.push_back(127 - length % 128);
  life.step(to_edge, KVARN_WEIGHTED, {4, 0, 0, false}, true);
  life.step({1, 1, 1}, KVARN_WEIGHTED, {4, 0, 0, false}, true);
  std::printf("%s\n", shape.c_str());
}

}  // namespace
}  // namespace kvarn::test

int main(int count, char** names) {
  if (kvarn_cuda_available() == 0) {
    std::printf("%s\n", kvarn_last_error());
    return 77;
  }
  std::vector<std::string> shapes(names + 1, names + count);
  if (shapes.empty())
    for (const char* const* name = kvarn_cuda_shapes(); *name != nullptr; ++name) shapes.emplace_back(*name);
  for (const std::string& shape : shapes) kvarn::test::live(shape);
  return 0;
}
