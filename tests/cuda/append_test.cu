// SPDX-License-Identifier: Apache-2.0
// append on the device against kvarn_append on the CPU: whole page pools, byte for byte, over random life cycles; then
// its times. A program of its own, so that compute-sanitizer can run it:
//   append_test [shapes|time|small] [seed] [preset]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <cuda_fp16.h>

#include "cuda/dispatch.hpp"
#include "cuda/launch.hpp"
#include "kvarn/kvarn.h"

namespace kvarn::cuda {

namespace {

void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s: %s\n", line, what, cudaGetErrorString(error));
  std::exit(2);
}
#define CHECK(call) check(call, #call, __LINE__)

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(next()) * 0x1p-30f - 1.0f; }  // [-1, 1)
  float normal() { return (uniform() + uniform() + uniform() + uniform()) * .866f; }
};

template <class T>
struct Device {
  T* data = nullptr;
  size_t count = 0;
  Device() = default;
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void fit(size_t n) {
    if (n <= count) return;
    cudaFree(data);
    CHECK(cudaMalloc(&data, n * sizeof(T)));
    count = n;
  }
  void put(const T* from, size_t n) {
    fit(n);
    CHECK(cudaMemcpy(data, from, n * sizeof(T), cudaMemcpyHostToDevice));
  }
  void put(const std::vector<T>& from) { put(from.data(), from.size()); }
};

int64_t element_bytes(kvarn_dtype dtype) { return dtype == KVARN_FLOAT32 ? 4 : 2; }

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float element(const std::vector<uint8_t>& bytes, kvarn_dtype dtype, int64_t i) {
  float x;
  uint16_t half;
  if (dtype == KVARN_FLOAT32) return std::memcpy(&x, bytes.data() + 4 * i, 4), x;
  std::memcpy(&half, bytes.data() + 2 * i, 2);
  const uint32_t wide = static_cast<uint32_t>(half) << 16;
  if (dtype == KVARN_BFLOAT16) return std::memcpy(&x, &wide, 4), x;
  return __half2float(__ushort_as_half(half));
}

// k or v of a step on both sides, with strides and an offset of its own.
struct Input {
  std::vector<uint8_t> host;
  Device<uint8_t> device;
  kvarn_rows on_host, on_device;

  void fill(Random& random, kvarn_dtype dtype, int tokens, int heads, int head_dim, bool odd) {
    const int64_t head_stride = head_dim + (odd ? random.below(9) : 0);
    const int64_t token_stride = heads * head_stride + (odd ? random.below(9) : 0), offset = odd ? random.below(9) : 0;
    const int64_t count = tokens * token_stride + offset, bytes = element_bytes(dtype);
    host.resize(static_cast<size_t>(count * bytes));
    const auto set = [&](int64_t i, float x) {
      uint8_t* to = host.data() + i * bytes;
      const uint16_t half = dtype == KVARN_FLOAT16 ? __half_as_ushort(__float2half_rn(x)) : to_bf16(x);
      std::memcpy(to, dtype == KVARN_FLOAT32 ? static_cast<const void*>(&x) : &half, static_cast<size_t>(bytes));
    };
    for (int64_t t = 0; t < tokens; ++t) {
      // Sinks, zero tokens, tiny and huge ones, constant ones, and elements that must be replaced.
      const int kind = random.below(40);
      const float scale = kind == 0   ? 0.0f
                          : kind == 1 ? 1e-6f
                          : kind == 2 ? 3e4f
                          : kind == 3 ? 1e-2f
                                      : std::exp2(static_cast<float>(random.below(3)));
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < head_dim; ++d) {
          float x = kind == 4 ? scale : scale * random.normal();
          if (kind < 8 && random.below(100) == 0) x = random.below(2) ? NAN : random.below(2) ? -INFINITY : 7e4f;
          set(offset + t * token_stride + h * head_stride + d, x);
        }
    }
    device.put(host);
    const auto start = static_cast<size_t>(offset * bytes);
    on_host = {host.data() + start, dtype, tokens, heads, token_stride, head_stride};
    on_device = on_host;
    on_device.data = device.data + start;
  }
};

// A pool, tables and a workspace on both sides.
struct Cache {
  kvarn_layout layout;
  int requests, max_length, table_width;
  std::vector<uint8_t> pool;
  std::vector<int32_t> table;
  Device<uint8_t> device_pool, workspace;
  Device<int32_t> device_table, lengths, starts;
  Device<int64_t> slots, replaced;
  kvarn_cuda_limits limits{};
  kvarn_pages pages, device_pages;

  Cache(const char* preset, int head_dim, int heads, int requests_, int max_length_, Random& random)
      : requests(requests_), max_length(max_length_) {
    if (kvarn_layout_init(preset, head_dim, heads, &layout) != KVARN_OK) std::exit(3);
    table_width = static_cast<int>(format::pages_of(layout, max_length));
    const int count = requests * table_width + 3;
    const int64_t stride = layout.page_bytes + 16 * random.below(2);
    pool.resize(static_cast<size_t>(count * stride));
    for (uint8_t& byte : pool) byte = static_cast<uint8_t>(random.next());
    std::vector<int32_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    for (int i = count - 1; i > 0; --i)
      std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random.below(i + 1))]);
    table.assign(order.begin(), order.begin() + requests * table_width);
    device_pool.put(pool);
    device_table.put(table);
    replaced.fit(1);
    pages = {pool.data(), count, stride};
    device_pages = {device_pool.data, count, stride};
  }

  // A step whose requests with `takes_part` 0 have a negative slot.
  kvarn_cuda_step step(const std::vector<int32_t>& length, const std::vector<int32_t>& start,
                       const std::vector<uint8_t>& takes_part) {
    std::vector<int64_t> slot(static_cast<size_t>(start.back()) + 1, 5);
    int32_t most = 0;
    for (size_t r = 0; r < length.size(); ++r) {
      most = std::max(most, start[r + 1] - start[r]);
      if (!takes_part[r]) slot[static_cast<size_t>(start[r])] = -1;
    }
    lengths.put(length);
    starts.put(start);
    slots.put(slot);
    return {
        {static_cast<int32_t>(length.size()), table_width, table_width, device_table.data, lengths.data, starts.data},
        slots.data,
        start.back(),
        most};
  }

  // The plan on the device, in a workspace of poison.
  Launch plan(const kvarn_cuda_step& step, cudaStream_t stream) {
    limits = {step.tokens, step.batch.requests, 0, max_length, 0};
    const WorkspaceMap map = WorkspaceMap::make(layout, limits, 1);
    workspace.fit(static_cast<size_t>(map.bytes));
    CHECK(cudaMemset(workspace.data, 0xff, static_cast<size_t>(map.bytes)));
    const Launch launch{layout, device_pages, step, limits, workspace.data, map, 1, stream};
    CHECK(cuda::plan(launch, 0, 0));
    return launch;
  }
};

kvarn_status append_on_cpu(Cache& cache, const std::vector<int32_t>& length, const std::vector<int32_t>& start,
                           const Input& k, const Input& v, kvarn_encoder encoder, int64_t& replaced) {
  int64_t bytes = 0;
  kvarn_workspace_bytes(&cache.layout, start.back(), static_cast<int64_t>(length.size()), 0, cache.max_length, 1,
                        &bytes);
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, static_cast<size_t>(bytes)),
                                                           std::free);
  const kvarn_workspace workspace{memory.get(), bytes};
  const kvarn_batch batch{static_cast<int32_t>(length.size()),
                          cache.table_width,
                          cache.table_width,
                          cache.table.data(),
                          length.data(),
                          start.data()};
  return kvarn_append(&cache.layout, &cache.pages, &batch, &k.on_host, &v.on_host, encoder, &workspace, nullptr,
                      &replaced);
}

// The first byte that differs, or -1.
int64_t difference(const Cache& cache) {
  std::vector<uint8_t> got(cache.pool.size());
  CHECK(cudaMemcpy(got.data(), cache.device_pool.data, got.size(), cudaMemcpyDeviceToHost));
  if (std::memcmp(got.data(), cache.pool.data(), got.size()) == 0) return -1;
  int64_t i = 0;
  while (got[static_cast<size_t>(i)] == cache.pool[static_cast<size_t>(i)]) ++i;
  return i;
}

// A few requests that decode, verify drafts and read prompts, on both sides.
struct LifeCycle {
  Random random;
  const char* preset;
  kvarn_encoder encoder;
  uint32_t seed;
  int heads, requests;
  Cache cache;
  std::vector<int32_t> length;
  static constexpr int kMost = 1000;

  LifeCycle(const char* preset_, int head_dim, kvarn_encoder encoder_, uint32_t seed_)
      : random{seed_ * 7919ull + 17},
        preset(preset_),
        encoder(encoder_),
        seed(seed_),
        heads(1 + random.below(3)),
        requests(1 + random.below(5)),
        cache(preset_, head_dim, heads, requests, kMost, random),
        length(static_cast<size_t>(requests), 0) {}

  // Appends rows[r] tokens to each request, to those with `skips` nothing.
  bool append_rows(const std::vector<int32_t>& rows, const std::vector<uint8_t>& skips, const char* kind) {
    std::vector<int32_t> start{0}, planned, seen, before = length;
    std::vector<uint8_t> has_slot;
    for (size_t r = 0; r < length.size(); ++r) {
      start.push_back(start.back() + rows[r]);
      if (!skips[r]) length[r] += rows[r];
      planned.push_back(skips[r] || rows[r] == 0 ? 0 : length[r]);
      // One that is left out has no slot, and then any length, or no length.
      has_slot.push_back(planned[r] > 0 || rows[r] == 0 || random.below(2) == 0);
      seen.push_back(has_slot[r] ? planned[r] : rows[r] + random.below(200));
    }
    if (start.back() == 0) return true;
    Input k, v;
    const auto dtype = [&] { return static_cast<kvarn_dtype>(random.below(3)); };
    const bool odd = random.below(3) == 0;
    k.fill(random, dtype(), start.back(), heads, cache.layout.head_dim, odd);
    v.fill(random, dtype(), start.back(), heads, cache.layout.head_dim, odd);
    int64_t expected = 0, got = 0;
    if (append_on_cpu(cache, planned, start, k, v, encoder, expected) != KVARN_OK)
      return std::printf("cpu: %s\n", kvarn_last_error()), false;
    const kvarn_cuda_step step = cache.step(seen, start, has_slot);
    CHECK(cudaMemset(cache.replaced.data, 0, 8));
    const Launch launch = cache.plan(step, nullptr);
    CHECK(append(launch, k.on_device, v.on_device, encoder, cache.replaced.data));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(&got, cache.replaced.data, 8, cudaMemcpyDeviceToHost));
    const int64_t at = difference(cache);
    if (at < 0 && got == expected) return true;
    const int64_t page = at / cache.pages.stride, in_page = at % cache.pages.stride, bytes = cache.layout.record_bytes;
    std::printf(
        "FAIL %s d%d encoder %d seed %u, %s: byte %lld of record, head %lld, page %lld; replaced %lld of %lld\n",
        preset, cache.layout.head_dim, encoder, seed, kind, static_cast<long long>(in_page % bytes),
        static_cast<long long>(in_page / bytes), static_cast<long long>(page), static_cast<long long>(got),
        static_cast<long long>(expected));
    for (size_t r = 0; r < length.size(); ++r)
      std::printf("  request %zu: %d -> %d (%d)\n", r, before[r], planned[r], rows[r]);
    return false;
  }

  bool step() {
    const int n = cache.layout.raw_tokens_per_page, g = cache.layout.page_tokens, kind = random.below(5);
    std::vector<int32_t> rows(length.size());
    std::vector<uint8_t> skips(length.size(), 0);
    for (int32_t& l : length)
      if (l > kMost - 500) l = 0;
    if (kind == 0) {  // decode, most of them onto a tile's edge
      for (size_t r = 0; r < length.size(); ++r) rows[r] = random.below(4) == 0 ? 1 : g - 1 - length[r] % g;
      if (!append_rows(rows, skips, "up to an edge")) return false;
      std::fill(rows.begin(), rows.end(), 1);
    }
    for (size_t r = 0; r < length.size(); ++r) {
      const int mine = kind == 4 ? random.below(4) : kind;  // decode, drafts, chunks, prompts
      if (mine == 0) rows[r] = 1;
      if (mine == 1) rows[r] = 1 + random.below(n + 1);
      if (mine == 2) rows[r] = random.below(3 * n);
      if (mine == 3) rows[r] = random.below(420);
      skips[r] = random.below(6) == 0;
    }
    if (!append_rows(rows, skips, kind == 0 ? "decode" : kind == 1 ? "drafts" : "prompts")) return false;
    for (size_t r = 0; r < length.size(); ++r)  // some drafts are rejected
      if (!skips[r] && rows[r] > 1 && rows[r] <= n + 1) length[r] -= random.below(rows[r]);
    return true;
  }
};

bool life_cycle(const char* preset, int head_dim, kvarn_encoder encoder, int steps, uint32_t seed) {
  LifeCycle run(preset, head_dim, encoder, seed);
  for (int s = 0; s < steps; ++s)
    if (!run.step()) return false;
  return true;
}

// rotate of every pair of dtypes, against kvarn_rotate.
bool rotates(int head_dim, uint32_t seed) {
  Random random{seed * 31ull + 5};
  const int heads = 1 + random.below(4), tokens = 1 + random.below(70);
  for (int in = 0; in < 3; ++in)
    for (int out = 0; out < 3; ++out) {
      Input x, y;
      x.fill(random, static_cast<kvarn_dtype>(in), tokens, heads, head_dim, random.below(2) == 0);
      y.fill(random, static_cast<kvarn_dtype>(out), tokens, heads, head_dim, random.below(2) == 0);
      const auto target = [](const kvarn_rows& r) {
        return kvarn_rows_out{const_cast<void*>(r.data), r.dtype, r.tokens, r.heads, r.token_stride, r.head_stride};
      };
      const kvarn_rows_out on_host = target(y.on_host), on_device = target(y.on_device);
      if (kvarn_rotate(head_dim, &x.on_host, &on_host, nullptr) != KVARN_OK) return false;
      CHECK(rotate(head_dim, x.on_device, on_device, nullptr));
      std::vector<uint8_t> got(y.host.size());
      CHECK(cudaMemcpy(got.data(), y.device.data, got.size(), cudaMemcpyDeviceToHost));
      const int64_t count = static_cast<int64_t>(got.size()) / element_bytes(y.on_host.dtype);
      for (int64_t i = 0; i < count; ++i) {  // a NaN is a NaN
        const float a = element(got, y.on_host.dtype, i), b = element(y.host, y.on_host.dtype, i);
        if (std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b))) continue;
        std::printf("FAIL rotate d%d %d -> %d: element %lld %g, not %g\n", head_dim, in, out, static_cast<long long>(i),
                    a, b);
        return false;
      }
    }
  return true;
}

float microseconds(Cache& cache, const std::vector<int32_t>& length, const std::vector<int32_t>& start, const Input& k,
                   const Input& v, kvarn_encoder encoder) {
  const kvarn_cuda_step step = cache.step(length, start, std::vector<uint8_t>(length.size(), 1));
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t run;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  const Launch launch = cache.plan(step, stream);
  CHECK(cudaStreamSynchronize(stream));
  constexpr int kRuns = 40;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kRuns; ++i) CHECK(append(launch, k.on_device, v.on_device, encoder, nullptr));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  float best = 1e30f;
  for (int i = 0; i < 8; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(run, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::min(best, milliseconds * 1000 / kRuns);
  }
  CHECK(cudaGraphExecDestroy(run));
  CHECK(cudaGraphDestroy(graph));
  return best;
}

void time(const char* preset, int head_dim, kvarn_encoder encoder) {
  Random random{1};
  const auto measure = [&](const char* name, int requests, int rows, int length) {
    Cache cache(preset, head_dim, 8, requests, length, random);
    std::vector<int32_t> lengths(static_cast<size_t>(requests), length), starts;
    for (int r = 0; r <= requests; ++r) starts.push_back(r * rows);
    Input k, v;
    k.fill(random, KVARN_BFLOAT16, requests * rows, 8, head_dim, false);
    v.fill(random, KVARN_BFLOAT16, requests * rows, 8, head_dim, false);
    std::printf("  %s %.2f", name, microseconds(cache, lengths, starts, k, v, encoder));
  };
  std::printf("time %s d%d %s us:", preset, head_dim, encoder == KVARN_VARNORM ? "varnorm" : "weighted");
  measure("decode1", 1, 1, 300);
  measure("decode32", 32, 1, 300);
  measure("decode256", 256, 1, 300);
  measure("pairs8", 1, 1, 384);
  measure("pairs64", 8, 1, 384);
  measure("pairs256", 32, 1, 384);
  measure("pairs1024", 128, 1, 384);
  measure("prompt1024", 1, 128 * 128, 128 * 128);
  std::printf("\n");
}

}  // namespace
}  // namespace kvarn::cuda

int main(int argc, char** argv) {
  using namespace kvarn::cuda;
  const std::string mode = argc > 1 ? argv[1] : "shapes";
  const uint32_t seed = argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 0;
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = 0, runs = 0;
  for (const std::string preset : {"k4v2", "k4v3", "k4v4", "k2v2", "k8v4"})
    for (int tokens : {128, 64})
      for (int head_dim : {128, 64, 96, 256}) {
        const std::string name = "kvarn_" + preset + "_g" + std::to_string(tokens);
        kvarn_layout layout;
        if (kvarn_layout_init(name.c_str(), head_dim, 1, &layout) != KVARN_OK) return 3;
        if ((!only.empty() && preset != only) || !is_built(layout)) continue;
        for (kvarn_encoder encoder : {KVARN_WEIGHTED, KVARN_VARNORM}) {
          const bool main_shape = tokens == 128 && head_dim == 128;
          if (mode == "time" && (main_shape || preset == "k4v2")) time(name.c_str(), head_dim, encoder);
          if (mode == "small") ++runs, failures += !life_cycle(name.c_str(), head_dim, encoder, 3, seed);
          if (mode != "shapes") continue;
          for (uint32_t i = 0; i < 2; ++i)
            ++runs, failures += !life_cycle(name.c_str(), head_dim, encoder, 10, seed + i);
        }
      }
  if (mode != "time")
    for (int head_dim : {64, 80, 96, 128, 256})
      for (uint32_t i = 0; i < 3; ++i) ++runs, failures += !rotates(head_dim, seed + i);
  if (runs > 0) std::printf("%s: %d checks, %d failed\n", mode.c_str(), runs, failures);
  return failures > 0;
}
