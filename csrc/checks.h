// Input checks of the operators of all stages, on both devices. Python checks first and raises TypeError or ValueError;
// these guard direct calls and reach Python as RuntimeError. They run before any dispatcher call or parallel region,
// where messages would be lost. They establish dtypes, shapes and contiguity. The values of a CSR they do not read:
// that rowptr ascends from 0 to nnz and that col is in range the kernels take from whoever made the graph.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cctype>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

// Like STD_TORCH_CHECK, but the message is only what the user needs: no file, no line, no path of the build machine.
#define LFM_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(lfm::joined(__VA_ARGS__))

namespace lfm {

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// As torch writes it in Python.
inline std::string dtype_name(ScalarType type) {
  // those whose C++ names are others
  static constexpr const char* names[] = {"uint8",   "int8",    "int16",     "int32",     "int64",      "float16",
                                          "float32", "float64", "complex32", "complex64", "complex128", "bool"};
  const auto number = static_cast<size_t>(type);
  if (number < std::size(names)) return std::string("torch.") + names[number];
  std::string text = torch::headeronly::toString(type);
  for (char& letter : text) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return "torch." + text;
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  LFM_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got shape ", shape_of(t));
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t wanted) {
  LFM_CHECK(t.size(dim) == wanted, name, " must have ", wanted, " entries in dimension ", dim, ", got shape ",
            shape_of(t));
}

inline void check_contiguous(const char* name, const Tensor& t) {
  LFM_CHECK(t.is_contiguous(), name, " must be contiguous, got strides of another layout, shape ", shape_of(t));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType wanted, const char* wanted_name) {
  LFM_CHECK(t.scalar_type() == wanted, name, " must be ", wanted_name, ", got ", dtype_name(t.scalar_type()));
}

inline void check_like(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  LFM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
            dtype_name(like.scalar_type()), ", got ", dtype_name(t.scalar_type()));
}

inline void check_floating(const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  LFM_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64, got ",
            dtype_name(type));
}

// Where each set of a ragged batch begins, and the end: int64 in CPU memory, ascending from 0 to `total`.
inline void check_offsets(const char* name, const Tensor& offsets, int64_t total) {
  check_dim(name, offsets, 1);
  check_dtype(name, offsets, ScalarType::Long, "int64");
  check_contiguous(name, offsets);
  LFM_CHECK(offsets.is_cpu(), name, " must be on the CPU, got another device");
  const int64_t size = offsets.size(0), *start = offsets.const_data_ptr<int64_t>();
  LFM_CHECK(size >= 1 && start[0] == 0 && start[size - 1] == total, name, " must go from 0 to ", total);
  for (int64_t s = 1; s < size; ++s) LFM_CHECK(start[s - 1] <= start[s], name, " must be ascending");
}

// A block of vectors: the type of the values it meets, or float16 or bfloat16 where those are float32.
inline void check_block_type(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check_floating(like_name, like);
  const auto type = t.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  LFM_CHECK(type == like.scalar_type() || (half && like.scalar_type() == ScalarType::Float), name,
            " must have the dtype of ", like_name, ", ", dtype_name(like.scalar_type()),
            " (or be float16 or bfloat16 where that is float32), got ", dtype_name(type));
}

// CSR of N rows: rowptr [N + 1] int64, col [nnz] int32, both contiguous.
inline void check_csr(const Tensor& rowptr, const Tensor& col) {
  check_dim("rowptr", rowptr, 1);
  check_dim("col", col, 1);
  check_dtype("rowptr", rowptr, ScalarType::Long, "int64");
  check_dtype("col", col, ScalarType::Int, "int32");
  check_contiguous("rowptr", rowptr);
  check_contiguous("col", col);
  LFM_CHECK(rowptr.size(0) >= 1, "rowptr must have N + 1 entries, got none");
}

// Calls body with a null pointer of the C++ type of the tensor: float* or double*.
template <class Body>
void dispatch_floating(const char* name, const Tensor& t, Body&& body) {
  check_floating(name, t);
  if (t.scalar_type() == ScalarType::Float) {
    body(static_cast<float*>(nullptr));
  } else {
    body(static_cast<double*>(nullptr));
  }
}

}  // namespace lfm
