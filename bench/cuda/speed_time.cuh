// SPDX-License-Identifier: Apache-2.0
// Time on a GPU: graphs of many launches, the copy bandwidth as the yardstick, the clock under load.
#pragma once

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvarn/cuda.h"

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);  // after a fault on the device nothing else can be trusted
}
inline void check(kvarn_status status, const char* what) {
  if (status != KVARN_OK) throw std::runtime_error(std::string(what) + ": " + kvarn_last_error());
}

// Device memory that ends with its scope.
template <class T>
class Device {
 public:
  explicit Device(size_t count, int poison = 0xff) : count_(count) {
    check(cudaMalloc(&data_, bytes()), "cudaMalloc");
    fill(poison);
  }
  explicit Device(const std::vector<T>& from) : Device(from.size()) {
    check(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* data() const { return data_; }
  size_t bytes() const { return std::max<size_t>(count_, 1) * sizeof(T); }
  void fill(int byte) { check(cudaMemset(data_, byte, bytes()), "cudaMemset"); }
  std::vector<T> host() const {
    std::vector<T> to(count_);
    check(cudaMemcpy(to.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

struct Timing {
  double us, low, high;  // of one launch: median, fastest and slowest replay
  double sm_mhz;         // right behind the last replay
};

__global__ void measure_clock(double* megahertz) {
  long long begin, end;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin)::"memory");
  const long long start = clock64();
  while (clock64() - start < 400000) {
  }
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end)::"memory");
  *megahertz = static_cast<double>(clock64() - start) * 1e3 / static_cast<double>(end - begin);
}

// A launch's share of the time of a graph of `launches` calls launch(stream, 0), launch(stream, 1), ..: the median of
// `replays`, the first `skipped` left out. The caller rotates over memory that is several times the L2 cache.
inline Timing time_graph(int launches, const std::function<void(cudaStream_t, int)>& launch, int replays = 12,
                         int skipped = 3) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  cudaGraph_t graph;
  try {
    for (int i = 0; i < launches; ++i) launch(stream, i);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t executable;
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");

  std::vector<cudaEvent_t> events(static_cast<size_t>(replays) + 1);
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "event");
  Device<double> megahertz(1);
  check(cudaEventRecord(events[0], stream), "event");
  for (int i = 0; i < replays; ++i) {
    check(cudaGraphLaunch(executable, stream), "graph");
    check(cudaEventRecord(events[static_cast<size_t>(i) + 1], stream), "event");
  }
  measure_clock<<<1, 1, 0, stream>>>(megahertz.data());
  check(cudaStreamSynchronize(stream), "replay");

  std::vector<double> us;
  for (int i = skipped; i < replays; ++i) {
    float milliseconds;
    const auto at = static_cast<size_t>(i);
    check(cudaEventElapsedTime(&milliseconds, events[at], events[at + 1]), "event");
    us.push_back(1e3 * milliseconds / launches);
  }
  std::sort(us.begin(), us.end());
  const Timing timing{us[us.size() / 2], us.front(), us.back(), megahertz.host()[0]};
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  usleep(60000);  // a hot chip lowers its clock: every variant starts rested
  return timing;
}

// Every CTA copies 64 KB with four loads in flight per thread.
__global__ void copy_kernel(uint4* to, const uint4* from) {
  const size_t base = size_t{blockIdx.x} * 4096 + threadIdx.x;
  for (int i = 0; i < 4; ++i) {
    uint4 values[4];
    for (int j = 0; j < 4; ++j) values[j] = from[base + (4 * i + j) * 256];
    for (int j = 0; j < 4; ++j) to[base + (4 * i + j) * 256] = values[j];
  }
}

// Every CTA reads 64 KB, as a linear layer reads its weights: nothing of before stays in the caches.
__global__ void read_kernel(const uint4* from, uint32_t* never) {
  const size_t base = size_t{blockIdx.x} * 4096 + threadIdx.x;
  uint32_t sum = 0;
#pragma unroll 8
  for (int i = 0; i < 16; ++i) {
    const uint4 x = from[base + i * 256];
    sum |= x.x | x.y | x.z | x.w;
  }
  if (sum == 0x12345678 && never != nullptr) *never = sum;
}

// Bytes read plus bytes written per second of copying: the better of the driver's copy and a plain kernel, since the
// driver's depends on how far apart source and target lie.
inline double copy_bandwidth(uint8_t* memory, size_t bytes) {
  const size_t block = size_t{64} << 10, count = std::min<size_t>(bytes / 2, size_t{4} << 30) / block,
               size = count * block;
  double best = 0;
  const auto measure = [&](const char* name, const std::function<void(cudaStream_t, int)>& copy) {
    const double rate = 2e6 * static_cast<double>(size) / time_graph(1, copy).us;
    std::fprintf(stderr, "copy, %s: %.3f TB/s\n", name, rate * 1e-12);
    best = std::max(best, rate);
  };
  measure("driver", [&](cudaStream_t stream, int) {
    check(cudaMemcpyAsync(memory + size, memory, size, cudaMemcpyDeviceToDevice, stream), "copy");
  });
  measure("kernel", [&](cudaStream_t stream, int) {
    copy_kernel<<<static_cast<unsigned>(count), 256, 0, stream>>>(reinterpret_cast<uint4*>(memory + size),
                                                                  reinterpret_cast<const uint4*>(memory));
  });
  return best;
}
