"""Compiled pseudo-noise and its gradient against the plain torch code that defines them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_qn.kernels import native
from fairseq_qn.kernels import pseudo_noise as kernel
from fairseq_qn.quant.learned_bits import NOISES, PseudoNoise

needs_kernel = pytest.mark.skipif(
    not kernel.usable(torch.zeros(1, 1)), reason="the kernel was not compiled at installation"
)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NOISES), st.integers(0, 2**64 - 1), st.sampled_from([1.0, 0.25]), st.booleans(),
    st.sampled_from([(1, 1), (1, 40_000), (7, 5), (1500, 16), (300, 100)]),
)  # fmt: skip
def test_it_is_that_of_torch(kind: str, seed: int, p: float, skips: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(seed % 2**32)
    n = shape[0] * shape[1]
    noise = PseudoNoise(kind, seed, p, (n // 3, n // 7) if skips else (0, 0))
    values, steps = torch.randn(shape), torch.rand(shape[0])
    u = noise.draws(n, values.device).view(shape)
    torch.testing.assert_close(
        kernel.add(values, steps, noise.given), values + steps.unsqueeze(1) * u, rtol=1e-6, atol=1e-6
    )
    sums, copy = kernel.dots(values, noise.given)
    assert torch.equal(copy, values)
    torch.testing.assert_close(
        sums.double(), (values.double() * u).sum(1), rtol=1e-5, atol=1e-6 * shape[1] ** 0.5
    )


@needs_kernel
def test_threads_change_nothing() -> None:
    values, steps, noise = torch.randn(4000, 16), torch.rand(4000), PseudoNoise("gaussian", 3)
    one = (kernel.add(values, steps, noise.given), kernel.dots(values, noise.given)[0])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        four = (kernel.add(values, steps, noise.given), kernel.dots(values, noise.given)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, four))


def test_a_library_of_before_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "function", lambda *_: None)
    assert not kernel.usable(torch.zeros(1, 1))
