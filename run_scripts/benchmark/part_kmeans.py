"""Codebooks: k-means of ours, faiss-cpu and fairseq's EM on the blocks of one layer, with K = 256 and as
many iterations.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable

import faiss
import torch
from fairseq.modules.quantization.pq.em import EM
from harness import OURS, Case, arguments, progress, race, report, roofline
from torch import Tensor

from fairseq_qn.quant.kmeans import kmeans

K, ITERATIONS = 256, 20
# rows, columns, block size, the share of the rows that fairseq's EM is timed on
LAYERS = [(768, 768, 8, 1), (768, 768, 4, 1), (3072, 768, 8, 4), (3072, 768, 4, 4), (50_265, 768, 8, 32)]


def objective(x: Tensor, codes: Tensor) -> float:
    """Sum of squared distances to the mean of each code's blocks, in fp64: the same yardstick for all."""
    x = x.double()
    sums = torch.zeros(K, x.shape[1], dtype=torch.float64).index_add_(0, codes, x)
    means = sums / torch.bincount(codes, minlength=K).clamp(min=1).unsqueeze(1)
    return float((x - means[codes]).square().sum())


def with_faiss(x: Tensor, seed: int) -> Tensor:
    """Codes by faiss: all points (by default it draws 256 for each codeword), one run, and a last search for
    the codes.
    """
    found = faiss.Kmeans(x.shape[1], K, niter=ITERATIONS, nredo=1, seed=seed, max_points_per_centroid=len(x))
    found.train(x.numpy())
    return torch.from_numpy(found.index.search(x.numpy(), 1)[1][:, 0])


def with_fairseq(x: Tensor, seed: int, share: int) -> list[float]:
    """Seconds of one step of fairseq's EM, on one in `share` of the blocks, times `share` and the
    iterations.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    em = EM(x[: len(x) // share].t(), n_centroids=K, n_iter=1, verbose=False)
    em.initialize_centroids()
    began = time.perf_counter()
    em.step(0)
    return (time.perf_counter() - began) * share * ITERATIONS


def measure(rows: int, columns: int, d: int, share: int, repeats: int) -> Case:
    """One line of the table; every turn has a seed of its own, and objectives are compared by their means
    over the seeds.
    """
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).reshape(-1, d)
    engines: dict[str, Callable[[int], Tensor]] = {
        OURS: lambda seed: kmeans(x, K, iterations=ITERATIONS, seed=seed).codes,
        "faiss-cpu": lambda seed: with_faiss(x, seed),
    }
    codes: dict[str, list[Tensor]] = {name: [] for name in engines}

    def turn(name: str) -> Callable[[], None]:
        return lambda: codes[name].append(engines[name](len(codes[name])))

    values = race({name: turn(name) for name in engines}, repeats)
    errors = {name: [objective(x, c.long()) for c in found[1:]] for name, found in codes.items()}
    ratio = statistics.mean(errors[OURS]) / statistics.mean(errors["faiss-cpu"])
    values["fairseq EM"] = [with_fairseq(x, seed, share) for seed in range(repeats)]
    limit, by = roofline(2.0 * len(x) * K * d * ITERATIONS, 4.0 * x.numel() * ITERATIONS)
    name = f"{rows:,} x {columns}, d = {d} (error {ratio - 1:+.2%})"
    return Case(
        name, values, limit, by, extra={"objectives": errors, "objective_ratio": ratio, "em_share": share}
    )


NOTES = [
    f"K = {K}, {ITERATIONS} iterations each, weights drawn from a normal distribution; a seed of its own in "
    "each repeat.",
    "error: sum of squared errors of our codes against that of faiss', each to the means of its codes; mean "
    "over the seeds.",
    "faiss-cpu: Kmeans(nredo=1, max_points_per_centroid=n), without which it would take 256 points for each "
    "codeword, and "
    "the search that turns its centroids into codes. Ours: 10 steps on 8,192 blocks, 20 on all, codes "
    "included.",
    f"fairseq EM: one iteration times {ITERATIONS}; of 3,072 x 768 on a quarter of the blocks, times 4, of "
    "the "
    "table on one in 32, times 32.",
    "limit: 2 n K d operations for each iteration at the rate of this machine's fp32 matrix product.",
]


def main() -> None:
    """Measure every layer, or those asked for, and report."""
    parser = arguments("kmeans")
    parser.add_argument(
        "--only", type=int, nargs="+", choices=range(len(LAYERS)), help="some layers, by number"
    )
    args = parser.parse_args()
    logging.disable()
    faiss.omp_set_num_threads(torch.get_num_threads())
    cases = []
    for number in args.only or range(len(LAYERS)):
        progress(f"kmeans: {LAYERS[number]}")
        cases.append(measure(*LAYERS[number], args.repeats))
    report("kmeans", "k-means of the blocks of one layer", cases, NOTES, args)


if __name__ == "__main__":
    main()
