// SPDX-License-Identifier: Apache-2.0
// What the order of the codes costs a GPU kernel: the format's fragment order against "design A", the order made for
// one fp16 kernel (docs/fragment-order.md has both, and the results).
//
// One warp per k4v2_g128 record (D = 128) that lies in shared memory, one CTA per SM, compute only.
//   products  scores [128][8] = K codes * q and outputs [128][8] = V codes^T * p; q, p in registers
//   chain     q s_k folded per record; scores t_k, rounded to fp16 and transposed, times s_v, are p; outputs c_v: a
//             decode kernel without exponential, running maximum and zero terms, which are alike in every order
// Every variant is checked against double loops before it is timed; one JSON line each. Run by fragment_order.sh.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "fragment_order_data.hpp"
#include "fragment_order_design_a.cuh"
#include "fragment_order_ours.cuh"

static void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline constexpr int kIterations = 2000;  // of a timed launch: about 3 ms

template <class Operand>
struct Arguments {
  const uint8_t* records;  // [count][13824]
  int count, iterations;
  const Operand *q, *p;     // [8][128]
  float *scores, *outputs;  // [count][128][8], written by kDump only
  float* sums;              // [CTAs][threads][2]: of scores, of outputs, over all iterations
  long long* cycles;        // [CTAs]
};

template <class V, bool kChain, int kWarps, bool kDump>
__global__ __launch_bounds__(32 * kWarps, 1) void measure(const Arguments<typename V::Operand> a) {
  extern __shared__ __align__(16) uint8_t memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, index = (blockIdx.x * kWarps + warp) % a.count;
  uint8_t* record = memory + kRecordBytes * warp;
  for (int i = lane; i < kRecordBytes / 16; i += 32)
    reinterpret_cast<uint4*>(record)[i] = reinterpret_cast<const uint4*>(a.records + int64_t{kRecordBytes} * index)[i];

  constexpr bool kLimbs = std::is_same_v<typename V::Operand, int8_t>;
  uint32_t q[V::kOperands], p[V::kOperands];
  if constexpr (kChain)
    V::q_natural(lane, a.q + 128 * (lane >> 2), q);
  else
    V::q_operand(lane, a.q + 128 * (lane >> 2), q), V::p_operand(lane, a.p + 128 * (lane >> 2), p);

  float kept[8][4] = {}, score_sum[4] = {};
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < a.iterations; ++iteration) {
    asm volatile("" ::: "memory");  // the record might have changed
    float s[8][4] = {}, o[8][4] = {};
    if constexpr (kChain) {
      uint32_t folded[16], m[8][2];
      float factor[8][2];
      V::fold_q(record, lane, q, folded);
      V::scores(record, lane, folded, s);
      V::token_factors(record, lane, factor);
#pragma unroll
      for (int t = 0; t < 8; ++t)
        for (int h = 0; h < 2; ++h) {
          const float f = factor[t][h] * (V::kUnit * V::score_unit(t, h) * float(kChainUnit));
          for (int j = 0; j < 2; ++j) s[t][2 * h + j] *= f;
          m[t][h] = transpose(as_bits(__floats2half2_rn(s[t][2 * h], s[t][2 * h + 1])));
        }
      V::fold_p(record, lane, m, p);
    } else {
      V::scores(record, lane, q, s);
#pragma unroll
      for (int t = 0; t < 8; ++t)
        for (int j = 0; j < 4; j += kLimbs ? 2 : 1) {
          const float score = kLimbs ? fmaf(s[t][j], 256, s[t][j + 1]) : s[t][j];
          score_sum[j] = fmaf(score, V::score_unit(t, j / 2), score_sum[j]);
        }
    }
    V::outputs(record, lane, p, o);
    float factor[8][2];
    if constexpr (kChain) V::channel_factors(record, lane, factor);
#pragma unroll
    for (int t = 0; t < 8; ++t)
      for (int j = 0; j < 4; j += kLimbs ? 2 : 1) {
        if constexpr (kChain)
          kept[t][j] = fmaf(o[t][j], factor[t][j / 2], kept[t][j]);
        else
          kept[t][j] += kLimbs ? fmaf(o[t][j], 256, o[t][j + 1]) : o[t][j];
      }
    if constexpr (kDump)
      for (int t = 0; t < 8; ++t)
        for (int j = 0; j < 4; ++j) {
          const int column = 2 * (lane & 3) + j % 2, h = j / 2;
          a.scores[(128 * index + V::token(lane, t, h)) * kColumns + column] =
              s[t][j] * (kChain ? 1 : V::kUnit * V::score_unit(t, h));
          a.outputs[(128 * index + V::channel(lane, t, h)) * kColumns + column] =
              (kLimbs ? o[t][j] : kept[t][j]) * V::kOutputUnit * V::output_unit(t, h);
        }
  }
  __syncthreads();
  if (threadIdx.x == 0) a.cycles[blockIdx.x] = clock64() - start;

  float sums[2] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sums[0] += score_sum[j] * V::kUnit;
    for (int t = 0; t < 8; ++t) sums[1] += kept[t][j] * (V::kOutputUnit * V::output_unit(t, j / 2));
  }
  for (int i = 0; i < 2; ++i) a.sums[2 * (blockIdx.x * blockDim.x + threadIdx.x) + i] = sums[i];
}

// Everything the variants of one kind of operands share.
template <class Operand>
struct Case {
  std::vector<Answer> answers;
  Arguments<Operand> arguments;
  int ctas;
  bool timed;
};

template <class T>
T* device_copy(const std::vector<T>& from) {
  T* to;
  check(cudaMalloc(&to, from.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return to;
}

template <class T>
std::vector<T> host_copy(const T* from, size_t count) {
  std::vector<T> to(count);
  check(cudaMemcpy(to.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return to;
}

// The largest error over the root mean square of the answer; NaN where anything was not written.
static double worst_error(const std::vector<float>& got, const std::vector<Answer>& answers, Matrix Answer::* part) {
  double worst = 0, square = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double want = (answers[i / 1024].*part)[i % 1024], error = std::abs(got[i] - want);
    if (std::isnan(error)) return error;  // the poison: not written
    worst = std::max(worst, error);
    square += want * want;
  }
  return worst / std::sqrt(square / double(got.size()));
}

// Runs, checks and times one kernel; prints its line. The timed kernel is checked by its sums.
template <class V, bool kChain, int kWarps>
void time(const char* name, const Case<typename V::Operand>& c, double score_error, double output_error) {
  const auto kernel = measure<V, kChain, kWarps, false>;
  const int bytes = kWarps * kRecordBytes;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  Arguments<typename V::Operand> a = c.arguments;

  a.iterations = 3;
  check(cudaMemset(a.sums, 0xff, sizeof(float) * 2 * c.ctas * 32 * kWarps), "poison");
  kernel<<<c.ctas, 32 * kWarps, bytes>>>(a);
  check(cudaDeviceSynchronize(), name);
  const std::vector<float> sums = host_copy(a.sums, size_t(2) * c.ctas * 32 * kWarps);
  constexpr bool kLimbs = std::is_same_v<typename V::Operand, int8_t>;
  double got[2] = {}, want[2] = {}, size[2] = {};
  for (size_t i = 0; i < sums.size(); ++i) got[i % 2] += sums[i] / 3.;
  for (int w = 0; w < c.ctas * kWarps; ++w)
    for (int part = 0; part < 2; ++part) {
      const Answer& answer = c.answers[w % a.count];
      const Matrix& m = part ? answer.outputs : answer.scores;
      for (size_t i = 0; i < m.size(); ++i) {
        const double value = m[i] * (kLimbs && i % 2 == 0 ? 256 : 1);
        want[part] += value;
        size[part] += std::abs(value);
      }
    }
  for (int part = kChain; part < 2; ++part)
    if (!(std::abs(got[part] - want[part]) < 1e-3 * size[part])) {
      std::fprintf(stderr, "%s: timed kernel's sum %d is %g, not %g\n", name, part, got[part], want[part]);
      std::exit(1);
    }

  if (!c.timed) return;
  a.iterations = kIterations;
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "event");
  std::vector<double> cycles, megahertz;
  for (int run = 0; run < 9; ++run) {
    check(cudaEventRecord(events[0]), "event");
    kernel<<<c.ctas, 32 * kWarps, bytes>>>(a);
    check(cudaEventRecord(events[1]), "event");
    check(cudaDeviceSynchronize(), name);
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, events[0], events[1]), "event");
    std::vector<long long> per_cta = host_copy(a.cycles, c.ctas);
    std::sort(per_cta.begin(), per_cta.end());
    if (run < 2) continue;  // warm-up
    cycles.push_back(double(per_cta[c.ctas / 2]) / (double(kIterations) * kWarps));
    megahertz.push_back(double(per_cta[c.ctas / 2]) / milliseconds * 1e-3);
  }
  std::sort(cycles.begin(), cycles.end());
  std::sort(megahertz.begin(), megahertz.end());
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes");
  const char* symbol;
  check(cudaFuncGetName(&symbol, kernel), "name");
  std::printf(
      "{\"variant\": \"%s\", \"part\": \"%s\", \"warps\": %d, \"cycles_per_record\": %.1f, \"spread\": [%.1f, %.1f], "
      "\"sm_mhz\": %.0f, \"registers\": %d, \"stack_bytes\": %zu, \"score_error\": %.2g, \"output_error\": %.2g, "
      "\"bank_ways\": %d, \"symbol\": \"%s\"}\n",
      name, kChain ? "chain" : "products", kWarps, cycles[cycles.size() / 2], cycles.front(), cycles.back(),
      megahertz[megahertz.size() / 2], attributes.numRegs, attributes.localSizeBytes, score_error, output_error,
      bank_ways<V>(), symbol);
  std::fflush(stdout);
  usleep(20000);
}

template <class V, bool kChain = false>
void variant(const char* name, Case<typename V::Operand>& c, const uint8_t* records, double tolerance) {
  c.arguments.records = records;
  constexpr int kWarps = 8;
  const auto kernel = measure<V, kChain, kWarps, true>;
  const size_t values = size_t(c.arguments.count) * 1024;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWarps * kRecordBytes),
        "shared memory");
  check(cudaMemset(c.arguments.scores, 0xff, values * 4), "poison");
  check(cudaMemset(c.arguments.outputs, 0xff, values * 4), "poison");
  kernel<<<c.ctas, 32 * kWarps, kWarps * kRecordBytes>>>(c.arguments);
  check(cudaDeviceSynchronize(), name);
  const double scores = worst_error(host_copy(c.arguments.scores, values), c.answers, &Answer::scores);
  const double outputs = worst_error(host_copy(c.arguments.outputs, values), c.answers, &Answer::outputs);
  if (!(scores <= tolerance && outputs <= tolerance)) {
    std::fprintf(stderr, "%s: errors %g of scores, %g of outputs; allowed: %g\n", name, scores, outputs, tolerance);
    std::exit(1);
  }
  time<V, kChain, 8>(name, c, scores, outputs);
  time<V, kChain, 12>(name, c, scores, outputs);
}

// With any argument it only checks: what a profiler should look at.
int main(int argument_count, char**) {
  const bool timed = argument_count == 1;
  int ctas;
  check(cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, 0), "device");
  const int count = 8 * ctas;
  std::mt19937 random(std::random_device{}());
  std::vector<Tile> tiles(count);
  for (Tile& tile : tiles) tile = random_tile(random);
  const auto records = [&](auto pack, bool variation) {
    std::vector<uint8_t> all(size_t(count) * kRecordBytes);
    for (int i = 0; i < count; ++i) pack(tiles[i], variation, &all[size_t(i) * kRecordBytes]);
    return device_copy(all);
  };
  const uint8_t *ours = records(pack_ours, false), *in_order = records(pack_ours, true);
  const uint8_t *design_a = records(pack_design_a, false), *natural = records(pack_design_a, true);
  // Sixteenths, so that design A's differences are exact in fp16 too and the products must agree to fp32 rounding.
  Matrix q(1024), p(1024), q8(1024), p8(1024);
  std::vector<half> q_half(1024), p_half(1024);
  std::vector<int8_t> q_byte(1024), p_byte(1024);
  for (int i = 0; i < 1024; ++i) {
    q_half[i] = __float2half_rn(float(q[i] = (int(random() % 65) - 32) / 16.));
    p_half[i] = __float2half_rn(float(p[i] = (random() % 17) / 16.));
    q8[i] = q_byte[i] = int8_t(int(random() % 255) - 127);
    p8[i] = p_byte[i] = int8_t(int(random() % 255) - 127);
  }
  const auto answers = [&](const Matrix& q, const Matrix& p, bool chain) {
    std::vector<Answer> all;
    for (const Tile& tile : tiles) all.push_back(answer(tile, q, p, chain));
    return all;
  };
  float *scores, *outputs, *sums;
  long long* cycles;
  check(cudaMalloc(&scores, size_t(count) * 4096), "cudaMalloc");
  check(cudaMalloc(&outputs, size_t(count) * 4096), "cudaMalloc");
  check(cudaMalloc(&sums, size_t(ctas) * 1024 * 8), "cudaMalloc");
  check(cudaMalloc(&cycles, size_t(ctas) * 8), "cudaMalloc");
  const half *q16 = device_copy(q_half), *p16 = device_copy(p_half);
  const int8_t *q_limbs = device_copy(q_byte), *p_limbs = device_copy(p_byte);

  Case<half> fp16{answers(q, p, false), {design_a, count, 1, q16, p16, scores, outputs, sums, cycles}, ctas, timed};
  variant<DesignA<false>>("design A", fp16, design_a, 1e-5);
  variant<Ours<true, true, true>>("fragment order", fp16, ours, 1e-5);
  variant<Ours<true, true, false>>("fragment order, 4 + 4 tiles", fp16, ours, 1e-5);
  variant<Ours<false, true, true>>("fragment order, plain masks", fp16, ours, 1e-5);
  variant<Ours<true, false, true>>("fragment order, bytes 0 1 2 3", fp16, in_order, 1e-5);

  fp16.answers = answers(q, p, true);
  variant<DesignA<false>, true>("design A", fp16, design_a, 1e-2);
  variant<DesignA<true>, true>("design A, natural vectors", fp16, natural, 1e-2);
  variant<Ours<true, true, true>, true>("fragment order", fp16, ours, 1e-2);
  variant<Ours<true, true, false>, true>("fragment order, 4 + 4 tiles", fp16, ours, 1e-2);
  variant<Ours<false, true, true>, true>("fragment order, plain masks", fp16, ours, 1e-2);
  variant<Ours<true, false, true>, true>("fragment order, bytes 0 1 2 3", fp16, in_order, 1e-2);

  Case<int8_t> int8{
      answers(q8, p8, false), {in_order, count, 1, q_limbs, p_limbs, scores, outputs, sums, cycles}, ctas, timed};
  variant<OursInt8>("fragment order, int8", int8, in_order, 0);
  int8.answers = answers(effective(q8, 2, 2, 4), effective(p8, 4, 1, 2), false);
  variant<DesignAInt8>("design A, int8", int8, design_a, 0);
}
