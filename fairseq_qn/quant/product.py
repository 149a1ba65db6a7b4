"""Product quantisation of a weight: codes [out_features, blocks a row] into one codebook [K, d].

The codebook of a frozen weight is the mean of the blocks that share a code, so that the decoded weight is a
projection of the dense one: linear, idempotent and its own transpose. Its gradient is therefore the same
function of the incoming gradient, and a step of SGD moves each codeword by the mean of its blocks' gradients
(Fan et al. 2020, section 3.2). A codebook may be rounded to integers, symmetric, with one scale; gradients
are then those of the means, straight through the rounding.

The pad row of an Embedding belongs to no code and stays dense: look-ups do not learn from it, but a softmax
that is tied to the table reads it, and has trained it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING

import torch

from fairseq_qn.kernels import native
from fairseq_qn.quant.blocks import codes_shape, from_blocks, to_blocks
from fairseq_qn.quant.kmeans import Clusters, kmeans

if TYPE_CHECKING:
    from torch import Tensor

PART = 1 << 18  # codes that are widened at a time
RUN = 256  # blocks that are added up in fp32; a plain fp32 sum of 300,000 equal blocks is 0.3% off


def codes_dtype(n_centroids: int) -> torch.dtype:
    """The smallest dtype that holds codes 0 .. n_centroids - 1 and that DDP can broadcast, which int16 is
    not.

    >>> codes_dtype(256), codes_dtype(257)
    (torch.uint8, torch.int32)
    """
    return torch.uint8 if n_centroids <= 1 << 8 else torch.int32


def code_bits(n_centroids: int) -> int:
    """Bits of one packed code, 1 .. 16.

    >>> [code_bits(k) for k in (1, 2, 200, 256, 257)]
    [1, 1, 8, 8, 9]
    """
    return max(1, ceil(log2(n_centroids)))


def n_codewords(
    shape: Sequence[int], block_size: int, n_centroids: int, padding_idx: int | None = None
) -> int:
    """K, clipped to the number of blocks that have to be encoded (a pad row is not).

    >>> n_codewords((3, 8), 4, 256), n_codewords((3, 8), 4, 256, padding_idx=0)
    (6, 4)
    """
    rows, columns = codes_shape(shape, block_size)
    return max(1, min(n_centroids, (rows - (padding_idx is not None)) * columns))


@dataclass(frozen=True)
class Groups:
    """The blocks of a weight sorted by code, and cut into runs that hold one code each and at most RUN
    blocks.

    order int32 [n]: blocks by code; starts int32 [n_runs]: where in `order` each run begins; first int32
    [K]: the first run of each code; counts int64 [K]; codes [n_blocks], as they were given.

    >>> groups = Groups.of(torch.tensor([[1, 0], [1, 1]]), n_centroids=3)
    >>> groups.order.tolist(), groups.counts.tolist()
    ([1, 0, 2, 3], [1, 3, 0])
    """

    order: Tensor
    starts: Tensor
    first: Tensor
    counts: Tensor
    codes: Tensor
    padding_idx: int | None

    @classmethod
    def of(cls, codes: Tensor, n_centroids: int, padding_idx: int | None = None) -> Groups:
        """Sort codes [out_features, blocks a row]; the row `padding_idx` belongs to no code."""
        flat = counted = codes.reshape(-1)
        order = torch.argsort(flat, stable=True).int()
        if padding_idx is not None:
            columns = codes.shape[1]
            order = order[order.div(columns, rounding_mode="floor") != padding_idx]
            counted = torch.cat([flat[: padding_idx * columns], flat[(padding_idx + 1) * columns :]])
        counts = torch.bincount(counted, minlength=n_centroids)
        runs = (counts + RUN - 1).div(RUN, rounding_mode="floor")
        begin, first = counts.cumsum(0) - counts, runs.cumsum(0) - runs
        code = torch.repeat_interleave(runs)  # the code of each run
        starts = begin[code] + RUN * (torch.arange(len(code), device=flat.device) - first[code])
        return cls(order, starts.int(), first.int(), counts, flat, padding_idx)


def codebook_of(weight: Tensor, groups: Groups, block_size: int, bits: int = 16) -> Tensor:
    """Mean of the blocks that share a code, of `bits` below 16 as integers round it: fp32 [K, d] (fp64 for
    an fp64 weight); 0 for a code that none has, but of 1 bit.

    >>> groups = Groups.of(torch.tensor([[0, 0], [0, 1]]), n_centroids=3)
    >>> codebook_of(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), groups, 2).tolist()
    [[3.0, 4.0], [7.0, 8.0], [0.0, 0.0]]
    """
    blocks = to_blocks(weight, block_size)
    if blocks.dtype not in (torch.float32, torch.float64):
        blocks = blocks.float()
    sums = torch.nn.functional.embedding_bag(groups.order, blocks, groups.starts, mode="sum").double()
    runs = torch.arange(len(sums), dtype=torch.int32, device=sums.device)
    sums = torch.nn.functional.embedding_bag(runs, sums, groups.first, mode="sum")
    codebook = (sums / groups.counts.clamp(min=1).unsqueeze(1)).to(blocks.dtype)
    return of_integers(*to_integers(codebook, bits)).to(blocks.dtype) if bits < 16 else codebook


def most(bits: int) -> int:
    """The greatest of symmetric integers; of 1 bit there are -1 and 1.

    >>> most(8), most(6), most(2), most(1)
    (127, 31, 1, 1)
    """
    return max(1, (1 << (bits - 1)) - 1)


def scale_of(values: Tensor, bits: int) -> Tensor:
    """What a step stands for, fp32 [1]: the largest value is the greatest integer; 1 bit: the mean size."""
    low, high = torch.aminmax(values.detach().float())
    found: Tensor = torch.maximum(-low, high).div(most(bits))
    if bits == 1:
        found = values.detach().double().abs().mean().float()
    return found.clamp(min=torch.finfo(torch.float32).tiny).reshape(1)


def to_integers(codebook: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(int8 [K, d] of -most to most, scale fp32 [1]).

    >>> to_integers(torch.tensor([[-2.54, 0.0], [1.27, 0.1]]), bits=8)[0].tolist()
    [[-127, 0], [64, 5]]
    """
    scale = scale_of(codebook, bits)
    steps = torch.where(codebook < 0, -1.0, 1.0) if bits == 1 else (codebook.float() / scale).round_()
    return steps.to(torch.int8), scale


def of_integers(codebook: Tensor, scale: Tensor) -> Tensor:
    """fp32 [K, d] that an integer codebook stands for; NaN if it was rounded from NaN or Inf."""
    return codebook.float() * scale


def digits_of(integers: Tensor, bits: int) -> Tensor:
    """int8 of -most to most -> uint8 of 0 to 2^bits - 1, to be packed.

    >>> digits_of(torch.tensor([-31, 0, 31]), 6).tolist(), digits_of(torch.tensor([-1, 1]), 1).tolist()
    ([1, 32, 63], [0, 1])
    """
    return (integers.int().add(1) // 2 if bits == 1 else integers.int() + 2 ** (bits - 1)).to(torch.uint8)


def integers_of(digits: Tensor, bits: int) -> Tensor:
    """The same backwards; digit 0, of which `digits_of` makes none but of 1 bit, is less than -most."""
    return (digits.int() * 2 - 1 if bits == 1 else digits.int() - 2 ** (bits - 1)).to(torch.int8)


def decode(
    codes: Tensor,
    codebook: Tensor,
    shape: Sequence[int],
    padding_idx: int | None = None,
    pad: Tensor | None = None,
) -> Tensor:
    """codes (any integer dtype and shape, n_blocks of them), codebook [K, d] -> weight, whose pad row is
    `pad`, or zero.

    >>> codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> decode(torch.tensor([[0, 1], [1, 1]]), codebook, shape=(2, 4)).tolist()
    [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 3.0, 4.0]]
    """
    codes = codes.reshape(-1)
    if codebook.requires_grad or native.watched():
        blocks = torch.nn.functional.embedding(codes.int(), codebook)
    else:  # the same, without all codes in int32 at once
        blocks = codebook.new_empty(len(codes), codebook.shape[1])
        for part, chosen in zip(blocks.split(PART), codes.split(PART), strict=True):
            torch.index_select(codebook, 0, chosen.int(), out=part)
    weight = from_blocks(blocks, shape)
    if padding_idx is not None:
        weight[padding_idx] = 0 if pad is None else pad
    return weight


def project(weight: Tensor, groups: Groups, block_size: int, bits: int = 16) -> Tensor:
    """Replace each block by its codeword (`codebook_of`); same shape and dtype. The pad row stays as it
    is.

    >>> groups = Groups.of(torch.tensor([[0, 0], [0, 1]]), n_centroids=2)
    >>> project(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), groups, block_size=1).tolist()
    [[3.0, 3.0], [3.0, 9.0]]
    """
    codebook, pad = codebook_of(weight, groups, block_size, bits), groups.padding_idx
    return decode(groups.codes, codebook, weight.shape, pad, None if pad is None else weight[pad]).to(
        weight.dtype
    )


def project_moment(moment: Tensor, groups: Groups, block_size: int, *, squared: bool) -> Tensor:
    """A moment of Adam's -> that of each block's codeword: the mean of its |J| blocks, of squares the mean /
    |J|. Same shape and dtype; the pad row stays as it was.

    >>> groups, moment = Groups.of(torch.tensor([[0, 0], [1, 1]]), n_centroids=2), torch.ones(2, 2)
    >>> project_moment(moment, groups, block_size=1, squared=True).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    codebook, pad = codebook_of(moment, groups, block_size), groups.padding_idx
    if squared:
        codebook = codebook / groups.counts.clamp(min=1).unsqueeze(1)
    row = None if pad is None else moment[pad]
    return decode(groups.codes, codebook, moment.shape, pad, row).to(moment.dtype)


def project_some(weight: Tensor, groups: Groups, block_size: int, mask: Tensor, bits: int = 16) -> Tensor:
    """As `project` where mask [n_blocks] is True, the weight elsewhere. On a GPU this waits to count the
    blocks.

    >>> groups = Groups.of(torch.tensor([[0, 0], [0, 1]]), n_centroids=2)
    >>> mask = torch.tensor([False, True, True, True])
    >>> project_some(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), groups, 1, mask).tolist()
    [[1.0, 3.0], [3.0, 9.0]]
    """
    hit = mask.nonzero().squeeze(1)
    if groups.padding_idx is not None:
        hit = hit[hit.div(len(mask) // len(weight), rounding_mode="floor") != groups.padding_idx]
    blocks = torch.nn.functional.embedding(
        groups.codes[hit].int(), codebook_of(weight, groups, block_size, bits)
    ).to(weight.dtype)
    result = weight.clone(memory_format=torch.contiguous_format)
    to_blocks(result, block_size).index_copy_(0, hit, blocks)
    return result


def learn(
    weight: Tensor,
    block_size: int,
    n_centroids: int,
    *,
    padding_idx: int | None = None,
    iterations: int = 20,
    seed: int = 0,
    start: Tensor | None = None,
    name: str = "weight",
) -> tuple[Tensor, Clusters]:
    """Codes [out_features, blocks a row] of a weight by k-means, and the clusters they come from.

    The pad row takes no part and gets code 0. Raises NonFiniteWeight.

    >>> codes, found = learn(torch.tensor([[1.0, 2.0, 1.0, 2.0], [1.0, 2.0, 5.0, 6.0]]), 2, n_centroids=2)
    >>> found.codebook[codes.long()].tolist()
    [[[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [5.0, 6.0]]]
    """
    kept, pad, columns = weight.detach(), padding_idx, codes_shape(weight.shape, block_size)[1]
    if pad is not None:
        kept = torch.cat([kept[:pad], kept[pad + 1 :]])
    clusters = kmeans(
        to_blocks(kept, block_size), n_centroids, iterations=iterations, seed=seed, start=start, name=name
    )
    codes = clusters.codes.reshape(-1, columns).to(codes_dtype(n_centroids))
    if pad is not None:
        codes = torch.cat([codes[:pad], codes.new_zeros(1, columns), codes[pad:]])
    return codes, clusters
