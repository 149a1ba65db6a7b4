/* The search for one tile of points, LANES of them in a vector; nearest.c includes it for each width. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define floats JOIN(floats_, LANES)
#define ints JOIN(ints_, LANES)
#define scan JOIN(scan_, LANES)
#define search JOIN(search_, LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* Codes of VECTORS * LANES points, which lie side by side in rows of TILE: enough independent sums to hide
 * their latency. */
static inline __attribute__((always_inline)) void
scan(const float *points, const float *codebook, const float *bias, int64_t k, const int d, int32_t *codes)
{
    floats best[VECTORS];
    ints where[VECTORS];
    for (int v = 0; v < VECTORS; v++) best[v] = -__builtin_inff() + (floats){0}, where[v] = (ints){0};
    for (int64_t j = 0; j < k; j++) {
        floats score[VECTORS];
        for (int v = 0; v < VECTORS; v++) score[v] = bias[j] + (floats){0};
        for (int t = 0; t < d; t++)
            for (int v = 0; v < VECTORS; v++)
                score[v] += *(const floats *)(points + t * TILE + v * LANES) * codebook[j * d + t];
        for (int v = 0; v < VECTORS; v++) {
            /* AVX-512 compares on the ports that multiply, and subtracts on others: 4% faster; AVX2 has no
             * such shift-and-blend */
            ints better = LANES == 16 ? (ints)(best[v] - score[v]) >> 31 : score[v] > best[v];
            best[v] = (floats)((better & (ints)score[v]) | (~better & (ints)best[v]));
            where[v] = (better & (int32_t)j) | (~better & where[v]);
        }
    }
    memcpy(codes, where, sizeof where);
}

TARGET static void search(const float *tile, const float *codebook, const float *bias, int64_t k, int d,
                          int32_t *codes)
{
    for (int i = 0; i < TILE; i += VECTORS * LANES)
        switch (d) { /* the usual block sizes stay in registers */
        case 4: scan(tile + i, codebook, bias, k, 4, codes + i); break;
        case 8: scan(tile + i, codebook, bias, k, 8, codes + i); break;
        default: scan(tile + i, codebook, bias, k, d, codes + i);
        }
}

#undef JOIN_
#undef JOIN
#undef floats
#undef ints
#undef scan
#undef search
#undef LANES
#undef TARGET
