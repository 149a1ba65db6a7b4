"""Which noise a forward pass draws: (seed, update, micro-batch, rank), and what lasts as long as the pass
does; shared by all views of a model.

A pass begins with the outermost training forward of any module that carries views. Other modules that are
called after it join it, until one comes again: `model.encode(x)` and `model.decode(h)`, or
`model.forward(x)`, whose hooks nobody runs, are one pass. Outputs carry their pass into the backward pass,
where activation checkpointing computes parts of it again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fairseq_qn.errors import ViewError
from fairseq_qn.recipe import Recipe

Time = tuple[int, int]  # update, micro-batch


@dataclass(eq=False)
class Clock:
    """Time as the noise sees it. Each pass is an update, unless an optimizer's steps are (`stepped`: passes
    are micro-batches), or it was `pinned` by set_update.

    values: what shared views have read in the present outermost call; None between calls. followed: the
    optimizer's hook.
    recipe: the one that the views are of.
    """

    seed: int = 0
    recipe: Recipe | None = None
    update: int = 0
    micro: int = 0  # -1 after a step, before a pass
    pinned: bool = False
    stepped: bool = False
    followed: RemovableHandle | None = None
    values: dict[str, Any] | None = None
    outer: nn.Module | None = None  # whose call is the outermost
    _frame: FrameType | None = None  # that runs it
    _depth: int = 0  # calls of `outer` within itself
    _again: bool = False  # the call is made by a backward pass
    _ticked: bool = False  # the call has begun or joined a pass
    # ids of modules called in training in the present pass; None: the next call begins one
    _called: set[int] | None = None
    # autograd's id of a backward pass -> the pass it has come to
    _tasks: dict[int, Time] = field(default_factory=dict)

    def pin(self, update: int, micro: int) -> None:
        """Set the update and micro-batch by hand, from now on."""
        self.update, self.micro, self.pinned = update, micro, True

    def step(self, update: int) -> None:
        """Let `update` begin; the passes to come are its micro-batches."""
        self.update, self.micro, self.pinned, self.stepped, self._called = update, -1, False, True, None

    @property
    def started(self) -> bool:
        """Whether there was a training forward, follow or set_update: before, a read is no training."""
        return self.pinned or self.stepped or self.update > 0

    @property
    def rank(self) -> int:
        """This process' rank, so that data-parallel workers draw different masks."""
        on = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_rank() if on else 0

    def time(self) -> Time:
        """Update and micro-batch of the pass that a read belongs to.

        Raises ViewError in a backward pass that has come through no output of a pass: whose part it is
        cannot be told.
        """
        if _backward() == -1:
            return self.update, max(self.micro, 0)
        found = self._time_again()
        if found is None:
            raise ViewError(
                "a weight is computed again in backward, and of which pass cannot be told: checkpoint what "
                "a called module does whose output the loss depends on, or call "
                "fairseq_qn.set_update(model, n) before each pass"
            )
        return found

    def _time_again(self) -> Time | None:
        # a backward pass may run within another
        within = [task for task in self._tasks if task <= _backward()]
        return self._tasks[max(within)] if within else (self.update, self.micro) if self.pinned else None

    def shared(self) -> dict[str, Any] | None:
        """`values`, if they are of the pass that is being read for."""
        return self.values if self._again == (_backward() != -1) else None

    def begin(self, module: nn.Module) -> None:
        """A module that carries views is called."""
        if self.outer is None or (self.outer is module and self._abandoned()):
            self.outer, self._depth, self._ticked, self._again = module, 1, False, _backward() != -1
            self._frame = None if torch.compiler.is_compiling() else sys._getframe(2)
            self.values = {}
        elif self.outer is module:
            self._depth += 1
        if module.training and not self._again:
            if not self._ticked:
                self._tick(module)
            if self._called is not None:  # no step was made within the call
                self._called.add(id(module))

    def end(self, module: nn.Module, output: Any) -> None:
        """Its call is over, done or failed (with `output` None)."""
        if self.outer is not module:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self.outer = self._frame = self.values = None
        at = self._time_again() if self._again else self.time() if self._ticked else None
        if at is not None and torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(partial(self._come_to, at))

    def _tick(self, module: nn.Module) -> None:
        self._ticked = True
        if self._called is not None and not any(id(part) in self._called for part in module.modules()):
            return
        self._called = set()
        if not self.pinned:
            self.update, self.micro = (self.update, self.micro + 1) if self.stepped else (self.update + 1, 0)

    def _come_to(self, at: Time, grads: Any) -> None:
        """A backward pass has come to the outputs of the forward pass `at`, the latest first."""
        task = _backward()
        if task not in self._tasks:
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._tasks.pop, task, None))
        self._tasks[task] = at

    def _abandoned(self) -> bool:
        """Whether the outermost call was left without its hook, which KeyboardInterrupt does not run."""
        if self._frame is None:
            return False
        try:
            self._frame.clear()
        except RuntimeError:  # it is still running
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no pass of its own yet, and no optimizer to follow."""
        return {key: getattr(self, key) for key in ("seed", "recipe", "update", "micro", "pinned")} | {
            "_tasks": {}
        }


def _backward() -> int:
    """autograd's id of the backward pass that runs; -1 outside of any."""
    return torch._C._current_graph_task_id()


def _begin(module: nn.Module, args: tuple) -> None:
    module._qn_clock.begin(module)


def _end(module: nn.Module, args: tuple, output: Any) -> None:
    module._qn_clock.end(module, output)


def track(module: nn.Module, clock: Clock) -> bool:
    """Let the clock know of the calls of each module that carries views or has parts that do; whether this
    one does.

    Every module gets to know its clock, so that apply finds those of parts of a model.
    """
    inside = "_qn_views" in module.__dict__
    for child in module.children():
        inside |= track(child, clock)
    # the hooks find it there, also in a copy of the module, or under another parent
    module.__dict__["_qn_clock"] = clock
    if inside and _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end, always_call=True)
    return inside


def untrack(module: nn.Module) -> None:
    """Undo `track`."""
    for part in module.modules():
        part.__dict__.pop("_qn_clock", None)
        for hooks, ours in ((part._forward_pre_hooks, _begin), (part._forward_hooks, _end)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
