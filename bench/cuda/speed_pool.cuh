// SPDX-License-Identifier: Apache-2.0
// What the benchmarks read: shapes, lengths, and page pools full of random records and random raw tails.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>

#include "format/fragment.hpp"
#include "format/raw.hpp"
#include "speed_time.cuh"

struct Shape {
  const char* preset;
  int head_dim, query_heads, kv_heads, requests, tokens;
  int least = 0;  // 0: every request has about `tokens`; else ragged, log-uniform from `least` to `tokens`
  int rows = 1;   // of each request in this step
  bool tail = true;

  std::string name() const {
    const std::string range = least > 0 ? std::to_string(least) + "-" : "";
    return std::to_string(requests) + "x" + range + std::to_string(tokens) + " " + std::to_string(query_heads) + "/" +
           std::to_string(kv_heads) + " D" + std::to_string(head_dim);
  }
  // Lengths are a Weyl sequence, so that rivals.py has the same. With a tail the own tile holds 1 to G-1 raw tokens, at
  // random; without, one, after `tokens` packed ones. No tile completes: append's benchmark has that.
  std::vector<int32_t> lengths(int page_tokens) const {
    std::vector<int32_t> all;
    for (int r = 0; r < requests; ++r) {
      const double random = 0.6180339887498949 * (r + 1) - static_cast<int>(0.6180339887498949 * (r + 1));
      int length = tokens + 1;
      if (least > 0)
        length = static_cast<int>(least * std::pow(static_cast<double>(tokens) / least, random));
      else if (tail)
        length = tokens - page_tokens + 1 + static_cast<int>(random * (page_tokens - 1));
      all.push_back(length % page_tokens == 0 ? length + 1 : length);
    }
    return all;
  }
};

__host__ __device__ inline uint32_t hash(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
  return static_cast<uint32_t>(x >> 32);
}
__device__ inline float normal(uint64_t index) {
  const float u = (static_cast<float>(hash(2 * index)) + 1) * 0x1p-32f, angle = static_cast<float>(hash(2 * index + 1));
  return sqrtf(-2 * logf(fminf(u, 1))) * cospif(angle * 0x1p-31f);
}

__global__ void fill_normal(void* data, int64_t count, kvarn_dtype dtype, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const float value = normal((seed << 40) + static_cast<uint64_t>(i));
    if (dtype == KVARN_FLOAT32)
      static_cast<float*>(data)[i] = value;
    else if (dtype == KVARN_FLOAT16)
      static_cast<__half*>(data)[i] = __float2half_rn(value);
    else
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

// Records as a normal cache has them: random codes, steps that make K^ and V^ of about unit variance, zeros that leave
// every channel an offset of its own, factors of 0.8 to 1.2.
__global__ void fill_records(uint32_t* data, int64_t words, kvarn_layout l, uint64_t seed) {
  const auto within = [](int64_t at, int64_t start, int64_t bytes) { return at >= start && at < start + bytes; };
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = 4 * i % l.record_bytes;
    const uint32_t random = hash((seed << 44) + static_cast<uint64_t>(i));
    const bool codes = at < l.k_scale || within(at, l.v_codes, l.v_channel - l.v_codes);
    if (codes) {
      data[i] = random;
      continue;
    }
    const float bits = static_cast<float>(1 << (at < l.v_codes ? l.k_bits : l.v_bits));
    const float step = sqrtf(12 / (bits * bits - 1));
    const bool scale = within(at, l.k_scale, 2 * l.head_dim) || within(at, l.v_scale, 2 * l.page_tokens);
    const bool zero = within(at, l.k_zero, 2 * l.head_dim) || within(at, l.v_zero, 2 * l.page_tokens);
    const float factor = scale ? step : zero ? -step * (bits - 1) / 2 : 1;
    const float width = scale ? 0.8f : 0.4f;
    const auto value = [&](uint32_t u) { return factor * (1 - width / 2 + width * static_cast<float>(u) * 0x1p-16f); };
    const __half2 pair = __floats2half2_rn(value(random & 0xffff), value(random >> 16));
    data[i] = reinterpret_cast<const uint32_t&>(pair);
  }
}

// The raw tokens that a step with `rows` rows reads; the rest of their rooms is NaN. CTA: (request, KV head).
__global__ void fill_raw(uint8_t* data, kvarn_layout l, kvarn_batch batch, int rows, uint64_t seed) {
  const int32_t length = batch.seq_lens[blockIdx.x], head = static_cast<int32_t>(blockIdx.y), threads = blockDim.x;
  const int32_t first_tile = (length - rows) / l.page_tokens, end_page = (length - 1) / l.page_tokens + l.pages_ahead;
  const int32_t* table = batch.block_table + blockIdx.x * batch.table_stride;
  const auto room = [&](int32_t page) {
    return reinterpret_cast<uint16_t*>(data + table[page] * l.page_bytes + head * l.record_bytes);
  };
  for (int32_t page = first_tile + 1; page <= end_page; ++page)
    for (int64_t i = threadIdx.x; i < l.record_bytes / 2; i += threads) room(page)[i] = 0xffff;
  __syncthreads();
  const int32_t start = first_tile * l.page_tokens;
  for (int32_t i = threadIdx.x; i < (length - start) * l.head_dim; i += threads) {
    const int32_t position = start + i / l.head_dim, d = i % l.head_dim;
    const kvarn::format::RawPlace place = kvarn::format::raw_place(l, position);
    const uint64_t index = (((seed + blockIdx.x) * 64 + blockIdx.y) << 32) + 2 * static_cast<uint64_t>(i);
    room(place.page)[kvarn::format::raw_k_offset(l, place.slot) + d] = __half_as_ushort(__float2half_rn(normal(index)));
    room(place.page)[kvarn::format::raw_v_offset(l, place.slot) + d] =
        __half_as_ushort(__float2half_rn(normal(index + 1)));
  }
}

// The step of a shape on the device, and as many pools of the same requests ("layers") as fit `memory`: they share
// lengths and block table, a random permutation of their pages.
class Step {
 public:
  Step(const kvarn_layout& layout, std::vector<int32_t> sequence_lengths, int rows, uint8_t* memory, size_t bytes,
       int most_layers)
      : layout_(layout),
        lengths_(std::move(sequence_lengths)),
        rows_(rows),
        memory_(memory),
        pages_(std::accumulate(lengths_.begin(), lengths_.end(), int64_t{0},
                               [&](int64_t sum, int32_t l) { return sum + kvarn::format::pages_of(layout, l); })),
        layers_(static_cast<int>(std::min<int64_t>(most_layers, static_cast<int64_t>(bytes) / layer_bytes()))),
        width_(static_cast<int32_t>(kvarn::format::pages_of(layout, max_length()))),
        table_(make_table()),
        seq_lens_(lengths_),
        query_starts_(make_starts()) {
    if (layers_ < 1) throw std::runtime_error("the pool is too small for this shape");
  }

  int32_t requests() const { return static_cast<int32_t>(lengths_.size()); }
  int32_t tokens() const { return requests() * rows_; }
  int rows() const { return rows_; }
  int layers() const { return layers_; }
  int64_t layer_bytes() const { return pages_ * layout_.page_bytes; }
  int32_t max_length() const { return *std::max_element(lengths_.begin(), lengths_.end()); }
  const std::vector<int32_t>& lengths() const { return lengths_; }
  const kvarn_layout& layout() const { return layout_; }
  kvarn_pages pages(int layer) const { return {memory_ + layer % layers_ * layer_bytes(), pages_, layout_.page_bytes}; }
  kvarn_batch batch() const {
    return {requests(), width_, width_, table_.data(), seq_lens_.data(), query_starts_.data()};
  }
  kvarn_cuda_step step() const { return {batch(), nullptr, tokens(), rows_, 0}; }

  void fill(uint64_t seed) const {
    for (int layer = 0; layer < layers_; ++layer) {
      uint8_t* data = pages(layer).data;
      fill_records<<<4096, 256>>>(reinterpret_cast<uint32_t*>(data), layer_bytes() / 4, layout_, seed + layer);
      fill_raw<<<dim3(requests(), layout_.kv_heads), 256>>>(data, layout_, batch(), rows_, (seed + layer) << 16);
    }
    check(cudaGetLastError(), "fill");
    check(cudaDeviceSynchronize(), "fill");
  }

  // Packed and raw bytes that attention has to read; verification reads every packed tile once.
  int64_t attended_bytes() const {
    int64_t records = 0, raw_tokens = 0;
    for (int32_t length : lengths_) {
      records += (length - 1) / layout_.page_tokens;
      raw_tokens += length - (length - rows_) / layout_.page_tokens * layout_.page_tokens;
    }
    return layout_.kv_heads * (records * layout_.record_bytes + raw_tokens * 4 * layout_.head_dim);
  }

 private:
  std::vector<int32_t> make_table() const {
    std::vector<int32_t> order(static_cast<size_t>(pages_)), table(lengths_.size() * static_cast<size_t>(width_), -1);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    auto next = order.begin();
    for (size_t r = 0; r < lengths_.size(); ++r) {
      const int64_t count = kvarn::format::pages_of(layout_, lengths_[r]);
      std::copy(next, next + count, table.begin() + static_cast<int64_t>(r) * width_);
      next += count;
    }
    return table;
  }
  std::vector<int32_t> make_starts() const {
    std::vector<int32_t> starts;
    for (int32_t r = 0; r <= requests(); ++r) starts.push_back(r * rows_);
    return starts;
  }

  kvarn_layout layout_;
  std::vector<int32_t> lengths_;
  int rows_;
  uint8_t* memory_;
  int64_t pages_;
  int layers_;
  int32_t width_;
  Device<int32_t> table_, seq_lens_, query_starts_;
};
