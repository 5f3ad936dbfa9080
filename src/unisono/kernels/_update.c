/* The arithmetic of an update on every element, in loops that read and write memory once. update.py says when they are
   used, and what they compute; torch's operations give the same bits, in more passes.

   A pass goes from run to run: nodes are added as the tree says, divided, squared, and with Adam old values become new
   ones, all while they are in the nearest cache. Compiled with -ffp-contract=off: no product and sum are fused, except
   those that say fmaf. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#define CAN_STREAM __builtin_cpu_supports("avx")
#else
#define FOR_EACH_PROCESSOR
#define CAN_STREAM 0
#endif

enum { GRID = 64, BLOCK = 1024 }; /* elements: of the engine's layout */
enum { RUN = 256 };               /* elements that go through all of a pass at once: so they stay in the cache */
enum { DEPTH = 64 };              /* of a tree of any size */

/* ---- the sum of nodes, divided ---- */

typedef struct {
    Py_ssize_t nodes;
    const float **node;
    int *additions; /* after each node: how often the last two become one */
    float (*sums)[RUN]; /* as many as there are nodes that wait for a sibling, at most */
    float weight, factor;
    double *squares; /* of each block; NULL: not requested */
} Sum;

FOR_EACH_PROCESSOR static void add(Py_ssize_t n, const float *left, const float *right, float *sum)
{
#pragma GCC ivdep
    for (Py_ssize_t i = 0; i < n; i++)
        sum[i] = left[i] + right[i];
}

FOR_EACH_PROCESSOR static void divide(Py_ssize_t n, const float *restrict sum, float weight, float *restrict mean)
{
    for (Py_ssize_t i = 0; i < n; i++)
        mean[i] = sum[i] / weight;
}

FOR_EACH_PROCESSOR static void multiply(Py_ssize_t n, float *mean, float factor)
{
    for (Py_ssize_t i = 0; i < n; i++)
        mean[i] *= factor;
}

FOR_EACH_PROCESSOR static void square(Py_ssize_t n, const float *restrict mean, float *restrict squares)
{
    for (Py_ssize_t i = 0; i < n; i++)
        squares[i] = mean[i] * mean[i];
}

/* Add a block's squares by halving; they are overwritten. */
FOR_EACH_PROCESSOR static float halve(float *squares)
{
    for (int width = BLOCK / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            squares[i] += squares[width + i];
    return squares[0];
}

/* The mean of a run from `start` on. squares: those of the block so far. */
static void find_mean(const Sum *sum, Py_ssize_t start, Py_ssize_t n, float *mean, float *squares)
{
    const float *stack[DEPTH];
    int top = 0;
    for (Py_ssize_t k = 0; k < sum->nodes; k++) {
        stack[top++] = sum->node[k] + start;
        for (int left = sum->additions[k]; left > 0; left--) {
            top--;
            add(n, stack[top - 1], stack[top], sum->sums[top - 1]);
            stack[top - 1] = sum->sums[top - 1];
        }
    }
    divide(n, stack[0], sum->weight, mean);
    if (sum->squares) {
        square(n, mean, squares + start % BLOCK);
        if ((start + n) % BLOCK == 0)
            sum->squares[start / BLOCK] = halve(squares);
    }
    if (sum->factor != 1.0f)
        multiply(n, mean, sum->factor);
}

/* ---- Adam ---- */

/* The arithmetic is that of torch's kernels (ATen/native/cpu/FusedAdamKernel.cpp), operation by operation, with the
   fused multiply-adds of its build. */
typedef struct {
    float decay, penalty, lerp, beta2, square, correction, epsilon, step;
    int from_average; /* whether the mean is computed from the old one, or from the gradient: by the smaller factor */
} Factors;

FOR_EACH_PROCESSOR static void adam_run(const Factors *factors, Py_ssize_t n, const float *restrict gradients,
                                        const float *restrict weights, const float *restrict averages,
                                        const float *restrict squares, float *restrict new_weights,
                                        float *restrict new_averages, float *restrict new_squares)
{
    const Factors f = *factors;
    for (Py_ssize_t i = 0; i < n; i++) {
        float gradient = f.penalty != 0.0f ? fmaf(weights[i], f.penalty, gradients[i]) : gradients[i];
        float average = fmaf(f.lerp, gradient - averages[i], f.from_average ? averages[i] : gradient);
        float square = fmaf(f.square * gradient, gradient, squares[i] * f.beta2);
        new_averages[i] = average;
        new_squares[i] = square;
        new_weights[i] = weights[i] * f.decay - f.step * average / (sqrtf(square) / f.correction + f.epsilon);
    }
}

/* Write past the caches. */
#if defined(__x86_64__) && defined(__linux__)
__attribute__((target("avx"))) static void stream(float *target, const float *values, Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i += 8)
        _mm256_stream_ps(target + i, _mm256_loadu_ps(values + i));
}

static void finish_streams(void)
{
    _mm_sfence(); /* before any message that these values were written */
}
#else
static void stream(float *target, const float *values, Py_ssize_t n) { memcpy(target, values, n * sizeof(float)); }
static void finish_streams(void) {}
#endif

typedef struct {
    int64_t stop, setting; /* end of the piece in the pass, and its factors; −1: it stays unchanged */
} Piece;

typedef struct {
    Py_ssize_t pieces;
    const Piece *piece;
    const Factors *factors;
    float *old[3], *new[3]; /* weights, averages, averages of squares */
    int past_caches;
} Adam;

static void update(const Sum *sum, const Adam *adam, Py_ssize_t n)
{
    _Alignas(64) float squares[BLOCK], mean[RUN], values[3][RUN];
    int streams = adam->past_caches && CAN_STREAM;
    Py_ssize_t done = 0, k = 0;
    for (Py_ssize_t start = 0; start < n; start += RUN) {
        Py_ssize_t end = n - start < RUN ? n : start + RUN;
        find_mean(sum, start, end - start, mean, squares);
        while (done < end && k < adam->pieces) {
            Py_ssize_t stop = adam->piece[k].stop < end ? adam->piece[k].stop : end, size = stop - done;
            float *to[3], *new[3] = {adam->new[0] + done, adam->new[1] + done, adam->new[2] + done};
            for (int i = 0; i < 3; i++)
                to[i] = streams ? values[i] : new[i];
            if (adam->piece[k].setting >= 0)
                adam_run(&adam->factors[adam->piece[k].setting], size, mean + (done - start), adam->old[0] + done,
                         adam->old[1] + done, adam->old[2] + done, to[0], to[1], to[2]);
            else
                for (int i = 0; i < 3; i++)
                    memcpy(to[i], adam->old[i] + done, size * sizeof(float));
            for (int i = 0; i < 3 && streams; i++)
                stream(new[i], values[i], size);
            done = stop;
            k += done == adam->piece[k].stop;
        }
    }
    if (streams)
        finish_streams();
}

/* ---- from Python ---- */

static float *at(unsigned long long address)
{
    return (float *)(uintptr_t)address;
}

static void forget(Sum *sum)
{
    PyMem_Free(sum->node);
    PyMem_Free(sum->additions);
    PyMem_Free(sum->sums);
}

/* Read (address, additions) of each node. */
static int take_nodes(PyObject *nodes, Sum *sum)
{
    int depth = 0, deepest = 0;
    sum->nodes = PyTuple_GET_SIZE(nodes);
    sum->node = PyMem_Calloc(sum->nodes + 1, sizeof *sum->node);
    sum->additions = PyMem_Calloc(sum->nodes + 1, sizeof *sum->additions);
    if (!sum->node || !sum->additions) {
        PyErr_NoMemory();
        return 0;
    }
    for (Py_ssize_t k = 0; k < sum->nodes; k++) {
        unsigned long long address;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(nodes, k), "Ki", &address, &sum->additions[k]))
            return 0;
        sum->node[k] = at(address);
        depth += 1;
        deepest = depth > deepest ? depth : deepest;
        if (depth > DEPTH || sum->additions[k] < 0 || sum->additions[k] >= depth) {
            PyErr_SetString(PyExc_ValueError, "these additions are no tree");
            return 0;
        }
        depth -= sum->additions[k];
    }
    if (depth != 1) {
        PyErr_SetString(PyExc_ValueError, "these additions leave no single node");
        return 0;
    }
    sum->sums = PyMem_Malloc(deepest * sizeof *sum->sums);
    if (!sum->sums)
        PyErr_NoMemory();
    return sum->sums != NULL;
}

static PyObject *mean(PyObject *self, PyObject *arguments)
{
    Py_ssize_t n;
    PyObject *nodes;
    unsigned long long target, squares;
    double weight;
    if (!PyArg_ParseTuple(arguments, "nO!dKK:mean", &n, &PyTuple_Type, &nodes, &weight, &target, &squares))
        return NULL;
    if (n < 0 || n % BLOCK) {
        PyErr_SetString(PyExc_ValueError, "n is no multiple of 1024");
        return NULL;
    }
    Sum sum = {.weight = (float)weight, .factor = 1.0f, .squares = (double *)(uintptr_t)squares};
    if (take_nodes(nodes, &sum)) {
        Py_BEGIN_ALLOW_THREADS;
        _Alignas(64) float squares_of_block[BLOCK], found[RUN];
        for (Py_ssize_t start = 0; start < n; start += RUN) {
            find_mean(&sum, start, RUN, found, squares_of_block);
            memcpy(at(target) + start, found, sizeof found);
        }
        Py_END_ALLOW_THREADS;
    }
    forget(&sum);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static Factors reckon(double count, double rate, double decay, double beta1, double beta2, double epsilon,
                      int decoupled)
{
    float lerp = (float)(1 - beta1);
    int from_average = fabsf(lerp) < 0.5f;
    return (Factors){
        .decay = decoupled ? (float)(1 - rate * decay) : 1.0f,
        .penalty = decoupled ? 0.0f : (float)decay,
        .lerp = from_average ? lerp : lerp - 1.0f,
        .beta2 = (float)beta2,
        .square = (float)(1 - beta2),
        .correction = (float)sqrt(1 - pow(beta2, count)),
        .epsilon = (float)epsilon,
        .step = (float)(rate / (1 - pow(beta1, count))),
        .from_average = from_average,
    };
}

static int fits(const Adam *adam, Py_ssize_t n, Py_ssize_t settings, const double *squares)
{
    int64_t before = 0;
    if (n < 0 || n % (squares ? BLOCK : GRID))
        return 0;
    for (Py_ssize_t k = 0; k < adam->pieces; k++) {
        if (adam->piece[k].stop < before || adam->piece[k].stop > n || adam->piece[k].stop % GRID ||
            adam->piece[k].setting < -1 || adam->piece[k].setting >= settings)
            return 0;
        before = adam->piece[k].stop;
    }
    for (int i = 0; i < 3; i++)
        if ((uintptr_t)adam->new[i] % 32)
            return 0;
    return 1;
}

static PyObject *adam(PyObject *self, PyObject *arguments)
{
    Py_ssize_t n;
    PyObject *nodes, *settings, *result = NULL;
    Py_buffer pieces;
    unsigned long long squares, old[3], new[3];
    double weight, factor, beta1, beta2, epsilon;
    int decoupled, past_caches;
    if (!PyArg_ParseTuple(arguments, "nO!ddK(KKK)(KKK)y*O!dddpp:adam", &n, &PyTuple_Type, &nodes, &weight, &factor,
                          &squares, &old[0], &old[1], &old[2], &new[0], &new[1], &new[2], &pieces, &PyTuple_Type,
                          &settings, &beta1, &beta2, &epsilon, &decoupled, &past_caches))
        return NULL;
    Sum sum = {.weight = (float)weight, .factor = (float)factor, .squares = (double *)(uintptr_t)squares};
    Adam adam = {.pieces = pieces.len / (Py_ssize_t)sizeof(Piece),
                 .piece = pieces.buf,
                 .old = {at(old[0]), at(old[1]), at(old[2])},
                 .new = {at(new[0]), at(new[1]), at(new[2])},
                 .past_caches = past_caches};
    Py_ssize_t count_settings = PyTuple_GET_SIZE(settings);
    Factors *factors = PyMem_Calloc(count_settings + 1, sizeof *factors);
    if (!factors) {
        PyErr_NoMemory();
        goto end;
    }
    adam.factors = factors;
    for (Py_ssize_t k = 0; k < count_settings; k++) {
        double count, rate, decay;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(settings, k), "ddd", &count, &rate, &decay))
            goto end;
        factors[k] = reckon(count, rate, decay, beta1, beta2, epsilon, decoupled);
    }
    if (!fits(&adam, n, count_settings, sum.squares)) {
        PyErr_SetString(PyExc_ValueError, "sizes, pieces or addresses are off the grid");
        goto end;
    }
    if (!take_nodes(nodes, &sum))
        goto end;
    Py_BEGIN_ALLOW_THREADS;
    update(&sum, &adam, n);
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
end:
    forget(&sum);
    PyMem_Free(factors);
    PyBuffer_Release(&pieces);
    return result;
}

static PyMethodDef functions[] = {
    {"mean", mean, METH_VARARGS,
     "mean(n, nodes, weight, target, squares)\n\n"
     "target = sum of nodes / weight, for n float32 elements, a multiple of 1024. nodes: (address, additions after it)\n"
     "of each. squares: where float64 goes, the sum of squares of each 1024; 0: nowhere. target may be the first node."},
    {"adam", adam, METH_VARARGS,
     "adam(n, nodes, weight, factor, squares, old, new, pieces, settings, beta1, beta2, epsilon, decoupled,\n"
     "past_caches)\n\n"
     "Update n float32 elements by sum of nodes / weight * factor. old, new: addresses of weights and both averages,\n"
     "which do not overlap. pieces: int64 pairs, up to which element, and by which setting, -1 for none. settings:\n"
     "(count of updates, this one included; rate; decay)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_update", NULL, -1, functions};

PyMODINIT_FUNC PyInit__update(void)
{
    return PyModule_Create(&module);
}
