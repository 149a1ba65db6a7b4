"""A loaded model -> a program of integers alone (Jacob et al. 2018).

    input    fp32 -> uint8, in the range of the first layer that reads it
    layer    uint8 x int8 -> int32 of scale S1 S2; a batch norm that follows is folded into S2 and the bias
    between  int32: ReLU, pooling, sums
    layer    requantised to uint8 in its own range, and so on
    output   int32 -> fp32

Ranges are those that the file has for the inputs of its layers. Whatever else a model does is refused; of a
transformer, whose softmax, LayerNorm and GELU need fp32, the Linears alone are made so (integer_layer.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.graph import NORMS, SAME, Graph
from fairseq_qn.modules.integer_layer import input_range, integer_linears, integers_of, levels_of
from fairseq_qn.quant import integer_ops
from fairseq_qn.quant.fixed_point import HIGH, multiplier, requantize, rescale

SUMS = (operator.add, operator.iadd, torch.add)
KNOWN = "Linear, Conv2d, batch norm after them, ReLU, ReLU6, sums, max and average pooling, flatten, dropout"


@dataclass(frozen=True)
class Step:
    """One operation on values by name."""

    name: str
    inputs: tuple[str, ...]
    run: Callable[..., Tensor]


class IntegerProgram(nn.Module):
    """What `load` gives in mode "integer": fp32 in and out, integers between. It does not train."""

    def __init__(self, steps: list[Step], scale: float, zero: int, last: str, of_last: Tensor) -> None:
        super().__init__()
        self.steps, self.scale, self.zero, self.last = steps, scale, zero, last
        self.of_last = of_last.float()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """As of the model."""
        return self.integers(levels_of(x, self.scale, self.zero)) * self.of_last

    def integers(self, q: Tensor) -> Tensor:
        """uint8 -> int32, on integers alone."""
        values = {"": q}
        for step in self.steps:
            values[step.name] = step.run(*(values[name] for name in step.inputs))
        return values[self.last]


@torch.no_grad()
def integer_model(model: nn.Module) -> nn.Module:
    """Of a packed model, in eval mode: a program, or, of a model with LayerNorm, itself with its Linears on
    integers. Raises UnsupportedError for a module that is none of KNOWN, by its name, and for a layer
    without symmetric integers, an int8 codebook or a static range of 8 bits.
    """
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        return integer_linears(model)
    return _Lowering(Graph(model, "mode integer")).program()


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes = graph, graph.nodes
        self.steps: list[Step] = []
        # of each node: the name of its value, int32 of zero 0; that of the input, "", is uint8
        self.names: dict[fx.Node, str] = {}
        self.scales: dict[str, Tensor] = {}  # float64, [] or by channel, as it broadcasts against the value
        self.scale, self.zero = 1.0, 0  # of the input

    def program(self) -> IntegerProgram:
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise UnsupportedError(f"mode integer: expected one input, found {len(inputs)}")
        self._enter(inputs[0])
        for node in self.nodes:
            if node.op == "output":
                return self._leave(node.args[0])
            if node.op != "placeholder":
                self._lower(node)
        raise AssertionError("a graph has an output")

    def _enter(self, node: fx.Node) -> None:
        """In the range of the first layer that reads it, through whatever lies between."""
        reached = {node}
        for other in self.nodes:
            if reached & {*other.all_input_nodes}:
                if isinstance(layer := self.graph.module(other), (nn.Linear, nn.Conv2d)):
                    self.scale, self.zero = input_range(str(other.target), layer)
                    self.names[node], self.scales[""] = "", torch.tensor(self.scale, dtype=torch.float64)
                    return
                reached.add(other)
        raise UnsupportedError("mode integer: no layer reads the input, so it has no range")

    def _leave(self, result: Any) -> IntegerProgram:
        if not isinstance(result, fx.Node):
            raise UnsupportedError(
                f"mode integer: expected one tensor as output, found {type(result).__name__}"
            )
        last = self._int32(result)
        return IntegerProgram(self.steps, self.scale, self.zero, last, self.scales[last])

    def _lower(self, node: fx.Node) -> None:
        module, source = self.graph.module(node), node.args[0] if node.args else None
        inplace = getattr(module, "inplace", False) and not isinstance(module, SAME)
        if (inplace or node.target is operator.iadd) and self.graph.overwrites(node):
            raise UnsupportedError(
                f"mode integer: {node.name}: changes in place what others read; write it without"
            )
        if node.target in SUMS and len(node.args) == 2 and not node.kwargs:
            return self._sum(node)
        if module is None or not isinstance(source, fx.Node):
            self._refuse(node)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._layer(node, source, module)
        elif isinstance(module, SAME) or (
            isinstance(module, NORMS) and self.graph.norm_after(source) is module
        ):
            self.names[node] = self.names[source]
        elif isinstance(module, nn.Flatten):
            even = self._even(source)
            self._step(node, (even,), module, self.scales[even])
        else:
            name = self._int32(source)
            run = self._between(module, self.scales[name])
            if run is None:
                self._refuse(node)
            self._step(node, (name,), run, self.scales[name])

    def _layer(self, node: fx.Node, source: fx.Node, module: Any) -> None:
        """Requantised input; weight and bias, with a batch norm that follows."""
        norm = self.graph.norm_after(node)
        scale, zero, weight, whole, sizes = integers_of(str(node.target), module, norm)
        q = self._uint8(node, source, scale, zero)
        if isinstance(module, nn.Linear):
            return self._step(node, (q,), _Linear(zero, weight, whole), sizes)
        if module.padding_mode != "zeros":
            self._refuse(node)
        run = partial(
            integer_ops.conv2d, zero=zero, weight=weight, bias=whole, stride=module.stride,
            padding=module._reversed_padding_repeated_twice, dilation=module.dilation, groups=module.groups,
        )  # fmt: skip
        return self._step(node, (q,), run, sizes.view(-1, 1, 1))

    def _sum(self, node: fx.Node) -> None:
        """Both at the coarser scale of each channel, so that neither can overflow."""
        if not all(isinstance(x, fx.Node) for x in node.args):
            self._refuse(node)
        names = tuple(self._int32(x) for x in node.args)
        a, b = (self.scales[name] for name in names)
        both = torch.maximum(a, b)
        by_a, by_b = multiplier(a / both), multiplier(b / both)
        self._step(node, names, partial(integer_ops.add, by_a=by_a, by_b=by_b), both)

    def _between(self, module: Any, scale: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What is done to int32 of this scale between layers; None for what is not known."""
        if isinstance(module, nn.ReLU):
            return partial(torch.clamp, min=0)
        if isinstance(module, nn.ReLU6):
            high = (6 / scale).round().clamp(max=HIGH).int()
            return partial(torch.clamp, min=torch.zeros_like(high), max=high)
        if isinstance(module, nn.MaxPool2d) and not module.return_indices:
            return module
        if isinstance(module, nn.AvgPool2d):
            kernel, stride, padding = (_pair(n) for n in (module.kernel_size, module.stride, module.padding))
            known = module.count_include_pad or padding == (0, 0)
            if known and not module.ceil_mode and module.divisor_override is None:
                return partial(integer_ops.average_pool2d, kernel=kernel, stride=stride, padding=padding)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1]):
            return integer_ops.average_all
        return None

    # -- values

    def _step(self, node: fx.Node | str, inputs: tuple[str, ...], run: Callable, scale: Tensor) -> None:
        name = node if isinstance(node, str) else node.name
        self.steps.append(Step(name, inputs, run))
        self.scales[name] = scale
        if isinstance(node, fx.Node):
            self.names[node] = name

    def _int32(self, node: fx.Node) -> str:
        """The value of a node, int32 of zero 0."""
        name = self.names[node]
        if name:
            return name
        if ".int32" not in self.scales:
            self._step(".int32", ("",), partial(integer_ops.centred, zero=self.zero), self.scales[""])
        return ".int32"

    def _even(self, node: fx.Node) -> str:
        """The same at one scale, the coarsest of its channels."""
        name = self._int32(node)
        scale = self.scales[name]
        if scale.numel() == 1:
            return name
        even = f"{name}.even"
        self._step(even, (name,), partial(rescale, by=multiplier(scale / scale.max())), scale.max())
        return even

    def _uint8(self, reader: fx.Node, node: fx.Node, scale: float, zero: int) -> str:
        """What a layer reads, in its own range."""
        if self.names[node] == "" and (scale, zero) == (self.scale, self.zero):
            return ""
        name = self._int32(node)
        own = f"{reader.name}.input"
        by = multiplier(self.scales[name] / scale)
        self._step(own, (name,), partial(requantize, by=by, zero=zero), torch.tensor(scale).double())
        return own

    def _refuse(self, node: fx.Node) -> Any:
        known = node.op != "call_module"
        module = self.graph.module(node) if known else self.graph.modules[str(node.target)]
        named = (
            node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        )
        what = f" ({type(module).__name__})" if module is not None else ""
        raise UnsupportedError(f"mode integer: {named}{what}: not supported; known are {KNOWN}")


@dataclass(frozen=True)
class _Linear:
    zero: int
    weight: Tensor
    bias: Tensor

    def __call__(self, q: Tensor) -> Tensor:
        if q.dim() != 2:  # of more dimensions, batch norm and flatten mean others than the last
            raise UnsupportedError(
                f"mode integer: a Linear reads [batch, features], found {q.dim()} dimensions"
            )
        return integer_ops.linear(q, self.zero, self.weight, self.bias)


def _pair(n: int | Sequence[int]) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else (n[0], n[1])
