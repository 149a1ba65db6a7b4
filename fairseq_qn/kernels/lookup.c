/* y = x W^T + bias, for a weight W that stays codes and a codebook.
 *
 * A block of an input row meets only K codewords, whatever the number of output features: their K dot
 * products go into a table, and an output is a sum of table entries, one for each of its codes. For
 * out_features well over K that is d times fewer operations than the dense product, and W is read as one
 * byte for d weights. What it computes is defined in plain torch: F.linear(x, decode(codes, codebook),
 * bias); sums are in another order, in fp32.
 *
 * A row's arithmetic depends neither on the other rows nor on how work falls to threads.
 */
#include "native.h"

#define LARGEST 64 /* block sizes up to here */
#define GROUPS 8   /* of columns whose tables are held at once: 128 KiB for 16 rows, in a core's L2 */

typedef struct {
    const float *x, *codebook, *bias;
    const uint8_t *codes;
    float *y, *scratch;
    int64_t rows, groups, out, k, chunk, chunks;
    int d, lanes;
} job_t;

#define LANES 4
#include "lookup_rows.h"
#undef LANES
#define LANES 8
#include "lookup_rows.h"
#undef LANES
#define LANES 16
#include "lookup_rows.h"

/* A code beyond the codebook reads nonsense, but from scratch memory: hence what is left of 256 codewords */
static int64_t scratch_size(int64_t k, int d, int64_t chunk, int lanes)
{
    return (GROUPS * (d + k) + chunk + (k < 256 ? 256 - k : 0)) * lanes;
}

static void work(const void *data, int64_t piece, int worker)
{
    const job_t *job = data;
    int64_t row = piece / job->chunks * job->lanes, begin = piece % job->chunks * job->chunk;
    int64_t end = begin + job->chunk < job->out ? begin + job->chunk : job->out;
    float *scratch = job->scratch + worker * scratch_size(job->k, job->d, job->chunk, job->lanes);
    switch (job->lanes) {
    case 4: sum_rows_4(job, row, begin, end, scratch); break;
    case 8: sum_rows_8(job, row, begin, end, scratch); break;
    default: sum_rows_16(job, row, begin, end, scratch);
    }
}

/* Floats of scratch memory that each thread needs. */
EXPORT int64_t qn_lookup_scratch(int64_t k, int32_t d, int64_t chunk, int32_t lanes)
{
    return scratch_size(k, d, chunk, lanes);
}

/* x [rows, groups * d], codes [out, groups], codebook [k, d], k <= 256, bias [out] or NULL, scratch
 * [threads, ...] aligned to 64 bytes; y [rows, out] out. `lanes` rows and `chunk` outputs, a multiple of 16,
 * make a piece of work. */
EXPORT void qn_lookup(fork_t fork, int32_t threads, const float *x, int64_t rows, const uint8_t *codes,
                      const float *codebook, int64_t k, int32_t d, const float *bias, float *y,
                      int64_t groups, int64_t out, int64_t chunk, int32_t lanes, float *scratch)
{
    const int64_t chunks = (out + chunk - 1) / chunk;
    job_t job = {x, codebook, bias, codes, y, scratch, rows, groups, out, k, chunk, chunks, d, lanes};
    share_out(fork, threads, work, &job, (rows + lanes - 1) / lanes * job.chunks);
}
