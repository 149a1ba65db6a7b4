/* One step of k-means: the nearest codeword of each block, and the sums of the blocks of each codeword.
 *
 * What it computes is defined in plain torch by quant/kmeans.py: argmax over k of x.c_k - |c_k|^2 / 2, the
 * lowest k on ties, and sums in fp64. A point's arithmetic depends neither on its neighbours nor on how work
 * falls to threads; sums are added up by pieces of which there are always as many, in their order.
 *
 * Points are the blocks centred and scaled, in tiles [d, TILE]: laid out once for all steps, so that a
 * vector holds one element of many points. The arithmetic limits the search, not memory: d FMAs and a
 * comparison for each codeword.
 */
#include "native.h"

#define TILE 64   /* points */
#define VECTORS 4 /* that share each load of a codeword's element */
#define SHARE 32  /* codewords whose sums are put together at a time */

#define LANES 4
#define TARGET
#include "nearest_rows.h"
#ifdef __x86_64__
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "nearest_rows.h"
#define LANES 16
#define TARGET __attribute__((target("avx512f")))
#include "nearest_rows.h"
#endif

typedef struct {
    const float *x, *codebook, *bias;
    const double *shift;
    float *points;
    int32_t *codes;
    double *sums, scale;
    int64_t *counts, n, k, step;
    int d, lanes;
} job_t;

static int64_t end_of(const job_t *job, int64_t piece)
{
    return (piece + 1) * job->step < job->n ? (piece + 1) * job->step : job->n;
}

static void lay_out(const void *data, int64_t piece, int worker)
{
    const job_t *job = data;
    const int d = job->d;
    const double inverse = 1 / job->scale; /* of a power of two */
    double energy = 0;
    (void)worker;
    for (int64_t i = piece * job->step; i < end_of(job, piece); i += TILE) {
        int64_t n = job->n - i < TILE ? job->n - i : TILE;
        for (int t = 0; t < d; t++)
            for (int64_t l = 0; l < TILE; l++) {
                double value = l < n ? job->x[(i + l) * d + t] - job->shift[t] : 0;
                job->points[i * d + t * TILE + l] = (float)(value * inverse);
                energy += value * value;
            }
    }
    job->sums[piece] = energy;
}

/* points [ceil(n / TILE), d, TILE] = (x - shift) / scale, with zeros after the last; energies [pieces] of
 * |x - shift|^2. `step`, a multiple of TILE, blocks make a piece. */
EXPORT void qn_lay_out(fork_t fork, int32_t threads, const float *x, int64_t n, int32_t d,
                       const double *shift, double scale, int64_t step, float *points, double *energies)
{
    job_t job = {.x = x, .n = n, .d = d, .shift = shift, .scale = scale, .step = step,
                 .points = points, .sums = energies};
    share_out(fork, threads, lay_out, &job, (n + step - 1) / step);
}

static inline __attribute__((always_inline)) void add_up(const float *x, int64_t n, const int d,
                                                         const int32_t *codes, double *sums, int64_t *counts)
{
    for (int64_t i = 0; i < n; i++) {
        double *sum = sums + (int64_t)codes[i] * d;
        for (int t = 0; t < d; t++) sum[t] += x[i * d + t];
        counts[codes[i]]++;
    }
}

static void assign(const void *data, int64_t piece, int worker)
{
    const job_t *job = data;
    const int64_t end = end_of(job, piece);
    double *sums = job->sums + piece * job->k * job->d;
    int64_t *counts = job->counts + piece * job->k;
    (void)worker;
    memset(sums, 0, sizeof *sums * job->k * job->d);
    memset(counts, 0, sizeof *counts * job->k);
    for (int64_t i = piece * job->step; i < end; i += TILE) {
        int64_t n = end - i < TILE ? end - i : TILE;
        if (job->points) {
            const float *tile = job->points + i * job->d;
            int32_t codes[TILE];
            switch (job->lanes) {
#ifdef __x86_64__
            case 16: search_16(tile, job->codebook, job->bias, job->k, job->d, codes); break;
            case 8: search_8(tile, job->codebook, job->bias, job->k, job->d, codes); break;
#endif
            default: search_4(tile, job->codebook, job->bias, job->k, job->d, codes);
            }
            memcpy(job->codes + i, codes, 4 * n);
        }
        const float *rows = job->x + i * job->d;
        switch (job->d) {
        case 4: add_up(rows, n, 4, job->codes + i, sums, counts); break;
        case 8: add_up(rows, n, 8, job->codes + i, sums, counts); break;
        default: add_up(rows, n, job->d, job->codes + i, sums, counts);
        }
    }
}

/* The first piece's sums of SHARE codewords += those of the other pieces, in their order. */
static void add_pieces(const void *data, int64_t share, int worker)
{
    const job_t *job = data;
    const int64_t k = job->k, d = job->d, first = share * SHARE, end = first + SHARE < k ? first + SHARE : k;
    (void)worker;
    for (int64_t piece = 1; piece * job->step < job->n; piece++) {
        const double *sums = job->sums + piece * k * d;
        const int64_t *counts = job->counts + piece * k;
        for (int64_t i = first * d; i < end * d; i++) job->sums[i] += sums[i];
        for (int64_t j = first; j < end; j++) job->counts[j] += counts[j];
    }
}

/* The widest vectors that this processor has, in floats. */
EXPORT void qn_lanes(int32_t *lanes)
{
    *lanes = 4;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *lanes = 8;
    if (__builtin_cpu_supports("avx512f")) *lanes = 16;
#endif
}

/* codes [n] of the nearest of codebook [k, d], bias [k] = -|c|^2 / 2, to points; without points, codes are
 * given. sums [pieces, k, d] of the rows of x [n, d] of each code, counts [pieces, k]: their first entries
 * end as the totals. */
EXPORT void qn_assign(fork_t fork, int32_t threads, const float *points, const float *x, int64_t n,
                      int32_t d, const float *codebook, const float *bias, int64_t k, int64_t step,
                      int32_t lanes, int32_t *codes, double *sums, int64_t *counts)
{
    job_t job = {.points = (float *)points, .x = x, .n = n, .d = d, .codebook = codebook, .bias = bias,
                 .k = k, .step = step, .lanes = lanes, .codes = codes, .sums = sums, .counts = counts};
    share_out(fork, threads, assign, &job, n ? (n + step - 1) / step : 1); /* no rows: zeros */
    if (n > step) share_out(fork, threads, add_pieces, &job, (k + SHARE - 1) / SHARE);
}
