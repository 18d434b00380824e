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

#include "columns.h"
#include "decoder_layer.h"
#include "linear.h"
#include "proposal.h"
#include "read_rows.h"
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

struct PythonError {};  // thrown where Python's own error is set already

// What is prepared once, what to run it with, and the name of its capsule.
template <class Kind>
struct Prepared {
    Kind what;
    const Isa* isa;
};

template <class Kind>
constexpr const char* kName = nullptr;
template <>
constexpr const char* kName<Weights> = "moe_tools.ffn";
template <>
constexpr const char* kName<ffn::Linear> = "moe_tools.linear";
template <>
constexpr const char* kName<ffn::Columns> = "moe_tools.columns";
template <>
constexpr const char* kName<ffn::Proposal> = "moe_tools.proposal";
template <>
constexpr const char* kName<ffn::Router> = "moe_tools.router";
template <>
constexpr const char* kName<ffn::DecoderLayer> = "moe_tools.decoder_layer";

template <class Kind>
const Prepared<Kind>* held(PyObject* capsule) {
    return static_cast<const Prepared<Kind>*>(PyCapsule_GetPointer(capsule, kName<Kind>));
}

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
    const Prepared<Kind>* prepared(const char* name) {
        PyObject* given = find(name);
        if (given == Py_None) return nullptr;
        const Prepared<Kind>* made = held<Kind>(given);
        if (!made) throw PythonError();
        return made;
    }
    template <class Kind>
    const Kind* what(const char* name) {
        const Prepared<Kind>* made = prepared<Kind>(name);
        return made ? &made->what : nullptr;
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

// Reads what is to be prepared, all by names, and hands it to Python, which deletes it.
template <class Kind, Prepared<Kind> (*read)(Arguments)>
PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count) return PyErr_Format(PyExc_TypeError, "give every argument by its name");
        auto owned = std::make_unique<Prepared<Kind>>(read(Arguments(args, names)));
        PyObject* capsule = PyCapsule_New(owned.get(), kName<Kind>, [](PyObject* self) {
            delete static_cast<Prepared<Kind>*>(PyCapsule_GetPointer(self, kName<Kind>));
        });
        if (capsule) owned.release();
        return capsule;
    });
}

// The first argument of a call; the others have names.
template <class Kind>
const Prepared<Kind>& first(PyObject* const* args, Py_ssize_t count, const char* what) {
    if (count != 1) {
        PyErr_Format(PyExc_TypeError, "give the %s, then names", what);
        throw PythonError();
    }
    const Prepared<Kind>* made = held<Kind>(args[0]);
    if (!made) throw PythonError();
    return *made;
}

// An instruction set that runs here.
const Isa* read_isa(Arguments& from) {
    const Isa* isa = ffn::kIsas[from.code<int>("isa", int(std::size(ffn::kIsas)))];
    if (isa->runs_here()) return isa;
    PyErr_Format(PyExc_ValueError, "this CPU does not run %s", isa->name);
    throw PythonError();
}

ffn::Activation read_act(Arguments& from, const char* kind, const char* threshold) {
    Activation made;
    made.kind = from.code<Act>(kind, ffn::kActs);
    made.threshold = float(from.real(threshold));
    return made;
}

// Of x, h and the cache.
DType read_float(Arguments& from, const char* name) {
    return from.code<DType>(name, int(DType::i8));  // those before it are floats
}

Prepared<Weights> read_ffn(Arguments from) {
    Prepared<Weights> made{};
    Weights& weights = made.what;
    weights.rows_FPD = from.tensor<const std::byte>("rows_FPB");
    weights.biases_FP = from.tensor<const float>("biases_FP");
    weights.off_F = from.tensor<const float>("off_F");
    weights.down_D = from.tensor<const float>("down_D");
    weights.neurons = from.integer("neurons");
    weights.width = from.integer("width");
    weights.lines = from.integer("lines");
    weights.inputs = 1 + from.code<int>("gated", 2);
    weights.dtype = from.code<DType>("dtype", ffn::kDTypes);
    weights.acts[0] = read_act(from, "act", "threshold");
    weights.acts[1] = read_act(from, "up_act", "up_threshold");
    weights.screen.rows_FD = from.tensor<const std::byte>("screen_FB");
    weights.screen.scales_F = from.tensor<const float>("screen_scale_F");
    weights.screen.errors_F = from.tensor<const float>("screen_error_F");
    weights.screen.reach = float(from.real("screen_reach"));
    made.isa = read_isa(from);
    from.finish();
    return made;
}

Prepared<ffn::Linear> read_linear(Arguments from) {
    Prepared<ffn::Linear> made{};
    made.what.rows_ND = from.tensor<const std::byte>("rows_NB");
    made.what.bias_N = from.tensor<const float>("bias_N");
    made.what.rows = from.integer("rows");
    made.what.width = from.integer("width");
    made.what.lines = from.integer("lines");
    made.what.dtype = from.code<DType>("dtype", ffn::kDTypes);
    made.what.zero = float(from.real("zero"));
    made.isa = read_isa(from);
    from.finish();
    return made;
}

Prepared<ffn::Columns> read_columns(Arguments from) {
    Prepared<ffn::Columns> made{};
    made.what.columns_DN = from.tensor<const std::byte>("columns_DB");
    made.what.bias_N = from.tensor<const float>("bias_N");
    made.what.columns = from.integer("columns");
    made.what.rows = from.integer("rows");
    made.what.lines = from.integer("lines");
    made.what.dtype = from.code<DType>("dtype", ffn::kDTypes);
    made.isa = read_isa(from);
    from.finish();
    return made;
}

// The caller keeps the linears of what follows. A linear that has to be there:
const Prepared<ffn::Linear>& read_needed(Arguments& from, const char* name) {
    const auto* found = from.prepared<ffn::Linear>(name);
    if (found) return *found;
    PyErr_Format(PyExc_ValueError, "%s is None", name);
    throw PythonError();
}

Prepared<ffn::Proposal> read_proposal(Arguments from) {
    Prepared<ffn::Proposal> made{};
    made.what.gate = from.what<ffn::Linear>("gate");
    const auto& up = read_needed(from, "up");
    made.what.up = &up.what, made.isa = up.isa;
    made.what.act = read_act(from, "act", "threshold");
    made.what.up_act = read_act(from, "up_act", "up_threshold");
    made.what.norm_F = from.tensor<const float>("norm_F");
    from.finish();
    return made;
}

Prepared<ffn::Router> read_router(Arguments from) {
    Prepared<ffn::Router> made{};
    const auto& weight = read_needed(from, "weight");
    made.what.weight = &weight.what, made.isa = weight.isa;
    made.what.bias_E = from.tensor<const float>("bias_E");
    made.what.by_rank = from.code<int>("by_rank", 2);
    made.what.first = from.what<ffn::Linear>("first");
    from.finish();
    return made;
}

ffn::Norm read_norm(Arguments& from, DType dtype, const char* weight, const char* eps,
                    const char* offset) {
    const void* weight_D = from.tensor<const void>(weight);
    return {weight_D, dtype, float(from.real(eps)), float(from.real(offset))};
}

Prepared<ffn::DecoderLayer> read_layer(Arguments from) {
    Prepared<ffn::DecoderLayer> made{};
    ffn::DecoderLayer& layer = made.what;
    const auto norm = [&](const char* weight, const char* eps, const char* offset) {
        return read_norm(from, layer.dtype, weight, eps, offset);
    };
    layer.dtype = read_float(from, "dtype");
    layer.width = from.integer("width");
    layer.query_heads = from.integer("query_heads");
    layer.key_heads = from.integer("key_heads");
    layer.head = from.integer("head");
    layer.scale = float(from.real("scale"));
    const auto& q = read_needed(from, "q");
    layer.q = &q.what, made.isa = q.isa;
    layer.k = &read_needed(from, "k").what;
    layer.v = &read_needed(from, "v").what;
    layer.o = &read_needed(from, "o").what;
    layer.gate = from.what<ffn::Linear>("gate");
    layer.up = from.what<ffn::Linear>("up");
    layer.down = from.what<ffn::Linear>("down");
    layer.act = read_act(from, "act", "threshold");
    layer.proposal = from.what<ffn::Proposal>("proposal");
    layer.router = from.what<ffn::Router>("router");
    layer.neurons = from.what<Weights>("neurons");
    layer.constant_D = from.tensor<const float>("constant_D");
    layer.before_attention =
        norm("before_attention", "before_attention_eps", "before_attention_offset");
    layer.of_queries = norm("of_queries", "of_queries_eps", "of_queries_offset");
    layer.of_keys = norm("of_keys", "of_keys_eps", "of_keys_offset");
    layer.behind_attention =
        norm("behind_attention", "behind_attention_eps", "behind_attention_offset");
    layer.before_ffn = norm("before_ffn", "before_ffn_eps", "before_ffn_offset");
    layer.behind_ffn = norm("behind_ffn", "behind_ffn_eps", "behind_ffn_offset");
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

// The calls below come once a token and layer, hence without Python's parser of format strings.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const auto& made = first<Weights>(args, count, "FFN");
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        Batch batch{};
        batch.x_TD = from.tensor<const void>("x_TD");
        batch.dtype = read_float(from, "dtype");
        batch.tokens = from.integer("tokens");
        batch.mask_TE = from.tensor<const std::uint8_t>("mask_TE");
        batch.experts = from.integer("experts");
        batch.y_TD = from.tensor<void>("y_TD");
        Limits limits{};
        limits.few = from.integer("few");
        limits.most_few = from.real("most_few");
        limits.most_many = from.real("most_many");
        from.finish();
        std::int64_t read = 0;
        unlocked([&] { read = ffn::sparse_ffn(made.what, batch, *made.isa, threads, limits); });
        return PyLong_FromLongLong(read);
    });
}

// Writes y = x W^T + b, from rows or columns of W.
template <class Weight, void (*multiply)(const Weight&, const ffn::Product&, const Isa&, int)>
PyObject* write_product(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const auto& made = first<Weight>(args, count, "weight");
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::Product product{};
        product.x_TD = from.tensor<const void>("x_TD");
        product.dtype = read_float(from, "dtype");
        product.tokens = from.integer("tokens");
        product.y_TN = from.tensor<void>("y_TN");
        from.finish();
        unlocked([&] { multiply(made.what, product, *made.isa, threads); });
        Py_RETURN_NONE;
    });
}

// Writes the mask of what a proposal or a router chooses.
template <class Chooser, void (*choose)(const Chooser&, const void*, DType, std::int64_t, float,
                                        std::uint8_t*, const Isa&, int)>
PyObject* write_mask(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const auto& made = first<Chooser>(args, count, "chooser");
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        const void* x_TD = from.tensor<const void>("x_TD");
        const DType dtype = read_float(from, "dtype");
        const std::int64_t tokens = from.integer("tokens");
        const float knob = float(from.real("knob"));
        auto* mask_TE = from.tensor<std::uint8_t>("mask_TE");
        from.finish();
        unlocked([&] {
            choose(made.what, x_TD, dtype, tokens, knob, mask_TE, *made.isa, threads);
        });
        Py_RETURN_NONE;
    });
}

PyObject* new_heads(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const auto& made = first<ffn::DecoderLayer>(args, count, "layer");
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
        unlocked([&] { ffn::new_heads(made.what, call, *made.isa, threads); });
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

ffn::Masked read_masked(Arguments& from) {
    ffn::Masked made{};
    made.kind = from.code<ffn::Mask>("mask", 3);
    made.dtype = read_float(from, "mask_dtype");
    made.data_BS = from.tensor<const void>("mask_BS");
    made.sequence = from.integer("mask_sequence");
    return made;
}

PyObject* new_token(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        const auto& made = first<ffn::DecoderLayer>(args, count, "layer");
        Arguments from(args + 1, names);
        const int threads = int(from.integer("threads"));
        ffn::NewToken call{};
        call.sequences = from.integer("sequences");
        call.positions = from.integer("positions");
        call.h_BD = from.tensor<const void>("h_BD");
        call.q_BHW = from.tensor<const void>("q_BHW");
        call.keys = read_cached(from, "keys", "keys_sequence", "keys_head", "keys_position");
        call.values =
            read_cached(from, "values", "values_sequence", "values_head", "values_position");
        call.mask = read_masked(from);
        call.knob = float(from.real("knob"));
        call.out_BD = from.tensor<void>("out_BD");
        call.x_BD = from.tensor<void>("x_BD");
        from.finish();
        unlocked([&] { ffn::new_token(made.what, call, *made.isa, threads); });
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
            const auto* made = held<ffn::DecoderLayer>(PyTuple_GET_ITEM(args[0], i));
            if (!made) throw PythonError();
            layers.push_back(&made->what);
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
        call.keys_LBKSW = from.tensor<char>("keys");
        call.values_LBKSW = from.tensor<char>("values");
        call.layer = from.integer("layer");
        call.sequence = from.integer("sequence");
        call.head = from.integer("head");
        call.position = from.integer("position");
        call.mask = read_masked(from);
        call.knobs = from.tensor<const double>("knobs");
        call.last = read_norm(from, layers[0]->dtype, "last", "last_eps", "last_offset");
        call.out_BD = from.tensor<void>("out_BD");
        from.finish();
        unlocked([&] { ffn::run_stack(layers.data(), call, *isa, threads); });
        Py_RETURN_NONE;
    });
}

PyObject* read_rows(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    return guarded([&]() -> PyObject* {
        if (count != 0) return PyErr_Format(PyExc_TypeError, "give names only");
        Arguments from(args, names);
        const int threads = int(from.integer("threads"));
        ffn::Reading reading{};
        reading.rows = from.tensor<const std::byte>("rows");
        reading.stride = from.integer("stride");
        reading.count = from.integer("count");
        reading.format.dtype = from.code<ffn::DType>("stored", ffn::kDTypes);
        reading.format.width = from.integer("width");
        reading.format.lines = from.integer("lines");
        reading.format.zero = float(from.real("zero"));
        reading.format.added = from.code<int>("added", 2) != 0;
        reading.dtype = read_float(from, "dtype");
        reading.to = from.tensor<void>("to");
        const Isa* isa = read_isa(from);
        from.finish();
        unlocked([&] { ffn::read_rows(reading, *isa, threads); });
        Py_RETURN_NONE;
    });
}

PyObject* isas(PyObject*, PyObject*) {
    PyObject* places = PyDict_New();
    for (int i = 0; places && i < int(std::size(ffn::kIsas)); ++i) {
        if (!ffn::kIsas[i]->runs_here()) continue;
        PyObject* place = PyLong_FromLong(i);
        if (!place || PyDict_SetItemString(places, ffn::kIsas[i]->name, place) < 0)
            Py_CLEAR(places);
        Py_XDECREF(place);
    }
    return places;
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

constexpr int kByNames = METH_FASTCALL | METH_KEYWORDS;

PyMethodDef methods[] = {
    {"prepare", with_names(prepare<Weights, read_ffn>), kByNames,
     "The handle of an FFN whose tensors the caller keeps."},
    {"run", with_names(run), kByNames,
     "Writes y; the number of rows read, or -1 if the tokens want more than the limits."},
    {"prepare_linear", with_names(prepare<ffn::Linear, read_linear>), kByNames,
     "The handle of a linear whose tensors the caller keeps."},
    {"multiply", with_names(write_product<ffn::Linear, ffn::linear>), kByNames,
     "Writes y = x W^T + b."},
    {"prepare_columns", with_names(prepare<ffn::Columns, read_columns>), kByNames,
     "The handle of the columns of a linear whose tensors the caller keeps."},
    {"multiply_columns", with_names(write_product<ffn::Columns, ffn::columns>), kByNames,
     "Writes y = x W^T + b, and reads no column that meets zeros only."},
    {"prepare_layer", with_names(prepare<ffn::DecoderLayer, read_layer>), kByNames,
     "The handle of a decoder layer whose linears and norms the caller keeps."},
    {"new_heads", with_names(new_heads), kByNames,
     "Writes queries, keys and values of new tokens."},
    {"new_token", with_names(new_token), kByNames,
     "Writes what a layer makes of new tokens, given keys and values."},
    {"run_stack", with_names(run_stack), kByNames,
     "Writes what layers make of new tokens, one behind the other, and appends to their caches."},
    {"read_rows", with_names(read_rows), kByNames,
     "Writes rows of int8 or int4 as floats."},
    {"prepare_router", with_names(prepare<ffn::Router, read_router>), kByNames,
     "The handle of a router whose linear and bias the caller keeps."},
    {"choose", with_names(write_mask<ffn::Router, ffn::choose>), kByNames,
     "Writes the mask of the experts that a router chooses."},
    {"prepare_proposal", with_names(prepare<ffn::Proposal, read_proposal>), kByNames,
     "The handle of proposals whose linears and norms the caller keeps."},
    {"propose", with_names(write_mask<ffn::Proposal, ffn::propose>), kByNames,
     "Writes the mask of the neurons whose score is above tau."},
    {"isas", isas, METH_NOARGS, "The names of instruction sets that run here, the fastest last, and their places."},
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, "Asks for huge pages; may be ignored."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sparse_ffn", nullptr, -1, methods,
                      nullptr,               nullptr,       nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__sparse_ffn() { return PyModule_Create(&module); }
