/* Pseudo-noise of groups of weights and its gradient, as quant/learned_bits.py defines them, to rounding: a
 * weight's draw is a function of its index and two keys, so that backward draws it again and nothing is kept.
 */
#include "native.h"

#define PIECE 16384 /* weights, or one group that has more */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *values, *steps;
    float *sums, *out;
    int64_t groups, size, piece;
    uint32_t first, second, below, skip_begin, skip_size;
    int gaussian;
} job_t;

/* a bijection of 32 bits in which each bit of x moves every other half the time */
INLINE uint32_t mixed(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7feb352dU;
    x = (x ^ x >> 15) * 0x846ca68bU;
    return x ^ x >> 16;
}

/* 32 random bits -> u */
INLINE float uniform(uint32_t bits) { return (float)(int32_t)(bits >> 8) * 0x1p-24f - (0.5f - 0x1p-25f); }

INLINE float gaussian(uint32_t bits)
{
    int32_t sum = (int32_t)((bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24));
    float x = (float)(sum - 510) * 0x1p-9f, square = x * x;
    return x * (1.676208f + square * (0.083179f + square * 0.475080f));
}

INLINE float draw(const job_t *job, int is_gaussian, int partly, uint32_t i)
{
    uint32_t bits = mixed(mixed(i + job->first) + job->second);
    float u = is_gaussian ? gaussian(bits) : uniform(bits);
    if (!partly) return u;
    return (mixed(bits + job->first) >> 16 < job->below) & (i - job->skip_begin >= job->skip_size) ? u : 0;
}

INLINE void add(job_t job, int is_gaussian, int partly, int64_t group, int64_t end)
{
    for (; group < end; group++) {
        int64_t at = group * job.size;
        const float step = job.steps[group], *values = job.values + at;
        float *out = job.out + at;
        for (int64_t i = 0; i < job.size; i++)
            out[i] = values[i] + step * draw(&job, is_gaussian, partly, (uint32_t)(at + i));
    }
}

/* Eight sums in turn: the result does not depend on the width of vectors. */
INLINE void dot(job_t job, int is_gaussian, int partly, int64_t group, int64_t end)
{
    for (; group < end; group++) {
        int64_t at = group * job.size, i = 0;
        const float *values = job.values + at;
        float sums[8] = {0}, total = 0, *out = job.out + at;
        for (; i + 8 <= job.size; i += 8)
            for (int j = 0; j < 8; j++) {
                float value = out[i + j] = values[i + j];
                sums[j] += value * draw(&job, is_gaussian, partly, (uint32_t)(at + i + j));
            }
        for (; i < job.size; i++) total += (out[i] = values[i]) * draw(&job, is_gaussian, partly, (uint32_t)(at + i));
        for (int j = 0; j < 8; j++) total += sums[j];
        job.sums[group] = total;
    }
}

#define KINDS(what)                                           \
    if (job->gaussian)                                        \
        partly ? what(*job, 1, 1, group, end) : what(*job, 1, 0, group, end); \
    else                                                      \
        partly ? what(*job, 0, 1, group, end) : what(*job, 0, 0, group, end)

FOR_EACH_PROCESSOR
static void some(const job_t *job, int64_t group, int64_t end)
{
    int partly = job->below < 65536 || job->skip_size;
    if (job->steps) {
        KINDS(add);
    } else {
        KINDS(dot);
    }
}

static void work(const void *data, int64_t piece, int worker)
{
    const job_t *job = data;
    int64_t begin = piece * job->piece, end = begin + job->piece;
    (void)worker;
    some(job, begin, end < job->groups ? end : job->groups);
}

/* The u of weight i is of 32 random bits; it is 0 where 16 others are not less than `below`, and for skip_size
 * weights from skip_begin on. With steps [groups]: values + steps * u -> out; without: values -> out, and the
 * sum of values * u of each group -> sums. values and out [groups, size] */
EXPORT void qn_pseudo_noise(fork_t fork, int32_t threads, int32_t is_gaussian, int64_t first, int64_t second,
                            int64_t below, int64_t skip_begin, int64_t skip_size, int64_t groups, int64_t size,
                            const float *values, const float *steps, float *sums, float *out)
{
    job_t job = {values, steps, sums, out, groups, size, size < PIECE ? PIECE / size : 1, (uint32_t)first,
                 (uint32_t)second, (uint32_t)below, (uint32_t)skip_begin, (uint32_t)skip_size, is_gaussian};
    share_out(fork, threads, work, &job, (groups + job.piece - 1) / job.piece);
}
