"""What a head reads is what the whole encoder gives for the first token."""

from __future__ import annotations

import pytest
import torch
from described import build, save
from fairseq.models.roberta import RobertaHubInterface
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_qn import hub
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.models.batches import batches, token_ids
from fairseq_qn.models.first_token import first_token

ROWS = st.lists(st.lists(st.integers(4, 303), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, layers=st.integers(0, 3), before=st.booleans(), seed=st.integers(0, 99))
def test_as_the_whole_encoder(rows: list[list[int]], layers: int, before: bool, seed: int) -> None:
    """Whatever the layers, wherever their norms, padded or not; weights and biases far from their start."""
    model = build("qn_roberta", encoder_layers=layers, encoder_normalize_before=before).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        encoder = model.encoder.sentence_encoder
        for _, ids in batches([torch.tensor([0, *row, 2]) for row in rows], 4, encoder.padding_idx):
            wanted = model(ids, features_only=True)[0][:, :1]
            torch.testing.assert_close(first_token(encoder, ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_the_interface_answers_as_fairseqs(mode: str, tmp_path) -> None:
    found = hub.load_interface(save("qn_roberta", tmp_path / "m.qn.safetensors"), mode)
    alone = found.encode("ka lo ka")
    ids = torch.stack([alone, alone.flip(0)])
    for tokens in (ids, alone):
        for logits in (False, True):
            wanted = RobertaHubInterface.predict(found, "mood", tokens, logits)
            torch.testing.assert_close(found.predict("mood", tokens, logits), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="up to 32 tokens, found 33"):
        found.predict("mood", torch.zeros(33, dtype=torch.long))


def test_in_training_it_is_fairseqs_own(tmp_path) -> None:
    """Dropout and noise are drawn for all tokens, as ever."""
    found = hub.load_interface(save("qn_roberta", tmp_path / "m.qn.safetensors", dropout=0.5)).train()
    tokens = found.encode("ka lo ka")
    torch.manual_seed(1)
    wanted = RobertaHubInterface.predict(found, "mood", tokens)
    torch.manual_seed(1)
    assert found.predict("mood", tokens).equal(wanted)


def test_ids_are_fairseqs(tmp_path) -> None:
    """Of one sentence, of several, without separators, and of pieces that the dictionary lacks."""
    found = hub.load_interface(save("qn_roberta", tmp_path / "m.qn.safetensors"))
    for sentences in (["ka lo"], [""], ["ka", "lo ka"], ["ka", "", "é"]):
        for bare in (False, True):
            wanted = RobertaHubInterface.encode(found, *sentences, no_separator=bare)
            assert found.encode(*sentences, no_separator=bare).equal(wanted)
    words, text = found.task.source_dictionary, " 7  nowhere\u00a0<s>\t8 "
    assert token_ids(words, text).equal(
        words.encode_line(text, append_eos=False, add_if_not_exist=False).long()
    )
