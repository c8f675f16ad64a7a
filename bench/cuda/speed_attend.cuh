// SPDX-License-Identifier: Apache-2.0
// attend, alone, sustained, in a decode step and in one with a model's weights, and the plan. Answers are compared with
// float64 over the same pages.
#pragma once

#include "speed_bench.cuh"

namespace speed {

template <class T>
double error_of(const Step& step, int layer, const Rows& q, const Rows& out, int query_heads, float scale) {
  const kvarn_dtype dtype = out.out().dtype;
  const double error = relative_error(out.host(), dtype, reference::attend(step, layer, q.as<T>(), query_heads, scale));
  if (!(error <= (dtype == KVARN_FLOAT16 ? 2e-3 : 6e-3)))
    throw std::runtime_error("relative error " + std::to_string(error));
  return error;
}

// Everything of one layer's attention.
struct Attention {
  kvarn_layout layout;
  Step step;
  Workspace memory;
  kvarn_cuda_workspace workspace;
  kvarn_cuda_step device_step;
  Rows q, out;
  kvarn_rows q_rows;
  kvarn_cuda_attention options;
  int query_heads;

  Attention(const Bench& bench, const Shape& s, kvarn_dtype dtype, int most_layers = 200)
      : layout(layout_of(s)),
        step(layout, s.lengths(layout.page_tokens), s.rows, bench.pool, bench.pool_bytes, most_layers),
        memory(layout, step.tokens(), step.requests(), s.query_heads, step.max_length()),
        workspace(memory),
        device_step(step.step()),
        q(step.tokens(), s.query_heads, s.head_dim, dtype, 5),
        out(step.tokens(), s.query_heads, s.head_dim, dtype),
        q_rows(q.in()),
        options{1 / std::sqrt(static_cast<float>(s.head_dim)), 0, 0, nullptr, nullptr},
        query_heads(s.query_heads) {
    device_step.defer = 1;
    step.fill(1);
  }
  void plan(cudaStream_t stream) const {
    check(kvarn_cuda_plan(&layout, &device_step, query_heads, 0, &workspace, stream), "plan");
  }
  void attend(cudaStream_t stream, int layer) const {
    const kvarn_pages pages = step.pages(layer);
    check(kvarn_cuda_attend(&layout, &pages, &device_step, &q_rows, &out.out(), &options, &workspace, stream),
          "attend");
  }
  double error(int layer) const {
    return q_rows.dtype == KVARN_FLOAT16 ? error_of<__half>(step, layer, q, out, query_heads, options.scale)
                                         : error_of<__nv_bfloat16>(step, layer, q, out, query_heads, options.scale);
  }
};

inline void attend(Bench& bench, const Shape& s, kvarn_dtype dtype = KVARN_FLOAT16) {
  const std::string label = std::string("attend ") + s.preset + " " + s.name() + (s.tail ? "" : " no tail") + " rows " +
                            std::to_string(s.rows) + (dtype == KVARN_BFLOAT16 ? " bf16" : "");
  bench.run(label, [&] {
    Attention a(bench, s, dtype);
    a.plan(nullptr);
    check(cudaDeviceSynchronize(), "plan");
    a.attend(nullptr, 0);
    check(cudaDeviceSynchronize(), "attend");
    const double error = a.error(0);
    if (!bench.timed) return;

    const int64_t bytes = a.step.attended_bytes();
    const int launches = launches_for(bytes), last = (launches - 1) % a.step.layers();
    a.out.poison();
    const Timing timing = time_graph(launches, [&](cudaStream_t stream, int i) { a.attend(stream, i); });
    const std::vector<uint16_t> timed = a.out.host();
    const double timed_error = a.error(last);
    a.out.poison();
    a.attend(nullptr, last);
    check(cudaDeviceSynchronize(), "attend");
    if (a.out.host() != timed) throw std::runtime_error("the timed graph's bits are not those of a lone launch");
    bench.report(dtype == KVARN_BFLOAT16 ? "attend bf16" : "attend", s.preset, s.name(), s.rows,
                 s.tail ? "random" : "1 token", timing, bytes, std::max(error, timed_error));
  });
}

// A second of back-to-back launches: what power and heat leave.
inline void sustained(Bench& bench, const Shape& s) {
  bench.run(std::string("sustained ") + s.preset + " " + s.name(), [&] {
    Attention a(bench, s, KVARN_FLOAT16);
    a.plan(nullptr);
    check(cudaDeviceSynchronize(), "plan");
    a.attend(nullptr, 0);
    check(cudaDeviceSynchronize(), "attend");
    const double error = a.error(0);
    if (!bench.timed) return;
    const int launches = launches_for(a.step.attended_bytes());
    const Timing timing = time_graph(launches, [&](cudaStream_t stream, int i) { a.attend(stream, i); }, 400, 300);
    bench.report("sustained", s.preset, s.name(), s.rows, "random", timing, a.step.attended_bytes(), error);
  });
}

inline void plan(Bench& bench, const Shape& s) {
  bench.run(std::string("plan ") + s.preset + " " + s.name(), [&] {
    const Attention a(bench, s, KVARN_FLOAT16, 1);
    if (!bench.timed) return;
    const Timing timing = time_graph(100, [&](cudaStream_t stream, int) { a.plan(stream); });
    bench.report("plan", s.preset, s.name(), s.rows, "random", timing, 0, 0);
  });
}

// A decode step of up to 36 layers: the plan, append and attend of every layer, pack. Microseconds of one layer; behind
// as many bytes of weights, read before each, what comes to the time of reading them.
inline void decode_step(Bench& bench, const Shape& s, size_t weights = 0) {
  const char* name = weights > 0 ? "layer" : "step";
  bench.run(name + std::string(" ") + s.preset + " " + s.name(), [&] {
    const Attention a(bench, s, KVARN_FLOAT16, 36);
    const Rows k(a.step.tokens(), s.kv_heads, s.head_dim, KVARN_FLOAT16, 8);
    const Rows v(a.step.tokens(), s.kv_heads, s.head_dim, KVARN_FLOAT16, 9);
    const kvarn_rows k_rows = k.in(), v_rows = v.in();
    const auto read_weights = [&](cudaStream_t stream, int layer) {
      constexpr size_t kBlock = size_t{64} << 10;
      const size_t count = weights / kBlock, at = layer * count % (bench.pool_bytes / kBlock - count);
      if (count > 0)
        read_kernel<<<static_cast<unsigned>(count), 256, 0, stream>>>(
            reinterpret_cast<const uint4*>(bench.pool + at * kBlock), nullptr);
    };
    std::vector<kvarn_cuda_layer> layers;
    for (int layer = 0; layer < a.step.layers(); ++layer) layers.push_back({a.step.pages(layer), nullptr});
    const auto all_layers = [&](cudaStream_t stream, int) {
      a.plan(stream);
      for (int layer = 0; layer < a.step.layers(); ++layer) {
        read_weights(stream, layer);
        const kvarn_pages pages = a.step.pages(layer);
        check(kvarn_cuda_append(&a.layout, &pages, &a.device_step, &k_rows, &v_rows, KVARN_WEIGHTED, nullptr, nullptr,
                                nullptr, &a.workspace, stream),
              "append");
        a.attend(stream, layer);
      }
      check(kvarn_cuda_pack(&a.layout, layers.data(), a.step.layers(), &a.device_step, KVARN_WEIGHTED, &a.workspace,
                            stream),
            "pack");
    };
    all_layers(nullptr, 0);
    check(cudaDeviceSynchronize(), "step");
    const double error = a.error(a.step.layers() - 1);
    if (!bench.timed) return;
    Timing timing = time_graph(1, all_layers);
    for (double* us : {&timing.us, &timing.low, &timing.high}) *us /= a.step.layers();
    if (weights > 0) {
      const double reading = time_graph(a.step.layers(), read_weights).us;
      for (double* us : {&timing.us, &timing.low, &timing.high}) *us -= reading;
    }
    bench.report(name, s.preset, s.name(), s.rows, "random", timing, a.step.attended_bytes(), error);
  });
}

}  // namespace speed
