"""apply, freeze, save, load, inspect: what everything else, and every user, calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fairseq_qn.artifact import container
from fairseq_qn.errors import RecipeError, UnsupportedError
from fairseq_qn.modules import stages
from fairseq_qn.modules.activations import refuse_unseen, share_ranges
from fairseq_qn.modules.apply import install_all, uninstall_all
from fairseq_qn.modules.decoded import decoded_state_dict
from fairseq_qn.modules.export import content_of
from fairseq_qn.modules.follow import follow
from fairseq_qn.modules.freeze import (
    LayerReport,
    Progress,
    distortion,
    freeze_views,
    refresh_due,
    refresh_views,
)
from fairseq_qn.modules.match import Coverage
from fairseq_qn.modules.moments import project_moments
from fairseq_qn.modules.pruning import STACKS, pruned, sensitivity
from fairseq_qn.modules.restore import File, read, register_builder
from fairseq_qn.modules.sharing import share, shared
from fairseq_qn.modules.stages import Stages
from fairseq_qn.modules.undecayed import parameter_groups
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.recipe import Recipe
from fairseq_qn.report import SizeReport, inspect
from fairseq_qn.structure import Prune

__all__ = [
    "File", "Stages", "apply", "decoded_state_dict", "figures", "follow", "freeze", "inspect", "load",
    "parameter_groups", "predict_size", "prune", "read", "refresh", "register_builder", "remove", "save",
    "sensitivity", "set_update", "share", "size_penalty",
]  # fmt: skip


def apply(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    seed: int | None = None,
    strict: bool = True,
) -> Coverage:
    """Let layers share their weights as the recipe says, and install weight views on those that it names,
    in place.

    Applying the same recipe again covers layers that the model has gained since; to a model of whose parts
    some carry its views already, it takes these over. seed: of the noise and of k-means; by default torch's,
    so that torch.manual_seed makes a run repeat itself. Nothing changes if an error is raised: RecipeError,
    NoLayerMatched (unless not `strict`), BlockSizeError, or UnsupportedError where views of another recipe
    are in place, or a weight cannot carry one.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    pruned(model, recipe.prune, strict)  # refuses now what `save` would refuse
    with shared(model, recipe.share, strict):
        coverage = install_all(model, recipe, seed, strict)
    model._qn_recipe = recipe
    return coverage


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that was applied to this model, if any."""
    return model.__dict__.get("_qn_recipe")


def freeze(
    model: nn.Module,
    stage: str | None = None,
    *,
    iterations: int = 20,
    progress: Progress | None = None,
    optimizer: Optimizer | Sequence[Optimizer] = (),
) -> list[LayerReport]:
    """Quantise the layers of one stage, or all that are left, and keep training or evaluate them quantised.

    The dense Parameters stay; product codes are fixed and codebooks follow the Parameters. Returns a report
    per layer.
    optimizer: what trains on, one of torch's or several. A codeword's gradient is the mean of many blocks'
    and so smaller than Adam remembers: its moments become those of the codewords. Other optimizers are left
    alone, with a warning.
    Raises RecipeError for an unknown stage, NonFiniteWeight (before anything is changed), UnsupportedError.
    """
    recipe = _applied(model, "freeze")
    names = [s.name for s in recipe.stages]
    if stage is not None and stage not in names:
        raise RecipeError(f"freeze: stage: expected one of {names}, found {stage!r}")
    optimizers = [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]
    if strange := [type(o).__name__ for o in optimizers if not isinstance(o, Optimizer)]:
        raise UnsupportedError(
            f"freeze: optimizer: expected torch.optim.Optimizer, found {', '.join(strange)}"
        )
    views = [view for view in views_of(model) if stage in (None, view.rule.stage) and view.phase != FROZEN]
    reports = freeze_views(views, iterations=iterations, progress=progress)
    left = project_moments(optimizers, views)[1] if optimizers else ""
    if left:
        warnings.warn(f"freeze: {left}", stacklevel=2)
    return reports


def unfrozen(model: nn.Module) -> list[str]:
    """The stages, in the recipe's order, that have a layer left to freeze; [] without a recipe."""
    recipe = recipe_of(model)
    return [] if recipe is None else stages.unfrozen(model, recipe)


def refresh(model: nn.Module, *, progress: Progress | None = None) -> list[LayerReport]:
    """Learn the codebooks of exact noise from the present weights; a no-op without exact noise."""
    _applied(model, "refresh")
    return refresh_views(list(views_of(model)), progress=progress)


def remove(model: nn.Module) -> nn.Module:
    """Take the views off, in place: an ordinary model, which trains on as one.

    Frozen layers keep the weights that were read, the others their Parameters; each Parameter stays the same
    object. The noise ends. Raises UnsupportedError without a recipe, and
    where a module outside of the model reads one of its weights.
    """
    _applied(model, "remove")
    uninstall_all(model)
    for module in model.modules():
        module.__dict__.pop("_qn_recipe", None)
    return model


def set_update(model: nn.Module, n: int, micro: int = 0) -> None:
    """Say which update and micro-batch the noise belongs to, from now on: the same numbers draw the same
    masks.

    Without it, or `follow`, each pass is an update.
    Exact noise whose `refresh` is a number of updates is refreshed here, at the first micro-batch of its
    updates.
    Of several ranks each has to call it: here they take over the first one's static ranges of inputs.
    """
    views = list(views_of(model))
    for clock in {id(view.clock): view.clock for view in views}.values():
        clock.pin(n, micro)
    if micro == 0:
        share_ranges(model)
    refresh_due(views, n, micro)


def save(model: nn.Module, path: str | Path, *, parts: str = "float16", drop: Sequence[str] = (),
         assets: Mapping[str, bytes] | None = None, source: Mapping[str, Any] | None = None,
         coder: str | None = None) -> SizeReport:  # fmt: skip
    """Write the small file and report its size on disk.

    Every layer of the recipe has to be frozen, but those that its `prune` leaves out.
    parts: dtype of codebooks and of what stays dense, float16 or float32.
    drop: names of modules to leave out, e.g. an LM head that nothing will call. assets: files to carry along
    (BPE models).
    source: how to rebuild the model; a qn_ model of fairseq knows by itself. coder: "ans" codes what is
    packed by how often each code occurs, where that is smaller; reading then takes the library constriction.
    Raises UnsupportedError (not frozen, unknown module in `drop`), NonFiniteWeight, OSError; the old file
    survives any of them.
    """
    recipe, model = _applied(model, "save"), _outgoing(model)
    content = content_of(model, recipe, parts=parts, drop=drop, assets=assets, source=source, coder=coder)
    if waiting := unfrozen(model):
        raise UnsupportedError(
            f"save: stages {waiting} are not frozen yet; call fairseq_qn.freeze(model) first"
        )
    refuse_unseen(model, drop)
    content.check()
    written, tensors = content.encode()
    container.write(path, tensors, written)
    return SizeReport.of(path, container.read_manifest(path))


def predict_size(model: nn.Module, *, parts: str = "float16", drop: Sequence[str] = (),
                 assets: Mapping[str, bytes] | None = None, source: Mapping[str, Any] | None = None,
                 coder: str | None = None) -> int:  # fmt: skip
    """Bytes that `save` will write, from shapes alone; frozen or not. With a coder, bytes at most."""
    recipe, model = _applied(model, "predict_size"), _outgoing(model)
    content = content_of(model, recipe, parts=parts, drop=drop, assets=assets, source=source, coder=coder)
    return content.size()


def prune(model: nn.Module, keep: str | Sequence[int] | None = None, layers: str = STACKS) -> nn.Module:
    """The model without some layers of its stacks: a tree of its own over the same layers and Parameters,
    which stay whole in the model given. To be measured or saved; to be trained, prune before `apply`.

    keep: "every_other", of layers or of the chunks that share their weights, beginning with the first; or
    numbers of layers in the whole stack. By default what the recipe's `prune` says, as `save` does itself.
    layers: the stacks, ModuleList or Sequential, whose whole name matches this regular expression.
    Raises RecipeError, NoLayerMatched, UnsupportedError for layers that the model has not.

    >>> stack = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    >>> prune(stack, "every_other", layers="")[1] is stack[2]
    True
    """
    given = None if keep is None else Prune.parse([{"layers": layers, "keep": keep}], "prune")
    result = pruned(model, _applied(model, "prune").prune if given is None else given)
    if result is not model:
        result.__dict__["_qn_pruned"] = True  # `save` prunes once
    return result


def size_penalty(model: nn.Module, *, rounded: bool = True) -> Tensor:
    """MiB (2^20 bytes) of the weights that learn their size, differentiable: a fp32 scalar to add to the
    loss, times a weight (Defossez et al. 2021).

    rounded: of bits as the file has them; else of the real-valued ones. The gradient is that of the
    real-valued ones either way. Layers that are frozen count as they are. Raises UnsupportedError where
    no weight learns its size.
    """
    sizes = [size for view in views_of(model) if (size := view.scheme.size(view, rounded)) is not None]
    if not sizes:
        raise UnsupportedError(
            "size_penalty: no layer learns its size; use scheme: learned_bits in the recipe, or no penalty"
        )
    return torch.stack(sizes).sum() / (8 * 2**20)


def load(path: str | Path, mode: str = "dense", model: nn.Module | None = None, *,
         dtype: torch.dtype | None = None, large: bool = False) -> nn.Module:  # fmt: skip
    """The model of a small file, in eval mode. Nothing in the file is executed.

    mode: "dense" decodes every weight once; the model is then an ordinary one, and all of it trains on,
    without the codes. "packed" keeps codes and codebooks in memory and computes with them; only what is
    dense beside them trains (biases, norms, heads), and model.train() warns of it. Gradients of inputs are
    those of the dense model. "integer" computes with integers alone between input and output
    (modules/integer_program.py): for networks of Linear, Conv2d, batch norm, ReLU, sums and pooling whose
    layers have static 8-bit activations, and weights of symmetric integers or of int8 codebooks. Of a model
    with LayerNorm, as a transformer is, each quantised Linear computes so, and fp32 what lies between them:
    softmax, LayerNorm, GELU, attention's products, tables (modules/integer_layer.py). It does not train.
    model: a fresh dense instance, for any module that fairseq_qn cannot rebuild from the file alone; it is
    filled in place. Its tensors, ties, classes and options such as eps have to be those that were saved;
    weights tied in the file are tied in it.
    dtype: of the whole model, e.g. torch.bfloat16, which a processor's matrix units take; by default the
    model's own, fp32.
    large: decode even what takes more than 1 GB and 20 times the file, and so opens more slowly than a file
    of its size should; without it such a file is refused in mode "dense".
    Raises FormatError (damaged, another version, not such a file), MismatchError (another model),
    UnsupportedError, OSError.
    """
    return read(path).load(mode, model, dtype=dtype, large=large)


def figures(model: nn.Module, **saved: Any) -> dict[str, float]:
    """For logs: share of the recipe's weights that is frozen, predicted MB (10^6 bytes), mean distortion by
    frozen stage. saved: drop, assets, ... as `save` will be given them.
    """
    views = list(views_of(model))
    frozen = [view for view in views if view.phase == FROZEN]
    total = sum(view.weight.numel() for view in views)
    result = {"frozen_share": sum(v.weight.numel() for v in frozen) / max(1, total)}
    # a model that no small file can hold trains all the same; `save` says why
    with suppress(UnsupportedError):
        result["predicted_mb"] = predict_size(model, **saved) / 1e6
    for stage in dict.fromkeys(view.rule.stage for view in frozen):
        errors = [distortion(view) for view in frozen if view.rule.stage == stage]
        result[f"distortion_{stage}"] = sum(errors) / len(errors)
    return result


def _outgoing(model: nn.Module) -> nn.Module:
    """What is written of a model: it, or what its recipe's `prune` leaves of it."""
    return model if "_qn_pruned" in model.__dict__ else prune(model)


def _applied(model: nn.Module, verb: str) -> Recipe:
    recipe = recipe_of(model)
    if recipe is None:
        raise UnsupportedError(
            f"{verb}: the model carries no recipe; call fairseq_qn.apply(model, recipe) first"
        )
    return recipe
