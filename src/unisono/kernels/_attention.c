/* Attention with dropout for packed samples, one head of one sample at a time, all of it in the cache: scaled dot
   products (Vaswani et al., arXiv 1706.03762), softmax, mask, weighted sum, and the backward pass. Two numbers of a row
   of scores are kept; the backward pass computes the rest again (Dao et al., arXiv 2205.14135). packed_attention.py says
   when it is used.

   Rows of scores are padded to whole vectors; columns beyond the last token have weight 0. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_common.h"

enum { LANES = 8, ROWS = 64, TILE = 6 }; /* numbers in a vector; rows of scores, and of a product, computed at a time */

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* ---- products ---- */

/* Rows of any matrix, also of a transposed one: element (i, k) is at[i * row + k * step]. */
typedef struct {
    const float *at;
    long row, step;
} Left;

typedef struct {
    float *at;
    long row; /* floats from one row to the next */
} Rows;

/* c (+)= a b, a few rows and one or two vectors of columns, in registers. */
INLINE void multiply_tile(int rows, int vectors, int add, long depth, Left a, Rows b, Rows c)
{
    vector sums[TILE][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            sums[i][j] = add ? *(vector *)(c.at + i * c.row + j * LANES) : (vector){0};
    for (long k = 0; k < depth; k++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++)
                sums[i][j] += a.at[i * a.row + k * a.step] * *(vector *)(b.at + k * b.row + j * LANES);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            *(vector *)(c.at + i * c.row + j * LANES) = sums[i][j];
}

INLINE void multiply_columns(int vectors, int add, long rows, long depth, Left a, Rows b, Rows c)
{
    for (; rows >= TILE; rows -= TILE) {
        multiply_tile(TILE, vectors, add, depth, a, b, c);
        a.at += TILE * a.row;
        c.at += TILE * c.row;
    }
    switch (rows) { /* so that each number of rows is a constant */
    case 5: multiply_tile(5, vectors, add, depth, a, b, c); break;
    case 4: multiply_tile(4, vectors, add, depth, a, b, c); break;
    case 3: multiply_tile(3, vectors, add, depth, a, b, c); break;
    case 2: multiply_tile(2, vectors, add, depth, a, b, c); break;
    case 1: multiply_tile(1, vectors, add, depth, a, b, c); break;
    }
}

INLINE void multiply_all(int add, long rows, long columns, long depth, Left a, Rows b, Rows c)
{
    for (; columns >= 2 * LANES; columns -= 2 * LANES) {
        multiply_columns(2, add, rows, depth, a, b, c);
        b.at += 2 * LANES;
        c.at += 2 * LANES;
    }
    if (columns)
        multiply_columns(1, add, rows, depth, a, b, c);
}

/* c [rows, columns] = a [rows, depth] b [depth, columns]; columns: a multiple of LANES. Each sum is taken in order. */
FOR_EACH_PROCESSOR static void multiply(long rows, long columns, long depth, Left a, Rows b, Rows c)
{
    multiply_all(0, rows, columns, depth, a, b, c);
}

FOR_EACH_PROCESSOR static void multiply_and_add(long rows, long columns, long depth, Left a, Rows b, Rows c)
{
    multiply_all(1, rows, columns, depth, a, b, c);
}

/* ---- rows of scores ---- */

INLINE float sum_lanes(const float *lanes)
{
    float sum = lanes[0];
    for (int l = 1; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

/* Scores become exp(scale (score - largest)), 0 from column t on; return 1 / their sum. */
FOR_EACH_PROCESSOR static float soften(long t, long columns, float scale, float *row, float *largest)
{
    float high[LANES], sums[LANES] = {0};
    for (int l = 0; l < LANES; l++)
        high[l] = -INFINITY;
    for (long j = t; j < columns; j++)
        row[j] = -INFINITY;
    for (long j = 0; j < columns; j += LANES)
        for (int l = 0; l < LANES; l++)
            high[l] = row[j + l] > high[l] ? row[j + l] : high[l];
    float most = high[0];
    for (int l = 1; l < LANES; l++)
        most = high[l] > most ? high[l] : most;
    for (long j = 0; j < columns; j++)
        row[j] = exponential((row[j] - most) * scale);
    for (long j = t; j < columns; j++)
        row[j] = 0.0f;
    for (long j = 0; j < columns; j += LANES)
        for (int l = 0; l < LANES; l++)
            sums[l] += row[j + l];
    *largest = most;
    return 1.0f / sum_lanes(sums);
}

/* Multiply the scores from `soften` by `inverse`. */
FOR_EACH_PROCESSOR static void soften_again(long t, long columns, float scale, float largest, float inverse, float *row)
{
    for (long j = 0; j < columns; j++)
        row[j] = exponential((row[j] - largest) * scale) * inverse;
    for (long j = t; j < columns; j++)
        row[j] = 0.0f;
}

FOR_EACH_PROCESSOR static void drop_row(long n, const uint16_t *numbers, int dropped, float factor, float *row)
{
    for (long j = 0; j < n; j++)
        row[j] = row[j] * (numbers[j] >= dropped ? factor : 0.0f);
}

/* Of weights, and what their dropped values are due: weights become dropped ones, dues those of the scores. */
FOR_EACH_PROCESSOR static void go_back_row(long n, const uint16_t *numbers, int dropped, float factor, float scale,
                                           float *restrict weights, float *restrict dues)
{
    float sums[LANES] = {0};
    for (long j = 0; j < n; j += LANES)
        for (int l = 0; l < LANES; l++) {
            float due = dues[j + l] * (numbers[j + l] >= dropped ? factor : 0.0f);
            sums[l] += due * weights[j + l];
            dues[j + l] = due;
        }
    float mean = sum_lanes(sums);
    for (long j = 0; j < n; j++) {
        float weight = weights[j];
        dues[j] = weight * (dues[j] - mean) * scale;
        weights[j] = weight * (numbers[j] >= dropped ? factor : 0.0f);
    }
}

/* ---- a head of a sample ---- */

typedef struct {
    long n, heads, d; /* samples, and numbers per token and head */
    const int64_t *lengths;
    float scale;
    uint64_t key, drawn; /* words of the mask */
    int dropped;
    float factor;
} Task;

static long pad(long t)
{
    return (t + LANES - 1) / LANES * LANES;
}

static long longest_of(const Task *task)
{
    long longest = 0;
    for (long s = 0; s < task->n; s++)
        longest = task->lengths[s] > longest ? task->lengths[s] : longest;
    return pad(longest);
}

/* The next numbers of the mask, for a row of so many columns; without dropout `numbers` stays as it is. */
static void next_row(Task *task, long columns, uint64_t *numbers)
{
    if (!task->dropped)
        return;
    draw(task->key, task->drawn, (int)(columns / NUMBERS), numbers);
    task->drawn += columns / NUMBERS;
}

/* A head's numbers, token after token: side by side in memory they do not compete for cache lines. */
static void collect(long t, long d, const float *from, long row, float *target)
{
    for (long j = 0; j < t; j++)
        memcpy(target + j * d, from + j * row, sizeof(float) * d);
}

static void transpose(long t, long columns, long d, const float *rows, float *target)
{
    for (long k = 0; k < d; k++) {
        for (long j = 0; j < t; j++)
            target[k * columns + j] = rows[j * d + k];
        for (long j = t; j < columns; j++)
            target[k * columns + j] = 0.0f;
    }
}

static int forward(Task task, const float *packed, float *mixed, float *kept)
{
    long d = task.d, w = task.heads * d, most = longest_of(&task);
    float *query = malloc(sizeof(float) * most * (4 * d + ROWS + 1)); /* one more row: the mask's 16 bits each */
    if (!query)
        return -1;
    float *key = query + most * d, *value = key + most * d, *keys = value + most * d, *scores = keys + most * d;
    uint64_t *numbers = (uint64_t *)(scores + ROWS * most);
    for (long s = 0; s < task.n; s++) {
        long t = task.lengths[s], columns = pad(t);
        for (long h = 0; h < task.heads; h++) {
            collect(t, d, packed + h * d, 3 * w, query);
            collect(t, d, packed + h * d + w, 3 * w, key);
            collect(t, d, packed + h * d + 2 * w, 3 * w, value);
            transpose(t, columns, d, key, keys);
            for (long start = 0; start < t; start += ROWS) {
                long rows = t - start < ROWS ? t - start : ROWS;
                multiply(rows, columns, d, (Left){query + start * d, d, 1}, (Rows){keys, columns},
                         (Rows){scores, columns});
                for (long i = 0; i < rows; i++, kept += 2) {
                    kept[1] = soften(t, columns, task.scale, scores + i * columns, kept);
                    next_row(&task, columns, numbers);
                    if (task.dropped)
                        drop_row(columns, (uint16_t *)numbers, task.dropped, task.factor * kept[1],
                                 scores + i * columns);
                    else
                        for (long j = 0; j < columns; j++)
                            scores[i * columns + j] *= kept[1];
                }
                multiply(rows, d, t, (Left){scores, columns, 1}, (Rows){value, d},
                         (Rows){mixed + start * w + h * d, w});
            }
        }
        packed += t * 3 * w;
        mixed += t * w;
    }
    free(query);
    return 0;
}

static int backward(Task task, const float *packed, const float *kept, const float *gradient, float *target)
{
    long d = task.d, w = task.heads * d, most = longest_of(&task);
    float *query = malloc(sizeof(float) * most * (6 * d + 2 * ROWS + 1));
    if (!query)
        return -1;
    float *key = query + most * d, *value = key + most * d, *due = value + most * d, *keys = due + most * d;
    float *values = keys + most * d, *weights = values + most * d, *dues = weights + ROWS * most;
    uint64_t *numbers = (uint64_t *)(dues + ROWS * most);
    memset(numbers, 0xff, sizeof(uint16_t) * most); /* none is dropped */
    for (long s = 0; s < task.n; s++) {
        long t = task.lengths[s], columns = pad(t);
        for (long h = 0; h < task.heads; h++) {
            float *to_query = target + h * d, *to_key = to_query + w, *to_value = to_key + w;
            collect(t, d, packed + h * d, 3 * w, query);
            collect(t, d, packed + h * d + w, 3 * w, key);
            collect(t, d, packed + h * d + 2 * w, 3 * w, value);
            collect(t, d, gradient + h * d, w, due);
            transpose(t, columns, d, key, keys);
            transpose(t, columns, d, value, values);
            for (long start = 0; start < t; start += ROWS) {
                long rows = t - start < ROWS ? t - start : ROWS;
                Rows asked = {query + start * d, d}, owed = {due + start * d, d};
                multiply(rows, columns, d, (Left){asked.at, d, 1}, (Rows){keys, columns}, (Rows){weights, columns});
                multiply(rows, columns, d, (Left){owed.at, d, 1}, (Rows){values, columns}, (Rows){dues, columns});
                for (long i = 0; i < rows; i++, kept += 2) {
                    soften_again(t, columns, task.scale, kept[0], kept[1], weights + i * columns);
                    next_row(&task, columns, numbers);
                    go_back_row(columns, (uint16_t *)numbers, task.dropped, task.factor, task.scale,
                                weights + i * columns, dues + i * columns);
                }
                (start ? multiply_and_add : multiply)(t, d, rows, (Left){weights, 1, columns}, owed,
                                                      (Rows){to_value, 3 * w});
                (start ? multiply_and_add : multiply)(t, d, rows, (Left){dues, 1, columns}, asked,
                                                      (Rows){to_key, 3 * w});
                multiply(rows, d, t, (Left){dues, columns, 1}, (Rows){key, d}, (Rows){to_query + start * 3 * w, 3 * w});
            }
        }
        packed += t * 3 * w;
        gradient += t * w;
        target += t * 3 * w;
    }
    free(query);
    return 0;
}

/* ---- Python ---- */

static PyObject *attend(PyObject *self, PyObject *arguments)
{
    Task task = {0};
    unsigned long long lengths, packed, mixed, kept;
    int failed;
    if (!PyArg_ParseTuple(arguments, "lKllfKifKKK:attend", &task.n, &lengths, &task.heads, &task.d, &task.scale,
                          &task.key, &task.dropped, &task.factor, &packed, &mixed, &kept))
        return NULL;
    task.lengths = (const int64_t *)at(lengths);
    Py_BEGIN_ALLOW_THREADS;
    failed = forward(task, at(packed), at(mixed), at(kept));
    Py_END_ALLOW_THREADS;
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *attend_backward(PyObject *self, PyObject *arguments)
{
    Task task = {0};
    unsigned long long lengths, packed, kept, gradient, target;
    int failed;
    if (!PyArg_ParseTuple(arguments, "lKllfKifKKKK:attend_backward", &task.n, &lengths, &task.heads, &task.d,
                          &task.scale, &task.key, &task.dropped, &task.factor, &packed, &kept, &gradient, &target))
        return NULL;
    task.lengths = (const int64_t *)at(lengths);
    Py_BEGIN_ALLOW_THREADS;
    failed = backward(task, at(packed), at(kept), at(gradient), at(target));
    Py_END_ALLOW_THREADS;
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"attend", attend, METH_VARARGS,
     "attend(n, lengths, heads, d, scale, key, dropped, factor, packed, mixed, kept)\n\n"
     "mixed [m, h · d] of packed [m, 3 · h · d] float32, for n samples of `lengths` (int64, each from 1) tokens; d: a\n"
     "multiple of 8. kept [m · h, 2]: for the backward pass. Weights become 0 where their 16 bits of the sequence that\n"
     "begins at `key` are below `dropped`, else they are multiplied by `factor`. Arrays as addresses, contiguous."},
    {"attend_backward", attend_backward, METH_VARARGS,
     "attend_backward(n, lengths, heads, d, scale, key, dropped, factor, packed, kept, gradient, target)\n\n"
     "target [m, 3 · h · d], the gradient of packed, of the gradient [m, h · d] of what `attend` made of it."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_attention", NULL, -1, functions};

PyMODINIT_FUNC PyInit__attention(void)
{
    return PyModule_Create(&module);
}
