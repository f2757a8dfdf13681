// Included by hot_loops.inl: statistics of one frame of hidden states in a single read.
//
// Four rows advance together, so that the column sums are loaded and stored once for every four rows.
// Sixteen lanes everywhere, whatever the registers' width: the order of every addition, hence every bit,
// is the same for all instruction sets.

namespace cacovid::cpu {
namespace {

constexpr int lanes = 16;
typedef float Lanes __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));

// Sixteen columns of a row. Results are returned by reference: vector arguments have no common ABI.
template <class T>
inline __attribute__((always_inline)) void load_lanes(const T* row, int64_t stride, int64_t count, Lanes& out) {
  if (count >= lanes && stride == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      std::memcpy(&out, row, sizeof out);
    } else if constexpr (std::is_same_v<T, bf16_t>) {
      Halves bits;
      std::memcpy(&bits, row, sizeof bits);
      out = reinterpret_cast<Lanes>(__builtin_convertvector(bits, Words) << 16);
    } else {
#if defined(__AVX512F__)
      __m256i bits;
      std::memcpy(&bits, row, sizeof bits);
      out = reinterpret_cast<Lanes>(_mm512_cvtph_ps(bits));
#else
      for (int l = 0; l < lanes; ++l) out[l] = load_float(row[l]);
#endif
    }
    return;
  }
  out = Lanes{};  // columns past the end are zero and change no sum
  for (int l = 0; l < lanes && l < count; ++l) out[l] = load_float(row[l * stride]);
}

template <class T, int rows>
void pool_rows(const T* first, int64_t row_stride, int64_t column_stride, int64_t columns, float eps, float* rrms,
               float* sums) {
  Lanes squares[rows] = {};
  for (int64_t c = 0; c < columns; c += lanes) {
    Lanes x[rows], sum;
    for (int r = 0; r < rows; ++r) {
      load_lanes(first + r * row_stride + c * column_stride, column_stride, columns - c, x[r]);
      squares[r] += x[r] * x[r];
    }
    std::memcpy(&sum, sums + c, sizeof sum);
    if constexpr (rows == 4) {
      sum += (x[0] + x[1]) + (x[2] + x[3]);
    } else {
      sum += x[0];
    }
    std::memcpy(sums + c, &sum, sizeof sum);
  }
  for (int r = 0; r < rows; ++r) {
    float total = 0.0f;
    for (int l = 0; l < lanes; ++l) total += squares[r][l];
    rrms[r] = 1.0f / std::sqrt(total / static_cast<float>(columns) + eps);
  }
}

template <class T>
void pool_frame_as(const T* hidden, const FrameShape& shape, float eps, float* rrms, float* mean, float* sums) {
  std::memset(sums, 0, static_cast<size_t>(padded(shape.columns)) * sizeof(float));
  int64_t r = 0;
  for (; r + 4 <= shape.rows; r += 4) {
    pool_rows<T, 4>(hidden + r * shape.row_stride, shape.row_stride, shape.column_stride, shape.columns, eps,
                    rrms + r, sums);
  }
  for (; r < shape.rows; ++r) {
    pool_rows<T, 1>(hidden + r * shape.row_stride, shape.row_stride, shape.column_stride, shape.columns, eps,
                    rrms + r, sums);
  }
  for (int64_t c = 0; c < shape.columns; ++c) mean[c] = sums[c] / static_cast<float>(shape.rows);
}

void pool_frame(const void* hidden, DType dtype, const FrameShape& shape, float eps, float* rrms, float* mean,
                float* sums) {
  switch (dtype) {
    case DType::bf16: return pool_frame_as(static_cast<const bf16_t*>(hidden), shape, eps, rrms, mean, sums);
    case DType::f16: return pool_frame_as(static_cast<const f16_t*>(hidden), shape, eps, rrms, mean, sums);
    default: return pool_frame_as(static_cast<const float*>(hidden), shape, eps, rrms, mean, sums);
  }
}

}  // namespace
}  // namespace cacovid::cpu
