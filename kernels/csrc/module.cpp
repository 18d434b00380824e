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

#include "linear.h"
#include "sparse_ffn.h"

namespace {

using ffn::Act;
using ffn::Activation;
using ffn::Batch;
using ffn::DType;
using ffn::Isa;
using ffn::Limits;
using ffn::Weights;

constexpr const char *kCapsule = "moe_tools.ffn", *kLinear = "moe_tools.linear";

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
    {"isas", isas, METH_NOARGS, "Instruction sets that run here, the fastest last."},
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, "Asks for huge pages; may be ignored."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sparse_ffn", nullptr, -1, methods,
                      nullptr,               nullptr,       nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__sparse_ffn() { return PyModule_Create(&module); }
