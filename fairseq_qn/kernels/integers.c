/* Integers by ranges of consecutive values, as quant/integer.py defines them, to the bit: weights from 8-bit
 * levels, (level - zero) * scale, and weights of which a mask's share reads as quantised and de-quantised.
 */
#include <math.h>

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
        int64_t range = i / job->range, stop = (range + 1) * job->range;
        stop = stop < end ? stop : end;
        values(job->levels + i, stop - i, job->zero[range], job->scale[range], job->weight + i);
        i = stop;
    }
}

/* levels [size], scale and zero [size / range] -> weight [size] */
EXPORT void qn_dequantize(fork_t fork, int32_t threads, const uint8_t *levels, const float *scale,
                          const uint8_t *zero, int64_t size, int64_t range, float *weight)
{
    job_t job = {levels, zero, scale, weight, size, range};
    share_out(fork, threads, work, &job, (size + PIECE - 1) / PIECE);
}

typedef struct {
    const float *weight, *step, *scale, *highest;
    const uint8_t *mask;
    float *noised;
    int64_t begin, size, range;
} noise_t;

FOR_EACH_PROCESSOR
static void noised(const float *weight, const uint8_t *mask, int64_t n, float step, float scale,
                   float highest, float *noised)
{
    for (int64_t i = 0; i < n; i++) {
        float level = rintf(weight[i] / step);
        level = level > highest ? highest : level;
        noised[i] = mask[i] ? level * scale : weight[i];
    }
}

static void noise(const void *data, int64_t piece, int worker)
{
    const noise_t *job = data;
    int64_t end = (piece + 1) * PIECE < job->size ? (piece + 1) * PIECE : job->size;
    (void)worker;
    for (int64_t i = piece * PIECE; i < end;) {
        int64_t range = (job->begin + i) / job->range, stop = (range + 1) * job->range - job->begin;
        stop = stop < end ? stop : end;
        noised(job->weight + i, job->mask + i, stop - i, job->step[range], job->scale[range],
               job->highest[range], job->noised + i);
        i = stop;
    }
}

/* weight and mask [size] from the value `begin` on, in ranges of `range` values; step, scale, highest level
 * above zero of each range -> noised [size]: min(round(weight / step), highest) * scale where the mask is
 * set, the weight elsewhere */
EXPORT void qn_integer_noise(fork_t fork, int32_t threads, const float *weight, const uint8_t *mask,
                             const float *step, const float *scale, const float *highest, int64_t begin,
                             int64_t size, int64_t range, float *noised)
{
    noise_t job = {weight, step, scale, highest, mask, noised, begin, size, range};
    share_out(fork, threads, noise, &job, (size + PIECE - 1) / PIECE);
}
