// Python bindings of kernels.h; no other file includes pybind11. A matrix arrives as the tuple (pointer, rows, cols,
// row_stride, col_stride, dtype). Python has validated all shapes (fedspine_edge/kernels). Every call releases the GIL.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;
using namespace fedspine;

namespace {

// Increased with every change of the functions below; fedspine_edge/kernels/native.py expects the same number.
constexpr int kInterface = 2;

Matrix matrix(const py::tuple& t) {
  return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          static_cast<DType>(t[5].cast<int>())};
}

ImportanceArgs importance_args(const py::tuple& weight, const py::tuple& lora_a, const py::tuple& lora_b,
                               const py::tuple& grad_a, const py::tuple& grad_b, float scaling, uintptr_t group,
                               bool by_row, int64_t num_groups, int metric, uintptr_t scores) {
  return {matrix(weight),
          matrix(lora_a),
          matrix(lora_b),
          matrix(grad_a),
          matrix(grad_b),
          scaling,
          reinterpret_cast<const int32_t*>(group),
          by_row,
          num_groups,
          static_cast<Metric>(metric),
          reinterpret_cast<float*>(scores)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of fedspine_edge; use fedspine_edge.kernels.ops.";
  m.attr("interface") = kInterface;
  m.attr("pointer_bits") = static_cast<int>(sizeof(void*) * 8);
  m.attr("compiler") = FEDSPINE_COMPILER;
  m.attr("version") = FEDSPINE_VERSION;
  m.attr("cuda_architectures") = FEDSPINE_CUDA_ARCHITECTURES;
  m.def("cpu_isa", &cpu_isa);

  m.def(
      "importance_accumulate_cpu", [](const py::tuple& weight, const py::tuple& lora_a, const py::tuple& lora_b,
                                      const py::tuple& grad_a, const py::tuple& grad_b, float scaling, uintptr_t group,
                                      bool by_row, int64_t num_groups, int metric, uintptr_t scores, int threads) {
        const ImportanceArgs args =
            importance_args(weight, lora_a, lora_b, grad_a, grad_b, scaling, group, by_row, num_groups, metric, scores);
        py::gil_scoped_release release;
        importance_accumulate_cpu(args, threads);
      });

  m.def("lora_linear_project_cpu",
        [](const py::tuple& out, const py::tuple& x, const py::tuple& small, float alpha, int threads) {
          const Matrix o = matrix(out), i = matrix(x), s = matrix(small);
          py::gil_scoped_release release;
          lora_linear_project_cpu(o, i, s, alpha, threads);
        });

  m.def("gather_cpu",
        [](const py::tuple& out, const py::tuple& in, uintptr_t index, bool by_row, int item_bytes, int threads) {
          const Matrix o = matrix(out), i = matrix(in);
          py::gil_scoped_release release;
          gather_cpu(o, i, reinterpret_cast<const int64_t*>(index), by_row, item_bytes, threads);
        });

  m.def("rms_norm_cpu", [](const py::tuple& out, uintptr_t rstd, const py::tuple& x, const py::tuple& weight,
                           float epsilon, int threads) {
    const Matrix o = matrix(out), i = matrix(x), w = matrix(weight);
    py::gil_scoped_release release;
    rms_norm_cpu(o, reinterpret_cast<float*>(rstd), i, w, epsilon, threads);
  });
  m.def("rms_norm_backward_cpu", [](const py::tuple& grad_x, const py::tuple& grad, const py::tuple& x,
                                    const py::tuple& weight, uintptr_t rstd, int threads) {
    const Matrix o = matrix(grad_x), g = matrix(grad), i = matrix(x), w = matrix(weight);
    py::gil_scoped_release release;
    rms_norm_backward_cpu(o, g, i, w, reinterpret_cast<float*>(rstd), threads);
  });
  m.def("swiglu_cpu", [](const py::tuple& out, const py::tuple& gate, const py::tuple& up, int threads) {
    const Matrix o = matrix(out), g = matrix(gate), u = matrix(up);
    py::gil_scoped_release release;
    swiglu_cpu(o, g, u, threads);
  });
  m.def("swiglu_backward_cpu", [](const py::tuple& grad_gate, const py::tuple& grad_up, const py::tuple& grad,
                                  const py::tuple& gate, const py::tuple& up, int threads) {
    const Matrix dg = matrix(grad_gate), du = matrix(grad_up), dy = matrix(grad), g = matrix(gate), u = matrix(up);
    py::gil_scoped_release release;
    swiglu_backward_cpu(dg, du, dy, g, u, threads);
  });

#ifdef FEDSPINE_WITH_CUDA
  m.attr("cuda") = true;
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("importance_accumulate_workspace_floats", &importance_accumulate_workspace_floats);
  m.def("lora_linear_workspace_floats", &lora_linear_workspace_floats);
  m.def("importance_accumulate_cuda", [](const py::tuple& weight, const py::tuple& lora_a, const py::tuple& lora_b,
                                         const py::tuple& grad_a, const py::tuple& grad_b, float scaling,
                                         uintptr_t group, bool by_row, int64_t num_groups, int metric, uintptr_t scores,
                                         bool tensor_cores, uintptr_t workspace, int device, uintptr_t stream) {
    const ImportanceArgs args =
        importance_args(weight, lora_a, lora_b, grad_a, grad_b, scaling, group, by_row, num_groups, metric, scores);
    py::gil_scoped_release release;
    importance_accumulate_cuda(args, tensor_cores, reinterpret_cast<float*>(workspace), device, stream);
  });
  m.def("lora_linear_expand_cuda", [](const py::tuple& out, const py::tuple& left, const py::tuple& right, float alpha,
                                      bool tensor_cores, int device, uintptr_t stream) {
    const Matrix o = matrix(out), l = matrix(left), r = matrix(right);
    py::gil_scoped_release release;
    lora_linear_expand_cuda(o, l, r, alpha, tensor_cores, device, stream);
  });
  using Reduction = void (*)(const Matrix&, const Matrix&, const Matrix&, float, bool, float*, int, uintptr_t);
  const auto reduction = [&m](const char* name, Reduction run) {
    m.def(name, [run](const py::tuple& out, const py::tuple& first, const py::tuple& second, float alpha,
                      bool tensor_cores, uintptr_t workspace, int device, uintptr_t stream) {
      const Matrix o = matrix(out), a = matrix(first), b = matrix(second);
      py::gil_scoped_release release;
      run(o, a, b, alpha, tensor_cores, reinterpret_cast<float*>(workspace), device, stream);
    });
  };
  reduction("lora_linear_project_cuda", &lora_linear_project_cuda);
  reduction("lora_linear_gradient_cuda", &lora_linear_gradient_cuda);
  m.def("gather_cuda", [](const py::tuple& out, const py::tuple& in, uintptr_t index, bool by_row, int item_bytes,
                          int device, uintptr_t stream) {
    const Matrix o = matrix(out), i = matrix(in);
    py::gil_scoped_release release;
    gather_cuda(o, i, reinterpret_cast<const int64_t*>(index), by_row, item_bytes, device, stream);
  });

  m.def("importance_accumulate_naive_cuda",
        [](const py::tuple& weight, const py::tuple& lora_a, const py::tuple& lora_b, const py::tuple& grad_a,
           const py::tuple& grad_b, float scaling, uintptr_t group, bool by_row, int64_t num_groups, int metric,
           uintptr_t scores, int device, uintptr_t stream) {
          const ImportanceArgs args = importance_args(weight, lora_a, lora_b, grad_a, grad_b, scaling, group, by_row,
                                                      num_groups, metric, scores);
          py::gil_scoped_release release;
          importance_accumulate_naive_cuda(args, device, stream);
        });
  m.def("lora_linear_product_naive_cuda", [](const py::tuple& out, const py::tuple& left, const py::tuple& right,
                                             float alpha, bool accumulate, int device, uintptr_t stream) {
    const Matrix o = matrix(out), l = matrix(left), r = matrix(right);
    py::gil_scoped_release release;
    lora_linear_product_naive_cuda(o, l, r, alpha, accumulate, device, stream);
  });
  m.def("gather_naive_cuda", [](const py::tuple& out, const py::tuple& in, uintptr_t index, bool by_row, int item_bytes,
                                int device, uintptr_t stream) {
    const Matrix o = matrix(out), i = matrix(in);
    py::gil_scoped_release release;
    gather_naive_cuda(o, i, reinterpret_cast<const int64_t*>(index), by_row, item_bytes, device, stream);
  });
#else
  m.attr("cuda") = false;
#endif
}
