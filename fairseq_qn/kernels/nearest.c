/* Nearest codeword of each block, and the sums of the blocks that chose each codeword.
 *
 * What it computes is defined in plain torch by quant/kmeans.py: argmax over k of x.c_k - |c_k|^2 / 2, the lowest k on
 * ties. A row's arithmetic does not depend on its neighbours, so nor does the result on how rows are shared out among
 * threads.
 */
#include "native.h"

#define LANES 16   /* rows in a vector */
#define VECTORS 2  /* vectors of rows that share each codeword's load */
#define LARGEST 64 /* block sizes up to here; the caller takes the torch path above */

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

/* Codes of up to LANES * VECTORS rows; those past `n` are worked on as zeros and not stored. */
static inline __attribute__((always_inline)) void tile(const float *x, int64_t n, const float *codebook, const float *bias,
                                                       int64_t k, const int d, int32_t *codes)
{
    vfloat rows[VECTORS][LARGEST], best[VECTORS];
    vint where[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        for (int l = 0; l < LANES; l++)
            for (int t = 0; t < d; t++) rows[v][t][l] = v * LANES + l < n ? x[(v * LANES + l) * (int64_t)d + t] : 0;
        best[v] = bias[0] + (vfloat){0};
        for (int t = 0; t < d; t++) best[v] += rows[v][t] * codebook[t];
        where[v] = (vint){0};
    }
    for (int64_t j = 1; j < k; j++) {
        const float *codeword = codebook + j * d;
        vfloat score[VECTORS];
        for (int v = 0; v < VECTORS; v++) score[v] = bias[j] + (vfloat){0};
        for (int t = 0; t < d; t++)
            for (int v = 0; v < VECTORS; v++) score[v] += rows[v][t] * codeword[t];
        for (int v = 0; v < VECTORS; v++) {
            vint better = score[v] > best[v];
            best[v] = (vfloat)((better & (vint)score[v]) | (~better & (vint)best[v]));
            where[v] = (better & (int32_t)j) | (~better & where[v]);
        }
    }
    for (int v = 0; v < VECTORS; v++)
        for (int l = 0; l < LANES; l++)
            if (v * LANES + l < n) codes[v * LANES + l] = where[v][l];
}

FOR_EACH_PROCESSOR
static void search(const float *x, int64_t n, const float *codebook, const float *bias, int64_t k, int d, int32_t *codes)
{
    for (int64_t i = 0; i < n; i += LANES * VECTORS)
        switch (d) { /* the usual block sizes stay in registers */
        case 4: tile(x + i * 4, n - i, codebook, bias, k, 4, codes + i); break;
        case 8: tile(x + i * 8, n - i, codebook, bias, k, 8, codes + i); break;
        default: tile(x + i * d, n - i, codebook, bias, k, d, codes + i);
        }
}

/* x [n, d], codebook [k, d], bias [k] = -|c|^2 / 2, d <= LARGEST; codes [n] out. */
EXPORT void qn_nearest(const float *x, int64_t n, const float *codebook, const float *bias, int64_t k, int32_t d,
                       int32_t *codes)
{
    search(x, n, codebook, bias, k, d, codes);
}

/* sums [k, d] += the rows of each code, counts [k] += how many, in the order of the rows */
EXPORT void qn_accumulate(const float *x, const int32_t *codes, int64_t n, int32_t d, double *sums, int64_t *counts)
{
    for (int64_t i = 0; i < n; i++) {
        double *sum = sums + (int64_t)codes[i] * d;
        for (int32_t t = 0; t < d; t++) sum[t] += x[i * d + t];
        counts[codes[i]]++;
    }
}
