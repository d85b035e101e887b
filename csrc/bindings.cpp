// The only pybind11 file: addresses, sizes and strides come in as integers; an error goes out as an exception.
// Everything was checked in Python (fastdiff/ops/*/__init__.py); nothing here knows a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "common/normal.h"
#include "cpu/parallel.h"
#include "cuda/group_norm_plan.h"
#include "fastdiff.h"

#ifdef FASTDIFF_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;
using namespace fastdiff;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

#ifdef FASTDIFF_WITH_CUDA
void check(int status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}
#endif

// A property that shows a pointer as its address.
#define ADDRESS(Params, name)                                                       \
    def_property(                                                                   \
        #name, [](const Params& p) { return reinterpret_cast<uintptr_t>(p.name); }, \
        [](Params& p, uintptr_t address) { p.name = pointer<std::remove_pointer_t<decltype(p.name)>>(address); })

// A call's own address in the place of the one that its parameters were prepared with. What is absent stays absent,
// since sizes and strides were prepared for it, too.
template <class T>
void replace(T*& address, uintptr_t given, const char* name) {
    if ((address == nullptr) != (given == 0))
        throw std::invalid_argument(std::string(name) + (given
                                                             ? " must be 0: the parameters were prepared without it"
                                                             : " must be an address: the parameters have one; got 0"));
    address = pointer<T>(given);
}

// The parameters of one call: a copy, since threads share what was prepared.
GroupNormSiluParams at(GroupNormSiluParams p, uintptr_t x, uintptr_t x2, uintptr_t add, uintptr_t out) {
    replace(p.x.data, x, "x");
    replace(p.x2.data, x2, "x2");
    replace(p.add.data, add, "add");
    replace(p.out.data, out, "out");
    return p;
}

ConvEpilogueParams at(ConvEpilogueParams p, uintptr_t x, uintptr_t add, uintptr_t residual, uintptr_t out) {
    replace(p.x.data, x, "x");
    replace(p.shift, add, "add");
    replace(p.residual.data, residual, "residual");
    replace(p.out.data, out, "out");
    return p;
}

WinogradConvParams at(WinogradConvParams p, uintptr_t x, uintptr_t residual, uintptr_t out) {
    replace(p.x, x, "x");
    replace(p.residual, residual, "residual");
    replace(p.out, out, "out");
    return p;
}

AttentionParams at(AttentionParams p, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out) {
    replace(p.q.data, q, "q");
    replace(p.k.data, k, "k");
    replace(p.v.data, v, "v");
    replace(p.out.data, out, "out");
    return p;
}

std::vector<uint32_t> philox4x32(const std::vector<uint32_t>& counter, uint32_t k0, uint32_t k1) {
    if (counter.size() != 4) throw std::invalid_argument("a Philox counter has four words");
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    philox<Scalar>(c, k0, k1);
    return {c[0], c[1], c[2], c[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "fastdiff's compiled kernels; the public functions are in fastdiff.ops";

    py::class_<View>(m, "View")
        .def(py::init([](uintptr_t data, int dtype, int64_t batch_stride, int64_t inner, int64_t outer_stride,
                         int64_t inner_stride) {
                 return View{pointer<void>(data), dtype, batch_stride, inner, outer_stride, inner_stride};
             }),
             py::arg("data"), py::arg("dtype"), py::arg("batch_stride"), py::arg("inner"), py::arg("outer_stride"),
             py::arg("inner_stride"))
        .ADDRESS(View, data);

    py::class_<NoiseKey>(m, "NoiseKey")
        .def(py::init([](uint64_t seed, int64_t sample_offset, uintptr_t seeds, uintptr_t samples) {
                 return NoiseKey{pointer<const int64_t>(seeds), pointer<const int64_t>(samples), seed, sample_offset};
             }),
             py::arg("seed") = 0, py::arg("sample_offset") = 0, py::arg("seeds") = 0, py::arg("samples") = 0);

    py::class_<RandnParams>(m, "RandnParams")
        .def(py::init<>())
        .def_readwrite("batch", &RandnParams::batch)
        .def_readwrite("n", &RandnParams::n)
        .def_readwrite("out", &RandnParams::out)
        .def_readwrite("key", &RandnParams::key)
        .def_readwrite("draw", &RandnParams::draw)
        .def_readwrite("stream", &RandnParams::stream);

    py::class_<AddNoiseParams>(m, "AddNoiseParams")
        .def(py::init<>())
        .def_readwrite("batch", &AddNoiseParams::batch)
        .def_readwrite("n", &AddNoiseParams::n)
        .def_readwrite("T", &AddNoiseParams::T)
        .def_readwrite("x0", &AddNoiseParams::x0)
        .def_readwrite("noise", &AddNoiseParams::noise)
        .def_readwrite("out", &AddNoiseParams::out)
        .def_readwrite("noise_out", &AddNoiseParams::noise_out)
        .ADDRESS(AddNoiseParams, coefficients)
        .ADDRESS(AddNoiseParams, timesteps)
        .def_readwrite("timestep", &AddNoiseParams::timestep)
        .def_readwrite("key", &AddNoiseParams::key)
        .def_readwrite("draw", &AddNoiseParams::draw)
        .def_readwrite("stream", &AddNoiseParams::stream);

    py::class_<UpdateParams>(m, "UpdateParams")
        .def(py::init<>())
        .def_readwrite("batch", &UpdateParams::batch)
        .def_readwrite("n", &UpdateParams::n)
        .ADDRESS(UpdateParams, table)
        .def_readwrite("row", &UpdateParams::row)
        .ADDRESS(UpdateParams, step)
        .def_readwrite("n_outputs", &UpdateParams::n_outputs)
        .def("set_output", [](UpdateParams& p, int i, const View& v) { p.outputs[i] = v; })
        .def("set_dense_output",  // the one output, contiguous
             [](UpdateParams& p, uintptr_t data, int dtype) {
                 p.n_outputs = 1;
                 p.outputs[0] = View{pointer<void>(data), dtype, p.n, p.n > 0 ? p.n : 1, 0, 1};
             })
        .def_readwrite("variance", &UpdateParams::variance)
        .ADDRESS(UpdateParams, x)
        .ADDRESS(UpdateParams, anchor)
        .def("set_slot", [](UpdateParams& p, int i, uintptr_t in) { p.slots[i] = pointer<const float>(in); })
        .ADDRESS(UpdateParams, noise)
        .ADDRESS(UpdateParams, gain)
        .ADDRESS(UpdateParams, clip)
        .ADDRESS(UpdateParams, gradient)
        .ADDRESS(UpdateParams, mask)
        .ADDRESS(UpdateParams, known)
        .ADDRESS(UpdateParams, known_noise)
        .ADDRESS(UpdateParams, x_out)
        .ADDRESS(UpdateParams, anchor_out)
        .def("set_slot_out", [](UpdateParams& p, int i, uintptr_t out) { p.slots_out[i] = pointer<float>(out); })
        .ADDRESS(UpdateParams, x0_out)
        .def_readwrite("model_input", &UpdateParams::model_input)
        .def_readwrite("key", &UpdateParams::key)
        .ADDRESS(UpdateParams, nonfinite)
        .ADDRESS(UpdateParams, deviance);

    py::class_<Planes>(m, "Planes")
        .def(py::init([](uintptr_t data, int64_t batch_stride, int64_t channel_stride, int64_t pixel_stride) {
                 return Planes{pointer<void>(data), batch_stride, channel_stride, pixel_stride};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("channel_stride"), py::arg("pixel_stride"));

    py::class_<Channels>(m, "Channels")
        .def(py::init([](uintptr_t data, int dtype, int64_t batch_stride) {
                 return Channels{pointer<const void>(data), dtype, batch_stride};
             }),
             py::arg("data"), py::arg("dtype"), py::arg("batch_stride") = 0);

    py::class_<GroupNormSiluParams>(m, "GroupNormSiluParams")
        .def(py::init<>())
        .def_readwrite("batch", &GroupNormSiluParams::batch)
        .def_readwrite("channels", &GroupNormSiluParams::channels)
        .def_readwrite("channels2", &GroupNormSiluParams::channels2)
        .def_readwrite("pixels", &GroupNormSiluParams::pixels)
        .def_readwrite("groups", &GroupNormSiluParams::groups)
        .def_readwrite("dtype", &GroupNormSiluParams::dtype)
        .def_readwrite("x", &GroupNormSiluParams::x)
        .def_readwrite("x2", &GroupNormSiluParams::x2)
        .def_readwrite("out", &GroupNormSiluParams::out)
        .def_readwrite("channels_last", &GroupNormSiluParams::channels_last)
        .def_readwrite("weight", &GroupNormSiluParams::weight)
        .def_readwrite("bias", &GroupNormSiluParams::bias)
        .def_readwrite("add", &GroupNormSiluParams::add)
        .def_readwrite("eps", &GroupNormSiluParams::eps)
        .def_readwrite("silu", &GroupNormSiluParams::silu)
        .def_readwrite("block_groups", &GroupNormSiluParams::block_groups)
        .def_readwrite("block_warps", &GroupNormSiluParams::block_warps)
        .def_readwrite("thread_vecs", &GroupNormSiluParams::thread_vecs);
    py::class_<ConvEpilogueParams>(m, "ConvEpilogueParams")
        .def(py::init<>())
        .def_readwrite("batch", &ConvEpilogueParams::batch)
        .def_readwrite("rows", &ConvEpilogueParams::rows)
        .def_readwrite("length", &ConvEpilogueParams::length)
        .def_readwrite("channels_last", &ConvEpilogueParams::channels_last)
        .def_readwrite("x", &ConvEpilogueParams::x)
        .def_readwrite("residual", &ConvEpilogueParams::residual)
        .def_readwrite("out", &ConvEpilogueParams::out)
        .ADDRESS(ConvEpilogueParams, shift)
        .def_readwrite("shift_stride", &ConvEpilogueParams::shift_stride)
        .def_readwrite("scale", &ConvEpilogueParams::scale);
    py::class_<WinogradConvParams>(m, "WinogradConvParams")
        .def(py::init<>())
        .def_readwrite("batch", &WinogradConvParams::batch)
        .def_readwrite("height", &WinogradConvParams::height)
        .def_readwrite("width", &WinogradConvParams::width)
        .def_readwrite("channels", &WinogradConvParams::channels)
        .def_readwrite("features", &WinogradConvParams::features)
        .def_readwrite("dtype", &WinogradConvParams::dtype)
        .def_readwrite("upsample", &WinogradConvParams::upsample)
        .def_readwrite("pairs", &WinogradConvParams::pairs)
        .ADDRESS(WinogradConvParams, x)
        .ADDRESS(WinogradConvParams, weights)
        .ADDRESS(WinogradConvParams, bias)
        .ADDRESS(WinogradConvParams, residual)
        .ADDRESS(WinogradConvParams, out);

    py::class_<Heads>(m, "Heads")
        .def(py::init([](uintptr_t data, int64_t batch_stride, int64_t head_stride, int64_t row_stride) {
                 return Heads{pointer<void>(data), batch_stride, head_stride, row_stride};
             }),
             py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"), py::arg("row_stride"));
    py::class_<AttentionParams>(m, "AttentionParams")
        .def(py::init<>())
        .def_readwrite("batch", &AttentionParams::batch)
        .def_readwrite("heads", &AttentionParams::heads)
        .def_readwrite("queries", &AttentionParams::queries)
        .def_readwrite("keys", &AttentionParams::keys)
        .def_readwrite("channels", &AttentionParams::channels)
        .def_readwrite("dtype", &AttentionParams::dtype)
        .def_readwrite("scale", &AttentionParams::scale)
        .def_readwrite("q", &AttentionParams::q)
        .def_readwrite("k", &AttentionParams::k)
        .def_readwrite("v", &AttentionParams::v)
        .def_readwrite("out", &AttentionParams::out);

    using Released = py::call_guard<py::gil_scoped_release>;
#define FASTDIFF_BIND_CPU(op, Params) m.def(#op "_cpu", &op##_cpu, Released());
    FASTDIFF_OPERATIONS(FASTDIFF_BIND_CPU)
    // The same with a call's own addresses, 0 for what is absent: parameters are prepared once a layer and shape.
    m.def("group_norm_silu_cpu_at",
          [](const GroupNormSiluParams& params, int threads, uintptr_t x, uintptr_t x2, uintptr_t add, uintptr_t out) {
              const GroupNormSiluParams p = at(params, x, x2, add, out);
              py::gil_scoped_release released;
              group_norm_silu_cpu(p, threads);
          });
    m.def("conv_epilogue_cpu_at", [](const ConvEpilogueParams& params, int threads, uintptr_t x, uintptr_t add,
                                     uintptr_t residual, uintptr_t out) {
        const ConvEpilogueParams p = at(params, x, add, residual, out);
        py::gil_scoped_release released;
        conv_epilogue_cpu(p, threads);
    });
    m.def("winograd_conv_cpu_at",
          [](const WinogradConvParams& params, int threads, uintptr_t x, uintptr_t residual, uintptr_t out) {
              const WinogradConvParams p = at(params, x, residual, out);
              py::gil_scoped_release released;
              winograd_conv_cpu(p, threads);
          });
    m.def("attention_cpu_at",
          [](const AttentionParams& params, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out) {
              const AttentionParams p = at(params, q, k, v, out);
              py::gil_scoped_release released;
              attention_cpu(p, threads);
          });
    m.def(
        "group_norm_silu_plan",
        [](const GroupNormSiluParams& p) -> py::object {
            const GroupNormPlan plan = plan_group_norm(p);
            if (plan.refusal) return py::str(plan.refusal);
            return py::make_tuple(plan.groups, plan.warps, plan.vecs);
        },
        "the CUDA kernel's groups a block, warps a block and vectors a thread; or why it does not serve");
    m.def("cpu_simd", &cpu_simd, "avx512, avx2 or portable: the kernels in use");
    m.def("set_cpu_simd", &set_cpu_simd, "use other kernels; False where this CPU lacks them");
    m.def("cpu_bfloat16", &cpu_bfloat16, "matrix, vector or nothing: what multiplies bfloat16 numbers here");
    m.def("philox4x32", &philox4x32, "one Philox4x32-10 block, for its known answers");
    m.attr("with_cuda") =
#ifdef FASTDIFF_WITH_CUDA
        true;
    m.attr("cuda_version") = CUDART_VERSION;
#define FASTDIFF_BIND_CUDA(op, Params) \
    m.def(#op "_cuda",                 \
          [](const Params& p, uintptr_t stream) { check(op##_cuda(p, pointer<void>(stream)), #op "_cuda"); });
    FASTDIFF_CUDA_OPERATIONS(FASTDIFF_BIND_CUDA)
    m.def("group_norm_silu_cuda_at",
          [](const GroupNormSiluParams& p, uintptr_t stream, uintptr_t x, uintptr_t x2, uintptr_t add, uintptr_t out) {
              check(group_norm_silu_cuda(at(p, x, x2, add, out), pointer<void>(stream)), "group_norm_silu_cuda");
          });
    // The number of devices that this runtime can use under the installed driver; an error says why there are none.
    m.def("cuda_device_count", [] {
        int count = 0;
        check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
        return count;
    });
#else
        false;
#endif
}
