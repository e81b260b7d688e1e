// Operands for the tests: memory of exactly the size that a kernel may touch, so that the address
// sanitizer sees a read or a write beside it, and values whose sums are exact in any order, so that
// results are compared for equality.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../dropout.h"
#include "../linear.h"
#include "../matrix.h"
#include "../panel.h"

namespace lora_kernels::tests {

// Multiples of 1/2 up to 1: sums of some thousand products of two are exact in float32, and each is
// itself exact in bfloat16 and float16.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool coin() { return below(2) == 1; }
  double value() { return static_cast<double>(below(5) - 2) / 2; }
  int64_t of(std::initializer_list<int64_t> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  Kind kind() { return static_cast<Kind>(below(3)); }

 private:
  std::mt19937 engine_;
};

// A 2-D array of doubles: what a matrix should hold.
struct Values {
  int64_t rows, cols;
  std::vector<double> data;

  Values(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(rows * cols) {}
  Values(int64_t rows, int64_t cols, Random& random) : Values(rows, cols) {
    for (double& value : data) value = random.value();
  }
  double& operator()(int64_t i, int64_t j) { return data[i * cols + j]; }
  double operator()(int64_t i, int64_t j) const { return data[i * cols + j]; }
};

// a b, both exact.
inline Values times(const Values& a, const Values& b) {
  Values c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t k = 0; k < a.cols; ++k) {
      for (int64_t j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
}

inline size_t element_size(Kind kind) { return kind == Kind::kFloat ? 4 : 2; }

inline double element(const Matrix& m, int64_t i, int64_t j) {
  return with_type(m.kind, [&]<typename T>() {
    const T* data = static_cast<const T*>(m.data);
    return static_cast<double>(static_cast<float>(data[i * m.stride_row + j * m.stride_col]));
  });
}

inline double rounded(double value, Kind kind) {
  return with_type(kind, [&]<typename T>() {
    return static_cast<double>(static_cast<float>(T(static_cast<float>(value))));
  });
}

// A matrix in memory that ends with its last element.
class Laid {
 public:
  Laid(int64_t rows, int64_t cols, Kind kind, int64_t stride_row, int64_t stride_col)
      : size_(rows > 0 && cols > 0 ? (rows - 1) * stride_row + (cols - 1) * stride_col + 1 : 0),
        memory_(new char[size_ * element_size(kind)]),
        matrix{memory_.get(), kind, rows, cols, stride_row, stride_col} {}

  // `values` in one of many layouts; the ones with a stride of zero make their elements equal.
  Laid(Values& values, Kind kind, Random& random) : Laid(values, kind, random.below(8)) {}

  static Laid contiguous(const Values& values, Kind kind) {
    return with_strides(values, kind, values.cols, 1);
  }

  static Laid with_strides(const Values& values, Kind kind, int64_t stride_row,
                           int64_t stride_col) {
    Laid laid(values.rows, values.cols, kind, stride_row, stride_col);
    laid.write(values);
    return laid;
  }

 private:
  static std::pair<int64_t, int64_t> strides(int64_t rows, int64_t cols, int64_t layout) {
    const std::pair<int64_t, int64_t> all[8] = {{cols, 1},         {1, rows},        {cols + 3, 1},
                                                {1, rows + 3},     {0, 1},           {1, 0},
                                                {2 * cols + 1, 2}, {3, 3 * rows + 2}};
    return all[layout];
  }

  Laid(Values& values, Kind kind, int64_t layout)
      : Laid(values.rows, values.cols, kind, strides(values.rows, values.cols, layout).first,
             strides(values.rows, values.cols, layout).second) {
    write(values);
    for (int64_t i = 0; i < values.rows; ++i) {
      for (int64_t j = 0; j < values.cols; ++j) values(i, j) = element(matrix, i, j);
    }
  }

  void write(const Values& values) {
    with_type(matrix.kind, [&]<typename T>() {
      T* data = static_cast<T*>(matrix.data);
      for (int64_t i = 0; i < values.rows; ++i) {
        for (int64_t j = 0; j < values.cols; ++j) {
          data[i * matrix.stride_row + j * matrix.stride_col] = T(static_cast<float>(values(i, j)));
        }
      }
    });
  }

  int64_t size_;
  std::unique_ptr<char[]> memory_;

 public:
  Matrix matrix;
};

template <typename C>
std::unique_ptr<C[]> exactly(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

// All panels of b, or nothing.
template <typename C>
std::unique_ptr<C[]> packed_or_null(const ConstMatrix& b, Random& random) {
  if (random.coin()) return nullptr;
  auto packed = exactly<C>(packed_size<C>(b.rows, b.cols));
  pack(b, packed.get());
  return packed;
}

// Rows as the kernels read them, padded with a zero, in memory that ends with the last of them.
template <typename C>
struct LaidRows {
  std::unique_ptr<C[]> memory;
  Rows<C> rows;

  LaidRows(const Values& values, int64_t ld)
      : memory(exactly<C>(values.rows > 0 ? (values.rows - 1) * ld + padded<C>(values.cols) : 0)),
        rows{memory.get(), values.rows, values.cols, ld} {
    for (int64_t i = 0; i < values.rows; ++i) {
      for (int64_t j = 0; j < padded<C>(values.cols); ++j) {
        memory[i * ld + j] = C(j < values.cols ? static_cast<float>(values(i, j)) : 0.0f);
      }
    }
  }
};

// Which elements a mask keeps, by Philox written out for one element.
inline bool kept(const DropoutMask& mask, int64_t i, int64_t j) {
  const uint64_t col = static_cast<uint64_t>(mask.col0 + j);
  uint32_t c[4] = {static_cast<uint32_t>(mask.row0 + i), static_cast<uint32_t>(col / 8),
                   static_cast<uint32_t>(mask.offset), static_cast<uint32_t>(mask.offset >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(mask.seed), static_cast<uint32_t>(mask.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * c[0], second = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(second >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(second),
        static_cast<uint32_t>(first >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(first)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return (c[col % 8 / 2] >> 16 * (col % 2) & 0xFFFF) >= mask.threshold;
}

inline std::optional<DropoutMask> any_mask(Random& random) {
  if (random.coin()) return std::nullopt;
  return DropoutMask{0x123456789ABCDEF0ull, 0xFEDCBA9876543210ull, random.below(100),
                     random.below(100), dropout_threshold(0.3)};
}

inline const DropoutMask* pointer(const std::optional<DropoutMask>& mask) {
  return mask ? &*mask : nullptr;
}

inline void drop_values(Values& values, const std::optional<DropoutMask>& mask) {
  for (int64_t i = 0; mask && i < values.rows; ++i) {
    for (int64_t j = 0; j < values.cols; ++j) {
      if (!kept(*mask, i, j)) values(i, j) = 0;
    }
  }
}

inline void expect_equal(double ours, double expected, const std::string& what, int64_t i,
                         int64_t j) {
  // Written so that a NaN fails.
  if (ours == expected) return;
  std::fprintf(stderr, "%s: [%lld, %lld] is %g, expected %g\n", what.c_str(),
               static_cast<long long>(i), static_cast<long long>(j), ours, expected);
  std::exit(1);
}

inline void expect(const Matrix& ours, const Values& expected, const std::string& what) {
  for (int64_t i = 0; i < expected.rows; ++i) {
    for (int64_t j = 0; j < expected.cols; ++j) {
      expect_equal(element(ours, i, j), rounded(expected(i, j), ours.kind), what, i, j);
    }
  }
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Every case in a thread of its own: threads keep their scratch memory, and what an earlier and
// larger case left would hide a read or a write past the end of what this one asked for. (OpenMP
// gives each of them helpers of its own too.)
inline void cases(int count, const std::function<void(Random&)>& test) {
  for (int i = 0; i < count; ++i) {
    std::thread([&] {
      at::set_num_threads(1 + i % 2);
      Random random(static_cast<uint32_t>(i));
      test(random);
    }).join();
  }
}

void test_dropout();
template <typename C>
void test_operands();
template <typename C>
void test_linear();
template <typename C>
void test_segmented();

}  // namespace lora_kernels::tests
