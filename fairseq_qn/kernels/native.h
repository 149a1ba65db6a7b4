/* What the kernels share. They are called through ctypes, which releases the interpreter's lock; the Python
 * module that the library pretends to be is empty. Work is shared out over the threads of torch's own OpenMP
 * pool: a second pool beside it would fight it for the cores. `fork` is GOMP_parallel (its ABI has stood
 * since GCC 4.9, and LLVM's runtime has it too), or NULL: then one thread does everything. No result may
 * depend on how pieces fall to threads.
 */
#ifndef QN_NATIVE_H
#define QN_NATIVE_H

#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Each level has a fused multiply-add for vectors of every width: results do not depend on the width. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("fma", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

typedef void (*fork_t)(void (*)(void *), void *, unsigned, unsigned);
typedef void (*work_t)(const void *job, int64_t piece, int worker);

typedef struct {
    work_t work;
    const void *job;
    int64_t pieces, next;
    int workers;
} share_t;

static void qn_take_pieces(void *shared)
{
    share_t *share = shared;
    int64_t piece;
    int worker = __atomic_fetch_add(&share->workers, 1, __ATOMIC_RELAXED);
    while ((piece = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED)) < share->pieces)
        share->work(share->job, piece, worker);
}

/* work(job, piece, worker) for each piece below `pieces`, once, on up to `threads` threads, of which worker
 * is one. */
static inline void share_out(fork_t fork, int threads, work_t work, const void *job, int64_t pieces)
{
    share_t share = {work, job, pieces, 0, 0};
    if (threads > pieces) threads = (int)pieces;
    if (fork && threads > 1)
        fork(qn_take_pieces, &share, (unsigned)threads, 0);
    else
        qn_take_pieces(&share);
}

#endif
