"""The options of the wrapper and its terms, and those of whichever criterion is wrapped, as fields of one
dataclass, of which fairseq makes command-line options and Hydra's.

fairseq adds only the chosen criterion's options to its parser, and tasks interpolate theirs from
`criterion.*`; so the wrapper's dataclass carries the fields of every criterion that fairseq has registered.
"""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from typing import Any, Optional

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass import FairseqDataclass

_GROUPS = ("${common.", "${optimization.", "${distributed_training.")


@dataclass
class Options(FairseqDataclass):
    """The wrapper's own: which criterion it wraps, and what its terms read."""

    wrapped_criterion: str = field(
        default="cross_entropy", metadata={"help": "the criterion that gives the task's loss"}
    )
    teacher_checkpoint: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint or small file of a teacher to distil from; neither trained nor saved"},
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "loss = (1 - weight) * task + weight * distillation"}
    )
    distill_temperature: float = field(
        default=1.0,
        metadata={"help": "softmax temperature of the distillation; a head of one output has none"},
    )
    size_weight: float = field(
        default=0.0,
        metadata={
            "help": "loss of a sample + weight * MiB of the layers that learn their bits (lambda of DiffQ)"
        },
    )


def with_wrapped_options(made: str, module: str) -> type[Options]:
    """`Options` as `made`, with the fields that have a default of all criterions; the first by name wins."""
    found: dict[str, tuple[type, Field]] = {}
    for name in sorted(CRITERION_DATACLASS_REGISTRY):
        for f in fields(CRITERION_DATACLASS_REGISTRY[name]):
            if _usable(f):
                found.setdefault(f.name, (f.type, f))
    own = {f.name for f in fields(Options)}
    extra = [
        (name, kind, field(default=f.default, metadata=dict(f.metadata)))
        for name, (kind, f) in found.items()
        if name not in own
    ]
    namespace = {"__doc__": Options.__doc__, "__module__": module}
    return make_dataclass(made, extra, bases=(Options,), namespace=namespace)


def options_of(
    dataclass: type[FairseqDataclass], config: Any, union: type[FairseqDataclass]
) -> FairseqDataclass:
    """The wrapped criterion's own options: what the user set; its own default for what was left as it is."""
    defaults = {f.name: f.default for f in fields(union)}
    result = dataclass()
    for f in fields(dataclass):
        value = getattr(config, f.name, MISSING)
        given = value is not MISSING and (value != defaults.get(f.name) or str(f.default).startswith("${"))
        if not f.name.startswith("_") and given:
            setattr(result, f.name, value)
    return result


def _usable(f: Field) -> bool:
    if f.name.startswith("_") or f.default is MISSING:
        return False
    return not (
        isinstance(f.default, str) and f.default.startswith("${") and not f.default.startswith(_GROUPS)
    )
