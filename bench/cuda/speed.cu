// SPDX-License-Identifier: Apache-2.0
// The speed of the CUDA verbs. Every configuration is checked first, attend against float64 over the same pages, expand
// and append bit for bit, and is not timed if it is wrong; what the timed graph left behind is checked again.
//
//   speed [--check] [--pool GB] [word ..]     all, or those whose label (see the calls below) holds every word
//
// One JSON line a result: microseconds of a launch inside a CUDA graph over rotating page pools, the bytes it has to
// move, and its share of the copy bandwidth that this process measured. gpu.sh builds and runs it.
#include "speed_append.cuh"
#include "speed_attend.cuh"
#include "speed_expand.cuh"

namespace speed {

void run_all(Bench& bench) {
  constexpr const char* kPreset = "kvarn_k4v2_g128";
  std::vector<Shape> shapes;
  for (auto [requests, tokens] :
       {std::pair{32, 8192}, {32, 16384}, {16, 131072}, {8, 32768}, {1, 131072}, {1, 32768}, {1, 8192}, {128, 2048}})
    shapes.push_back({kPreset, 128, 32, 8, requests, tokens});
  shapes.push_back({kPreset, 128, 32, 4, 32, 16384});
  for (Shape s : shapes) {
    attend(bench, s);
    s.tail = false;
    attend(bench, s);
  }
  for (const Shape& s : {Shape{kPreset, 128, 32, 8, 32, 32768, 1024},
                         {kPreset, 128, 32, 8, 64, 16384, 256},
                         {kPreset, 128, 32, 8, 256, 4096, 128},
                         {kPreset, 128, 32, 8, 64, 2112, 1985},
                         {kPreset, 128, 32, 8, 32, 16384, 15500}}) {
    attend(bench, s);
    plan(bench, s);
  }
  for (const Shape& s : shapes) plan(bench, s);
  for (int heads : {8, 16, 64}) attend(bench, {kPreset, 128, heads, 8, 32, 16384});
  for (int heads : {32, 64}) {
    for (const char* preset : {"kvarn_k3v3_g128", "kvarn_k4v3_g128", "kvarn_k2v2_g128", "kvarn_k4v4_g128",
                               "kvarn_k8v4_g128", "kvarn_k4v2_g64"})
      attend(bench, {preset, 128, heads, 8, 32, 16384});
    for (int head_dim : {64, 96, 256}) attend(bench, {kPreset, head_dim, heads, 8, 32, 16384});
  }
  attend(bench, {kPreset, 128, 32, 8, 32, 16384}, KVARN_BFLOAT16);
  for (int rows : {2, 3, 4, 5, 8})
    for (auto [requests, tokens] : {std::pair{32, 8192}, {8, 32768}})
      attend(bench, {kPreset, 128, 32, 8, requests, tokens, 0, rows});
  sustained(bench, {kPreset, 128, 32, 8, 32, 16384});
  for (const Shape& s : shapes)
    if (s.kv_heads == 8 && s.requests != 16) {
      decode_step(bench, s);
      decode_step(bench, s, 386 * 1000 * 1000);  // a layer of Qwen3-8B in bf16
    }
  for (auto [requests, tokens] : {std::pair{32, 8192}, {1, 131072}, {1, 8192}})
    expand(bench, {kPreset, 128, 32, 8, requests, tokens, 0, 1, false});
  prefill(bench, {kPreset, 128, 32, 8, 1, 131072, 0, 2048});
  for (const AppendCase& c : append_cases()) append(bench, kPreset, 128, 8, c);
}

}  // namespace speed

int main(int argument_count, char** arguments) {
  Bench bench;
  double gigabytes = 8;
  for (int i = 1; i < argument_count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--check")
      bench.timed = false;
    else if (argument == "--pool" && i + 1 < argument_count)
      gigabytes = std::atof(arguments[++i]);
    else
      bench.only.push_back(argument);
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device");
  bench.device = properties.name;
  bench.pool_bytes = static_cast<size_t>(gigabytes * 1e9);
  const Device<uint8_t> pool(bench.pool_bytes);
  bench.pool = pool.data();
  bench.copy = copy_bandwidth(pool.data(), bench.pool_bytes);
  if (kvarn_cuda_available() == 0) {
    std::fprintf(stderr, "%s\n", kvarn_last_error());
    return 1;
  }
  speed::run_all(bench);
  if (bench.selected == 0) std::fprintf(stderr, "no benchmark has this label\n");
  return bench.failures > 0 ? 1 : 0;
}
