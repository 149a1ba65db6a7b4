"""from_pretrained of the small file: in a fresh process, from another folder, with the data gone."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options as fairseq_options
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder
from fairseq_cli import preprocess
from fairseq_run import MLM, Run, command, recipe, sentences, train, write_recipe

import fairseq_qn
from fairseq_qn.cli import main
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.hub import QNRobertaModel
from fairseq_qn.kernels import native

LINES = sentences(4, 9)
HEAD = "sentence_classification_head"
ASK = """
import json, sys, torch
torch.set_num_threads(1)  # as in the process of the tests: sums of floats in the same order
from fairseq_qn.hub import QNRobertaModel
lines, answers = json.loads(sys.argv[1]), {}
for path in sys.argv[2:]:
    for mode in ("dense", "packed"):
        hub = QNRobertaModel.from_pretrained(path, mode=mode)
        tokens = [hub.encode(line) for line in lines]
        with torch.no_grad():
            logits = [hub.model(t.unsqueeze(0))[0] for t in tokens]
            features = [hub.extract_features(t) for t in tokens]
        answer = {"tokens": tokens, "logits": logits, "features": features}
        answer["decoded"] = [hub.decode(t) for t in tokens]
        if hub.model.classification_heads:
            answer["classes"] = [hub.predict(list(hub.model.classification_heads)[0], t) for t in tokens]
            answer["labels"] = [hub.classify(line)[0][0] for line in lines]
        else:
            answer["filled"] = hub.fill_mask(lines[0].split()[0] + " <mask> " + lines[0].split()[1])
        answers[f"{path} {mode}"] = answer
torch.save(answers, "answers.pt")
"""


def compress(run: Run, target: Path, *more: Any) -> Path:
    words = ["compress", str(run.folder / "checkpoint_last.pt"), "-o", str(target), *map(str, more)]
    assert main(words) == 0
    return target


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Run, list[Path]]:
    """A masked LM over a byte-level BPE of 256 bytes and 20 merges, made here; its data are deleted after
    training.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    symbols = list(bytes_to_unicode().values())
    merges = ["k a", "l o", "m i", "t e", "te r", "s u", "b e", "be n", "Ġ ka", "Ġ lo", "Ġ mi"]
    symbols += [merge.replace(" ", "") for merge in merges]
    files = [folder / "encoder.json", folder / "vocab.bpe"]
    files[0].write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    files[1].write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    encoder = get_encoder(*map(str, files))
    for split, seed in (("train", 1), ("valid", 2)):
        rows = [" ".join(map(str, encoder.encode(line))) for line in sentences(60, seed)]
        (folder / f"{split}.txt").write_text("\n".join(rows) + "\n")
    words = ["--only-source", "--trainpref", f"{folder}/train.txt", "--validpref", f"{folder}/valid.txt"]
    words += ["--destdir", f"{folder}/bin", "--workers", "1"]
    # no made-up words, which no BPE decodes and an untrained model may predict
    words += ["--padding-factor", "1"]
    preprocess.main(fairseq_options.get_preprocessing_parser().parse_args(words))
    path = {"--quant-recipe": write_recipe(folder / "r.yaml", recipe()), "--quant-stage-updates": "1,2,3"}
    run = train(folder / "run", folder / "bin", MLM, path, {"--max-update": 5})
    return run, files


@pytest.fixture(scope="module")
def answers(data, masked: Run, classifier: Run, gpt2, tmp_path_factory) -> dict[str, dict]:
    """What a fresh process answers from the files alone."""
    folder, elsewhere = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("elsewhere")
    pieces = ["--bpe", "sentencepiece", "--bpe-files", data.pieces]
    made = {}
    for parts in ("float32", "float16"):
        for name, run, bpe in (
            ("masked", masked, pieces),
            ("classifier", classifier, [*pieces, "--keep-head"]),
            ("gpt2", gpt2[0], ["--bpe", "gpt2", "--bpe-files", *gpt2[1]]),
        ):
            made[f"{name} {parts}"] = compress(
                run, folder / f"{name}.{parts}.qn.safetensors", *bpe, "--parts", parts
            )
    shutil.rmtree(gpt2[1][0].parent / "bin")
    for file in gpt2[1]:
        file.unlink()
    (elsewhere / "ask.py").write_text(ASK)
    done = command(sys.executable, "ask.py", json.dumps(LINES), *made.values(), cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(elsewhere / "answers.pt", weights_only=True)
    return {
        f"{name} {mode}": found[f"{path} {mode}"]
        for name, path in made.items()
        for mode in ("dense", "packed")
    }


def logits_of(run: Run, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [run.model(t.unsqueeze(0))[0] for t in tokens]


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("name", ["masked", "classifier", "gpt2"])
def test_equal_logits(name: str, mode: str, answers: dict, masked: Run, classifier: Run, gpt2) -> None:
    """fp32 parts: those of the frozen training model, exactly (packed, which sums in another order, to 1e-5
    of the largest); fp16 parts: to 1e-3 of the largest."""
    run = {"masked": masked, "classifier": classifier, "gpt2": gpt2[0]}[name]
    exact, half = (answers[f"{name} {parts} {mode}"] for parts in ("float32", "float16"))
    expected = logits_of(run, exact["tokens"])
    for a, b, c in zip(expected, exact["logits"], half["logits"]):
        assert float((b - a).abs().max()) <= (1e-5 * float(a.abs().max()) if mode == "packed" else 0)
        assert not c.equal(a) and float((c - a).abs().max()) < 1e-3 * max(1, float(a.abs().max()))
    assert float(torch.cat([e.flatten() for e in expected]).std()) > 0.05, "there is something to compare"


def test_the_interface_of_the_checkpoint_says_the_same(data, masked: Run, answers: dict) -> None:
    """fairseq's own way to load the training checkpoint, with its data folder and its BPE options."""
    theirs = QNRobertaModel.from_pretrained(
        str(masked.folder),
        "checkpoint_last.pt",
        str(data.lm),
        bpe="sentencepiece",
        sentencepiece_model=str(data.pieces),
    )
    theirs.eval()
    ours = answers["masked float32 dense"]
    for line, tokens, features in zip(LINES, ours["tokens"], ours["features"]):
        assert theirs.encode(line).equal(tokens)
        assert torch.allclose(theirs.extract_features(tokens), features, atol=1e-6)
    assert ours["decoded"] == LINES
    asked = f"{LINES[0].split()[0]} <mask> {LINES[0].split()[1]}"
    filled, words = theirs.fill_mask(asked), theirs.task.source_dictionary
    # fairseq leaves </s> out of the five tokens, but not out of the five probabilities
    assert [token for _, _, token in filled] == [token for _, _, token in ours["filled"]][: len(filled)]
    pieces = " <mask> ".join(theirs.bpe.encode(part.rstrip()) for part in asked.split("<mask>"))
    tokens = words.encode_line(f"<s> {pieces} </s>", append_eos=False, add_if_not_exist=False).long()
    with torch.no_grad():
        chances = theirs.model(tokens[None])[0][0, tokens == words.index("<mask>")][0].softmax(0)
    chances[[*range(words.nspecial), words.index("<mask>")]] = 0
    assert [chance for _, chance, _ in ours["filled"]] == pytest.approx(
        chances.topk(5).values.tolist(), rel=1e-4
    )


@pytest.mark.skipif(native.library() is None, reason="the kernel was not compiled at installation")
def test_a_packed_model_never_sees_a_dense_weight(
    masked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, feed-forward layers and the tied LM head compute from codes, with padding in the batch
    too.
    """
    path = compress(masked, tmp_path / "m.qn.safetensors", "--parts", "float32")
    packed, dense = fairseq_qn.load(path, "packed"), fairseq_qn.load(path)
    tokens = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    tokens[1, 6:] = dense.encoder.dictionary.pad()
    with torch.no_grad():
        expected = dense(tokens)[0]
        monkeypatch.delattr("fairseq_qn.quant.product.decode")
        found = packed(tokens)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_in_bfloat16(masked: Run, tmp_path: Path, mode: str) -> None:
    path = compress(masked, tmp_path / "m.qn.safetensors")
    full, short = (
        QNRobertaModel.from_pretrained(str(path), mode=mode, dtype=d) for d in (None, torch.bfloat16)
    )
    tensors = {**dict(short.model.named_parameters()), **dict(short.model.named_buffers())}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert floating and all(tensor.dtype == torch.bfloat16 for tensor in floating.values())
    tokens = torch.tensor([[0, 5, 6, 7, 8, 2]])
    with torch.no_grad():
        expected, found = full.model(tokens)[0], short.model(tokens)[0]
    assert (
        found.dtype == torch.bfloat16
        and (found.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    )


def test_byte_level_bpe_travels(answers: dict) -> None:
    ours = answers["gpt2 float16 packed"]
    assert ours["decoded"] == LINES
    assert ours["filled"] and all(text.endswith(f" {LINES[0].split()[1]}") for text, _, _ in ours["filled"])


def test_classes_and_their_names(classifier: Run, answers: dict) -> None:
    ours = answers["classifier float32 dense"]
    with torch.no_grad():
        for tokens, classes, label in zip(ours["tokens"], ours["classes"], ours["labels"]):
            model = classifier.model
            logits = model(tokens.unsqueeze(0), features_only=True, classification_head_name=HEAD)[0]
            assert torch.allclose(logits.log_softmax(-1), classes, atol=1e-6)
            names = classifier.trainer.task.label_dictionary
            assert label == names[int(logits.argmax()) + names.nspecial]
    assert set(ours["labels"]) <= {"early", "late"}


def test_without_the_lm_head(classifier: Run, data, tmp_path: Path) -> None:
    words = ["--bpe", "sentencepiece", "--bpe-files", data.pieces]
    whole = compress(classifier, tmp_path / "whole.qn.safetensors", *words, "--keep-head")
    small = compress(classifier, tmp_path / "small.qn.safetensors", *words)
    assert small.stat().st_size < whole.stat().st_size
    ours, theirs = (QNRobertaModel.from_pretrained(path) for path in (small, whole))
    assert ours.classify(LINES[0]) == theirs.classify(LINES[0])
    with pytest.raises(UnsupportedError, match="encoder.lm_head: was left out"):
        ours.fill_mask("ka <mask> lo")


def test_without_a_bpe_model(masked: Run, tmp_path: Path) -> None:
    hub = QNRobertaModel.from_pretrained(compress(masked, tmp_path / "x.qn.safetensors"))
    for ask in (lambda: hub.encode("ka"), lambda: hub.fill_mask("ka <mask>")):
        with pytest.raises(UnsupportedError, match="carries no BPE"):
            ask()


def test_a_folder_with_one_file(masked: Run, tmp_path: Path) -> None:
    compress(masked, tmp_path / "x.qn.safetensors")
    assert QNRobertaModel.from_pretrained(tmp_path).model is not None
    compress(masked, tmp_path / "y.qn.safetensors")
    with pytest.raises(FormatError, match="found 2"):
        QNRobertaModel.from_pretrained(str(tmp_path))


def test_loading_imports_no_compiler(masked: Run, tmp_path: Path) -> None:
    """torch imports its own to draw a weight that has no memory: ten times what the rest of loading
    takes.
    """
    code = """
        import sys
        from fairseq_qn import hub
        before = set(sys.modules)
        models = [hub.load_interface(sys.argv[1], mode).model for mode in ("dense", "packed")]
        assert not any(parameter.is_meta for model in models for parameter in model.parameters())
        print([name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "sympy"))])
    """
    path = compress(masked, tmp_path / "x.qn.safetensors")
    done = command(sys.executable, "-c", textwrap.dedent(code), path, cwd=tmp_path)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr[-2000:]


@pytest.mark.parametrize("damage", ["cut", "flipped", "pickle", "empty"])
def test_a_damaged_file(damage: str, masked: Run, tmp_path: Path) -> None:
    path = compress(masked, tmp_path / "x.qn.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    made = {
        "cut": content[:-100],
        "flipped": content,
        "empty": b"",
        "pickle": (masked.folder / "checkpoint_last.pt").read_bytes(),
    }
    path.write_bytes(made[damage])
    with pytest.raises(FormatError) as error:
        QNRobertaModel.from_pretrained(path)
    assert "\n" not in str(error.value) and "x.qn.safetensors" in str(error.value)
