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
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules import digest
from fairseq_qn.modules.clock import Clock, Time
from fairseq_qn.modules.folding import Fold
from fairseq_qn.noise import Noise
from fairseq_qn.quant.noise import seed_of
from fairseq_qn.quant.reading import read
from fairseq_qn.recipe import Rule, is_conv1d
from fairseq_qn.schemes.base import Draw

T = TypeVar("T")
FLOAT, CODED, FROZEN = 0, 1, 2
PHASES = ("float", "coded", "frozen")
SHARDED = (
    "views need whole Parameters, which FSDP and nn.DataParallel take apart; use DistributedDataParallel "
    "(legacy_ddp)"
)


class WeightView:
    """How one Parameter is read, by all modules that own it.

    Its buffers, `phase` (uint8 scalar), those of its scheme and a `digest` of them, and the Parameters that
    its scheme learns beside the weight, are registered on `home`, the module that the recipe matched, when
    the view is made; state-dict keys are therefore the same in every phase. To its scheme it is a Site,
    whose weight has its outputs first: that of a Conv1D [in, out] is handed over transposed, so that blocks
    run along the input as everywhere.
    """

    def __init__(self, name: str, rule: Rule, noise: Noise, home: nn.Module, clock: Clock) -> None:
        weight = home._parameters["weight"]
        self.name, self.rule, self.noise, self.home, self.clock = name, rule, noise, home, clock
        self.scheme = rule.scheme
        self.transposed = is_conv1d(home)
        # state-dict keys of the Parameter on `home`: several where that goes by several names
        self.keys = (name,)
        self.padding_idx = getattr(home, "padding_idx", None) if isinstance(home, nn.Embedding) else None
        self.fold: Fold | None = None  # the batch norm that its scheme sees the weight folded with
        self.readers = 0  # modules that read through this view
        self._cache: dict[str, tuple[Tensor, int, Any]] = {}
        self.stored: ref[nn.Parameter] | None = None  # the Parameter that was read last
        # the last pass that drew noise, and the weight's version then
        self._seen: tuple[Time | None, int] = (None, 0)
        self._watching: RemovableHandle | None = None
        _check_weight(weight, name)
        self.scheme.check(self.shape, name)  # raises before anything is registered
        with torch.inference_mode(False):  # tensors that can be written to and used anywhere
            codes, learned = (
                self.scheme.buffers(self.shape, self.padding_idx),
                self.scheme.parameters(self.shape),
            )
            buffers = {"phase": torch.tensor(FLOAT, dtype=torch.uint8), **codes}
            buffers["digest"] = torch.zeros(digest.SIZE, dtype=torch.int64)
            for own in (*buffers, *learned):
                if hasattr(home, own):
                    raise UnsupportedError(
                        f"{name}: its module already has a {own!r}, a name that the view needs; rename it"
                    )
            for own, tensor in buffers.items():
                home.register_buffer(own, tensor.to(weight.device))
            for own, tensor in learned.items():
                home.register_parameter(own, nn.Parameter(tensor.to(weight)))
        # names of what its scheme keeps
        self.codes, self.learned = tuple(codes), tuple(learned)

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives what it needs from buffers of its own, and its Parameter has no hook."""
        return {**self.__dict__, "_cache": {}, "_seen": (None, 0), "_watching": None, "stored": None}

    # -- state

    @property
    def weight(self) -> nn.Parameter:
        """The dense Parameter as it is stored."""
        return self.home._parameters["weight"]

    @property
    def shape(self) -> torch.Size:
        """Of the weight as its scheme sees it."""
        return self.weight.shape[::-1] if self.transposed else self.weight.shape

    @property
    def matrix(self) -> Tensor:
        """The weight as its scheme sees it, detached: [out, in, ...]."""
        weight = self.weight.detach()
        return self.turned(weight) if self.fold is None else self.fold.into(weight).detach()

    def turned(self, tensor: Tensor) -> Tensor:
        """From the weight's layout to its scheme's, or back."""
        return tensor.t().contiguous() if self.transposed else tensor

    def through(self, weight: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
        """phi of the weight as its scheme sees it, as the network reads it."""
        if self.fold is not None:
            return self.fold.through(weight, phi)
        return self.turned(phi(self.turned(weight)))

    def buffer(self, name: str) -> Tensor:
        """One of its buffers: `phase`, `digest`, or one of its scheme's, meaningful when CODED or FROZEN."""
        return self.home._buffers[name]

    def parameter(self, name: str) -> nn.Parameter:
        """One of the Parameters that its scheme learns beside the weight."""
        return self.home._parameters[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Of what it has registered on `home`."""
        return ("phase", *self.codes, "digest", *self.learned)

    def clear(self) -> None:
        """Take it off again."""
        for name in self.names:
            self.home._buffers.pop(name, None)
            self.home._parameters.pop(name, None)

    @property
    def phase(self) -> int:
        """FLOAT, CODED or FROZEN, as the buffer says."""
        return self.derived("phase", int)

    @phase.setter
    def phase(self, value: int) -> None:
        self.buffer("phase").fill_(value)
        digest.sign(self)

    def derived(self, name: str, compute: Callable[[Tensor], T]) -> T:
        """compute(buffer), kept until the buffer is replaced or written to: reading one on a GPU would wait
        for it.

        Raises ViewError where what was written is not what the digest says.
        """
        buffer = self.buffer(name)
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
        if self.phase == FROZEN or (self.scheme.rounds_in_evaluation and not training):
            _refuse_tracing(self.name)
            return self.through(weight, lambda w: self.scheme.frozen(w, self))
        if not training or self.noise.kind == "none":
            return weight
        _refuse_tracing(self.name)
        if not self.clock.started:
            self._watch(weight)
            return weight
        at = self.clock.time()
        p = self.noise.at(at[0])
        if p == 0:
            return weight
        if self.needs_learning and self.phase == FLOAT:
            raise ViewError(
                f"{self.name}: noise before its codes or ranges were learned; call "
                "fairseq_qn.refresh(model) first"
            )
        seed = seed_of(self.clock.seed, *at, self.clock.rank, self.name)
        draw = Draw(self.noise.kind, p, seed)
        value = self.through(weight, lambda w: self.scheme.noised(w, self, draw))
        return read(value, lambda noised: noised, self._untimed) if self._is_stale(weight, at) else value

    def _is_stale(self, weight: Tensor, at: Time) -> bool:
        """Whether a read outside of any call draws a mask that served before the last step."""
        clock = self.clock
        if clock.pinned or clock.stepped:
            return False
        if clock.outer is None and self._seen[0] == at:
            return self._seen[1] != weight._version
        self._seen = (at, weight._version)
        return False

    def _watch(self, weight: Tensor) -> None:
        """Let a gradient that comes of reads without any call raise."""
        if torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and self._watching is None:
            self._watching = weight.register_post_accumulate_grad_hook(self._gradient_came)

    def unwatch(self) -> None:
        """Undo it."""
        if self._watching is not None:
            self._watching.remove()

    def _gradient_came(self, weight: Tensor) -> None:
        if not self.clock.started and self.home.training:
            self._untimed()

    def _untimed(self, *_: Tensor) -> None:
        raise ViewError(
            f"{self.name}: trained by reads outside of any module's call, whose noise nothing moves on; "
            "call the module that reads it, not its forward, or fairseq_qn.follow(model, optimizer), or "
            "fairseq_qn.set_update(model, n)"
        )

    def quantized(self) -> Tensor:
        """phi(weight) of the scheme: exact, without noise or gradient, by what was learned."""
        with torch.no_grad():
            return self.through(self.weight.detach(), lambda w: self.scheme.quantized(w, self))

    @property
    def label(self) -> str:
        """Scheme and phase, in a few letters."""
        entry = self.scheme.entry(self.matrix, self, torch.float32, learned=False)
        folded = "" if self.fold is None else ", folded"
        return f"{self.scheme.label(entry)}{folded}, {PHASES[self.phase]}"

    @property
    def needs_learning(self) -> bool:
        """Whether its noise draws on codes, which have to be learned first and refreshed."""
        return self.scheme.needs_learning(self.noise.kind)


def _refuse_tracing(name: str) -> None:
    """Raise UnsupportedError while torch.jit records: it would keep the value and lose the view."""
    if torch.jit.is_tracing():
        todo = "save the model with fairseq_qn.save and trace what fairseq_qn.load gives"
        raise UnsupportedError(f"{name}: torch.jit cannot trace a view; {todo}")


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
