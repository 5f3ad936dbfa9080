/* Dropout and GELU in loops that read and write memory once. masks.py and gelu.py say when they are used, and have
   references in NumPy and torch, which give the same bits.

   Compiled with -ffp-contract=off: no product and sum are fused. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "_common.h"

/* ---- dropout ---- */

enum { WORDS = 256 }; /* drawn at a time */

FOR_EACH_PROCESSOR static void drop_run(int n, const uint16_t *numbers, int dropped, float factor, const float *values,
                                        float *target)
{
#pragma GCC ivdep
    for (int i = 0; i < n; i++)
        target[i] = values[i] * (numbers[i] >= dropped ? factor : 0.0f);
}

FOR_EACH_PROCESSOR static void drop_and_add_run(int n, const uint16_t *numbers, int dropped, float factor,
                                                const float *values, const float *added, float *target)
{
#pragma GCC ivdep
    for (int i = 0; i < n; i++)
        target[i] = values[i] * (numbers[i] >= dropped ? factor : 0.0f) + added[i];
}

static PyObject *drop(PyObject *self, PyObject *arguments)
{
    Py_ssize_t n;
    unsigned long long key, first, values, added, target;
    int dropped;
    float factor;
    if (!PyArg_ParseTuple(arguments, "nKKifKKK:drop", &n, &key, &first, &dropped, &factor, &values, &added, &target))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    union {
        uint64_t words[WORDS];
        uint16_t numbers[WORDS * NUMBERS];
    } drawn;
    for (Py_ssize_t start = 0; start < n; start += WORDS * NUMBERS) {
        int size = n - start < WORDS * NUMBERS ? (int)(n - start) : WORDS * NUMBERS;
        draw(key, first + start / NUMBERS, (size + NUMBERS - 1) / NUMBERS, drawn.words);
        if (added)
            drop_and_add_run(size, drawn.numbers, dropped, factor, at(values) + start, at(added) + start,
                             at(target) + start);
        else
            drop_run(size, drawn.numbers, dropped, factor, at(values) + start, at(target) + start);
    }
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* ---- GELU ---- */

/* x times the normal distribution's Phi(x), and the derivative of that. Phi by Abramowitz and Stegun, 7.1.26. */
FOR_EACH_PROCESSOR static void gelu_run(Py_ssize_t n, const float *restrict values, float *restrict target,
                                        float *restrict slopes)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        float x = values[i], bell = exponential(x * x * -0.5f);
        float t = 1.0f / (fabsf(x) * 0.231641888f + 1.0f); /* 0.3275911 / sqrt(2) */
        float tail = 0.5307027145f; /* halves of the coefficients of 7.1.26 */
        tail = tail * t - 0.7265760135f;
        tail = tail * t + 0.7107068705f;
        tail = tail * t - 0.142248368f;
        tail = tail * t + 0.127414796f;
        tail = tail * t * bell; /* 1 - Phi(|x|) */
        float phi = x < 0.0f ? tail : 1.0f - tail;
        target[i] = x * phi;
        slopes[i] = x * (bell * 0.398942280f) + phi; /* 1 / sqrt(2 pi) */
    }
}

static PyObject *gelu(PyObject *self, PyObject *arguments)
{
    Py_ssize_t n;
    unsigned long long values, target, slopes;
    if (!PyArg_ParseTuple(arguments, "nKKK:gelu", &n, &values, &target, &slopes))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    gelu_run(n, at(values), at(target), at(slopes));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"gelu", gelu, METH_VARARGS,
     "gelu(n, values, target, slopes)\n\n"
     "target = GELU of values, slopes = its derivative there, for n float32 elements. Addresses of different memory."},
    {"drop", drop, METH_VARARGS,
     "drop(n, key, first, dropped, factor, values, added, target)\n\n"
     "target = values * (0 or factor) + added, for n float32 elements. Element i becomes 0 if number i of the sequence\n"
     "that begins with word `first` of `key`, 16 bits, is below `dropped`. values, added, target: addresses; added: 0\n"
     "for nothing. target may be either of the others."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_elementwise", NULL, -1, functions};

PyMODINIT_FUNC PyInit__elementwise(void)
{
    return PyModule_Create(&module);
}
