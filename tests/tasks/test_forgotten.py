"""What a fairseq-train command lacks is said in one line before it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary

from fairseq_qn.errors import MismatchError
from fairseq_qn.tasks import forgotten


def labels(*names: str) -> SimpleNamespace:
    """A task with a label dictionary as fairseq-preprocess and fairseq's task make it."""
    dictionary = Dictionary()
    for name in (*names, "madeupword0000", "madeupword0001", "<mask>"):
        dictionary.add_symbol(name)
    return SimpleNamespace(label_dictionary=dictionary)


@pytest.mark.parametrize("classes", [1, 2, 4, 6])
def test_a_wrong_number_of_classes(classes: int) -> None:
    config = SimpleNamespace(num_classes=classes, regression_target=False, data="bin")
    with pytest.raises(MismatchError, match=f"^--num-classes {classes}: bin has 3 .*give --num-classes 3$"):
        forgotten.check_labels(labels("a", "b", "c"), config)


def test_the_right_number_of_classes_and_values() -> None:
    task = labels("a", "b", "c")
    forgotten.check_labels(task, SimpleNamespace(num_classes=3, regression_target=False, data="bin"))
    forgotten.check_labels(task, SimpleNamespace(num_classes=1, regression_target=True, data="bin"))
    forgotten.check_labels(SimpleNamespace(), SimpleNamespace(num_classes=9))
    forgotten.check_labels(task, SimpleNamespace())


@pytest.mark.parametrize(
    ("options", "pair", "said"),
    [
        ({"init_token": None, "separator_token": None}, False, ["--init-token 0"]),
        ({"init_token": 0, "separator_token": None}, True, ["--separator-token 2"]),
        ({"init_token": None, "separator_token": None}, True, ["--init-token 0", "--separator-token 2"]),
        ({"init_token": 0, "separator_token": 2}, True, []),
        ({"init_token": 0, "separator_token": None}, False, []),
        ({}, True, []),
    ],
)
def test_tokens(
    options: dict, pair: bool, said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if pair:
        (tmp_path / "input1").mkdir()
    with caplog.at_level(logging.WARNING):
        forgotten.say_tokens(SimpleNamespace(data=str(tmp_path), **options))
    assert [
        message.endswith(f"add {todo}") for message, todo in zip(caplog.messages, said, strict=True)
    ] == [True] * len(said)


def test_stages_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    forgotten.say_stages({"ffn": ("update", 3)}, ["ffn", "emb"])
    assert not caplog.messages
    forgotten.say_stages({}, ["ffn", "emb"])
    (message,) = caplog.messages
    assert "freezes nothing" in message and message.endswith("for stages ffn, emb")
