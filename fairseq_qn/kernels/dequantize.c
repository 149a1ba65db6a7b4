/* Weights from 8-bit levels: (level - zero) * scale, by ranges of consecutive values; as quant/integer.py defines it, to the bit. */
#include "native.h"

#define PIECE 16384 /* values: a write of 64 KiB */

typedef struct {
    const uint8_t *levels, *zero;
    const float *scale;
    float *weight;
    int64_t size, range;
} job_t;

FOR_EACH_PROCESSOR
static void values(const uint8_t *level, int64_t n, float zero, float scale, float *weight)
{
    for (int64_t i = 0; i < n; i++) weight[i] = ((float)level[i] - zero) * scale;
}

static void work(const void *data, int64_t piece, int worker)
{
    const job_t *job = data;
    int64_t end = (piece + 1) * PIECE < job->size ? (piece + 1) * PIECE : job->size;
    (void)worker;
    for (int64_t i = piece * PIECE; i < end;) {
        int64_t range = i / job->range, stop = (range + 1) * job->range < end ? (range + 1) * job->range : end;
        values(job->levels + i, stop - i, job->zero[range], job->scale[range], job->weight + i);
        i = stop;
    }
}

/* levels [size], scale and zero [size / range] -> weight [size] */
EXPORT void qn_dequantize(fork_t fork, int32_t threads, const uint8_t *levels, const float *scale, const uint8_t *zero,
                          int64_t size, int64_t range, float *weight)
{
    job_t job = {levels, zero, scale, weight, size, range};
    share_out(fork, threads, work, &job, (size + PIECE - 1) / PIECE);
}
