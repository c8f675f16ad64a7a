// SPDX-License-Identifier: Apache-2.0
// kvarn._core: the C ABI for numpy and torch arrays, through DLPack and without copies. Threads are OpenMP's, so they
// are shared with torch. Defaults, docstrings and output allocation live in python/kvarn/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "module.hpp"

namespace nb = nanobind;
using kvarn::python::check;
using kvarn::python::encoder_of;

namespace {

using Array = nb::ndarray<nb::device::cpu>;
using ReadOnly = nb::ndarray<nb::device::cpu, nb::ro>;

void run_openmp(void*, int64_t tasks, kvarn_task task, void* argument) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < tasks; ++i) task(argument, i, omp_get_thread_num());
}

kvarn_executor openmp() { return {nullptr, omp_get_max_threads(), run_openmp}; }

template <class... Arguments>
std::string concatenate(const Arguments&... arguments) {
  std::string out;
  ((out += arguments), ...);
  return out;
}

template <class AnyArray>
std::string shape_of(const AnyArray& array) {
  std::string out = "[";
  for (size_t i = 0; i < array.ndim(); ++i) out += (i ? ", " : "") + std::to_string(array.shape(i));
  return out + "]";
}

template <class AnyArray>
void want_dimensions(const char* name, const AnyArray& array, size_t dimensions) {
  if (array.ndim() != dimensions)
    throw nb::value_error(
        concatenate(name, " has shape ", shape_of(array), "; it must have ", std::to_string(dimensions), " axes")
            .c_str());
}

template <class AnyArray>
kvarn_dtype float_dtype(const char* name, const AnyArray& array) {
  const nb::dlpack::dtype dtype = array.dtype();
  if (dtype == nb::dtype<float>()) return KVARN_FLOAT32;
  if (dtype.lanes == 1 && dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float))
    return KVARN_FLOAT16;
  if (dtype.lanes == 1 && dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat))
    return KVARN_BFLOAT16;
  throw nb::type_error(concatenate(name, " must be float32, float16 or bfloat16").c_str());
}

template <class Rows, class AnyArray>
Rows rows_of(const char* name, const AnyArray& array, int32_t head_dim) {
  want_dimensions(name, array, 3);
  if (array.shape(2) != static_cast<size_t>(head_dim))
    throw nb::value_error(concatenate(name, " has shape ", shape_of(array),
                                      "; its last axis must be head_dim = ", std::to_string(head_dim))
                              .c_str());
  if (array.size() > 0 && array.stride(2) != 1)
    throw nb::value_error(
        concatenate(name, " must be contiguous along its last axis; call .contiguous() or np.ascontiguousarray")
            .c_str());
  return {array.data(),
          float_dtype(name, array),
          static_cast<int64_t>(array.shape(0)),
          static_cast<int64_t>(array.shape(1)),
          array.stride(0),
          array.stride(1)};
}

kvarn_pages pages_of(const Array& pages, const kvarn_layout& layout) {
  want_dimensions("pages", pages, 2);
  if (pages.dtype() != nb::dtype<uint8_t>()) throw nb::type_error("pages must be uint8");
  if (static_cast<int64_t>(pages.shape(1)) != layout.page_bytes)
    throw nb::value_error(concatenate("pages has shape ", shape_of(pages), "; a page of this layout has ",
                                      std::to_string(layout.page_bytes), " bytes")
                              .c_str());
  if (pages.size() > 0 && pages.stride(1) != 1) throw nb::value_error("the bytes of a page must be contiguous");
  return {static_cast<uint8_t*>(pages.data()), static_cast<int64_t>(pages.shape(0)), pages.stride(0)};
}

const int32_t* int32_vector(const char* name, const ReadOnly& array, size_t length) {
  want_dimensions(name, array, 1);
  if (array.dtype() != nb::dtype<int32_t>()) throw nb::type_error(concatenate(name, " must be int32").c_str());
  if (array.shape(0) != length)
    throw nb::value_error(
        concatenate(name, " has ", std::to_string(array.shape(0)), " elements; it must have ", std::to_string(length))
            .c_str());
  if (length > 1 && array.stride(0) != 1) throw nb::value_error(concatenate(name, " must be contiguous").c_str());
  return static_cast<const int32_t*>(array.data());
}

kvarn_batch batch_of(const ReadOnly& block_table, const ReadOnly& seq_lens, const ReadOnly* query_starts) {
  want_dimensions("block_table", block_table, 2);
  if (block_table.dtype() != nb::dtype<int32_t>()) throw nb::type_error("block_table must be int32");
  if (block_table.size() > 0 && block_table.shape(1) > 1 && block_table.stride(1) != 1)
    throw nb::value_error("the rows of block_table must be contiguous");
  const size_t requests = block_table.shape(0);
  return {static_cast<int32_t>(requests),
          static_cast<int32_t>(block_table.shape(1)),
          block_table.stride(0),
          static_cast<const int32_t*>(block_table.data()),
          int32_vector("seq_lens", seq_lens, requests),
          query_starts ? int32_vector("query_starts", *query_starts, requests + 1) : nullptr};
}

kvarn_workspace workspace_of(const Array& workspace) {
  want_dimensions("workspace", workspace, 1);
  if (workspace.dtype() != nb::dtype<uint8_t>()) throw nb::type_error("workspace must be uint8");
  if (workspace.size() > 1 && workspace.stride(0) != 1) throw nb::value_error("workspace must be contiguous");
  return {workspace.data(), static_cast<int64_t>(workspace.size())};
}

// float32 of that shape, contiguous
const float* floats_of(const char* name, const std::optional<ReadOnly>& array, std::initializer_list<int64_t> shape) {
  if (!array) return nullptr;
  want_dimensions(name, *array, shape.size());
  if (array->dtype() != nb::dtype<float>()) throw nb::type_error(concatenate(name, " must be float32").c_str());
  std::string wanted;
  bool same = true;
  for (size_t i = 0; i < shape.size(); ++i) {
    const int64_t size = shape.begin()[i];
    same = same && static_cast<int64_t>(array->shape(i)) == size;
    wanted += (i ? ", " : "[") + std::to_string(size);
  }
  if (!same)
    throw nb::value_error(concatenate(name, " has shape ", shape_of(*array), "; it must have ", wanted, "]").c_str());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape.begin()[i])
    if (shape.begin()[i] > 1 && array->stride(i) != step)
      throw nb::value_error(concatenate(name, " must be contiguous").c_str());
  return static_cast<const float*>(array->data());
}

struct Options {
  kvarn_executor executor = openmp();
  kvarn_options options;
  explicit Options(const std::optional<std::string>& target) : options{&executor, target ? target->c_str() : nullptr} {}
};

kvarn_layout make_layout(const std::string& preset, int32_t head_dim, int32_t kv_heads) {
  if (preset.find('\0') != std::string::npos) throw nb::value_error("the preset's name contains a NUL character");
  kvarn_layout layout;
  check(kvarn_layout_init(preset.c_str(), head_dim, kv_heads, &layout));
  return layout;
}

int64_t workspace_bytes(const kvarn_layout& layout, int64_t tokens, int64_t requests, int64_t query_heads,
                        int64_t max_seq_len, std::optional<int32_t> threads) {
  int64_t bytes;
  check(kvarn_workspace_bytes(&layout, tokens, requests, query_heads, max_seq_len,
                              threads.value_or(omp_get_max_threads()), &bytes));
  return bytes;
}

int64_t append(const kvarn_layout& layout, const Array& pages, const ReadOnly& block_table, const ReadOnly& seq_lens,
               const ReadOnly& query_starts, const ReadOnly& k, const ReadOnly& v, const Array& workspace,
               const std::string& encoder, const std::optional<std::string>& target,
               const std::optional<ReadOnly>& feedback, const std::optional<ReadOnly>& balance) {
  const kvarn_encoder code = encoder_of(encoder);
  const kvarn_pages pool = pages_of(pages, layout);
  const kvarn_batch batch = batch_of(block_table, seq_lens, &query_starts);
  const auto k_rows = rows_of<kvarn_rows>("k", k, layout.head_dim),
             v_rows = rows_of<kvarn_rows>("v", v, layout.head_dim);
  const kvarn_workspace space = workspace_of(workspace);
  const Options options(target);
  const float* matrices = floats_of("feedback", feedback, {layout.kv_heads, layout.head_dim, layout.head_dim});
  const float* divisors = floats_of("balance", balance, {layout.kv_heads, layout.head_dim});
  int64_t replaced = 0;
  kvarn_status status;
  {
    nb::gil_scoped_release release;
    status = kvarn_append(&layout, &pool, &batch, &k_rows, &v_rows, code, matrices, divisors, &space, &options.options,
                          &replaced);
  }
  check(status);
  return replaced;
}

void attend(const kvarn_layout& layout, const Array& pages, const ReadOnly& block_table, const ReadOnly& seq_lens,
            const ReadOnly& query_starts, const ReadOnly& q, const Array& out, float scale, float soft_cap,
            const Array& workspace, const std::optional<std::string>& target, const std::optional<ReadOnly>& balance) {
  const kvarn_pages pool = pages_of(pages, layout);
  const kvarn_batch batch = batch_of(block_table, seq_lens, &query_starts);
  const float* factors = floats_of("balance", balance, {layout.kv_heads, layout.head_dim});
  const auto rows = rows_of<kvarn_rows>("q", q, layout.head_dim);
  const auto out_rows = rows_of<kvarn_rows_out>("out", out, layout.head_dim);
  const kvarn_workspace space = workspace_of(workspace);
  const Options options(target);
  kvarn_status status;
  {
    nb::gil_scoped_release release;
    status = kvarn_attend(&layout, &pool, &batch, &rows, &out_rows, scale, soft_cap, factors, &space, &options.options);
  }
  check(status);
}

void expand(const kvarn_layout& layout, const Array& pages, const ReadOnly& block_table, const ReadOnly& seq_lens,
            const Array& k, const Array& v, const Array& workspace, const std::optional<std::string>& target) {
  const kvarn_pages pool = pages_of(pages, layout);
  const kvarn_batch batch = batch_of(block_table, seq_lens, nullptr);
  const auto k_rows = rows_of<kvarn_rows_out>("k", k, layout.head_dim),
             v_rows = rows_of<kvarn_rows_out>("v", v, layout.head_dim);
  const kvarn_workspace space = workspace_of(workspace);
  const Options options(target);
  kvarn_status status;
  {
    nb::gil_scoped_release release;
    status = kvarn_expand(&layout, &pool, &batch, &k_rows, &v_rows, &space, &options.options);
  }
  check(status);
}

void rotate(const ReadOnly& in, const Array& out, const std::optional<std::string>& target) {
  want_dimensions("x", in, 3);
  const auto head_dim = static_cast<int32_t>(in.shape(2));
  const auto rows = rows_of<kvarn_rows>("x", in, head_dim);
  const auto out_rows = rows_of<kvarn_rows_out>("out", out, head_dim);
  const Options options(target);
  check(kvarn_rotate(head_dim, &rows, &out_rows, &options.options));
}

std::vector<std::string> names(const char* const* list) {
  std::vector<std::string> out;
  for (; *list != nullptr; ++list) out.emplace_back(*list);
  return out;
}

std::string target_name(const std::optional<std::string>& name) {
  const char* found = kvarn_target(name ? name->c_str() : nullptr);
  if (found == nullptr) check(KVARN_UNKNOWN_TARGET);
  return found;
}

}  // namespace

namespace kvarn::python {

void check(kvarn_status status) {
  const char* detail = kvarn_last_error();
  const std::string message = *detail ? detail : kvarn_status_message(status);
  switch (status) {
    case KVARN_OK:
      return;
    case KVARN_BAD_PAGE_INDEX:
      throw nb::index_error(message.c_str());
    case KVARN_BAD_DTYPE:
      throw nb::type_error(message.c_str());
    case KVARN_CUDA_ERROR:
    case KVARN_CUDA_UNAVAILABLE:
      throw std::runtime_error(message);
    default:
      throw nb::value_error(message.c_str());
  }
}

kvarn_encoder encoder_of(const std::string& name) {
  if (name != "weighted" && name != "varnorm")
    throw nb::value_error(concatenate("encoder \"", name, "\" is unknown; allowed: weighted, varnorm").c_str());
  return name == "varnorm" ? KVARN_VARNORM : KVARN_WEIGHTED;
}

}  // namespace kvarn::python

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // a process may end while engines still hold layouts
  nb::class_<kvarn_layout>(m, "Layout")
      .def_ro("format_version", &kvarn_layout::format_version)
      .def_ro("k_bits", &kvarn_layout::k_bits)
      .def_ro("v_bits", &kvarn_layout::v_bits)
      .def_ro("page_tokens", &kvarn_layout::page_tokens)
      .def_ro("head_dim", &kvarn_layout::head_dim)
      .def_ro("kv_heads", &kvarn_layout::kv_heads)
      .def_ro("raw_tokens_per_page", &kvarn_layout::raw_tokens_per_page)
      .def_ro("pages_ahead", &kvarn_layout::pages_ahead)
      .def_ro("record_bytes", &kvarn_layout::record_bytes)
      .def_ro("page_bytes", &kvarn_layout::page_bytes)
      .def_prop_ro("offsets", [](const kvarn_layout& layout) {
        nb::dict out;
        out["k_codes"] = layout.k_codes;
        out["k_scale"] = layout.k_scale;
        out["k_zero"] = layout.k_zero;
        out["k_token"] = layout.k_token;
        out["v_codes"] = layout.v_codes;
        out["v_channel"] = layout.v_channel;
        out["v_scale"] = layout.v_scale;
        out["v_zero"] = layout.v_zero;
        return out;
      });
  using namespace nb::literals;
  m.def("layout", make_layout, "preset"_a, "head_dim"_a, "kv_heads"_a);
  m.def("workspace_bytes", workspace_bytes, "layout"_a, "tokens"_a, "requests"_a, "query_heads"_a, "max_seq_len"_a,
        "threads"_a.none());
  m.def("append", append, "layout"_a, "pages"_a, "block_table"_a, "seq_lens"_a, "query_starts"_a, "k"_a, "v"_a,
        "workspace"_a, "encoder"_a, "target"_a.none(), "feedback"_a.none(), "balance"_a.none());
  m.def("attend", attend, "layout"_a, "pages"_a, "block_table"_a, "seq_lens"_a, "query_starts"_a, "q"_a, "out"_a,
        "scale"_a, "soft_cap"_a, "workspace"_a, "target"_a.none(), "balance"_a.none());
  m.def("expand", expand, "layout"_a, "pages"_a, "block_table"_a, "seq_lens"_a, "k"_a, "v"_a, "workspace"_a,
        "target"_a.none());
  m.def("rotate", rotate, "x"_a, "out"_a, "target"_a.none());
  m.def("presets", [] { return names(kvarn_presets()); });
  m.def("targets", [] { return names(kvarn_targets()); });
  m.def("target", target_name, "name"_a = nb::none());
  kvarn::python::add_cuda(m);
  m.attr("FORMAT_VERSION") = KVARN_FORMAT_VERSION;
  m.attr("__version__") = KVARN_VERSION_STRING;
}
