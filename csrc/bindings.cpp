// The only file that knows Python. arc_topk/_C.pyi documents what it exposes.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "build_info.h"
#include "compress/make_plan.h"
#include "compress/warmup.h"
#include "ddp/comm_hook.h"

namespace py = pybind11;

namespace arc_topk {
namespace {

FeedbackKind feedback_named(const std::string& name) {
  if (name == "none") return FeedbackKind::kNone;
  if (name == "ef14") return FeedbackKind::kEF14;
  if (name == "ef21") return FeedbackKind::kEF21;
  if (name == "ef21m") return FeedbackKind::kEF21M;
  throw std::invalid_argument("feedback is '" + name +
                              "'; expected 'none', 'ef14', 'ef21' or 'ef21m'");
}

std::optional<DType> optional_type(const std::optional<at::ScalarType>& type,
                                   DType (*its_type)(at::ScalarType)) {
  if (!type) return std::nullopt;
  return its_type(*type);
}

Config make_config(std::string compressor, const std::string& feedback, double ratio,
                   std::optional<int64_t> rank, int64_t sketch_dim,
                   std::optional<int64_t> row_width, double eta, int64_t start_step,
                   int64_t warmup_steps, std::string warmup,
                   std::optional<at::ScalarType> wire_dtype,
                   std::optional<at::ScalarType> sketch_dtype,
                   std::optional<at::ScalarType> state_dtype, uint64_t seed,
                   std::optional<double> spike_limit, int64_t check_every,
                   std::optional<int64_t> resync_every, bool adaptive) {
  compressor_named(compressor);
  return {std::move(compressor),
          feedback_named(feedback),
          ratio,
          rank,
          sketch_dim,
          row_width,
          eta,
          start_step,
          warmup_steps,
          std::move(warmup),
          optional_type(wire_dtype, wire_type_of),
          optional_type(sketch_dtype, dtype_of),
          optional_type(state_dtype, dtype_of),
          seed,
          spike_limit,
          check_every,
          resync_every,
          adaptive};
}

// A lane may need the GIL to finish (a Python callback on a future): whoever lets the engine go
// must not hold it while joining that thread.
struct DeleteWithoutGil {
  void operator()(Exchange* exchange) const {
    if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
      const py::gil_scoped_release release;
      delete exchange;
    } else {
      delete exchange;
    }
  }
};

py::dict as_dict(const Metrics& m) {
  py::dict seconds;
  for (int i = 0; i < kNumPhases; ++i) seconds[name_of(static_cast<Phase>(i))] = m.seconds[i];
  py::dict dict;
  dict["steps"] = m.steps;
  dict["compressed_steps"] = m.compressed_steps;
  dict["exchanges"] = m.exchanges;
  dict["collectives"] = m.collectives;
  dict["wire_bytes"] = m.wire_bytes;
  dict["dense_bytes"] = m.dense_bytes;
  dict["link_bytes"] = static_cast<uint64_t>(m.link_bytes);
  const bool known = m.energy.total > 0 && std::isfinite(m.energy.total);
  dict["energy_captured"] =
      known ? m.energy.captured / m.energy.total : std::numeric_limits<double>::quiet_NaN();
  dict["seconds"] = seconds;
  return dict;
}

// A parameter's error feedback as Python has it: own_a, own_b, shared, basis, started.
using Part = std::optional<at::Tensor>;
using Parts = std::tuple<Part, Part, Part, Part, bool>;

Part part(const at::Tensor& tensor) { return tensor.defined() ? Part(tensor) : std::nullopt; }

py::tuple parts(const std::string& name, const std::optional<Kept>& kept) {
  if (!kept) return py::make_tuple(name, py::none());
  return py::make_tuple(name, Parts(part(kept->own_a), part(kept->own_b), part(kept->shared),
                                    part(kept->basis), kept->started));
}

std::optional<Kept> kept_of(const std::optional<Parts>& parts) {
  if (!parts) return std::nullopt;
  const auto& [own_a, own_b, shared, basis, started] = *parts;
  return Kept{own_a.value_or(at::Tensor()), own_b.value_or(at::Tensor()),
              shared.value_or(at::Tensor()), basis.value_or(at::Tensor()), started};
}

// How many own parts, and whether a shared one and a basis, a tensor has.
py::tuple parts_of(const Config& config, bool compressed) {
  const int own = compressed ? own_states(config.feedback) : 0;
  const bool shared =
      shares_estimate(config.feedback) && (compressed || has_momentum(config.feedback));
  const bool basis = compressed && compressor_named(config.compressor).factorises();
  return py::make_tuple(own, shared, basis);
}

// What make_plan() would decide of one tensor: (rows, cols, kept, wire, dense, state bytes,
// reason, steps between resyncs, bytes of one, what it travels in).
py::tuple describe(const Config& config, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, at::ScalarType dtype, int world_size,
                   double ratio) {
  const Compressor& compressor = compressor_named(config.compressor);
  const DType gradient = dtype_of(dtype);
  const Types types = types_for(config, compressor, gradient, world_size);
  Shape shape = shape_of(sizes, strides);
  shape.ratio = ratio;
  const Matrix m = view_as_matrix(config, compressor, shape, types, world_size);
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return py::make_tuple(m.rows, m.cols, m.kept, m.wire_bytes, numel * size_of(gradient),
                        m.state_bytes, m.why_dense,
                        m.kept > 0 ? resync_every(config, compressor, types, world_size) : 0,
                        m.resync_bytes, scalar_type_of(m.kept > 0 ? types.wire : types.dense));
}

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

// `own`: none, one or two, as Groups has them.
Groups groups_of(const Group& group, const std::vector<Group>& own) {
  return {group, own.empty() ? nullptr : own[0], own.size() < 2 ? nullptr : own[1]};
}

}  // namespace
}  // namespace arc_topk

PYBIND11_MODULE(_C, module) {
  using namespace arc_topk;

  py::class_<Config>(module, "Config")
      .def(py::init(&make_config), py::kw_only(), py::arg("compressor"), py::arg("feedback"),
           py::arg("ratio"), py::arg("rank"), py::arg("sketch_dim"), py::arg("row_width"),
           py::arg("eta"), py::arg("start_step"), py::arg("warmup_steps"), py::arg("warmup"),
           py::arg("wire_dtype"), py::arg("sketch_dtype"), py::arg("state_dtype"), py::arg("seed"),
           py::arg("spike_limit"), py::arg("check_every"), py::arg("resync_every"),
           py::arg("adaptive"))
      .def_readwrite("compress_without_gain", &Config::compress_without_gain);

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange")
      .def(py::init([](const Config& config, const Group& group, const std::vector<Group>& own) {
             return std::shared_ptr<Exchange>(new Exchange(config, groups_of(group, own)),
                                              DeleteWithoutGil());
           }),
           py::arg("config"), py::arg("group"), py::arg("own") = std::vector<Group>())
      .def(
          "start",
          [](Exchange& exchange, c10d::GradBucket& bucket) {
            // A C++ future of a tensor aborts in the reducer when a Python hook returns it: it must
            // come out of a then(), which also takes the tensor out of a process group's list.
            c10::intrusive_ptr<c10::ivalue::Future> future;
            {
              const py::gil_scoped_release release;
              future = exchange_bucket(exchange, bucket, /*result_in_buffer=*/true);
            }
            return std::make_shared<torch::jit::PythonFutureWrapper>(std::move(future));
          },
          py::arg("bucket"))
      .def("run", &Exchange::run, py::arg("buffer"), py::arg("parameters"), without_gil)
      .def("check_bind", &Exchange::check_bind, py::arg("parameters"), py::arg("names"))
      .def("bind", &Exchange::bind, py::arg("parameters"), py::arg("names"),
           py::arg("may_be_unused"), py::arg("ratios") = std::vector<double>())
      .def(
          "set_loss_scale",
          [](Exchange& exchange, const std::optional<at::Tensor>& scale) {
            exchange.set_loss_scale(scale.value_or(at::Tensor()));
          },
          py::arg("scale"))
      .def("check_idle", &Exchange::check_idle)
      .def("rescale", &Exchange::rescale, py::arg("factor"))
      .def("stop", &Exchange::stop, without_gil)
      .def("standing",
           [](const Exchange& exchange) {
             const Standing standing = exchange.standing();
             return std::make_tuple(standing.exchanges, standing.started, exchange.failed());
           })
      .def(
          "resume",
          [](Exchange& exchange, const Group& group, const std::vector<Group>& own,
             uint64_t exchanges,
             bool afresh) { exchange.resume(groups_of(group, own), exchanges, afresh); },
          py::arg("group"), py::arg("own"), py::arg("exchanges"), py::arg("afresh"))
      .def("snapshot",
           [](Exchange& exchange) {
             const Exchange::Saved saved = exchange.snapshot();
             py::list slots;
             for (const auto& [name, kept] : saved.slots) slots.append(parts(name, kept));
             return py::make_tuple(slots, saved.exchanges, saved.compressed);
           })
      .def(
          "restore",
          [](Exchange& exchange, const std::vector<std::optional<Parts>>& slots, uint64_t exchanges,
             uint64_t compressed) {
            std::vector<std::optional<Kept>> kept;
            for (const auto& parts : slots) kept.push_back(kept_of(parts));
            exchange.restore(std::move(kept), exchanges, compressed);
          },
          py::arg("slots"), py::arg("exchanges"), py::arg("compressed"))
      .def("metrics", [](const Exchange& exchange) { return as_dict(exchange.metrics()); })
      .def("reset_metrics", &Exchange::reset_metrics)
      .def("choice",
           [](const Exchange& exchange) -> py::object {
             const std::optional<Adaptive::Report> report = exchange.choice();
             if (!report) return py::none();
             py::list forms;
             for (const Form form : report->forms) forms.append(name_of(form));
             return py::make_tuple(report->step, forms, report->seconds);
           })
      .def_property_readonly("steps", &Exchange::steps);

  module.def(
      "register_comm_hook",
      [](const std::shared_ptr<c10d::Reducer>& reducer, std::shared_ptr<Exchange> exchange) {
        reducer->register_comm_hook(std::make_unique<CommHook>(std::move(exchange)));
      },
      py::arg("reducer"), py::arg("exchange"));
  module.def("parts_of", &parts_of, py::arg("config"), py::arg("compressed"));
  module.def("describe", &describe, py::arg("config"), py::arg("sizes"), py::arg("strides"),
             py::arg("dtype"), py::arg("world_size"), py::arg("ratio"));
  module.def(
      "ratio_at",
      [](const Config& config, double ratio, uint64_t step) {
        return ratio_in_stage(config, ratio, warmup_stage(config, step));
      },
      py::arg("config"), py::arg("ratio"), py::arg("step"));
  module.def("cpu_isa", &cpu_isa);
  module.def(
      "why_unusable",
      [](int device) {
        const Kernels* kernels = cuda_kernels();
        return kernels != nullptr ? kernels->why_unusable(device)
                                  : "this build has no CUDA kernels, it was made without nvcc";
      },
      py::arg("device"));
  module.def("build_info", [] {
    const BuildInfo info = build_info();
    py::dict dict;
    dict["torch"] = info.torch;
    dict["compiler"] = info.compiler;
    dict["cuda"] = py::none();
    if (info.cuda) {
      py::dict cuda;
      cuda["toolkit"] = info.cuda->toolkit;
      cuda["architectures"] = info.cuda->architectures;
      dict["cuda"] = cuda;
    }
    return dict;
  });
}
