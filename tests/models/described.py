"""Tiny models with random weights, a BPE and a head, saved as small files; and a watch over what a load
does.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq import models
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.models.options import MODELS, TASKS

RECIPE = {"version": 1, "rules": [{"layers": r".*\.fc[12]", "scheme": "integer", "bits": 8}]}
SIZES = {"layers": 2, "embed_dim": 8, "ffn_embed_dim": 16, "attention_heads": 2}
KINDS = ("qn_roberta", "qn_transformer", "qn_transformer_lm")


def dictionary(*symbols: str) -> Dictionary:
    made = Dictionary()
    for symbol in symbols:
        made.add_symbol(symbol)
    return made


def build(kind: str, **more: Any) -> Any:
    """A model of this kind, without views."""
    torch.manual_seed(0)
    words = dictionary(*map(str, range(300)))
    sides = {
        "qn_roberta": ["encoder"],
        "qn_transformer": ["encoder", "decoder"],
        "qn_transformer_lm": ["decoder"],
    }[kind]
    args = {f"{side}_{name}": size for side in sides for name, size in SIZES.items()} | {
        "arch": kind,
        "_name": kind,
    }
    if kind == "qn_roberta":
        labels = dictionary("good", "bad", "madeupword0000", "<mask>")
        head = {"num_classes": 2, "classification_head_name": "mood", "regression_target": False}
        task = _task("qn_sentence_prediction", words, labels=labels, max_positions=32, **head)
        words.add_symbol("<mask>")
        args |= {"max_positions": 32}
    elif kind == "qn_transformer":
        task = _task("qn_translation", words, labels=words, max_source_positions=32, max_target_positions=32)
        args |= {"share_all_embeddings": True, "max_source_positions": 32, "max_target_positions": 32}
    else:
        task = _task(
            "qn_language_modeling",
            words,
            tokens_per_sample=32,
            output_dictionary_size=-1,
            add_bos_token=False,
        )
        args |= {"decoder_input_dim": 8, "decoder_output_dim": 8, "share_decoder_input_output_embed": True}
        args |= {"tokens_per_sample": 32, "add_bos_token": False, "max_target_positions": 32, "tpu": False}
    args |= more
    if kind == "qn_transformer_lm":
        del args["arch"]
    model = models.build_model(
        OmegaConf.create(args) if kind == "qn_transformer_lm" else Namespace(**args), task
    )
    if kind == "qn_roberta":
        model.register_classification_head("mood", 2)
    return model


def _task(name: str, words: Dictionary, labels: Dictionary | None = None, **config: Any) -> Any:
    config = OmegaConf.create({"_name": name, "seed": 1, "data": "", **config})
    return TASK_REGISTRY[name](config, words, *([labels] if labels is not None else []))


def byte_bpe(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(source, assets) of a byte-level BPE with two merges."""
    symbols = [*bytes_to_unicode().values(), "ka", "lo", *(f"x{n}" for n in range(258, 300))]
    folder.mkdir(exist_ok=True)
    (folder / "encoder.json").write_text(
        json.dumps({symbol: number for number, symbol in enumerate(symbols)})
    )
    (folder / "vocab.bpe").write_text("#version: 0.2\nk a\nl o\n")
    return hub.carry_bpe("gpt2", [folder / "encoder.json", folder / "vocab.bpe"])


def save(kind: str, path: Path, drop: Sequence[str] = (), **more: Any) -> Path:
    """The small file of `build`, with a byte-level BPE."""
    model = build(kind, **more)
    fairseq_qn.apply(model, RECIPE)
    fairseq_qn.freeze(model)
    source, assets = byte_bpe(path.parent / "bpe")
    fairseq_qn.save(model.eval(), path, assets=assets, source=source, parts="float32", drop=drop)
    return path


def ask(interface: Any) -> Any:
    """What the command line's `predict` asks of an interface."""
    if not hasattr(interface, "classify"):
        return interface.translate("ka lo", beam=2, max_len_b=6)
    return interface.classify("ka lo"), interface.fill_mask("ka <mask>", topk=2)


_EVENTS: list[str] = []
_watching = False
_SEEN = (
    "open",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "compile",
    "urllib.",
    "ctypes.dlopen",
)


def _hook(event: str, args: tuple) -> None:
    if _watching and event.startswith(_SEEN):
        _EVENTS.append(f"{event} {str(args)[:300]}")


sys.addaudithook(_hook)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, mark: str) -> Iterator[None]:
    """Fail if code is run, a file opened or a variable of the environment read that names `mark`, or if
    anything connects.
    """
    global _watching
    read, before = [], os._Environ.__getitem__
    _EVENTS.clear()
    with monkeypatch.context() as patch:
        patch.setenv(mark, "a secret")
        patch.setattr(os._Environ, "__getitem__", lambda self, key: (read.append(key), before(self, key))[1])
        _watching = True
        try:
            yield
        finally:
            _watching = False
            read = [key for key in read if mark in str(key)]
    started = [e for e in _EVENTS if e.startswith(("socket.", "subprocess.", "os.", "urllib."))]
    assert not started and not [e for e in _EVENTS if mark in e], (started, _EVENTS)
    assert not read


# -- what a file or checkpoint may try

MARK = "qn_trap"  # in whatever would run, be opened or be read


def hostile(trap: Path) -> list[Any]:
    code = f"open({str(trap)!r}, 'w')"
    return [
        code, f"__import__('os').environ[{MARK!r}]", f"${{oc.env:{MARK}}}", f"${{oc.env:{MARK},x}}",
        "${model}", "${",
        str(trap), f"../{MARK}", f"asset:../{MARK}", f"asset:{trap}", f"http://127.0.0.1:9/{MARK}",
        f"file://{trap}", "asset:",
        f"{{'version': 1, 'rules': [], 'x': {code}}}", "[(1, 64), (2, 128)]", "0,2,4", "1,2", "20000,60000",
        "x" * 100_000, "{",
        "}", "{0}", "\n", "\x1b[31m", "é", "", "nan", "1e3", None, True, False, -1, 0, 1, 2, 3, 7, 8, 16, 31,
        32, 300, 511, 513,
        65_536, 10**6, 10**9, 10**18, -(10**18), 0.5, -0.5, 1e-300, 1e300, [], {}, [[]], [1, 2], [2, 1],
        [1] * 1000, ["a"],
        [code], {"a": code}, {"_name": "qn_roberta"}, {"_target_": f"{MARK}.run"}, [10**18, 10**18], *KINDS,
        *TASKS,
        *(name.removeprefix("qn_") for name in (*MODELS, *TASKS)), "wav2vec2", "fconv", "lstm",
        "audio_finetuning",
        "translation_moe", "gpt2", "sentencepiece", "fastbpe", "hf_byte_bpe", "bert", "moses", "space",
        "mood", "keys",
    ]  # fmt: skip


NAMES = [
    *"""adaptive_softmax_cutoff adaptive_input_cutoff adaptive_input adaptive_softmax_factor
    character_filters character_embeddings encoder_embed_path decoder_embed_path quant_recipe
    quant_noise_pq quant_noise_scalar
    conv_feature_layers xformers_att_config encoder_xformers_att_config decoder_xformers_att_config
    base_layers encoder decoder quant_noise embed_path encoder_layers_to_keep
    decoder_layers_to_keep data eval_bleu eval_bleu_detok
    eval_bleu_detok_args eval_bleu_args w2v_path tie_adaptive_weights checkpoint_activations
    offload_activations spectral_norm_classification_head builder _name arch task _target_ export user_dir
    bpe tokenizer source_lang heads
    dictionaries label_dictionary gpt2_encoder_json sentencepiece_model bpe_codes""".split(),
    *(name for table in (*MODELS.values(), *TASKS.values()) for name in table),
]

CODE = [
    f"open({MARK!r}, 'w')",
    f"${{oc.env:{MARK}}}",
    [f"open({MARK!r}, 'w')"],
    {"_name": MARK},
    10**18,
    -5,
    float(2**80),
]
