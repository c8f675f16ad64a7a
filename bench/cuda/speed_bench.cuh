// SPDX-License-Identifier: Apache-2.0
// What every benchmark of speed.cu shares: the run's settings, workspaces and rows, comparing, one JSON line a result.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstring>

#include "format/float16.hpp"
#include "speed_reference.cuh"

struct Bench {
  uint8_t* pool = nullptr;
  size_t pool_bytes = 0;
  double copy = 0;  // bytes per second
  std::string device;
  std::vector<std::string> only;  // run what has all of these in its label
  bool timed = true;
  int failures = 0, selected = 0;

  // Runs body unless it is not selected. Wrong answers and refused calls are reported, and counted.
  void run(const std::string& label, const std::function<void()>& body) {
    for (const std::string& part : only)
      if (label.find(part) == std::string::npos) return;
    ++selected;
    try {
      body();
      if (!timed) std::fprintf(stderr, "right: %s\n", label.c_str());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "FAILED %s: %s\n", label.c_str(), error.what());
      ++failures;
    }
  }

  void report(const char* bench, const char* preset, const std::string& shape, int rows, const char* tail,
              const Timing& t, int64_t bytes, double error) const {
    const double rate = static_cast<double>(bytes) / t.us * 1e6;
    std::printf(
        "{\"device\": \"%s\", \"sm_mhz\": %.0f, \"bench\": \"%s\", \"preset\": \"%s\", \"shape\": \"%s\", \"rows\": "
        "%d, \"tail\": \"%s\", \"us\": %.2f, \"spread\": [%.2f, %.2f], \"bytes\": %lld, \"copy_tbps\": %.3f, "
        "\"percent_of_copy\": %.1f, \"relative_error\": %.2g}\n",
        device.c_str(), t.sm_mhz, bench, preset, shape.c_str(), rows, tail, t.us, t.low, t.high,
        static_cast<long long>(bytes), copy * 1e-12, 100 * rate / copy, error);
    std::fflush(stdout);
  }
};

inline kvarn_layout layout_of(const Shape& shape) {
  kvarn_layout layout;
  check(kvarn_layout_init(shape.preset, shape.head_dim, shape.kv_heads, &layout), "layout");
  return layout;
}

class Workspace {
 public:
  Workspace(const kvarn_layout& layout, int32_t tokens, int32_t requests, int32_t query_heads, int32_t max_seq_len)
      : limits_{tokens, requests, query_heads, max_seq_len, 0}, memory_(bytes(layout, limits_), 0) {}
  operator kvarn_cuda_workspace() const { return {memory_.data(), static_cast<int64_t>(memory_.bytes()), limits_}; }

 private:
  static size_t bytes(const kvarn_layout& layout, const kvarn_cuda_limits& limits) {
    int64_t size = 0;
    check(kvarn_cuda_workspace_bytes(&layout, &limits, &size), "workspace");
    return static_cast<size_t>(size);
  }
  kvarn_cuda_limits limits_;
  Device<uint8_t> memory_;
};

// [tokens][heads][head_dim] of 16-bit floats.
class Rows {
 public:
  Rows(int64_t tokens, int64_t heads, int64_t head_dim, kvarn_dtype dtype)
      : memory_(static_cast<size_t>(tokens * heads * head_dim)),
        rows_{memory_.data(), dtype, tokens, heads, heads * head_dim, head_dim} {}
  Rows(int64_t tokens, int64_t heads, int64_t head_dim, kvarn_dtype dtype, uint64_t seed)
      : Rows(tokens, heads, head_dim, dtype) {
    fill_normal<<<2048, 256>>>(rows_.data, tokens * heads * head_dim, dtype, seed);
    check(cudaDeviceSynchronize(), "fill");
  }
  kvarn_rows in() const {
    return {rows_.data, rows_.dtype, rows_.tokens, rows_.heads, rows_.token_stride, rows_.head_stride};
  }
  const kvarn_rows_out& out() const { return rows_; }
  void poison() { memory_.fill(0xff); }
  std::vector<uint16_t> host() const { return memory_.host(); }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(memory_.data());
  }

 private:
  Device<uint16_t> memory_;
  kvarn_rows_out rows_;
};

// Relative L2 distance; NaN where anything was not written.
inline double relative_error(const std::vector<uint16_t>& got, kvarn_dtype dtype, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const float value =
        dtype == KVARN_FLOAT16 ? kvarn::format::f16_to_float(got[i]) : kvarn::format::bf16_to_float(got[i]);
    difference += (value - want[i]) * (value - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

// Launches for a graph of about 3 ms.
inline int launches_for(int64_t bytes) {
  return static_cast<int>(std::clamp(3000 / (static_cast<double>(bytes) / 3.5e6 + 5), 8., 200.));
}
