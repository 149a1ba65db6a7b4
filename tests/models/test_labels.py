"""Classes go by the labels that their own head was trained with, and by numbers where the file does not know
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from described import RECIPE, build, byte_bpe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.errors import UnsupportedError


@pytest.fixture
def interface(tmp_path: Path) -> Callable[..., Any]:
    """The interface of a file whose label dictionary is good, bad, a filler and <mask>; heads are added
    first.
    """

    def make(heads: dict[str, int]) -> Any:
        model = build("qn_roberta")
        if "mood" not in heads:
            del model.classification_heads["mood"]
        for name, classes in heads.items():
            model.register_classification_head(name, classes)
        fairseq_qn.apply(model, RECIPE)
        fairseq_qn.freeze(model)
        source, assets = byte_bpe(tmp_path / "bpe")
        fairseq_qn.save(model, tmp_path / "m.qn.safetensors", source=source, assets=assets)
        return hub.load_interface(tmp_path / "m.qn.safetensors")

    return make


def test_fairseqs_fillers_name_no_class(interface: Callable[..., Any]) -> None:
    """fairseq pads dictionaries with madeupword0000, and its task adds <mask>: 2 labels are 4 symbols."""
    found = interface({"mood": 2})
    assert found.labels == ["good", "bad"] and {label for label, _ in found.classify("ka lo")} == {
        "good",
        "bad",
    }
    for classes in (3, 4, 5):
        found = interface({"mood": classes})
        assert found.labels == [str(n) for n in range(classes)] and len(found.classify("ka lo")) == classes


def test_labels_of_another_head(interface: Callable[..., Any]) -> None:
    found = interface({"mood": 2, "topic": 2, "many": 3})
    assert found.labels_of("mood") == ["good", "bad"]
    assert {label for label, _ in found.classify("ka lo", head="topic")} == {"0", "1"}
    assert {label for label, _ in found.classify("ka lo", head="many")} == {"0", "1", "2"}
    assert interface({"renamed": 2}).labels == ["good", "bad"], (
        "the only head is the one that the labels are of"
    )
    with pytest.raises(UnsupportedError, match="one of the heads"):
        found.labels_of("nope")


def test_too_long_a_sentence_is_said_to_be(interface: Callable[..., Any]) -> None:
    found = interface({"mood": 2})
    for answer in (found.classify, lambda text: found.fill_mask(f"{text} <mask>")):
        with pytest.raises(
            UnsupportedError, match=r"expected up to 32 tokens, found .*; shorten the sentence"
        ):
            answer("ka lo " * 40)


def test_a_filler_of_the_dictionary_fills_no_mask(interface: Callable[..., Any]) -> None:
    """Though it is the likeliest: a byte-level BPE cannot decode it, and no text holds it. Nor do special
    symbols; what is left keeps its own probability.
    """
    found = interface({"mood": 2})
    words = found.task.source_dictionary
    words.symbols[10] = "madeupword0000"
    with torch.no_grad():
        bias = found.model.encoder.lm_head.bias
        bias[:] = torch.linspace(0, 1, len(bias))
        bias[10], bias[words.pad()], bias[20], bias[30] = 33, 32, 31, 30
    (text, first, token), (_, second, other) = found.fill_mask("ka <mask> lo", topk=2)
    assert [token, other] == [found.bpe.decode(words[20]), found.bpe.decode(words[30])]
    assert text == f"ka{token} lo" and first / second == pytest.approx(math.e, rel=0.2)
    assert first < math.exp(-1), "of all that the model holds possible"
    everything = found.fill_mask("ka <mask> lo", topk=10**6)
    assert len(everything) == len(words) - 6 and all(0 <= chance <= 1 for _, chance, _ in everything)
