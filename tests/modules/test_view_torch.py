"""Views and the rest of torch: what works beside them (torch.func, sparse gradients, fp64), and what is
refused by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, LAYERS, Net, noisy, recipe
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import fairseq_qn
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.view import views_of

PHASES = ["proxy", "int4", "exact", "frozen", "frozen int4"]


def in_phase(phase: str) -> Net:
    """At a fixed update, so that calls can be compared."""
    if phase in ("frozen", "frozen int4"):
        model = Net().train()
        fairseq_qn.apply(model, recipe(**({"scheme": "integer", "bits": 4} if "int4" in phase else {})))
        fairseq_qn.freeze(model)
    else:
        model = noisy(noise=phase)
    fairseq_qn.set_update(model, 3)
    return model


def scores(model: nn.Module, weights: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    return functional_call(model, weights, (ids,))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, weights: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    return scores(model, weights, ids).pow(2).mean()


# -- torch.func


@pytest.mark.parametrize("phase", PHASES)
def test_functional_call_and_grad(phase: str) -> None:
    model = in_phase(phase)
    assert torch.equal(scores(model, trained(model)), model(IDS))
    found = grad(lambda w: loss_of(model, w))(trained(model))
    model(IDS).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    assert model.block.fc1.get_parameter("weight").requires_grad


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_by_sample(phase: str) -> None:
    model = in_phase(phase)
    weights = trained(model)
    found = vmap(grad(lambda w, ids: loss_of(model, w, ids.unsqueeze(1))), (None, 1))(weights, IDS)
    for i in range(IDS.shape[1]):
        model.zero_grad()
        model(IDS[:, i : i + 1]).pow(2).mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, msg=name)


@pytest.mark.parametrize("phase", PHASES)
def test_derivatives_of_the_weight_forward_and_reverse(phase: str) -> None:
    model = in_phase(phase)
    fixed, name = trained(model), "block.fc1.weight"
    of = lambda w: scores(model, {**fixed, name: w}).sum((0, 1))  # noqa: E731
    torch.testing.assert_close(jacfwd(of)(fixed[name]), jacrev(of)(fixed[name]))
    tangent = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    _, found = jvp(of, (fixed[name],), (tangent,))
    torch.testing.assert_close(found, jacrev(of)(fixed[name]).flatten(1) @ tangent.flatten())
    with forward_ad.dual_level():
        dual = of(forward_ad.make_dual(fixed[name], tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)
    hessian = jacfwd(jacrev(lambda w: of(w).pow(2).sum()))(fixed[name])
    torch.testing.assert_close(
        hessian.flatten(2).flatten(0, 1), hessian.flatten(2).flatten(0, 1).T, rtol=1e-3, atol=1e-4
    )


def test_an_ensemble_of_weights() -> None:
    models = [in_phase("frozen") for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.5)
    weights, _ = stack_module_state(models)
    stacked = {
        name: weight for name, weight in weights.items() if name in dict(models[0].named_parameters())
    }
    found = vmap(lambda w: scores(models[0], w))(stacked)
    for model, answer in zip(models, found, strict=True):
        torch.testing.assert_close(answer, model(IDS))


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_of_gradients(phase: str) -> None:
    model = in_phase(phase)
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(IDS).pow(2).mean(), parameters, create_graph=True)
    sum(g.square().sum() for g in first).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


# -- sparse gradients, fp64


@pytest.mark.parametrize("phase", ["noise", "frozen"])
@pytest.mark.parametrize("scheme", ["product", "integer"])
def test_sparse_embeddings_have_the_gradients_of_dense_ones(scheme: str, phase: str) -> None:
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, sparse=sparse, padding_idx=3)).train()
        rule = {
            "layers": "0",
            "scheme": scheme,
            **({"n_centroids": 5} if scheme == "product" else {"bits": 4}),
        }
        fairseq_qn.apply(
            model, {"version": 1, "noise": {"kind": "proxy", "p": 0.5}, "rules": [rule]}, seed=0
        )
        if phase == "frozen":
            fairseq_qn.freeze(model)
        parameter = model.get_parameter("0.weight")
        optimizer = torch.optim.SparseAdam([parameter]) if sparse else torch.optim.SGD([parameter], lr=0.1)
        model(torch.tensor([1, 5, 5, 3, 9])).pow(2).sum().backward()
        assert parameter.grad.is_sparse == sparse
        gradients.append(parameter.grad.to_dense())
        optimizer.step()
    torch.testing.assert_close(*gradients)


def test_fp64_weights_are_read_as_they_are_where_no_noise_falls() -> None:
    """And what fp32 cannot hold is not frozen, before anything changes."""
    for scheme in ({"scheme": "integer", "bits": 4}, {"scheme": "product", "block_size": 2}):
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64)).train()
        noise = {"kind": "proxy", "p": 0.5}
        fairseq_qn.apply(model, {"version": 1, "noise": noise, "rules": [{"layers": "0", **scheme}]})
        fairseq_qn.set_update(model, 1)
        same = float((model[0].weight == model.get_parameter("0.weight")).double().mean())
        assert 0.3 < same < 0.7 and model[0].weight.dtype == torch.float64


# -- what is refused


def viewed(phase: str = "proxy") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    rule = {"layers": ".*", "scheme": "product", "block_size": 2}
    fairseq_qn.apply(model, {"version": 1, "noise": {"kind": "proxy", "p": 0.5}, "rules": [rule]})
    if phase == "frozen":
        fairseq_qn.freeze(model)
    elif phase == "proxy":
        model(torch.ones(1, 8))
    return model


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


REPARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.spectral_norm(layer),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "new weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "new spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune by random": lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0),
}


@pytest.mark.parametrize("phase", ["float", "proxy", "frozen"])
@pytest.mark.parametrize("how", REPARAMETRISED)
def test_reparametrisations_are_refused_and_leave_the_model_as_it_was(how: str, phase: str) -> None:
    model = viewed(phase)
    before, x = copy.deepcopy(model.state_dict()), torch.ones(1, 8)
    identities, answer = [id(p) for p in model.parameters()], model.eval()(x)
    with pytest.raises(
        UnsupportedError, match=r"^0.weight: weight_norm, spectral_norm, parametrize and prune"
    ) as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            REPARAMETRISED[how](model.train()[0])
    assert len(str(error.value)) <= 300
    assert model.state_dict().keys() == before.keys() and [id(p) for p in model.parameters()] == identities
    if (how, phase) != ("orthogonal", "float"):  # it writes to the Parameter before it takes it
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model.eval()(x), answer)
    prune.l1_unstructured(model[0], "bias", 0.5)  # which has no view


def test_a_reparametrised_weight_before_apply_is_not_a_layer() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    coverage = fairseq_qn.apply(model, {"version": 1, "rules": [{"layers": ".*", "scheme": "product"}]})
    assert list(coverage.matched) == ["1.weight"] and any("original" in name for name in coverage.left)


def test_data_parallel_is_refused() -> None:
    """Replicas are made on several GPUs only; this is how."""
    model = viewed()
    with pytest.raises(
        UnsupportedError, match="^Linear: the replicas of nn.DataParallel .* DistributedDataParallel"
    ):
        model[0]._replicate_for_data_parallel()
    assert nn.DataParallel(model)(torch.ones(1, 8)).shape == (1, 8)  # without a GPU it only calls the model


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2_is_refused_after_apply_and_before(alone: None) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fully_shard = getattr(fsdp, "fully_shard", None) or pytest.skip("torch without FSDP2")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(UnsupportedError, match="^Linear.weight: a viewed weight cannot be sharded"):
        fully_shard(viewed()[0], mesh=mesh)
    plain = nn.Sequential(nn.Linear(8, 8))
    fully_shard(plain, mesh=mesh)
    with pytest.raises(
        UnsupportedError, match="^0.weight: a view reads whole, dense weights, found DTensor"
    ):
        fairseq_qn.apply(plain, {"version": 1, "rules": [{"layers": "0", "scheme": "product"}]})


@pytest.mark.parametrize("phase", ["proxy", "frozen"])
def test_torchscript_is_refused(phase: str) -> None:
    model = viewed(phase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            UnsupportedError, match="^0.weight: torch.jit cannot trace a view; save the model"
        ):
            torch.jit.trace(model, torch.ones(1, 8))
        with pytest.raises(
            UnsupportedError, match="^Linear: torch.jit cannot script a view; save the model"
        ):
            torch.jit.script(model)


def inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(8, 8))


MADE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (
        lambda: nn.Sequential(nn.Linear(8, 8, device="meta")),
        "on the meta device; give the model memory",
    ),
    "inference": (inference, "made under torch.inference_mode, which no gradient reaches"),
    "complex": (
        lambda: nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)),
        "expected floating-point weights",
    ),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("scheme", ["product", "integer"])
def test_weights_that_no_view_can_read(how: str, scheme: str) -> None:
    make, words = MADE[how]
    model = make()
    with pytest.raises(UnsupportedError, match=f"^0.weight: {words}"):
        fairseq_qn.apply(model, {"version": 1, "rules": [{"layers": "0", "scheme": scheme}]})
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and not list(views_of(model))


def test_apply_freeze_and_answers_in_inference_mode() -> None:
    model = Net()
    with torch.inference_mode():
        fairseq_qn.apply(model, recipe(kind="proxy", p=0.5))
        fairseq_qn.freeze(model, "ffn")
        answer = model.eval()(IDS)
    assert torch.equal(model(IDS), answer)
    fairseq_qn.freeze(model)
    model.train()(IDS).sum().backward()
    assert torch.equal(copy.deepcopy(model).eval()(IDS), model.eval()(IDS))


def test_a_model_on_meta_gets_its_weights_and_then_its_views() -> None:
    with torch.device("meta"):
        model = Net()
    model.to_empty(device="cpu").load_state_dict(Net().state_dict())
    model.head.weight = model.embed.weight
    fairseq_qn.apply(model, recipe())
    fairseq_qn.freeze(model)
    twin = Net()
    fairseq_qn.apply(twin, recipe())
    fairseq_qn.freeze(twin)
    assert torch.equal(model.eval()(IDS), twin.eval()(IDS))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_torch_func_differentiates_learned_steps(p: float) -> None:
    model = Net()
    fairseq_qn.apply(model, recipe(kind="proxy", p=p, scheme="integer", bits=4, ranges="learned"), seed=0)
    fairseq_qn.refresh(model.train())
    fairseq_qn.set_update(model, 1)
    params = dict(model.named_parameters())
    found = grad(lambda own: functional_call(model, own, (IDS,)).square().sum())(params)
    model(IDS).square().sum().backward()
    assert sum(key.endswith("step_change") for key in params) == len(LAYERS)
    for key, parameter in params.items():
        torch.testing.assert_close(found[key], parameter.grad)
        assert found[key].any() or not key.endswith("step_change")
