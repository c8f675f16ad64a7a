// SPDX-License-Identifier: Apache-2.0
// expand and the prefill pages against the CPU library, bit for bit, and their speed against a device copy.
//
//   expand_test          every shape, dtype and stride; pools above 4 GiB; thousands of requests; graph replay; prefill
//   expand_test small    a few of them, for compute-sanitizer
//   expand_test time     microseconds, bytes and percent of copy bandwidth
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.hpp"
#include "format/float16.hpp"

namespace {

using namespace kvarn;

#define CHECK_CUDA(call)                                                                             \
  do {                                                                                               \
    if (const cudaError_t error = (call)) {                                                          \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)), exit(1); \
    }                                                                                                \
  } while (0)
#define CHECK_KVARN(call)                                                                                \
  do {                                                                                                   \
    if ((call) != KVARN_OK) std::printf("%s:%d: %s\n", __FILE__, __LINE__, kvarn_last_error()), exit(1); \
  } while (0)

int failures = 0;
void expect(bool ok, const std::string& what) {
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

template <class T>
struct Device {
  T* data = nullptr;
  size_t count;
  explicit Device(size_t n) : count(n) { CHECK_CUDA(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T))); }
  explicit Device(const std::vector<T>& from) : Device(from.size()) { put(from); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void put(const std::vector<T>& from) {
    CHECK_CUDA(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> to(count);
    CHECK_CUDA(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }
};

std::mt19937 rng(7);
int32_t below(int32_t n) { return static_cast<int32_t>(rng() % static_cast<uint32_t>(n)); }
size_t size_of(kvarn_dtype dtype) { return dtype == KVARN_FLOAT32 ? 4 : 2; }

// Requests whose tokens were all appended by the CPU library.
struct Pool {
  kvarn_layout layout;
  std::vector<int32_t> lengths, table;
  int32_t width;
  int64_t count = 0;
  std::vector<uint8_t> bytes, scratch;

  Pool(const std::string& preset, int32_t head_dim, int32_t heads, std::vector<int32_t> seq_lens)
      : lengths(std::move(seq_lens)), width(0) {
    CHECK_KVARN(kvarn_layout_init(preset.c_str(), head_dim, heads, &layout));
    std::vector<int32_t> starts{0};
    for (int32_t length : lengths) {
      starts.push_back(starts.back() + length);
      width = std::max(width, static_cast<int32_t>(format::pages_of(layout, length)));
      count += format::pages_of(layout, length);
    }
    std::vector<int32_t> order(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
    std::shuffle(order.begin(), order.end(), rng);
    table.assign(lengths.size() * static_cast<size_t>(width), -1);
    size_t next = 0;
    for (size_t r = 0; r < lengths.size(); ++r)
      for (int64_t i = 0; i < format::pages_of(layout, lengths[r]); ++i)
        table[r * static_cast<size_t>(width) + static_cast<size_t>(i)] = order[next++];
    bytes.assign(static_cast<size_t>(count * layout.page_bytes), 0xff);
    int64_t need = 0;
    const int64_t tokens = starts.back();
    const auto requests = static_cast<int32_t>(lengths.size());
    CHECK_KVARN(kvarn_workspace_bytes(&layout, tokens, requests, 0, 1 << 20, 1, &need));
    scratch.resize(static_cast<size_t>(need) + 64);
    const auto values = static_cast<size_t>(tokens) * static_cast<size_t>(heads * head_dim);
    std::vector<float> k(values), v(values);
    std::normal_distribution<float> normal;
    for (float& x : k) x = normal(rng);
    for (float& x : v) x = normal(rng);
    const auto rows = [&](const std::vector<float>& x) {
      return kvarn_rows{x.data(), KVARN_FLOAT32, tokens, heads, int64_t{heads} * head_dim, head_dim};
    };
    const kvarn_rows k_rows = rows(k), v_rows = rows(v);
    const kvarn_pages pages = host();
    const kvarn_batch in = batch(table, lengths, starts.data());
    const kvarn_workspace space = workspace();
    CHECK_KVARN(kvarn_append(&layout, &pages, &in, &k_rows, &v_rows, KVARN_WEIGHTED, &space, nullptr, nullptr));
  }

  kvarn_pages host() { return {bytes.data(), count, layout.page_bytes}; }
  kvarn_workspace workspace() {
    uint8_t* start = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
    return {start, static_cast<int64_t>(scratch.size()) - 64};
  }
  kvarn_batch batch(const std::vector<int32_t>& entries, const std::vector<int32_t>& seq_lens,
                    const int32_t* starts) const {
    return {static_cast<int32_t>(seq_lens.size()), width, width, entries.data(), seq_lens.data(), starts};
  }
  int64_t tiles(const std::vector<int32_t>& seq_lens) const {
    int64_t sum = 0;
    for (int32_t length : seq_lens) sum += length / layout.page_tokens;
    return sum;
  }
};

// The pool on the device, pages `stride` bytes apart.
struct DevicePages {
  Device<uint8_t> data;
  kvarn_pages pages;
  DevicePages(Pool& pool, int64_t stride) : data(static_cast<size_t>(stride * pool.count)) {
    pages = {data.data, pool.count, stride};
    const auto bytes = static_cast<size_t>(pool.layout.page_bytes);
    CHECK_CUDA(cudaMemcpy2D(data.data, static_cast<size_t>(stride), pool.bytes.data(), bytes, bytes,
                            static_cast<size_t>(pool.count), cudaMemcpyHostToDevice));
  }
};

// A caller's output: `padding` elements behind every head, and `offset` elements before the first.
struct Out {
  kvarn_dtype dtype;
  int64_t tokens, heads, head_stride, offset;
  size_t bytes() const {
    return static_cast<size_t>(std::max<int64_t>(tokens, 1) * heads * head_stride + offset) * size_of(dtype);
  }
  kvarn_rows_out rows(uint8_t* at) const {
    return {at + static_cast<size_t>(offset) * size_of(dtype), dtype, tokens, heads, heads * head_stride, head_stride};
  }
};

void check_expand(Pool& pool, const DevicePages& device, const std::vector<int32_t>& table,
                  const std::vector<int32_t>& lengths, const Out& k, const Out& v, const std::string& what) {
  std::vector<uint8_t> expected_k(k.bytes(), 0xa5), expected_v(v.bytes(), 0xa5);
  const Device<uint8_t> k_out(expected_k), v_out(expected_v);
  const kvarn_pages pages = pool.host();
  const kvarn_workspace space = pool.workspace();
  const kvarn_rows_out k_host = k.rows(expected_k.data()), v_host = v.rows(expected_v.data());
  kvarn_batch batch = pool.batch(table, lengths, nullptr);
  CHECK_KVARN(kvarn_expand(&pool.layout, &pages, &batch, &k_host, &v_host, &space, nullptr));
  const Device<int32_t> entries(table), seq_lens(lengths);
  batch.block_table = entries.data, batch.seq_lens = seq_lens.data;
  CHECK_CUDA(cuda::expand(pool.layout, device.pages, batch, k.rows(k_out.data), v.rows(v_out.data), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  expect(k_out.get() == expected_k, what + " k");
  expect(v_out.get() == expected_v, what + " v");
}

std::string name_of(const kvarn_layout& l) {
  return "k" + std::to_string(l.k_bits) + "v" + std::to_string(l.v_bits) + "_g" + std::to_string(l.page_tokens) + " D" +
         std::to_string(l.head_dim);
}

void check_shape(Pool& pool, bool small) {
  const std::string name = name_of(pool.layout);
  const DevicePages device(pool, pool.layout.page_bytes + 16 * below(3));
  const int64_t tokens = pool.tiles(pool.lengths) * pool.layout.page_tokens, heads = pool.layout.kv_heads,
                d = pool.layout.head_dim;
  const auto check = [&](Out k, Out v, const char* what) {
    check_expand(pool, device, pool.table, pool.lengths, k, v, name + " " + what);
  };
  check({KVARN_FLOAT16, tokens, heads, d, 0}, {KVARN_FLOAT16, tokens, heads, d, 0}, "f16");
  if (small) return;
  check({KVARN_BFLOAT16, tokens, heads, d + 8, 8}, {KVARN_BFLOAT16, tokens, heads, d + 8, 8}, "bf16 padded");
  check({KVARN_FLOAT32, tokens, heads, d, 0}, {KVARN_FLOAT32, tokens, heads, d, 0}, "f32");
  check({KVARN_FLOAT16, tokens, heads, d, 0}, {KVARN_BFLOAT16, tokens, heads, d, 0}, "f16, bf16");
  check({KVARN_BFLOAT16, tokens, heads, d + 1, 1}, {KVARN_FLOAT32, tokens, heads, d + 1, 1}, "unaligned");
}

// Output room for fewer tiles, lengths that change under a captured graph, corrupt tables, thousands of requests.
void check_limits() {
  Pool pool("kvarn_k4v2_g128", 128, 2, {700, 0, 90, 128, 1300});
  const DevicePages device(pool, pool.layout.page_bytes);
  const int64_t values = 128 * 2 * 128;  // of a tile
  const Out all{KVARN_FLOAT16, pool.tiles(pool.lengths) * 128, 2, 128, 0};
  std::vector<uint8_t> expected_k(all.bytes()), expected_v(all.bytes());
  kvarn_batch batch = pool.batch(pool.table, pool.lengths, nullptr);
  const kvarn_pages pages = pool.host();
  const kvarn_workspace space = pool.workspace();
  const kvarn_rows_out k_host = all.rows(expected_k.data()), v_host = all.rows(expected_v.data());
  CHECK_KVARN(kvarn_expand(&pool.layout, &pages, &batch, &k_host, &v_host, &space, nullptr));

  Device<int32_t> entries(pool.table), seq_lens(pool.lengths);
  Device<uint8_t> k(all.bytes()), v(all.bytes());
  batch.block_table = entries.data, batch.seq_lens = seq_lens.data;
  const auto poison = [&] {
    CHECK_CUDA(cudaMemset(k.data, 0xa5, k.count));
    CHECK_CUDA(cudaMemset(v.data, 0xa5, v.count));
  };
  const auto first = [&](int64_t tiles, const std::string& what) {
    CHECK_CUDA(cudaDeviceSynchronize());
    auto want_k = expected_k, want_v = expected_v;
    std::fill(want_k.begin() + 2 * values * tiles, want_k.end(), uint8_t{0xa5});
    std::fill(want_v.begin() + 2 * values * tiles, want_v.end(), uint8_t{0xa5});
    expect(k.get() == want_k && v.get() == want_v, what);
  };
  poison();
  const Out part{KVARN_FLOAT16, 7 * 128 + 127, 2, 128, 0};
  CHECK_CUDA(cuda::expand(pool.layout, device.pages, batch, part.rows(k.data), part.rows(v.data), nullptr));
  first(7, "outputs with room for 7 tiles");

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_CUDA(cuda::expand(pool.layout, device.pages, batch, all.rows(k.data), all.rows(v.data), stream));
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (const auto& [lengths, tiles] : std::vector<std::pair<std::vector<int32_t>, int64_t>>{
           {{640, 0, 0, 0, 0}, 5}, {{0, 0, 0, 0, 0}, 0}, {{127, -5, 0, 0, 0}, 0}, {pool.lengths, all.tokens / 128}}) {
    poison();
    seq_lens.put(lengths);
    CHECK_CUDA(cudaGraphLaunch(replay, stream));
    first(tiles, "replay with " + std::to_string(tiles) + " tiles");
  }
  auto corrupt = pool.table;
  for (size_t i = 0; i < corrupt.size(); i += 3) corrupt[i] = i % 2 ? INT32_MIN : INT32_MAX;
  entries.put(corrupt);
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  seq_lens.put({INT32_MAX, INT32_MAX, INT32_MIN, 5, 128 * 100});
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  CHECK_CUDA(cudaDeviceSynchronize());
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);

  for (const int32_t requests : {257, 3000}) {  // with borrowed pages
    std::vector<int32_t> lengths(static_cast<size_t>(requests)),
        table(lengths.size() * static_cast<size_t>(pool.width));
    for (int32_t& length : lengths) length = below(300);
    for (int32_t& entry : table) entry = pool.table[static_cast<size_t>(below(5))];
    const Out out{KVARN_FLOAT16, pool.tiles(lengths) * 128, 2, 128, 0};
    check_expand(pool, device, table, lengths, out, out, std::to_string(requests) + " requests");
  }
}

// Outputs and a pool beyond 2^32 bytes and 2^31 elements.
void check_large() {
  Pool pool("kvarn_k4v2_g128", 128, 2, {1000, 500, 300});
  const DevicePages device(pool, int64_t{160} << 20);
  const int64_t tiles = pool.tiles(pool.lengths), d = 128, stride = int64_t{1} << 21;  // elements from token to token
  std::vector<float> expected(static_cast<size_t>(2 * tiles * 128 * 2 * d));
  const kvarn_pages pages = pool.host();
  const kvarn_workspace space = pool.workspace();
  const kvarn_rows_out k_host{expected.data(), KVARN_FLOAT32, tiles * 128, 2, 2 * d, d},
      v_host{expected.data() + expected.size() / 2, KVARN_FLOAT32, tiles * 128, 2, 2 * d, d};
  kvarn_batch batch = pool.batch(pool.table, pool.lengths, nullptr);
  CHECK_KVARN(kvarn_expand(&pool.layout, &pages, &batch, &k_host, &v_host, &space, nullptr));
  const Device<int32_t> entries(pool.table), seq_lens(pool.lengths);
  batch.block_table = entries.data, batch.seq_lens = seq_lens.data;
  const Device<uint16_t> out(static_cast<size_t>(tiles * 128 * stride));
  const auto rows = [&](int64_t offset) {
    return kvarn_rows_out{out.data + offset, KVARN_FLOAT16, tiles * 128, 2, stride, d};
  };
  CHECK_CUDA(cuda::expand(pool.layout, device.pages, batch, rows(0), rows(512), nullptr));
  std::vector<uint16_t> got(1024);
  bool same = true;
  for (int64_t t = 0; t < tiles * 128; ++t) {
    CHECK_CUDA(cudaMemcpy(got.data(), out.data + t * stride, 2048, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < 2 * d; ++i)
      same = same &&
             got[static_cast<size_t>(i)] == format::float_to_f16(expected[static_cast<size_t>(t * 2 * d + i)]) &&
             got[static_cast<size_t>(512 + i)] ==
                 format::float_to_f16(expected[expected.size() / 2 + static_cast<size_t>(t * 2 * d + i)]);
  }
  std::printf("pool of %.1f GiB, outputs of %.1f GiB\n", double(device.data.count) / (1 << 30),
              double(out.count) * 2 / (1 << 30));
  expect(same, "large offsets");
}

uint16_t to16(uint16_t half, kvarn_dtype dtype) {
  return dtype == KVARN_FLOAT16 ? half : format::float_to_bf16(format::f16_to_float(half));
}

// A step over a pool: the last queries[r] tokens of each request are new; silent requests take no part.
void check_prefill(Pool& pool, const std::vector<int32_t>& queries, const std::vector<bool>& silent,
                   int32_t first_request, int32_t missing, kvarn_dtype dtype, const std::string& what) {
  const kvarn_layout& layout = pool.layout;
  const int32_t g = layout.page_tokens, d = layout.head_dim, heads = layout.kv_heads,
                requests = static_cast<int32_t>(pool.lengths.size());
  std::vector<int32_t> starts{0};
  for (int32_t q : queries) starts.push_back(starts.back() + q);
  const int32_t tokens = starts.back() + 3;
  std::vector<int64_t> slots(static_cast<size_t>(tokens), 0);
  for (int32_t r = 0; r < requests; ++r)
    if (silent[static_cast<size_t>(r)]) slots[static_cast<size_t>(starts[static_cast<size_t>(r)])] = -1;
  const DevicePages device(pool, layout.page_bytes);
  const Device<int32_t> table(pool.table), seq_lens(pool.lengths), query_starts(starts);
  const Device<int64_t> device_slots(slots);
  const kvarn_batch batch{requests, pool.width, pool.width, table.data, seq_lens.data, query_starts.data};
  const kvarn_cuda_step step{batch, device_slots.data, tokens, tokens};
  const kvarn_cuda_limits limits{tokens, requests, 0, 1 << 20, 8};
  const auto map = cuda::WorkspaceMap::make(layout, limits, 8);
  Device<uint8_t> workspace(static_cast<size_t>(map.bytes));
  CHECK_CUDA(cudaMemset(workspace.data, 0, workspace.count));
  std::vector<uint16_t> raw(static_cast<size_t>(map.max_raw_tiles) * static_cast<size_t>(heads) * 2 *
                            static_cast<size_t>(g * d));
  for (uint16_t& x : raw) x = static_cast<uint16_t>(below(0x7c00) | below(2) << 15);
  CHECK_CUDA(cudaMemcpy(workspace.data + map.raw, raw.data(), raw.size() * 2, cudaMemcpyHostToDevice));
  const cuda::Launch launch{layout, device.pages, step, limits, workspace.data, map, 8, nullptr};
  CHECK_CUDA(cuda::plan(launch, 0, 0));

  // The model.
  struct Sequence {
    int32_t row, length;
    std::vector<int32_t> pages;
  };
  std::vector<Sequence> sequences;
  std::vector<std::vector<uint16_t>> page_k, page_v;  // [g][heads][d] each
  const auto slot_size = static_cast<size_t>(g * heads * d);
  int32_t raw_slot = 0;
  for (int32_t r = 0; r < requests; ++r) {
    const int32_t length = pool.lengths[static_cast<size_t>(r)], q = queries[static_cast<size_t>(r)],
                  start = length - q, row = starts[static_cast<size_t>(r)];
    if (silent[static_cast<size_t>(r)] || q == 0) {
      for (int32_t i = 0; i < q && r >= first_request; i += g) sequences.push_back({row + i, 0, {}});
      continue;
    }
    const int32_t first = start / g, last = (length - 1) / g, base = static_cast<int32_t>(page_k.size());
    if (r >= first_request) {
      std::vector<uint16_t> k(slot_size * static_cast<size_t>(last)), v(k.size());
      const kvarn_rows_out k_rows{k.data(), dtype, int64_t{last} * g, heads, int64_t{heads} * d, d},
          v_rows{v.data(), dtype, int64_t{last} * g, heads, int64_t{heads} * d, d};
      const int32_t history = last * g;
      const kvarn_batch one{1, pool.width, pool.width, pool.table.data() + r * pool.width, &history, nullptr};
      const kvarn_pages pages = pool.host();
      const kvarn_workspace space = pool.workspace();
      CHECK_KVARN(kvarn_expand(&layout, &pages, &one, &k_rows, &v_rows, &space, nullptr));
      for (size_t t = 0; t < static_cast<size_t>(last); ++t) {
        page_k.emplace_back(k.begin() + static_cast<int64_t>(t * slot_size),
                            k.begin() + static_cast<int64_t>((t + 1) * slot_size));
        page_v.emplace_back(v.begin() + static_cast<int64_t>(t * slot_size),
                            v.begin() + static_cast<int64_t>((t + 1) * slot_size));
      }
    }
    for (int32_t tile = first; tile <= last; ++tile) {
      const bool in_pages = format::raw_in_pages(layout, tile, length);
      const int32_t slot = in_pages ? -1 : raw_slot++;
      if (r < first_request) continue;
      const int32_t end = std::min(length, (tile + 1) * g);
      std::vector<uint16_t> k(slot_size, 0), v(slot_size, 0);
      for (int32_t o = 0; o < end - tile * g; ++o)
        for (int32_t h = 0; h < heads; ++h) {
          const uint16_t *from_k, *from_v;
          if (in_pages) {
            const format::RawPlace at = format::raw_place(layout, tile * g + o);
            const int64_t page = pool.table[static_cast<size_t>(r * pool.width + at.page)];
            const auto* region = reinterpret_cast<const uint16_t*>(pool.bytes.data() + page * layout.page_bytes +
                                                                   h * layout.record_bytes);
            from_k = region + format::raw_k_offset(layout, at.slot),
            from_v = region + format::raw_v_offset(layout, at.slot);
          } else {
            from_k = raw.data() + ((int64_t{slot} * heads + h) * 2 * g + o) * d, from_v = from_k + g * d;
          }
          for (int32_t i = 0; i < d; ++i) {
            k[static_cast<size_t>((o * heads + h) * d + i)] = to16(from_k[i], dtype);
            v[static_cast<size_t>((o * heads + h) * d + i)] = to16(from_v[i], dtype);
          }
        }
      Sequence s{row + std::max(start, tile * g) - start, end, {}};
      for (int32_t i = 0; i < tile; ++i) s.pages.push_back(base + i);
      s.pages.push_back(static_cast<int32_t>(page_k.size()));
      sequences.push_back(s);
      page_k.push_back(k), page_v.push_back(v);
    }
  }

  const auto needed = static_cast<int32_t>(page_k.size()), room = std::max(0, needed - missing);
  const auto rows = static_cast<int32_t>(cuda::most_tiles(layout, tokens, requests));
  const int32_t width = pool.width + 1;
  const Device<int32_t> out_table(std::vector<int32_t>(static_cast<size_t>(rows * width), -7)),
      out_lengths(std::vector<int32_t>(static_cast<size_t>(rows), -7)),
      out_starts(std::vector<int32_t>(static_cast<size_t>(rows) + 1, -7)), out_overflow(std::vector<int32_t>{-7});
  const size_t values = slot_size * static_cast<size_t>(room + 1);
  const Device<uint16_t> k(std::vector<uint16_t>(values, 0xa5a5)), v(std::vector<uint16_t>(values, 0xa5a5));
  const auto out_rows = [&](const Device<uint16_t>& x) {
    return kvarn_rows_out{x.data, dtype, int64_t{room} * g, heads, int64_t{heads} * d, d};
  };
  const kvarn_cuda_prefill prefill{first_request,    requests,        width, rows, out_table.data,
                                   out_lengths.data, out_starts.data, room,  out_overflow.data};
  CHECK_CUDA(cuda::prefill_pages(launch, prefill, out_rows(k), out_rows(v)));
  CHECK_CUDA(cudaDeviceSynchronize());

  const auto got_table = out_table.get(), got_lengths = out_lengths.get(), got_starts = out_starts.get();
  expect(out_overflow.get()[0] == needed - room, what + " overflow");
  expect(static_cast<int32_t>(sequences.size()) <= rows, what + " sequences");
  bool tables = true;
  for (int32_t e = 0; e <= rows; ++e) {
    const bool real = e < static_cast<int32_t>(sequences.size());
    const Sequence s = real ? sequences[static_cast<size_t>(e)] : Sequence{starts.back(), 0, {}};
    const bool fits = s.pages.empty() || s.pages.back() < room;
    tables = tables && got_starts[static_cast<size_t>(e)] == s.row;
    if (e < rows) tables = tables && got_lengths[static_cast<size_t>(e)] == (fits ? s.length : 0);
    for (int32_t i = 0; i < width && e < rows; ++i) {
      const bool named = i < static_cast<int32_t>(s.pages.size());
      const int32_t want = named ? std::min(s.pages[static_cast<size_t>(i)], std::max(room - 1, 0)) : -7;
      tables = tables && got_table[static_cast<size_t>(e * width + i)] == want;
    }
  }
  expect(tables, what + " tables");
  const auto got_k = k.get(), got_v = v.get();
  bool same_k = true, same_v = true;
  for (size_t p = 0; p <= static_cast<size_t>(room); ++p) {
    const std::vector<uint16_t> poison(slot_size, 0xa5a5);
    const bool real = p < static_cast<size_t>(room);
    same_k =
        same_k && std::memcmp(got_k.data() + p * slot_size, (real ? page_k[p] : poison).data(), 2 * slot_size) == 0;
    same_v =
        same_v && std::memcmp(got_v.data() + p * slot_size, (real ? page_v[p] : poison).data(), 2 * slot_size) == 0;
  }
  expect(same_k && same_v, what + " pages");
}

void check_prefills(const std::string& preset, int32_t head_dim, bool small) {
  Pool pool(preset, head_dim, 2, {130, 700, 300, 128, 520, 5, 64, 1000});
  const std::vector<bool> none(8, false), some{false, false, true, false, false, true, false, false};
  const std::string name = name_of(pool.layout) + " prefill ";
  check_prefill(pool, {1, 300, 300, 128, 2, 5, 60, 513}, none, 0, 0, KVARN_BFLOAT16, name + "all");
  if (small) return;
  check_prefill(pool, {1, 300, 300, 128, 2, 5, 60, 513}, none, 1, 0, KVARN_FLOAT16, name + "from 1");
  check_prefill(pool, {1, 1, 300, 128, 2, 5, 60, 1000}, some, 2, 0, KVARN_BFLOAT16, name + "with silent requests");
  check_prefill(pool, {1, 300, 300, 100, 2, 5, 60, 513}, none, 1, 9, KVARN_BFLOAT16, name + "short of 9 pages");
  check_prefill(pool, {1, 1, 1, 1, 1, 1, 1, 1}, none, 8, 0, KVARN_BFLOAT16, name + "nobody");
  for (int i = 0; i < 3; ++i) {
    std::vector<int32_t> queries;
    std::vector<bool> silent;
    for (int32_t length : pool.lengths) queries.push_back(1 + below(length)), silent.push_back(below(5) == 0);
    check_prefill(pool, queries, silent, below(4), below(3), i % 2 ? KVARN_FLOAT16 : KVARN_BFLOAT16,
                  name + "random " + std::to_string(i));
  }
}

// Microseconds per call, from a graph of `calls`.
double time_graph(int calls, const std::function<void(int, cudaStream_t)>& call) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < calls; ++i) call(i, stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  std::vector<float> times;
  for (int i = 0; i < 7; ++i) {
    CHECK_CUDA(cudaEventRecord(begin, stream));
    CHECK_CUDA(cudaGraphLaunch(replay, stream));
    CHECK_CUDA(cudaEventRecord(end, stream));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i > 1) times.push_back(ms * 1000 / static_cast<float>(calls));
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

double copy_bandwidth() {  // bytes per microsecond, read and written; not from a graph, whose copies are slower
  const size_t bytes = size_t{2} << 30;
  const Device<uint8_t> a(bytes), b(bytes);
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  CHECK_CUDA(cudaMemset(a.data, 0x5a, bytes));
  std::vector<float> times;
  for (int i = 0; i < 7; ++i) {
    CHECK_CUDA(cudaEventRecord(begin));
    CHECK_CUDA(cudaMemcpyAsync(b.data, a.data, bytes, cudaMemcpyDeviceToDevice));
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaEventSynchronize(end));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 1000);
  }
  std::sort(times.begin(), times.end());
  return 2.0 * static_cast<double>(bytes) / static_cast<double>(times[times.size() / 2]);
}

struct Timed {
  const char* preset;
  int32_t head_dim, heads, requests, length, queries;  // queries 0: expand, otherwise prefill_pages
  kvarn_dtype dtype;
};

void time_one(const Timed& t, double copy) {
  Pool seed(t.preset, t.head_dim, t.heads, {4 * 128});
  const kvarn_layout& layout = seed.layout;
  const int32_t g = layout.page_tokens, per = static_cast<int32_t>(format::pages_of(layout, t.length));
  const int64_t tiles = int64_t{t.requests} * (t.length / g), pages_of_set = int64_t{per} * t.requests;
  const int64_t query_tiles = t.queries / g * t.requests;
  const int64_t history = t.queries ? tiles - t.requests : tiles, raw = query_tiles;
  const int64_t tile_out = int64_t{2} * g * t.heads * t.head_dim * static_cast<int64_t>(size_of(t.dtype));
  const double bytes = static_cast<double>(history * layout.page_bytes + (history + raw) * tile_out +
                                           raw * t.heads * cuda::raw_tile_bytes(layout));
  const int sets = static_cast<int>(std::min<double>(8, std::max(1.0, 4e8 / bytes + 1)));
  Device<uint8_t> pages(static_cast<size_t>(sets * pages_of_set * layout.page_bytes));
  const uint8_t* packed = seed.bytes.data();
  for (int64_t p = 0; p < sets * pages_of_set; ++p) {
    const int64_t from = seed.table[static_cast<size_t>(p % 3)] * layout.page_bytes;
    CHECK_CUDA(cudaMemcpyAsync(pages.data + p * layout.page_bytes, packed + from,
                               static_cast<size_t>(layout.page_bytes), cudaMemcpyHostToDevice));
  }
  std::vector<int32_t> table, lengths(static_cast<size_t>(t.requests), t.length), starts{0};
  for (int64_t p = 0; p < sets * pages_of_set; ++p) table.push_back(static_cast<int32_t>(p));
  for (int s = 0; s < sets; ++s)
    std::shuffle(table.begin() + s * pages_of_set, table.begin() + (s + 1) * pages_of_set, rng);
  for (int32_t r = 0; r < t.requests; ++r) starts.push_back(starts.back() + t.queries);
  const Device<int32_t> entries(table), seq_lens(lengths), query_starts(starts);
  const int64_t out_tiles = history + raw;
  const Device<uint8_t> k(static_cast<size_t>(sets * out_tiles * tile_out / 2)), v(k.count);
  const auto rows = [&](const Device<uint8_t>& x, int s) {
    return kvarn_rows_out{x.data + s * out_tiles * tile_out / 2, t.dtype,   out_tiles * g, t.heads,
                          int64_t{t.heads} * t.head_dim,         t.head_dim};
  };
  const kvarn_pages pool{pages.data, sets * pages_of_set, layout.page_bytes};
  const auto batch = [&](int s) {
    return kvarn_batch{t.requests, per, per, entries.data + s * pages_of_set, seq_lens.data, query_starts.data};
  };
  const int calls = std::max(sets, static_cast<int>(4e9 / bytes) + 1);
  double us;
  if (t.queries == 0) {
    us = time_graph(std::min(calls, 200), [&](int i, cudaStream_t stream) {
      CHECK_CUDA(cuda::expand(layout, pool, batch(i % sets), rows(k, i % sets), rows(v, i % sets), stream));
    });
  } else {
    const int32_t tokens = starts.back(), width = t.length / g + 1;
    const kvarn_cuda_limits limits{tokens, t.requests, 0, 1 << 20, 8};
    const auto map = cuda::WorkspaceMap::make(layout, limits, 8);
    const Device<uint8_t> workspace(static_cast<size_t>(map.bytes));
    CHECK_CUDA(cudaMemset(workspace.data, 0, workspace.count));
    const auto sequences = static_cast<int32_t>(cuda::most_tiles(layout, tokens, t.requests));
    const Device<int32_t> out_table(static_cast<size_t>(sequences) * static_cast<size_t>(width)),
        out_lens(static_cast<size_t>(sequences)), out_starts(static_cast<size_t>(sequences) + 1), overflow(1);
    const kvarn_cuda_prefill prefill{0,
                                     t.requests,
                                     width,
                                     sequences,
                                     out_table.data,
                                     out_lens.data,
                                     out_starts.data,
                                     static_cast<int32_t>(out_tiles),
                                     overflow.data};
    const kvarn_cuda_step first{batch(0), nullptr, tokens, t.queries};
    CHECK_CUDA(cuda::plan({layout, pool, first, limits, workspace.data, map, 8, nullptr}, 0, 0));
    us = time_graph(std::min(calls, 200), [&](int i, cudaStream_t stream) {
      const kvarn_cuda_step step{batch(i % sets), nullptr, tokens, t.queries};
      const cuda::Launch launch{layout, pool, step, limits, workspace.data, map, 8, stream};
      CHECK_CUDA(cuda::prefill_pages(launch, prefill, rows(k, i % sets), rows(v, i % sets)));
    });
    if (overflow.get()[0] != 0) std::printf("overflow %d\n", overflow.get()[0]);
  }
  std::printf("%-16s D%-3d %-4s %4d x %6d %s%-5d %8.1f us %7.1f MB %5.2f TB/s %5.1f %%\n", t.preset, t.head_dim,
              t.dtype == KVARN_FLOAT32   ? "f32"
              : t.dtype == KVARN_FLOAT16 ? "f16"
                                         : "bf16",
              t.requests, t.length, t.queries ? "prefill " : "expand  ", t.queries, us, bytes / 1e6, bytes / us / 1e6,
              100 * bytes / us / copy);
}

void time_all(bool brief) {
  double copy = copy_bandwidth();
  std::printf("copy %.3f TB/s\n", copy / 1e6);
  std::vector<Timed> all{{"kvarn_k4v2_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16},
                         {"kvarn_k4v2_g128", 128, 8, 1, 131072, 0, KVARN_FLOAT16},
                         {"kvarn_k4v2_g128", 128, 8, 64, 2048, 0, KVARN_BFLOAT16},
                         {"kvarn_k4v2_g128", 128, 8, 2048, 128, 0, KVARN_BFLOAT16},
                         {"kvarn_k4v2_g128", 128, 8, 1, 32768, 0, KVARN_BFLOAT16},
                         {"kvarn_k4v2_g128", 128, 8, 1, 8192, 0, KVARN_BFLOAT16}};
  if (brief)
    all = {all[0],
           all[2],
           all[4],
           all[5],
           {"kvarn_k4v2_g128", 64, 8, 1, 131072, 0, KVARN_BFLOAT16},
           {"kvarn_k4v2_g128", 96, 8, 1, 131072, 0, KVARN_BFLOAT16},
           {"kvarn_k4v2_g128", 256, 8, 1, 65536, 0, KVARN_BFLOAT16},
           {"kvarn_k8v4_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16}};
  if (!brief)
    all.insert(all.end(), {{"kvarn_k4v2_g128", 128, 8, 1, 131072, 2048, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g128", 128, 8, 1, 32768, 8192, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g128", 128, 8, 8, 2048, 2048, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g128", 128, 8, 1, 65536, 0, KVARN_FLOAT32},
                           {"kvarn_k4v2_g128", 64, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g128", 96, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g128", 256, 8, 1, 65536, 0, KVARN_BFLOAT16},
                           {"kvarn_k4v3_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k4v4_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k2v2_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k8v4_g128", 128, 8, 1, 131072, 0, KVARN_BFLOAT16},
                           {"kvarn_k4v2_g64", 128, 8, 1, 131072, 0, KVARN_BFLOAT16}});
  for (const Timed& t : all) time_one(t, copy);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "time" || mode == "brief") {
    time_all(mode == "brief");
    return 0;
  }
  const bool small = mode == "small";
  for (const char* preset : {"kvarn_k4v2_g", "kvarn_k4v3_g", "kvarn_k4v4_g", "kvarn_k2v2_g", "kvarn_k8v4_g"})
    for (const int32_t g : {128, 64})
      for (const int32_t head_dim : {64, 96, 128, 256}) {
        if (small && (head_dim != 96 || g != 64) && head_dim != 128) continue;
        const std::string name = preset + std::to_string(g);
        Pool pool(name, head_dim, 3, {0, g - 1, 2 * g, 1, 3 * g + 5, g, 2 * g - 1});
        check_shape(pool, small);
        check_prefills(name, head_dim, small || head_dim > 128);
      }
  if (!small) check_limits(), check_large();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
