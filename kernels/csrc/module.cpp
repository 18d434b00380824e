// The Python module. Every argument has a name. Tensors come as addresses: their owner,
// cpu/stored.py, checks and keeps them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "decoder_layer.h"
#include "linear.h"
#include "proposal.h"
#include "router.h"
#include "sparse_ffn.h"

namespace {

using ffn::Act;
using ffn::Activation;
using ffn::Batch;
using ffn::DType;
using ffn::Isa;
using ffn::Limits;
using ffn::Weights;

constexpr const char *kCapsule = "moe_tools.ffn", *kLinear = "moe_tools.linear",
                     *kLayer = "moe_tools.decoder_layer", *kProposal = "moe_tools.proposal",
                     *kRouter = "moe_tools.router";

struct PythonError {};  // thrown where Python's own error is set already

template <class T>
T* address(unsigned long long value) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

// The keyword arguments of a call. Every one is asked for once; in the order of the caller, that
// costs a comparison each.
class Arguments {
  public:
    Arguments(PyObject* const* values, PyObject* names)
        : values_(values), names_(names), count_(names ? PyTuple_GET_SIZE(names) : 0) {}

    template <class T>
    T* tensor(const char* name) {
        return address<T>(checked(PyLong_AsUnsignedLongLong(find(name))));
    }
    std::int64_t integer(const char* name) { return checked(PyLong_AsLongLong(find(name))); }
    double real(const char* name) { return checked(PyFloat_AsDouble(find(name))); }

    // What a capsule holds; null for None.
    template <class Kind>
    const Kind* prepared(const char* name, const char* capsule) {
        PyObject* given = find(name);
        if (given == Py_None) return nullptr;
        const auto* made = static_cast<const Kind*>(PyCapsule_GetPointer(given, capsule));
        if (!made) throw PythonError();
        return made;
    }

    // An integer below `end`, as what it stands for.
    template <class Code>
    Code code(const char* name, int end) {
        const std::int64_t value = integer(name);
        if (value >= 0 && value < end) return Code(value);
        PyErr_Format(PyExc_ValueError, "%s is %lld: codes go from 0 to %d", name,
                     static_cast<long long>(value), end - 1);
        throw PythonError();
    }

    // Raises if the caller gave one that nobody asked for.
    void finish() const {
        for (Py_ssize_t i = 0; i < count_; ++i) {
            if (i < kMost && found_ >> i & 1) continue;
            PyErr_Format(PyExc_TypeError, "nobody knows %R", PyTuple_GET_ITEM(names_, i));
            throw PythonError();
        }
    }

  private:
    static constexpr Py_ssize_t kMost = 64;

    PyObject* find(const char* name) {
        for (Py_ssize_t tries = 0; tries < count_; ++tries) {
            const Py_ssize_t at = next_;
            next_ = at + 1 < count_ ? at + 1 : 0;
            const char* given = PyUnicode_AsUTF8(PyTuple_GET_ITEM(names_, at));
            if (!given) throw PythonError();
            if (std::strcmp(given, name)) continue;
            if (at < kMost) found_ |= std::uint64_t{1} << at;
            return values_[at];
        }
        PyErr_Format(PyExc_TypeError, "%s is missing", name);
        throw PythonError();
    }

    template <class T>
    static T checked(T value) {
        if (value == T(-1) && PyErr_Occurred()) throw PythonError();
        return value;
    }

    PyObject* const* values_;
    PyObject* names_;
    Py_ssize_t count_, next_ = 0;
    std::uint64_t found_ = 0;  // which of the first 64 were asked for
};

// Calls the body and makes Python exceptions of what it throws: none may cross the C API. Not
// `catch (...)`: with that, Python could not end a thread that waits for the interpreter's lock.
template <class Body>
PyObject* guarded(const Body& body) {
    try {
        return body();
    } catch (const PythonError&) {
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

// Weights and what to run them with.
struct Prepared {
    Weights weights;
    const Isa* isa;
};

struct PreparedLinear {
    ffn::Linear weights;
    const Isa* isa;
};

struct PreparedLayer {
    ffn::DecoderLayer layer;
    const Isa* isa;
};

struct PreparedProposal {
    ffn::Proposal proposal;
    const Isa* isa;
};

struct PreparedRouter {
    ffn::Router router;
    const Isa* isa;
};

// Hands what was prepared to Python, which deletes it.
template <class Kind>
PyObject* capsule(Kind made, const char* name) {
    auto owned = std::make_unique<Kind>(std::move(made));
    PyObject* capsule = PyCapsule_New(owned.get(), name, [](PyObject* self) {
        delete static_cast<Kind*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
    });
    if (capsule) owned.release();
    return capsule;
}

// An instruction set that runs here.
const Isa* read_isa(Arguments& from) {
    const Isa* isa = ffn::kIsas[from.code<int>("isa", int(std::size(ffn::kIsas)))];
    if (isa->runs_here()) return isa;
    PyErr_Format(PyExc_ValueError, "this CPU does not run %s", isa->name);
    throw PythonError();
}

Prepared read_prepared(Arguments from) {
    Prepared made{};
    Weights& weights = made.weights;
    weights.rows_FPD = from.tensor<const std::byte>("rows_FPB");
    weights.biases_FP = from.tensor<const float>("biases_FP");
    weights.off_F = from.tensor<const float>("off_F");
    weights.down_D = from.tensor<const float>("down_D");
    weights.neurons = from.integer("neurons");
    weights.width = from.integer("width");
    weights.lines = from.integer("lines");
    weights.inputs = 1 + from.code<int>("gated", 2);
    weights.dtype = from.code<DType>("dtype", ffn::kDTypes);
    weights.acts[0].kind = from.code<Act>("act", ffn::kActs);
    weights.acts[0].threshold = float(from.real("threshold"));
    weights.acts[1].kind = from.code<Act>("up_act", ffn::kActs);
    weights.acts[1].threshold = float(from.real("up_threshold"));
    weights.screen.rows_FD = from.tensor<const std::byte>("screen_FB");
    weights.screen.scales_F = from.tensor<const float>("screen_scale_F");
    weights.screen.errors_F = from.tensor<const float>("screen_error_F");
    weights.screen.reach = float(from.real("screen_reach"));
    made.isa = read_isa(from);
    from.finish();
    return made;
}

PreparedLinear read_linear(Arguments from) {
    PreparedLinear made{};
    made.weights.rows_ND = from.tensor<const std::byte>("rows_NB");
    made.weights.bias_N = from.tensor<const float>("bias_N");
    made.weights.rows = from.integer("rows");
    made.weights.width = from.integer("width");
    made.weights.lines = from.integer("lines");
    made.weights.dtype = from.code<DType>("dtype", ffn::kDTypes);
    made.weights.zero = float(from.real("zero"));
    made.isa = read_isa(from);
    from.finish();
    return made;
}

// The caller keeps the linears.
PreparedLayer read_layer(Arguments from) {
    PreparedLayer made{};
    ffn::DecoderLayer& layer = made.layer;
    const auto linear = [&](const char* name) {
        const auto* found = from.prepared<PreparedLinear>(name, kLinear);
        if (found) made.isa = found->isa;
        return found ? &found->weights : nullptr;
    };
    const auto norm = [&](const char* weight, const char* eps, const char* offset) {
        const void* weight_D = from.tensor<const void>(weight);
        return ffn::Norm{weight_D, layer.dtype, float(from.real(eps)), float(from.real(offset))};
    };
    layer.dtype = from.code<DType>("dtype", int(DType::i8));  // a float of any kind
    layer.width = from.integer("width");
    layer.query_heads = from.integer("query_heads");
    layer.key_heads = from.integer("key_heads");
    layer.head = from.integer("head");
    layer.scale = float(from.real("scale"));
    layer.q = linear("q");
    layer.k = linear("k");
    layer.v = linear("v");
    layer.o = linear("o");
    layer.gate = linear("gate");
    layer.up = linear("up");
    layer.down = linear("down");
    layer.act.kind = from.code<Act>("act", ffn::kActs);
    layer.act.threshold = float(from.real("threshold"));
    const auto* proposal = from.prepared<PreparedProposal>("proposal", kProposal);
    const auto* router = from.prepared<PreparedRouter>("router", kRouter);
    const auto* neurons = from.prepared<Prepared>("neurons", kCapsule);
    layer.proposal = proposal ? &proposal->proposal : nullptr;
    layer.router = router ? &router->router : nullptr;
    layer.neurons = neurons ? &neurons->weights : nullptr;
    layer.constant_D = from.tensor<const float>("constant_D");
    layer.before_attention = norm("before_attention", "before_attention_eps", "before_attention_offset");
    layer.of_queries = norm("of_queries", "of_queries_eps", "of_queries_offset");
    layer.of_keys = norm("of_keys", "of_keys_eps", "of_keys_offset");
    layer.behind_attention = norm("behind_attention", "behind_attention_eps", "behind_attention_offset");
    layer.before_ffn = norm("before_ffn", "before_ffn_eps", "before_ffn_offset");
    layer.behind_ffn = norm("behind_ffn", "behind_ffn_eps", "behind_ffn_offset");
    from.finish();
    return made;
}

PyObject* prepare_layer(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        return capsule(read_layer(Arguments(args, names)), kLayer);
    });
}

PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        return capsule(read_prepared(Arguments(args, names)), kCapsule);
    });
}

PyObject* prepare_linear(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        return capsule(read_linear(Arguments(args, names)), kLinear);
    });
}

// What a call of `run` says, but for the FFN.
struct Call {
    int threads;
    Batch batch;
    Limits limits;
};

Call read_call(Arguments from) {
    Call made{};
    made.threads = int(from.integer("threads"));
    made.batch.x_TD = from.tensor<const void>("x_TD");
    made.batch.dtype = from.code<DType>("dtype", int(DType::i8));  // a float of any kind
    made.batch.tokens = from.integer("tokens");
    made.batch.mask_TE = from.tensor<const std::uint8_t>("mask_TE");
    made.batch.experts = from.integer("experts");
    made.batch.y_TD = from.tensor<void>("y_TD");
    made.limits.few = from.integer("few");
    made.limits.most_few = from.real("most_few");
    made.limits.most_many = from.real("most_many");
    from.finish();
    return made;
}

// Runs the body without the interpreter's lock.
template <class Body>
void unlocked(const Body& body) {
    std::exception_ptr error;
    Py_BEGIN_ALLOW_THREADS;
    try {
        body();
    } catch (...) {
        error = std::current_exception();
    }
    Py_END_ALLOW_THREADS;
    if (error) std::rethrow_exception(error);
}

// Once a token and layer, hence without Python's parser of format strings.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 1) return PyErr_Format(PyExc_TypeError, "give the FFN, then names");
        const auto* ffn = static_cast<Prepared*>(PyCapsule_GetPointer(args[0], kCapsule));
        if (!ffn) throw PythonError();
        const Call call = read_call(Arguments(args + 1, names));
        std::int64_t read = 0;
        unlocked([&] {
            read = ffn::sparse_ffn(ffn->weights, call.batch, *ffn->isa, call.threads, call.limits);
        });
        return PyLong_FromLongLong(read);
    });
}

PyObject* multiply(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 1) return PyErr_Format(PyExc_TypeError, "give the linear, then names");
        const auto* made = static_cast<PreparedLinear*>(PyCapsule_GetPointer(args[0], kLinear));
        if (!made) throw PythonError();
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::Product product{};
        product.x_TD = from.tensor<const void>("x_TD");
        product.dtype = from.code<DType>("dtype", int(DType::i8));  // a float of any kind
        product.tokens = from.integer("tokens");
        product.y_TN = from.tensor<void>("y_TN");
        from.finish();
        unlocked([&] { ffn::linear(made->weights, product, *made->isa, threads); });
        Py_RETURN_NONE;
    });
}

// The caller keeps the linears.
PreparedProposal read_proposal(Arguments from) {
    PreparedProposal made{};
    const auto* gate = from.prepared<PreparedLinear>("gate", kLinear);
    const auto* up = from.prepared<PreparedLinear>("up", kLinear);
    if (!up) {
        PyErr_SetString(PyExc_ValueError, "a proposal needs rows of up");
        throw PythonError();
    }
    made.isa = up->isa;
    made.proposal.gate = gate ? &gate->weights : nullptr;
    made.proposal.up = &up->weights;
    made.proposal.act.kind = from.code<Act>("act", ffn::kActs);
    made.proposal.act.threshold = float(from.real("threshold"));
    made.proposal.up_act.kind = from.code<Act>("up_act", ffn::kActs);
    made.proposal.up_act.threshold = float(from.real("up_threshold"));
    made.proposal.norm_F = from.tensor<const float>("norm_F");
    from.finish();
    return made;
}

PyObject* prepare_proposal(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        return capsule(read_proposal(Arguments(args, names)), kProposal);
    });
}

// The caller keeps the linear and the bias.
PreparedRouter read_router(Arguments from) {
    PreparedRouter made{};
    const auto* weight = from.prepared<PreparedLinear>("weight", kLinear);
    if (!weight) {
        PyErr_SetString(PyExc_ValueError, "a router needs a weight");
        throw PythonError();
    }
    made.isa = weight->isa;
    made.router.weight = &weight->weights;
    made.router.bias_E = from.tensor<const float>("bias_E");
    made.router.by_rank = from.code<int>("by_rank", 2);
    from.finish();
    return made;
}

PyObject* prepare_router(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        return capsule(read_router(Arguments(args, names)), kRouter);
    });
}

PyObject* choose(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 1) return PyErr_Format(PyExc_TypeError, "give the router, then names");
        const auto* made = static_cast<PreparedRouter*>(PyCapsule_GetPointer(args[0], kRouter));
        if (!made) throw PythonError();
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        const void* x_TD = from.tensor<const void>("x_TD");
        const DType dtype = from.code<DType>("dtype", int(DType::i8));  // a float of any kind
        const std::int64_t tokens = from.integer("tokens");
        const float knob = float(from.real("knob"));
        auto* mask_TE = from.tensor<std::uint8_t>("mask_TE");
        from.finish();
        unlocked([&] {
            ffn::choose(made->router, x_TD, dtype, tokens, knob, mask_TE, *made->isa, threads);
        });
        Py_RETURN_NONE;
    });
}

PyObject* propose(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 1) return PyErr_Format(PyExc_TypeError, "give the proposal, then names");
        const auto* made = static_cast<PreparedProposal*>(PyCapsule_GetPointer(args[0], kProposal));
        if (!made) throw PythonError();
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        const void* x_TD = from.tensor<const void>("x_TD");
        const DType dtype = from.code<DType>("dtype", int(DType::i8));  // a float of any kind
        const std::int64_t tokens = from.integer("tokens");
        const float tau = float(from.real("tau"));
        auto* mask_TF = from.tensor<std::uint8_t>("mask_TF");
        from.finish();
        unlocked([&] {
            ffn::propose(made->proposal, x_TD, dtype, tokens, tau, mask_TF, *made->isa, threads);
        });
        Py_RETURN_NONE;
    });
}

const PreparedLayer& read_prepared_layer(PyObject* const* args, Py_ssize_t count) {
    if (count != 1) {
        PyErr_Format(PyExc_TypeError, "give the layer, then names");
        throw PythonError();
    }
    const auto* made = static_cast<PreparedLayer*>(PyCapsule_GetPointer(args[0], kLayer));
    if (!made) throw PythonError();
    return *made;
}

PyObject* new_heads(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const PreparedLayer& made = read_prepared_layer(args, count);
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::NewHeads call{};
        call.sequences = from.integer("sequences");
        call.h_BD = from.tensor<const void>("h_BD");
        call.cos_BW = from.tensor<const void>("cos_BW");
        call.sin_BW = from.tensor<const void>("sin_BW");
        call.positions = from.integer("positions");
        call.q_BHW = from.tensor<void>("q_BHW");
        call.k_BKW = from.tensor<void>("k_BKW");
        call.v_BKW = from.tensor<void>("v_BKW");
        from.finish();
        unlocked([&] { ffn::new_heads(made.layer, call, *made.isa, threads); });
        Py_RETURN_NONE;
    });
}

ffn::Cached read_cached(Arguments& from, const char* data, const char* sequence, const char* head,
                        const char* position) {
    ffn::Cached made{};
    made.data_BKSW = from.tensor<const char>(data);
    made.sequence = from.integer(sequence);
    made.head = from.integer(head);
    made.position = from.integer(position);
    return made;
}

PyObject* new_token(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const PreparedLayer& made = read_prepared_layer(args, count);
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::NewToken call{};
        call.sequences = from.integer("sequences");
        call.positions = from.integer("positions");
        call.h_BD = from.tensor<const void>("h_BD");
        call.q_BHW = from.tensor<const void>("q_BHW");
        call.keys = read_cached(from, "keys", "keys_sequence", "keys_head", "keys_position");
        call.values = read_cached(from, "values", "values_sequence", "values_head", "values_position");
        call.mask = from.code<ffn::Mask>("mask", 3);
        call.mask_dtype = from.code<DType>("mask_dtype", int(DType::i8));
        call.mask_BS = from.tensor<const void>("mask_BS");
        call.mask_sequence = from.integer("mask_sequence");
        call.knob = float(from.real("knob"));
        call.out_BD = from.tensor<void>("out_BD");
        call.x_BD = from.tensor<void>("x_BD");
        from.finish();
        unlocked([&] { ffn::new_token(made.layer, call, *made.isa, threads); });
        Py_RETURN_NONE;
    });
}

PyObject* run_stack(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 1 || !PyTuple_Check(args[0]) || !PyTuple_GET_SIZE(args[0]))
            return PyErr_Format(PyExc_TypeError, "give a tuple of layers, then names");
        std::vector<const ffn::DecoderLayer*> layers;
        const Isa* isa = nullptr;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); ++i) {
            PyObject* one = PyTuple_GET_ITEM(args[0], i);
            const auto* made = static_cast<PreparedLayer*>(PyCapsule_GetPointer(one, kLayer));
            if (!made) throw PythonError();
            layers.push_back(&made->layer);
            isa = made->isa;
        }
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::Stack call{};
        call.layers = std::int64_t(layers.size());
        call.sequences = from.integer("sequences");
        call.used = from.integer("used");
        call.h_BD = from.tensor<const void>("h_BD");
        call.cos_BW = from.tensor<const void>("cos_BW");
        call.sin_BW = from.tensor<const void>("sin_BW");
        call.positions = from.integer("positions");
        call.keys = from.tensor<void* const>("keys");
        call.values = from.tensor<void* const>("values");
        call.sequence = from.integer("sequence");
        call.head = from.integer("head");
        call.position = from.integer("position");
        call.mask = from.code<ffn::Mask>("mask", 3);
        call.mask_dtype = from.code<DType>("mask_dtype", int(DType::i8));
        call.mask_BS = from.tensor<const void>("mask_BS");
        call.mask_sequence = from.integer("mask_sequence");
        call.knobs = from.tensor<const double>("knobs");
        call.out_BD = from.tensor<void>("out_BD");
        from.finish();
        unlocked([&] { ffn::run_stack(layers.data(), call, *isa, threads); });
        Py_RETURN_NONE;
    });
}

PyObject* isas(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Isa* isa : ffn::kIsas) {
        if (!names || !isa->runs_here()) break;  // each one needs those before it
        PyObject* name = PyUnicode_FromString(isa->name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject* advise_huge_pages(PyObject*, PyObject* args) {
    unsigned long long start, bytes;
    if (!PyArg_ParseTuple(args, "KK", &start, &bytes)) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const auto page = static_cast<unsigned long long>(sysconf(_SC_PAGESIZE));
    const unsigned long long begin = (start + page - 1) / page * page;
    const unsigned long long end = (start + bytes) / page * page;
    // Advice: whether the kernel follows it changes the speed only.
    if (begin < end) madvise(address<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
    Py_RETURN_NONE;
}

template <class Function>
PyCFunction with_names(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"prepare", with_names(prepare), METH_FASTCALL | METH_KEYWORDS,
     "The handle of an FFN whose tensors the caller keeps."},
    {"run", with_names(run), METH_FASTCALL | METH_KEYWORDS,
     "Writes y; the number of rows read, or -1 if the tokens want more than the limits."},
    {"prepare_linear", with_names(prepare_linear), METH_FASTCALL | METH_KEYWORDS,
     "The handle of a linear whose tensors the caller keeps."},
    {"multiply", with_names(multiply), METH_FASTCALL | METH_KEYWORDS, "Writes y = x W^T + b."},
    {"prepare_layer", with_names(prepare_layer), METH_FASTCALL | METH_KEYWORDS,
     "The handle of a decoder layer whose linears and norms the caller keeps."},
    {"new_heads", with_names(new_heads), METH_FASTCALL | METH_KEYWORDS,
     "Writes queries, keys and values of new tokens."},
    {"new_token", with_names(new_token), METH_FASTCALL | METH_KEYWORDS,
     "Writes what a layer makes of new tokens, given keys and values."},
    {"run_stack", with_names(run_stack), METH_FASTCALL | METH_KEYWORDS,
     "Writes what layers make of new tokens, one behind the other, and appends to their caches."},
    {"prepare_router", with_names(prepare_router), METH_FASTCALL | METH_KEYWORDS,
     "The handle of a router whose linear and bias the caller keeps."},
    {"choose", with_names(choose), METH_FASTCALL | METH_KEYWORDS,
     "Writes the mask of the experts that a router chooses."},
    {"prepare_proposal", with_names(prepare_proposal), METH_FASTCALL | METH_KEYWORDS,
     "The handle of proposals whose linears and norms the caller keeps."},
    {"propose", with_names(propose), METH_FASTCALL | METH_KEYWORDS,
     "Writes the mask of the neurons whose score is above tau."},
    {"isas", isas, METH_NOARGS, "Instruction sets that run here, the fastest last."},
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, "Asks for huge pages; may be ignored."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sparse_ffn", nullptr, -1, methods,
                      nullptr,               nullptr,       nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__sparse_ffn() { return PyModule_Create(&module); }
