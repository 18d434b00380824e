// The Python module. Tensors come as addresses: their owner, cpu/packed.py, checks and keeps them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <exception>
#include <memory>
#include <new>

#include "sparse_ffn.h"

namespace {

using ffn::Activation;
using ffn::Batch;
using ffn::DType;
using ffn::Isa;
using ffn::Weights;

constexpr const char* kCapsule = "moe_tools.ffn";

template <class T>
T* address(unsigned long long value) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

// Calls the body and makes Python exceptions of what it throws: none may cross the C API. Not
// `catch (...)`: with that, Python could not end a thread that waits for the interpreter's lock.
template <class Body>
PyObject* guarded(const Body& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

void forget(PyObject* capsule) {
    delete static_cast<Weights*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* prepare_unguarded(PyObject* args) {
    unsigned long long rows, scales, biases, off, down, screen, screen_scales, errors;
    long long neurons, width, lines;
    int inputs, dtype, kinds[2];
    float thetas[2], reach;
    if (!PyArg_ParseTuple(args, "KKKKKLLLiiififKKKf", &rows, &scales, &biases, &off, &down, &neurons,
                          &width, &lines, &inputs, &dtype, &kinds[0], &thetas[0], &kinds[1],
                          &thetas[1], &screen, &screen_scales, &errors, &reach))
        return nullptr;
    std::unique_ptr<Weights> weights(new Weights{address<const std::byte>(rows),
                                address<const float>(scales),
                                address<const float>(biases),
                                address<const float>(off),
                                address<const float>(down),
                                neurons,
                                width,
                                lines,
                                inputs,
                                DType(dtype),
                                {Activation{ffn::Act(kinds[0]), thetas[0]},
                                 Activation{ffn::Act(kinds[1]), thetas[1]}},
                                {address<const std::byte>(screen),
                                 address<const float>(screen_scales), address<const float>(errors),
                                 reach}});
    PyObject* capsule = PyCapsule_New(weights.get(), kCapsule, forget);
    if (capsule) weights.release();
    return capsule;
}

PyObject* prepare(PyObject*, PyObject* args) {
    return guarded([&] { return prepare_unguarded(args); });
}

// run(weights, isa, threads, x, dtype, tokens, mask, experts, y, few, most of few, most of many):
// once a token and layer, hence without the parser of format strings.
PyObject* run_unguarded(PyObject* const* args, Py_ssize_t count) {
    if (count != 12) return PyErr_Format(PyExc_TypeError, "12 arguments, not %zd", count);
    const auto* weights = static_cast<const Weights*>(PyCapsule_GetPointer(args[0], kCapsule));
    if (!weights) return nullptr;
    unsigned long long values[10];
    for (int i = 1; i < 10; ++i) values[i] = PyLong_AsUnsignedLongLong(args[i]);
    const ffn::Limits limits{std::int64_t(values[9]), PyFloat_AsDouble(args[10]),
                             PyFloat_AsDouble(args[11])};
    if (PyErr_Occurred()) return nullptr;
    const Isa& isa = *ffn::kIsas[values[1]];
    const Batch batch{address<const void>(values[3]), address<void>(values[8]),
                      DType(int(values[4])),          std::int64_t(values[5]),
                      address<const std::uint8_t>(values[6]), std::int64_t(values[7])};
    std::int64_t read = 0;
    std::exception_ptr error;
    Py_BEGIN_ALLOW_THREADS;
    try {
        read = ffn::sparse_ffn(*weights, batch, isa, int(values[2]), limits);
    } catch (...) {
        error = std::current_exception();
    }
    Py_END_ALLOW_THREADS;
    if (error) std::rethrow_exception(error);
    return PyLong_FromLongLong(read);
}

PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&] { return run_unguarded(args, count); });
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

PyMethodDef methods[] = {
    {"prepare", prepare, METH_VARARGS, "The handle of an FFN whose tensors the caller keeps."},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
     "Writes y; the number of rows read, or -1 if the tokens want more than the limits."},
    {"isas", isas, METH_NOARGS, "Instruction sets that run here, the fastest last."},
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, "Asks for huge pages; may be ignored."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sparse_ffn", nullptr, -1, methods,
                      nullptr,               nullptr,       nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__sparse_ffn() { return PyModule_Create(&module); }
