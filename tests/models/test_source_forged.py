"""Forged sources under right digests: each loads, or is refused by name; none runs, reads, fetches or leaks
anything.

Random edits are the same in each run of the tests; QN_FUZZ_EDITS=2000 QN_FUZZ_SEED=7 makes more of them, and
others.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forging
import pytest
from described import CODE, KINDS, MARK, NAMES, ask, build, hostile, save, watched
from forging import Manifest, Tensors, one_line, parts, write

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.artifact.manifest import pack_asset
from fairseq_qn.errors import FormatError, QNError
from fairseq_qn.models.describe import checked
from fairseq_qn.models.options import BPE_FILES, MODELS, TASKS

EDITS = int(os.environ.get("QN_FUZZ_EDITS", "50"))  # half as many of the kinds that take longer
SEED = int(os.environ.get("QN_FUZZ_SEED", "0"))
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("described")
    return {kind: save(kind, folder / f"{kind}.qn.safetensors") for kind in KINDS}


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every place in nested data."""
    for key, value in list(
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ):
        yield data, key
        yield from places(value)


def edited(source: Any, draw: random.Random, values: list[Any]) -> Any:
    """A copy of plain data with one to three edits: a value changed, left out or moved, or an option
    added.
    """
    source = copy.deepcopy(source)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        homes = [home for home, _ in places(source) if isinstance(home, dict)] + [source]
        home, key = draw.choice(list(places(source)))
        # rather a dictionary's numbers than a symbol
        if len(source) > 250 or "symbols" in source and draw.random() < 0.7:
            home, key = source, draw.choice(list(source))
        kind = draw.random()
        if kind < 0.5:
            home[key] = copy.deepcopy(draw.choice(values))
        elif kind < 0.9:
            draw.choice(homes)[draw.choice(NAMES)] = copy.deepcopy(draw.choice(values))
        elif isinstance(home, dict):
            value = home.pop(key)
            if kind < 0.95:
                draw.choice(homes)[draw.choice(NAMES)] = value
    return source


def try_all(path: Path, forged: Any, monkeypatch: Patch, trap: Path) -> str:
    """What becomes of a forged file: "answered", or the refusal."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        with watched(monkeypatch, MARK):
            fairseq_qn.load(path)
            ask(hub.load_interface(path, "packed"))
        outcome = "answered"
    except QNError as error:
        outcome = one_line(error)
        assert "a secret" not in outcome, outcome
    except BaseException as error:
        raise AssertionError(f"{json.dumps(forged)[:3000]} raised {error!r}") from error
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 10 and after.ru_maxrss - before.ru_maxrss < 300_000, (
        json.dumps(forged)[:3000]
    )
    assert not trap.exists()
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_random_edits(kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    tensors, manifest = parts(files[kind])
    trap, path = tmp_path / MARK, tmp_path / "f.qn.safetensors"
    draw, values, refused = random.Random(f"{kind} {SEED}"), hostile(trap), 0
    files_inside = fairseq_qn.api.read(files[kind]).assets
    times = EDITS if kind == "qn_roberta" else EDITS // 2
    for _ in range(times):
        if draw.random() < 0.7:
            forged = {"source": edited(manifest["source"], draw, values)}
            write(path, tensors, {**manifest, **forged})
        else:
            name = draw.choice([name for name in manifest["assets"] if name.endswith(".json")])
            forged = {name: edited(json.loads(files_inside[name]), draw, values)}
            forge(files[kind], path, {}, {name: json.dumps(forged[name]).encode()})
        refused += try_all(path, forged, monkeypatch, trap) != "answered"
    assert times / 5 < refused < times, "some edits matter, some do not"


def forge(saved: Path, target: Path, source: dict[str, Any], assets: dict[str, bytes] | None = None) -> Path:
    """The file with parts of its source changed (part -> options, or the whole part), and with files inside
    replaced.
    """

    def edit(tensors: Tensors, manifest: Manifest) -> None:
        for name, change in source.items():
            part = manifest["source"].get(name)
            both = isinstance(part, dict) and isinstance(change, dict)
            manifest["source"][name] = {**part, **change} if both else change
        for name, data in (assets or {}).items():
            manifest["assets"][name], tensors[f"asset:{name}"] = pack_asset(data)

    return forging.forge(saved, target, edit)


def refusal(path: Path, monkeypatch: Patch) -> str:
    outcome = try_all(path, str(path), monkeypatch, path.parent / MARK)
    assert outcome != "answered" and path.name in outcome
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_takes_code(kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    """Every option of the tables, set to what fairseq evaluates or what fits no option: refused under its
    name.
    """
    monkeypatch.chdir(tmp_path)
    source = fairseq_qn.inspect(files[kind])["source"]
    tables = [("model", MODELS[kind]), ("task", TASKS[source["task"]["_name"]])]
    for part, name in ((part, name) for part, table in tables for name in table):
        for value in CODE:
            with pytest.raises(FormatError, match=rf"^source\.{part}\.{name}: expected "):
                checked({**source, part: {**source[part], name: value}})
    path = forge(files[kind], tmp_path / "f.qn.safetensors", {part: {name: CODE[0]}})
    assert f"source.{part}.{name}: expected" in refusal(path, monkeypatch)


def test_what_no_table_holds_is_ignored(files: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    """Files of versions before hold all of fairseq's options; code in those, and paths, are left where they
    are.
    """
    monkeypatch.chdir(tmp_path)
    trap = tmp_path / MARK
    for kind in KINDS:
        known = {name for table in (*MODELS.values(), *TASKS.values()) for name in table}
        more = {name: f"open({str(trap)!r}, 'w')" for name in {*NAMES} - known - {"_name", "arch", "task"}}
        more |= {
            "encoder_embed_path": str(trap),
            "quant_recipe": str(trap),
            "data": f"http://127.0.0.1:9/{MARK}",
        }
        path = forge(files[kind], tmp_path / "f.qn.safetensors", {"model": more, "task": more})
        assert try_all(path, more, monkeypatch, trap) == "answered"
        ours, theirs = (fairseq_qn.load(p).state_dict() for p in (path, files[kind]))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_cutoffs_of_files_of_before_are_text(tmp_path: Path, monkeypatch: Patch) -> None:
    """fairseq evaluates it; here it is read, and fairseq gets the list."""
    bands = {"adaptive_softmax_cutoff": "20,60", "adaptive_input_cutoff": "20,60", "adaptive_input": True}
    factors = {"adaptive_softmax_factor": 2, "adaptive_input_factor": 2, "tie_adaptive_weights": True}
    more = {**bands, **factors, "share_decoder_input_output_embed": False}
    saved = save("qn_transformer_lm", tmp_path / "a.qn.safetensors", **more)
    model = fairseq_qn.inspect(saved)["source"]["model"]
    assert model["adaptive_softmax_cutoff"] == model["adaptive_input_cutoff"] == [20, 60]
    path = forge(saved, tmp_path / "f.qn.safetensors", {"model": bands})
    assert try_all(path, bands, monkeypatch, tmp_path / MARK) == "answered"
    ours, theirs = (fairseq_qn.load(p).state_dict() for p in (path, saved))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


REFUSED = {
    "another model": (
        {"model": {"_name": "wav2vec2", "conv_feature_layers": f"open({MARK!r}, 'w')"}},
        "source.model._name",
    ),
    "a stock model": ({"model": {"_name": "roberta"}}, "source.model._name"),
    "another of ours": ({"model": {"_name": "qn_transformer"}}, "source"),
    "another task": ({"task": {"_name": "translation_moe"}}, "source.task._name"),
    "a task of lists": ({"task": ["qn_masked_lm"]}, "source.task"),
    "characters": (
        {"model": {"_name": "qn_transformer_lm", "character_embeddings": True}},
        "character_embeddings",
    ),
    "more layers": ({"model": {"encoder_layers": 200}}, "encoder_layers: expected up to 2"),
    "many layers": (
        {"model": {"encoder_layers": 10**9}},
        "encoder_layers: expected a whole number from 0 to 256",
    ),
    "heads that do not divide": ({"model": {"encoder_attention_heads": 3}}, "source.model"),
    "a head's name": ({"heads": {"keys": [2, 8]}}, "source.model"),
    "a head with a path": ({"heads": {"a.b": [2, 8]}}, "source.heads"),
    "many heads": ({"heads": {f"h{n}": [2, 8] for n in range(300)}}, "source.heads"),
    "a head of more": ({"heads": {"mood": [3, 8]}}, "classification_heads.mood.out_proj"),
    "no dictionary": ({"dictionaries": []}, "source.dictionaries"),
    "another dictionary": ({"dictionaries": {"source_dictionary": "../x"}}, "source.dictionaries"),
    "a BPE unknown here": ({"bpe": {"_name": "hf_byte_bpe", "bpe_merges": MARK}}, "source.bpe._name"),
    "a BPE from disk": ({"bpe": {"gpt2_encoder_json": f"/{MARK}"}}, "source.bpe.gpt2_encoder_json"),
    "a BPE from elsewhere": (
        {"bpe": {"gpt2_encoder_json": f"asset:../{MARK}"}},
        "source.bpe.gpt2_encoder_json",
    ),
    "a BPE from the net": (
        {"bpe": {"gpt2_vocab_bpe": f"http://127.0.0.1:9/{MARK}"}},
        "source.bpe.gpt2_vocab_bpe",
    ),
    "a BPE by default, from the net": (
        {"bpe": {"_name": "gpt2", "gpt2_vocab_bpe": None}},
        "source.bpe.gpt2_vocab_bpe",
    ),
    "a BPE by interpolation": (
        {"bpe": {"gpt2_vocab_bpe": f"asset:${{oc.env:{MARK}}}"}},
        "source.bpe.gpt2_vocab_bpe",
    ),
    "a tokenizer": (
        {"tokenizer": {"_name": "moses", "source_lang": f"../{MARK}"}},
        "source.tokenizer.source_lang",
    ),
    "a tokenizer unknown here": ({"tokenizer": {"_name": MARK}}, "source.tokenizer._name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    source, named = REFUSED[what]
    path = tmp_path / "f.qn.safetensors"
    inside = {f"${{oc.env:{MARK}}}": b"#version: 0.2\n", f"../{MARK}": b"#version: 0.2\n"}
    outcome = try_all(forge(files["qn_roberta"], path, source, inside), source, monkeypatch, tmp_path / MARK)
    assert named in outcome and (path.name in outcome or "out_proj" in named)


BROKEN = {
    "source_dictionary.json": [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"symbols": []}',
        b"\xff",
        b'{"symbols": [1]}',
    ],
    "encoder.json": [b"", b"[]", b"[" * 100_000, b"{}", b'{"a": []}', b"\xff", b"null", b'{"k": NaN}'],
    "vocab.bpe": [b"\xff\xfe", b"#version: 0.2\nk\n", b"#version: 0.2\nk a\nka lo x\n"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_inside_that_make_no_sense(
    name: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    """An empty dictionary above all: fairseq then reads dict.txt of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dict.txt").write_text("".join(f"{n} 1\n" for n in range(300)))
    tensors, manifest = parts(files["qn_roberta"])
    empty = {"symbols": [], "nspecial": 0, **{f"{word}_index": 0 for word in ("bos", "pad", "eos", "unk")}}
    for data in [*BROKEN[name], *([json.dumps(empty).encode()] if name.startswith("source") else [])]:
        source = {"task": {"_name": "qn_masked_lm"}} if name.startswith("source") else {}
        path = forge(files["qn_roberta"], tmp_path / "f.qn.safetensors", source, {name: data})
        outcome = try_all(path, data.decode(errors="replace"), monkeypatch, tmp_path / MARK)
        assert outcome != "answered" or name == "vocab.bpe"


@pytest.mark.parametrize("bpe", ["sentencepiece", "qn_wordpiece", "subword_nmt", "fastbpe"])
def test_other_bpes_that_make_no_sense(
    bpe: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    option = next(iter(BPE_FILES[bpe]))
    for data in (b"", b"a", b"\xff" * 9, b"a b c d\na b\n", b"\n" * 9):
        config = {"_name": bpe, option: "asset:vocab.bpe", "bpe_separator": "@@"}
        refusal(
            forge(files["qn_roberta"], tmp_path / "f.qn.safetensors", {"bpe": config}, {"vocab.bpe": data}),
            monkeypatch,
        )


def test_positions_that_are_computed_take_no_memory(
    files: dict[str, Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    """They are in no tensor that could give the claim away."""
    sizes = {"max_source_positions": 1 << 20, "max_target_positions": 1 << 20}
    path = forge(files["qn_transformer"], tmp_path / "f.qn.safetensors", {"model": sizes, "task": sizes})
    assert try_all(path, sizes, monkeypatch, tmp_path / MARK) == "answered"
    table = fairseq_qn.load(path).encoder.embed_positions.weights
    assert table.numel() <= 1 << 22
    few = fairseq_qn.load(files["qn_transformer"]).encoder.embed_positions.weights
    assert table[: len(few)].equal(few)


@pytest.mark.parametrize("kind", KINDS)
def test_few_positions(kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: Patch) -> None:
    """Fewer than the sentence has tokens: that is said, by name."""
    outcomes = []
    for n in (2, 4, 7):
        few = dict.fromkeys(
            ("max_positions", "max_source_positions", "max_target_positions", "tokens_per_sample"), n
        )
        for source in ({"model": few, "task": few}, {"task": few}):
            path = forge(files[kind], tmp_path / "f.qn.safetensors", source)
            outcomes.append(try_all(path, source, monkeypatch, tmp_path / MARK))
    assert any("tokens, found" in outcome or "expected [" in outcome for outcome in outcomes)


LEFT_OUT = [
    *(f"{stack}{name}" for stack in ("encoder.sentence_encoder.", "encoder.", "decoder.") for name in (
        "layers", "layers.0.self_attn", "layers.1.self_attn.q_proj", "embed_tokens", "embed_positions",
        "lm_head",
        "output_projection",
    )),
    "encoder", "decoder", "classification_heads", "classification_heads.mood",
    "classification_heads.mood.out_proj",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_were_left_out(kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Asked for what is not in the file, an interface says so, whichever module it is."""
    names = {name for name, _ in build(kind).named_modules()}
    outcomes = {}
    for name in [name for name in LEFT_OUT if name in names]:
        try:
            path = save(kind, tmp_path / "f.qn.safetensors", drop=[name])
        except QNError as error:
            outcomes[name] = str(error)
        else:
            outcomes[name] = try_all(path, name, monkeypatch, tmp_path / MARK)
    other = {name: what for name, what in outcomes.items() if "left out" not in what and "heads" not in what}
    assert len(outcomes) > 4 and not other
