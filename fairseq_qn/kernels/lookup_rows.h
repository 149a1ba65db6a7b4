/* LANES rows of x at a time, one in each lane of a vector; lookup.c includes it for each width. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define vec JOIN(vector_, LANES)
#define fill_tables JOIN(fill_tables_, LANES)
#define sum_rows JOIN(sum_rows_, LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));

/* table [n groups, k, LANES] = x . codeword; xt [n * d, LANES] */
static inline __attribute__((always_inline)) void
fill_tables(const float *xt, const float *codebook, int64_t k, const int d, int64_t n, float *table)
{
    for (int64_t g = 0; g < n; g++) {
        vec x[LARGEST];
        for (int t = 0; t < d; t++) x[t] = *(const vec *)(xt + (g * d + t) * LANES);
        for (int64_t j = 0; j < k; j++) {
            vec sum = x[0] * codebook[j * d];
            for (int t = 1; t < d; t++) sum += x[t] * codebook[j * d + t];
            *(vec *)(table + (g * k + j) * LANES) = sum;
        }
    }
}

FOR_EACH_PROCESSOR
static void sum_rows(const job_t *job, int64_t row, int64_t begin, int64_t end, float *scratch)
{
    const int64_t groups = job->groups, k = job->k;
    const int64_t n_rows = job->rows - row < LANES ? job->rows - row : LANES;
    const int d = job->d;
    float *xt = scratch, *table = xt + GROUPS * d * LANES, *y = table + GROUPS * k * LANES;
    for (int64_t o = begin; o < end; o++)
        *(vec *)(y + (o - begin) * LANES) = (vec){0} + (job->bias ? job->bias[o] : 0);
    for (int64_t first = 0; first < groups; first += GROUPS) {
        const int64_t n = groups - first < GROUPS ? groups - first : GROUPS;
        const float *x = job->x + row * groups * d + first * d;
        for (int64_t t = 0; t < n * d; t++)
            for (int l = 0; l < LANES; l++) xt[t * LANES + l] = l < n_rows ? x[l * groups * d + t] : 0;
        switch (d) { /* the usual block sizes stay in registers */
        case 4: fill_tables(xt, job->codebook, k, 4, n, table); break;
        case 8: fill_tables(xt, job->codebook, k, 8, n, table); break;
        default: fill_tables(xt, job->codebook, k, d, n, table);
        }
        for (int64_t o = begin; o < end; o++) {
            const uint8_t *code = job->codes + o * groups + first;
            vec sum = *(vec *)(y + (o - begin) * LANES);
            if (n == GROUPS)
                for (int g = 0; g < GROUPS; g++) sum += *(const vec *)(table + (g * k + code[g]) * LANES);
            else
                for (int64_t g = 0; g < n; g++) sum += *(const vec *)(table + (g * k + code[g]) * LANES);
            *(vec *)(y + (o - begin) * LANES) = sum;
        }
    }
    for (int64_t l = 0; l < n_rows; l++)
        for (int64_t o = begin; o < end; o++) job->y[(row + l) * job->out + o] = y[(o - begin) * LANES + l];
}

#undef JOIN_
#undef JOIN
#undef vec
#undef fill_tables
#undef sum_rows
