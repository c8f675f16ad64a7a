// SPDX-License-Identifier: Apache-2.0
// Attention in float64 over the dequantized cache, and the exact values of expand: plain loops over the specification's
// formulas, fast enough to check every timed shape.
#pragma once

#include "speed_pool.cuh"

namespace reference {

inline constexpr int kMaxGroup = 8;     // query heads of a KV head
inline constexpr int kSplitTiles = 16;  // tiles of one CTA
inline constexpr int kThreads = 128;

struct Cache {
  kvarn_layout l;
  kvarn::format::Planes k_planes, v_planes;
  const uint8_t* data;
  const int32_t* table;
  int64_t table_stride;

  Cache(const kvarn_layout& layout, const kvarn_pages& pages, const kvarn_batch& batch)
      : l(layout),
        k_planes(kvarn::format::make_planes(layout.page_tokens, layout.head_dim, layout.k_bits)),
        v_planes(kvarn::format::make_planes(layout.head_dim, layout.page_tokens, layout.v_bits)),
        data(pages.data),
        table(batch.block_table),
        table_stride(batch.table_stride) {}

  __device__ const uint8_t* region(int request, int page, int head) const {
    return data + table[request * table_stride + page] * l.page_bytes + head * l.record_bytes;
  }
  __device__ static float f16(const uint8_t* at, int64_t index) {
    return __half2float(reinterpret_cast<const __half*>(at)[index]);
  }
  __device__ static float code(const uint8_t* codes, const kvarn::format::Planes& planes, int row, int column) {
    int code = 0;
    for (int i = 0; i < planes.count; ++i) {
      const kvarn::format::Plane& plane = planes.plane[i];
      const kvarn::format::CodePlace place = kvarn::format::code_place(plane, row, column);
      code |= (codes[place.byte] >> place.bit & ((1 << plane.width) - 1)) << plane.shift;
      codes += plane.bytes();
    }
    return static_cast<float>(code);
  }
  __device__ float k(const uint8_t* record, int t, int d) const {
    const float step = __fmul_rn(code(record, k_planes, t, d), f16(record + l.k_scale, d));
    return __fmul_rn(__fadd_rn(step, f16(record + l.k_zero, d)), f16(record + l.k_token, t));
  }
  __device__ float v(const uint8_t* record, int t, int d) const {
    const float step = __fmul_rn(code(record + l.v_codes, v_planes, d, t), f16(record + l.v_scale, t));
    return __fmul_rn(__fadd_rn(step, f16(record + l.v_zero, t)), f16(record + l.v_channel, d));
  }
  __device__ float raw(int request, int head, int position, int d, bool value) const {
    const kvarn::format::RawPlace place = kvarn::format::raw_place(l, position);
    const int64_t offset =
        value ? kvarn::format::raw_v_offset(l, place.slot) : kvarn::format::raw_k_offset(l, place.slot);
    return f16(region(request, place.page, head), offset + d);
  }
};

// x[0..n) in shared memory, by the whole CTA.
__device__ inline void rotate(double* x, int n) {
  for (int start = 0; start < n;) {
    int block = 1;
    while (2 * block <= n - start) block *= 2;
    for (int h = 1; h < block; h *= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < block / 2; i += blockDim.x) {
        const int low = start + i / h * 2 * h + i % h;
        const double a = x[low], b = x[low + h];
        x[low] = a + b, x[low + h] = a - b;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < block; i += blockDim.x) x[start + i] /= sqrt(static_cast<double>(block));
    start += block;
  }
  __syncthreads();
}

// CTA (row, query head): q [rows][heads][D] -> rotated.
template <class T>
__global__ void rotate_queries(const T* q, int head_dim, double* rotated) {
  extern __shared__ double x[];
  const int64_t at = (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * head_dim;
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) x[d] = static_cast<float>(q[at + d]);
  rotate(x, head_dim);
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) rotated[at + d] = x[d];
}

// CTA (split, KV head, row): maximum, sum and weighted values of kSplitTiles tiles. parts [row][head][split][D + 2].
__global__ void attend_split(Cache c, const int32_t* lengths, int rows, int group, double scale, const double* q,
                             double* parts) {
  extern __shared__ double memory[];
  const int D = c.l.head_dim, G = c.l.page_tokens, request = blockIdx.z / rows, kv_head = blockIdx.y;
  const int position = lengths[request] - rows + static_cast<int>(blockIdx.z) % rows, own = position / G;
  double *query = memory, *out = query + group * D, *p = out + group * D, *state = p + group * G;
  const int64_t first_head = int64_t{blockIdx.z} * group * gridDim.y + kv_head * group;
  for (int i = threadIdx.x; i < group * D; i += blockDim.x) query[i] = q[first_head * D + i] * scale, out[i] = 0;
  for (int g = threadIdx.x; g < group; g += blockDim.x) state[2 * g] = -INFINITY, state[2 * g + 1] = 0;
  __shared__ double factor[kMaxGroup];

  const int begin = blockIdx.x * kSplitTiles, end = min(begin + kSplitTiles, own + 1);
  for (int tile = begin; tile < end; ++tile) {
    const int visible = tile == own ? position % G + 1 : G;
    const uint8_t* record = c.region(request, tile, kv_head);
    __syncthreads();
    for (int t = threadIdx.x; t < visible; t += blockDim.x) {
      double sum[kMaxGroup] = {};
      for (int d = 0; d < D; ++d) {
        const double k = tile == own ? c.raw(request, kv_head, tile * G + t, d, false) : c.k(record, t, d);
#pragma unroll
        for (int g = 0; g < kMaxGroup; ++g)
          if (g < group) sum[g] += query[g * D + d] * k;
      }
#pragma unroll
      for (int g = 0; g < kMaxGroup; ++g)
        if (g < group) p[g * G + t] = sum[g];
    }
    __syncthreads();
    for (int g = threadIdx.x; g < group; g += blockDim.x) {
      double most = state[2 * g], sum = 0;
      for (int t = 0; t < visible; ++t) most = fmax(most, p[g * G + t]);
      for (int t = 0; t < visible; ++t) sum += p[g * G + t] = exp(p[g * G + t] - most);
      factor[g] = exp(state[2 * g] - most);
      state[2 * g] = most, state[2 * g + 1] = state[2 * g + 1] * factor[g] + sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
      double sum[kMaxGroup] = {};
      for (int t = 0; t < visible; ++t) {
        const double v = tile == own ? c.raw(request, kv_head, tile * G + t, d, true) : c.v(record, t, d);
#pragma unroll
        for (int g = 0; g < kMaxGroup; ++g)
          if (g < group) sum[g] += p[g * G + t] * v;
      }
#pragma unroll
      for (int g = 0; g < kMaxGroup; ++g)
        if (g < group) out[g * D + d] = out[g * D + d] * factor[g] + sum[g];
    }
  }
  __syncthreads();
  for (int g = 0; g < group; ++g) {
    double* part = parts + ((first_head + g) * gridDim.x + blockIdx.x) * (D + 2);
    for (int d = threadIdx.x; d < D; d += blockDim.x) part[d] = out[g * D + d];
    for (int i = threadIdx.x; i < 2; i += blockDim.x) part[D + i] = state[2 * g + i];
  }
}

// CTA (row, query head): out [rows][heads][D].
__global__ void merge_splits(const double* parts, int splits, int head_dim, double* out) {
  extern __shared__ double x[];
  const int64_t row = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  const double* part = parts + row * splits * (head_dim + 2);
  double most = -INFINITY, sum = 0;
  for (int s = 0; s < splits; ++s) most = fmax(most, part[s * (head_dim + 2) + head_dim]);
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) x[d] = 0;
  for (int s = 0; s < splits; ++s, part += head_dim + 2) {
    const double weight = exp(part[head_dim] - most);
    sum += weight * part[head_dim + 1];
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) x[d] += weight * part[d];
  }
  rotate(x, head_dim);
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) out[row * head_dim + d] = x[d] / sum;
}

// [tokens][query_heads][head_dim], natural basis.
template <class T>
std::vector<double> attend(const Step& step, int layer, const T* q, int query_heads, double scale) {
  const kvarn_layout& l = step.layout();
  const int rows = step.tokens(), group = query_heads / l.kv_heads, tiles = step.max_length() / l.page_tokens + 1;
  if (group > kMaxGroup) throw std::runtime_error("the reference has room for 8 query heads per KV head");
  const int splits = (tiles + kSplitTiles - 1) / kSplitTiles;
  const size_t values = static_cast<size_t>(rows) * query_heads * l.head_dim;
  Device<double> rotated(values), out(values);
  Device<double> parts(static_cast<size_t>(rows) * query_heads * splits * (l.head_dim + 2));
  const size_t vector = sizeof(double) * l.head_dim;
  rotate_queries<<<dim3(rows, query_heads), kThreads, vector>>>(q, l.head_dim, rotated.data());
  const size_t bytes = sizeof(double) * group * (2 * l.head_dim + l.page_tokens + 2);
  attend_split<<<dim3(splits, l.kv_heads, rows), kThreads, bytes>>>(Cache(l, step.pages(layer), step.batch()),
                                                                    step.batch().seq_lens, step.rows(), group, scale,
                                                                    rotated.data(), parts.data());
  merge_splits<<<dim3(rows, query_heads), kThreads, vector>>>(parts.data(), splits, l.head_dim, out.data());
  check(cudaGetLastError(), "reference");
  check(cudaDeviceSynchronize(), "reference");
  return out.host();
}

// Tile `tile` of a request was written to page `page` of G tokens of k and v.
struct Expanded {
  int request, tile, page;
};

// Counts the elements of k and v [pages][G][kv_heads][D] in binary16 that are not the specification's bits.
// CTA (entry of the list, KV head).
__global__ void compare_expanded(Cache c, const Expanded* tiles, const __half* k, const __half* v, unsigned* wrong) {
  const int head = blockIdx.y, D = c.l.head_dim, G = c.l.page_tokens;
  const Expanded expanded = tiles[blockIdx.x];
  const uint8_t* record = c.region(expanded.request, expanded.tile, head);
  unsigned mine = 0;
  for (int i = threadIdx.x; i < G * D; i += blockDim.x) {
    const int t = i / D, d = i % D;
    const int64_t at = ((int64_t{expanded.page} * G + t) * gridDim.y + head) * D + d;
    mine += __half_as_ushort(k[at]) != __half_as_ushort(__float2half_rn(c.k(record, t, d)));
    mine += __half_as_ushort(v[at]) != __half_as_ushort(__float2half_rn(c.v(record, t, d)));
  }
  if (mine > 0) atomicAdd(wrong, mine);
}

// Throws if anything of k and v is wrong.
inline void check_expanded(const Step& step, int layer, const std::vector<Expanded>& tiles, const __half* k,
                           const __half* v, const char* when) {
  const Device<Expanded> list(tiles);
  const Device<unsigned> wrong(1, 0);
  compare_expanded<<<dim3(static_cast<unsigned>(tiles.size()), step.layout().kv_heads), 256>>>(
      Cache(step.layout(), step.pages(layer), step.batch()), list.data(), k, v, wrong.data());
  check(cudaDeviceSynchronize(), "compare");
  if (const unsigned elements = wrong.host()[0]; elements > 0)
    throw std::runtime_error(std::to_string(elements) + " elements differ " + when);
}

}  // namespace reference
