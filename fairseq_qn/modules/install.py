"""A view takes the place of a module's weight: the class of the module *instance* is swapped for a subclass
with a property.

So code that reads `.weight` without calling the module is reached, and what would go past the view, or take
its Parameter away, is refused by name.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import ref

from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules import digest
from fairseq_qn.modules.activation_view import RANGE, ActivationView
from fairseq_qn.modules.seen import REPARAMETRISED, show
from fairseq_qn.modules.view import SHARDED, WeightView, kind


def install(module: nn.Module, attribute: str, view: WeightView) -> None:
    """Let `module.<attribute>` read through `view`; the Parameter stays where it is."""
    before = module.__dict__.get("_qn_views", {})
    view.readers += before.get(attribute) is not view
    views = {**before, attribute: view}
    base = type(module)._qn_base if "_qn_views" in module.__dict__ else type(module)
    module.__dict__["_qn_views"] = views
    module.__class__ = _viewed_class(base, tuple(sorted(views)))


def uninstall(module: nn.Module) -> None:
    """Undo it, for all of a module's views."""
    for view in module.__dict__.pop("_qn_views").values():
        if view.home is module:
            view.clear()
    module.__class__ = type(module)._qn_base


@cache
def _viewed_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base`, of the same name, whose attributes are read through the instance's views."""
    body = {attribute: _view_property(attribute) for attribute in attributes}
    body |= {
        "_qn_base": base, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__setattr__": _set_attribute, "__delattr__": _delete_attribute, "__reduce_ex__": _reduce,
        "register_parameter": _register_parameter, "_load_from_state_dict": _load,
        "_replicate_for_data_parallel": _replicate, "__prepare_scriptable__": _script,
        "extra_repr": _extra_repr,
    }  # fmt: skip
    return type(base.__name__, (base,), body)


def _view_property(attribute: str) -> property:
    def get(self: nn.Module) -> Tensor | None:
        weight = self._parameters[attribute]
        try:
            # A tied owner follows the training flag of the matched one, so that both see the same noise.
            view = self._qn_views[attribute]
            if weight is None:
                return None
            view.stored = ref(weight)
            value = view.read(weight, view.home.training)
            if value is not weight:
                show(value, weight, view.name)
            return value
        except AttributeError as error:  # would fall through to __getattr__, which hands out the Parameter
            raise ViewError(
                f"{type(self).__name__}.{attribute}: the view cannot be read: {error}"
            ) from error

    return property(get)


def _set_attribute(self: nn.Module, name: str, value: object) -> None:
    """Assigning what was read assigns its Parameter: fairseq's trainer so restores ties after a move."""
    if name in self.__dict__.get("_qn_views", ()):
        if not isinstance(value, (nn.Parameter, type(None))):
            read, value = value, getattr(value, "_qn_parameter", None)
            if value is None:
                raise UnsupportedError(
                    f"{type(self).__name__}.{name}: a viewed weight takes a Parameter, found {kind(read)}; "
                    f"{SHARDED}"
                )
        if type(value).__name__ == "DTensor":
            raise UnsupportedError(
                f"{type(self).__name__}.{name}: a viewed weight cannot be sharded (FSDP2); {SHARDED}"
            )
    nn.Module.__setattr__(self, name, value)


def _delete_attribute(self: nn.Module, name: str) -> None:
    if name in self._qn_views:
        raise UnsupportedError(f"{self._qn_views[name].name}: {REPARAMETRISED}")
    nn.Module.__delattr__(self, name)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Refuse the weight's parts as torch.nn.utils names them; weight_norm has taken it away by then."""
    for attribute, view in self._qn_views.items():
        if name in (f"{attribute}_g", f"{attribute}_v", f"{attribute}_orig"):
            if attribute not in self._parameters:
                others = dict(self._parameters)
                self._parameters.clear()
                self._parameters.update({attribute: view.stored(), **others})  # first, as a layer has it
            raise UnsupportedError(f"{view.name}: {REPARAMETRISED}")
    nn.Module.register_parameter(self, name, param)


def _load(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """torch's loading of this module alone, once phases and codes are checked. Raises MismatchError."""
    for view in self._qn_views.values():
        if view.home is self:
            digest.complete(view, state, prefix)
    placed = self.__dict__.get("_qn_activation")
    if isinstance(placed, ActivationView) and prefix + RANGE in state:
        placed.check(state[prefix + RANGE])
    type(self)._qn_base._load_from_state_dict(self, state, prefix, *rest)


def _replicate(self: nn.Module) -> nn.Module:
    raise UnsupportedError(
        f"{type(self).__name__}: the replicas of nn.DataParallel have no Parameter to read; {SHARDED}"
    )


def _script(self: nn.Module) -> nn.Module:
    raise UnsupportedError(
        f"{type(self).__name__}: torch.jit cannot script a view; save the model with fairseq_qn.save and "
        "script what fairseq_qn.load gives"
    )


class StoredParameters:
    """`get_parameter` of a module with views in it: the Parameter, not what is read."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, target: str) -> nn.Parameter:
        """The Parameter under a dotted name."""
        path, _, name = target.rpartition(".")
        stored = self.module.get_submodule(path)._parameters.get(name)
        return nn.Module.get_parameter(self.module, target) if stored is None else stored


def _extra_repr(self: nn.Module) -> str:
    """As of the plain module, and how each weight that has a view is read."""
    labels = (
        view.label if name == "weight" else f"{name} {view.label}" for name, view in self._qn_views.items()
    )
    return ", ".join(filter(None, (type(self)._qn_base.extra_repr(self), *labels)))


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Pickle and copy by the base class: the swapped class has no importable name."""
    return _rebuild, (type(self)._qn_base, tuple(sorted(self._qn_views))), self.__dict__


def _rebuild(base: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    cls = _viewed_class(base, attributes)
    return cls.__new__(cls)
