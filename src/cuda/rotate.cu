// SPDX-License-Identifier: Apache-2.0
// rotate: vectors of any dtype, rotated and rounded. Limited by memory: reads and writes each element once.
#include "cuda/launch.hpp"
#include "cuda/rotate.cuh"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 256;

struct RotateArguments {
  Rows in;
  void* out;
  kvarn_dtype out_dtype;
  int64_t out_token_stride, out_head_stride;
  bool out_aligned;
  int64_t vectors;
  int32_t heads;
};

__device__ void store_chunk(const RotateArguments& a, int64_t first, const float (&x)[kChunk]) {
  if (!a.out_aligned) {
    for (int i = 0; i < kChunk; ++i) store_element(x[i], a.out, a.out_dtype, first + i);
  } else if (a.out_dtype == KVARN_FLOAT32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(a.out) + first);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    alignas(16) uint16_t halves[kChunk];
    for (int i = 0; i < kChunk; ++i) store_element(x[i], halves, a.out_dtype, i);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.out) + first) = *reinterpret_cast<const uint4*>(halves);
  }
}

template <int kHeadDim>
__global__ __launch_bounds__(kThreads) void rotate_kernel(const __grid_constant__ RotateArguments a) {
  wait_for_previous();
  let_next_start();
  constexpr int kLanes = kVectorLanes<kHeadDim>;
  const int64_t vector = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool valid = vector < a.vectors && has_chunk<kHeadDim>(lane);
  const int64_t token = vector / a.heads, head = vector % a.heads;
  float x[kChunk] = {};
  if (valid) load_chunk(a.in, token * a.in.token_stride + head * a.in.head_stride + kChunk * lane, x);
  rotate<kHeadDim>(x, lane);
  if (valid) store_chunk(a, token * a.out_token_stride + head * a.out_head_stride + kChunk * lane, x);
}

template <int kHeadDim>
cudaError_t launch(const RotateArguments& a, cudaStream_t stream) {
  constexpr int kVectors = kThreads / kVectorLanes<kHeadDim>;
  const dim3 grid(static_cast<uint32_t>((a.vectors + kVectors - 1) / kVectors));
  return launch_dependent(rotate_kernel<kHeadDim>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace

cudaError_t rotate(int32_t head_dim, const kvarn_rows& in, const kvarn_rows_out& out, cudaStream_t stream) {
  const RotateArguments a{make_rows(in),
                          out.data,
                          out.dtype,
                          out.token_stride,
                          out.head_stride,
                          vectors_are_aligned(out.data, out.dtype, out.token_stride, out.head_stride),
                          in.tokens * in.heads,
                          static_cast<int32_t>(in.heads)};
  if (a.vectors == 0) return cudaSuccess;
  switch (head_dim) {
    case 64:
      return launch<64>(a, stream);
    case 80:
      return launch<80>(a, stream);
    case 96:
      return launch<96>(a, stream);
    case 128:
      return launch<128>(a, stream);
    case 256:
      return launch<256>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kvarn::cuda
