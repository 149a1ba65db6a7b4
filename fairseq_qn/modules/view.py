"""The weight view: what a network reads as `layer.weight` is a function of the dense Parameter stored under
that name.

    phase   reading .weight gives                                                  used for
    FLOAT   W; in training W + m * (phi(W) - W), with a straight-through gradient  Quant-Noise
    CODED   the same; `codes` hold the assignment for exact noise                  exact phi_PQ
    FROZEN  each block's cluster mean, or the de-quantised integers                iPQ, evaluation, export

install.py puts it in the place of `module.weight`, so that code which reads `.weight` without calling the
module (attention, tied heads) is reached. The Parameter never changes identity, shape, name or number, and
no forward writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules import digest
from fairseq_qn.modules.clock import Clock, Time
from fairseq_qn.modules.reading import read, refuse_tracing
from fairseq_qn.quant import integer, noise, product
from fairseq_qn.quant.blocks import check_block_size, codes_shape
from fairseq_qn.recipe import Noise, Rule

FLOAT, CODED, FROZEN = 0, 1, 2
SHARDED = (
    "views need whole Parameters, which FSDP and nn.DataParallel take apart; use DistributedDataParallel "
    "(legacy_ddp)"
)


class WeightView:
    """How one Parameter is read, by all modules that own it.

    Its buffers `phase` (uint8 scalar), for product quantisation `codes` [out_features, blocks a row], and
    `digest` of both are registered on `home`, the owner that the recipe matched, when the view is made;
    state-dict keys are therefore the same in every phase.
    """

    def __init__(
        self, name: str, rule: Rule, noise: Noise, home: nn.Module, attribute: str, clock: Clock
    ) -> None:
        weight = home._parameters[attribute]
        self.name, self.rule, self.noise, self.home, self.clock = name, rule, noise, home, clock
        self.attribute = attribute
        # state-dict keys of the Parameter on `home`: several where that goes by several names
        self.keys = (name,)
        self.padding_idx = getattr(home, "padding_idx", None) if isinstance(home, nn.Embedding) else None
        self.prefix = "" if attribute == "weight" else f"{attribute}_"
        self.readers = 0  # modules that read through this view
        self._cache: dict[str, tuple[Tensor, int, Any]] = {}
        self.stored: ref[nn.Parameter] | None = None  # the Parameter that was read last
        # the last pass that drew noise, and the weight's version then
        self._seen: tuple[Time | None, int] = (None, 0)
        self._watched = False
        _check_weight(weight, name)
        if rule.scheme == "product":  # raises before anything is registered
            check_block_size(weight.shape, rule.block_size, name)
        else:
            integer.ranges_shape(weight.shape, rule.granularity, rule.group_size, name)
        for buffer in self.buffer_names:
            if hasattr(home, buffer):
                raise UnsupportedError(
                    f"{name}: its module already has a {buffer!r}, a name that the view needs; rename it"
                )
        with torch.inference_mode(False):  # buffers that can be written to and used anywhere
            home.register_buffer(
                f"{self.prefix}phase", torch.tensor(FLOAT, dtype=torch.uint8, device=weight.device)
            )
            if rule.scheme == "product":
                dtype = product.codes_dtype(self.n_centroids)
                codes = torch.zeros(
                    codes_shape(weight.shape, rule.block_size), dtype=dtype, device=weight.device
                )
                home.register_buffer(f"{self.prefix}codes", codes)
            home.register_buffer(
                f"{self.prefix}digest", torch.zeros(digest.SIZE, dtype=torch.int64, device=weight.device)
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives what it needs from buffers of its own, and its Parameter has no hook."""
        return {**self.__dict__, "_cache": {}, "_seen": (None, 0), "_watched": False, "stored": None}

    # -- state

    @property
    def weight(self) -> nn.Parameter:
        """The dense Parameter as it is stored."""
        return self.home._parameters[self.attribute]

    @property
    def codes(self) -> Tensor:
        """codes [out_features, blocks a row]; meaningful when CODED or FROZEN."""
        return self.home._buffers[f"{self.prefix}codes"]

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Names of this view's buffers on `home`."""
        names = ("phase", "codes", "digest") if self.rule.scheme == "product" else ("phase", "digest")
        return tuple(self.prefix + name for name in names)

    @property
    def buffer_keys(self) -> tuple[str, ...]:
        """State-dict keys of this view's buffers."""
        return tuple(key[: -len(self.attribute)] + name for key in self.keys for name in self.buffer_names)

    @property
    def n_centroids(self) -> int:
        """K, clipped to the number of blocks."""
        return product.n_codewords(
            self.weight.shape, self.rule.block_size, self.rule.n_centroids, self.padding_idx
        )

    @property
    def phase(self) -> int:
        """FLOAT, CODED or FROZEN, as the buffer says."""
        return self._derived(f"{self.prefix}phase", int)

    @phase.setter
    def phase(self, value: int) -> None:
        self.home._buffers[f"{self.prefix}phase"].fill_(value)
        digest.sign(self)

    @property
    def groups(self) -> product.Groups:
        """The blocks sorted by code."""
        group = partial(product.Groups.of, n_centroids=self.n_centroids, padding_idx=self.padding_idx)
        return self._derived(f"{self.prefix}codes", group)

    def _derived(self, name: str, compute: Callable[[Tensor], Any]) -> Any:
        """compute(buffer), kept until the buffer is replaced or written to: reading one on a GPU would wait
        for it.

        Raises ViewError where what was written is not what the digest says.
        """
        buffer = self.home._buffers[name]
        kept = self._cache.get(name)
        if kept is None or kept[0] is not buffer or kept[1] != buffer._version:
            digest.check(self)
            kept = self._cache[name] = (buffer, buffer._version, compute(buffer))
        return kept[2]

    # -- what is read

    def read(self, weight: Tensor, training: bool) -> Tensor:
        """What the network sees in place of `weight`: within a forward pass one tensor for all who share it,
        so that its value and its gradient are computed once. Elsewhere, and where nothing is differentiated,
        each read is new.
        """
        shared = self.readers > 1 or len(self.keys) > 1
        values = self.clock.shared() if shared and torch.is_grad_enabled() else None
        if values is None:
            return self._value(weight, training)
        kept = values.get(self.name)
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            kept = values[self.name] = (weight, weight._version, self._value(weight, training))
        return kept[2]

    def _value(self, weight: Tensor, training: bool) -> Tensor:
        if self.phase == FROZEN:
            refuse_tracing(self.name)
            if self.rule.scheme == "product":
                project = partial(product.project, groups=self.groups, block_size=self.rule.block_size)
                return read(weight, project, project)
            return read(weight, self.quantized, None)
        if not training or self._noise_kind == "none":
            return weight
        refuse_tracing(self.name)
        if not self.clock.started:
            self._watch(weight)
            return weight
        at = self.clock.time()
        p = self.noise.at(at[0])
        if p == 0:
            return weight
        return read(
            weight, partial(self._noised, p=p, at=at), self._untimed if self._is_stale(weight, at) else None
        )

    def _is_stale(self, weight: Tensor, at: Time) -> bool:
        """Whether a read outside of any call draws a mask that served before the last step: no call moves it
        on.
        """
        clock = self.clock
        if clock.pinned or clock.stepped:
            return False
        if clock.outer is None and self._seen[0] == at:
            return self._seen[1] != weight._version
        self._seen = (at, weight._version)
        return False

    def _watch(self, weight: Tensor) -> None:
        """Let a gradient that comes of reads without any call raise."""
        if torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and not self._watched:
            self._watched = True
            weight.register_post_accumulate_grad_hook(self._gradient_came)

    def _gradient_came(self, weight: Tensor) -> None:
        if not self.clock.started and self.home.training:
            self._untimed()

    def _untimed(self, *_: Tensor) -> None:
        raise ViewError(
            f"{self.name}: trained by reads outside of any module's call, whose noise nothing moves on; "
            "call the module that "
            "reads it, not its forward, or fairseq_qn.follow(model, optimizer), or "
            "fairseq_qn.set_update(model, n)"
        )

    def quantized(self, weight: Tensor) -> Tensor:
        """phi(weight) of the scheme: exact, without noise. Product: by the present codes."""
        if self.rule.scheme == "product":
            return product.project(weight, self.groups, self.rule.block_size)
        rule = self.rule
        return integer.fake_quantize(weight, rule.bits, rule.granularity, rule.group_size, self.name)

    @property
    def _noise_kind(self) -> str:
        """Integers have a phi of their own, whatever kind of block noise the recipe asks for."""
        return "exact" if self.rule.scheme == "integer" and self.noise.kind != "none" else self.noise.kind

    @property
    def needs_codes(self) -> bool:
        """Exact noise draws on codes, which have to be learned first and refreshed."""
        return self.rule.scheme == "product" and self.noise.kind == "exact"

    def _noised(self, weight: Tensor, p: float, at: Time) -> Tensor:
        if self.needs_codes and self.phase == FLOAT:
            raise ViewError(
                f"{self.name}: exact noise before its codebook was learned; call fairseq_qn.refresh(model) "
                "first"
            )
        if self._noise_kind == "exact" and noise.is_certain(p):
            return self.quantized(weight)
        seed, block_size = (
            noise.seed_of(self.clock.seed, *at, self.clock.rank, self.name),
            self.rule.block_size,
        )
        if self.rule.scheme == "integer":
            masks, rule = noise.draws(weight.numel(), p, seed, weight.device), self.rule
            return integer.fake_quantize_some(
                weight, masks, rule.bits, rule.granularity, rule.group_size, self.name
            )
        mask = noise.bernoulli(weight.numel() // block_size, p, seed, weight.device)
        if self._noise_kind == "proxy":
            return noise.drop_blocks(weight, mask, block_size)
        if weight.device.type == "cpu":
            return product.project_some(weight, self.groups, block_size, mask)
        return noise.replace_blocks(weight, self.quantized(weight), mask, block_size)


def _check_weight(weight: Tensor, name: str) -> None:
    """Raise UnsupportedError for a weight that no view can read."""
    if not weight.is_floating_point():
        raise UnsupportedError(
            f"{name}: expected floating-point weights, found {weight.dtype}; keep this layer dense"
        )
    if weight.is_meta:
        raise UnsupportedError(f"{name}: on the meta device; give the model memory and its weights first")
    if weight.is_inference():
        raise UnsupportedError(
            f"{name}: made under torch.inference_mode, which no gradient reaches; build the model outside"
        )
    if weight.layout != torch.strided or type(weight).__name__ == "DTensor":
        raise UnsupportedError(f"{name}: a view reads whole, dense weights, found {kind(weight)}; {SHARDED}")


def kind(value: object) -> str:
    """What it is, in a word, for an error."""
    layout = getattr(value, "layout", torch.strided)
    return type(value).__name__ if layout == torch.strided else str(layout)


def views_of(model: nn.Module) -> Iterator[WeightView]:
    """Every view in the model, once, in the order of its modules."""
    seen: set[int] = set()
    for module in model.modules():
        for view in module.__dict__.get("_qn_views", {}).values():
            if id(view) not in seen:
                seen.add(id(view))
                yield view
