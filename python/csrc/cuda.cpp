// SPDX-License-Identifier: Apache-2.0
// kvarn/cuda.h for Python. Device memory comes as addresses, shapes and strides that python/kvarn/_launch.py reads off
// torch tensors, so that no exchange of tensors can wait for a stream, and nothing of torch is linked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "kvarn/cuda.h"
#include "module.hpp"

#ifdef KVARN_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;
using kvarn::python::check;
using kvarn::python::encoder_of;

namespace {

using Address = uint64_t;
using Limits = std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t>;  // as kvarn_cuda_limits
using Workspace = std::tuple<Address, int64_t, Limits>;                  // data, bytes, limits
using Pages = std::tuple<Address, int64_t, int64_t>;                     // data, count, stride
// data, dtype, tokens, heads, token stride, head stride
using Rows = std::tuple<Address, int32_t, int64_t, int64_t, int64_t, int64_t>;
// requests, table width, table stride, block table, seq_lens, query_starts
using Batch = std::tuple<int32_t, int32_t, int64_t, Address, Address, Address>;
using Step = std::tuple<Batch, Address, int32_t, int32_t, bool>;  // batch, slots, tokens, max_query_len, defer
// The stream is one of device `int`, whose context the calls use.
using Queue = std::tuple<int, Address>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

kvarn_cuda_limits limits_of(const Limits& x) {
  return {std::get<0>(x), std::get<1>(x), std::get<2>(x), std::get<3>(x), std::get<4>(x)};
}
kvarn_cuda_workspace workspace_of(const Workspace& x) {
  return {pointer<void>(std::get<0>(x)), std::get<1>(x), limits_of(std::get<2>(x))};
}
kvarn_pages pages_of(const Pages& x) { return {pointer<uint8_t>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }
template <class Result, class Data>
Result rows_of(const Rows& x) {
  return {pointer<Data>(std::get<0>(x)),
          static_cast<kvarn_dtype>(std::get<1>(x)),
          std::get<2>(x),
          std::get<3>(x),
          std::get<4>(x),
          std::get<5>(x)};
}
kvarn_rows in(const Rows& x) { return rows_of<kvarn_rows, const void>(x); }
kvarn_rows_out out(const Rows& x) { return rows_of<kvarn_rows_out, void>(x); }
kvarn_batch batch_of(const Batch& x) {
  return {std::get<0>(x),
          std::get<1>(x),
          std::get<2>(x),
          pointer<const int32_t>(std::get<3>(x)),
          pointer<const int32_t>(std::get<4>(x)),
          pointer<const int32_t>(std::get<5>(x))};
}
kvarn_cuda_step step_of(const Step& x) {
  return {batch_of(std::get<0>(x)), pointer<const int64_t>(std::get<1>(x)), std::get<2>(x), std::get<3>(x),
          std::get<4>(x) ? 1 : 0};
}

// Our runtime is linked statically and has its own idea of the current device.
void use_device([[maybe_unused]] int device) {
#ifdef KVARN_HAS_CUDA
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
    (void)cudaGetLastError();
    throw std::runtime_error(std::string("CUDA device ") + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
#endif
}

kvarn_cuda_stream stream_of(const Queue& queue) {
  use_device(std::get<0>(queue));
  return pointer<CUstream_st>(std::get<1>(queue));
}

int64_t workspace_bytes(const kvarn_layout& layout, const Limits& limits, int device) {
  const kvarn_cuda_limits most = limits_of(limits);
  int64_t bytes = 0;
  use_device(device);
  check(kvarn_cuda_workspace_bytes(&layout, &most, &bytes));
  return bytes;
}

void plan(const kvarn_layout& layout, const Step& step, int32_t query_heads, int32_t window, const Workspace& workspace,
          const Queue& queue) {
  const kvarn_cuda_step this_step = step_of(step);
  const kvarn_cuda_workspace space = workspace_of(workspace);
  check(kvarn_cuda_plan(&layout, &this_step, query_heads, window, &space, stream_of(queue)));
}

void append(const kvarn_layout& layout, const Pages& pages, const Step& step, const Rows& k, const Rows& v,
            const std::string& encoder, Address feedback, Address balance, Address replaced, const Workspace& workspace,
            const Queue& queue) {
  const kvarn_encoder code = encoder_of(encoder);
  const kvarn_pages pool = pages_of(pages);
  const kvarn_cuda_step this_step = step_of(step);
  const kvarn_rows k_rows = in(k), v_rows = in(v);
  const kvarn_cuda_workspace space = workspace_of(workspace);
  check(kvarn_cuda_append(&layout, &pool, &this_step, &k_rows, &v_rows, code, pointer<const float>(feedback),
                          pointer<const float>(balance), pointer<int64_t>(replaced), &space, stream_of(queue)));
}

void pack(const kvarn_layout& layout, const std::vector<std::tuple<Pages, Address>>& layers, const Step& step,
          const std::string& encoder, const Workspace& workspace, const Queue& queue) {
  const kvarn_encoder code = encoder_of(encoder);
  std::vector<kvarn_cuda_layer> all;
  for (const auto& [pages, feedback] : layers) all.push_back({pages_of(pages), pointer<const float>(feedback)});
  const kvarn_cuda_step this_step = step_of(step);
  const kvarn_cuda_workspace space = workspace_of(workspace);
  check(kvarn_cuda_pack(&layout, all.data(), static_cast<int32_t>(all.size()), &this_step, code, &space,
                        stream_of(queue)));
}

void attend(const kvarn_layout& layout, const Pages& pages, const Step& step, const Rows& q, const Rows& result,
            float scale, float soft_cap, int32_t window, Address sinks, Address balance, const Workspace& workspace,
            const Queue& queue) {
  const kvarn_pages pool = pages_of(pages);
  const kvarn_cuda_step this_step = step_of(step);
  const kvarn_rows q_rows = in(q);
  const kvarn_rows_out out_rows = out(result);
  const kvarn_cuda_attention attention{scale, soft_cap, window, pointer<const float>(sinks),
                                       pointer<const float>(balance)};
  const kvarn_cuda_workspace space = workspace_of(workspace);
  check(kvarn_cuda_attend(&layout, &pool, &this_step, &q_rows, &out_rows, &attention, &space, stream_of(queue)));
}

void expand(const kvarn_layout& layout, const Pages& pages, const Batch& batch, const Rows& k, const Rows& v,
            const Queue& queue) {
  const kvarn_pages pool = pages_of(pages);
  const kvarn_batch requests = batch_of(batch);
  const kvarn_rows_out k_rows = out(k), v_rows = out(v);
  check(kvarn_cuda_expand(&layout, &pool, &requests, &k_rows, &v_rows, nullptr, stream_of(queue)));
}

void rotate(int32_t head_dim, const Rows& x, const Rows& result, const Queue& queue) {
  const kvarn_rows rows = in(x);
  const kvarn_rows_out out_rows = out(result);
  check(kvarn_cuda_rotate(head_dim, &rows, &out_rows, stream_of(queue)));
}

// tables: first and end request, table width, sequences, block table, seq_lens, query_starts, pages, overflow
using Tables = std::tuple<int32_t, int32_t, int32_t, int32_t, Address, Address, Address, int32_t, Address>;
void prefill_pages(const kvarn_layout& layout, const Pages& pages, const Step& step, const Tables& tables,
                   const Rows& k, const Rows& v, const Workspace& workspace, const Queue& queue) {
  const kvarn_pages pool = pages_of(pages);
  const kvarn_cuda_step this_step = step_of(step);
  const kvarn_cuda_prefill prefill{std::get<0>(tables),
                                   std::get<1>(tables),
                                   std::get<2>(tables),
                                   std::get<3>(tables),
                                   pointer<int32_t>(std::get<4>(tables)),
                                   pointer<int32_t>(std::get<5>(tables)),
                                   pointer<int32_t>(std::get<6>(tables)),
                                   std::get<7>(tables),
                                   pointer<int32_t>(std::get<8>(tables))};
  const kvarn_rows_out k_rows = out(k), v_rows = out(v);
  const kvarn_cuda_workspace space = workspace_of(workspace);
  check(kvarn_cuda_prefill_pages(&layout, &pool, &this_step, &prefill, &k_rows, &v_rows, &space, stream_of(queue)));
}

// "" if the kernels can run here, otherwise why not.
std::string missing() { return kvarn_cuda_available() != 0 ? "" : kvarn_last_error(); }

std::vector<std::string> shapes() {
  std::vector<std::string> names;
  for (const char* const* name = kvarn_cuda_shapes(); *name != nullptr; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace

void kvarn::python::add_cuda(nb::module_& m) {
  m.def("cuda_missing", missing);
  m.def("cuda_architectures", kvarn_cuda_architectures);
  m.def("cuda_shapes", shapes);
  m.def("cuda_workspace_bytes", workspace_bytes);
  m.def("cuda_plan", plan);
  m.def("cuda_append", append);
  m.def("cuda_pack", pack);
  m.def("cuda_attend", attend);
  m.def("cuda_expand", expand);
  m.def("cuda_rotate", rotate);
  m.def("cuda_prefill_pages", prefill_pages);
}
