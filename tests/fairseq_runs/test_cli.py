"""The command line on real checkpoints and files: what it prints, its exit status, and one line for bad
input.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq_run import CLASSES, MLM, PLUGIN, Run, command, recipe, sentences, train, write_recipe
from forging import Bomb

import fairseq_qn
from fairseq_qn.cli import main

LINES = sentences(3, 9)


@pytest.fixture(scope="module")
def files(data, masked: Run, classifier: Run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, run in (("masked", masked), ("classifier", classifier)):
        found[name] = folder / f"{name}.qn.safetensors"
        words = ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces), "--keep-head"]
        assert (
            main(["compress", str(run.folder / "checkpoint_last.pt"), "-o", str(found[name]), *words]) == 0
        )
    return found


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What a command prints; it has to succeed, with nothing on stderr but a progress bar."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


def test_compress_a_staged_checkpoint(masked: Run, tmp_path: Path, said) -> None:
    small = tmp_path / "x.qn.safetensors"
    words = ["compress", masked.folder / "checkpoint_last.pt", "-o", small]
    report = json.loads(said(*words, "--json"))
    assert report["size"]["total"] == small.stat().st_size and report["frozen_here"] == []
    assert f"{small.stat().st_size / 1e6:.3f} MB on disk" in said(*words)


def test_compress_freezes_what_is_left(data, tmp_path: Path, said, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint within its stages: those that the training did not come to are frozen here, and named."""
    options = {
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe()),
        "--quant-stage-updates": "1,9,9",
    }
    train(tmp_path / "run", data.lm, MLM, options, {"--max-update": 3})
    words = ["compress", tmp_path / "run" / "checkpoint_last.pt", "-o", tmp_path / "x.qn.safetensors"]
    report = json.loads(said(*words, "--json"))
    assert {layer["stage"] for layer in report["frozen_here"]} == {"emb", "attn"}
    assert report["unreached"] == ["emb", "attn"]
    assert "froze 9 layers" in said(*words)
    alarm = "the training did not reach stages emb, attn: 9 layers frozen here, with no training after"
    assert main([str(word) for word in words]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and alarm in error
    assert "x.qn.safetensors: no BPE inside, so it will not answer text; add --bpe NAME" in error


@pytest.mark.parametrize(
    "noise", [{}, {"--quant-noise-pq": 0.1}, {"--quant-noise-pq": 0.1, "--quant-stage-updates": "7,8,9"}]
)
def test_compress_at_once_without_alarm(
    noise: dict, data, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No stage was due, or the recipe is one that the training did not know, so none of its stages was
    missed.
    """
    train(tmp_path / "run", data.lm, MLM, noise, {"--max-update": 1})
    other = recipe(stages=[{"name": "emb", "update": 9}, {"name": "rest", "update": 9}])
    other["rules"] = [
        {**rule, "stage": "emb" if rule["stage"] == "emb" else "rest"} for rule in other["rules"]
    ]
    words = [
        "compress",
        tmp_path / "run" / "checkpoint_last.pt",
        "-o",
        tmp_path / "x.qn.safetensors",
        "--json",
    ]
    for more in (["--recipe", write_recipe(tmp_path / "r.yaml", other)], [])[: len(noise) + 1]:
        assert main([str(word) for word in (*words, *more)]) == 0
        out, error = capsys.readouterr()
        error = [line for line in error.splitlines() if "no BPE inside" not in line]
        missed = ["ffn", "emb", "attn"] if len(noise) == 2 and not more else []
        assert (len(json.loads(out)["frozen_here"]), json.loads(out)["unreached"], bool(error)) == (
            13,
            missed,
            bool(missed),
        )


def test_a_classifier_leaves_its_lm_head_out(
    classifier: Run, data, files: dict[str, Path], tmp_path: Path, said
) -> None:
    words = ["compress", classifier.folder / "checkpoint_last.pt", "-o", tmp_path / "x.qn.safetensors"]
    assert "left out: encoder.lm_head" in said(*words)
    small = json.loads(said(*words, "--json"))
    whole = json.loads(said(*words, "--json", "--keep-head"))
    assert (small["dropped"], whole["dropped"]) == (["encoder.lm_head"], [])
    other = json.loads(said(*words, "--json", "--drop", "encoder.lm_head.dense"))
    assert other["dropped"] == ["encoder.lm_head.dense"]
    assert small["size"]["total"] < other["size"]["total"] < whole["size"]["total"]
    assert "encoder.lm_head" not in fairseq_qn.inspect(files["masked"])["dropped"]


def test_the_size_that_training_predicts(classifier: Run, masked: Run, tmp_path: Path, said) -> None:
    """As the file without a BPE is: its dictionaries and heads count, an LM head left out does not."""
    for run in (classifier, masked):
        words = [
            "compress",
            run.folder / "checkpoint_last.pt",
            "-o",
            tmp_path / "x.qn.safetensors",
            "--json",
        ]
        predicted = run.logged()[-1]["qn_predicted_mb"] * 1e6
        assert predicted == pytest.approx(json.loads(said(*words))["size"]["total"], rel=0.01)


def test_the_size_that_training_predicts_with_a_bpe(data, tmp_path: Path, said) -> None:
    bpe = {"--bpe": "sentencepiece", "--sentencepiece-model": data.pieces}
    recipe = {"--quant-noise-pq": 0.1, "--quant-noise-pq-block-size": 8, "--max-update": 1}
    run = train(tmp_path / "run", data.classes, CLASSES, bpe, recipe)
    small = tmp_path / "x.qn.safetensors"
    words = ["--bpe", "sentencepiece", "--bpe-files", data.pieces, "--json"]
    size = json.loads(said("compress", run.folder / "checkpoint_last.pt", "-o", small, *words))["size"]
    predicted = run.logged()[-1]["qn_predicted_mb"] * 1e6
    assert predicted == pytest.approx(size["total"], rel=0.01)
    assert size["parts"]["assets"] > 0.02 * size["total"], "else the test says nothing"


def test_a_wrong_drop_is_refused_before_anything_is_learned(
    data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path / "run", data.lm, MLM, {"--quant-noise-pq": 0.1, "--max-update": 1})
    monkeypatch.setattr("fairseq_qn.api.freeze", Bomb)
    words = ["compress", tmp_path / "run" / "checkpoint_last.pt", "-o", tmp_path / "x.qn.safetensors"]
    assert main([str(word) for word in (*words, "--drop", "encoder.lm_heat")]) == 1
    assert "the model has no module 'encoder.lm_heat'" in capsys.readouterr().err


def test_compress_by_another_seed(data, tmp_path: Path, said) -> None:
    options = {"--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe()), "--max-update": 1}
    train(tmp_path / "run", data.lm, MLM, options)
    words = ["compress", tmp_path / "run" / "checkpoint_last.pt", "--json", "-o"]
    found = {}
    for name, seed in (("own", []), ("same", ["--seed", MLM["--seed"]]), ("other", ["--seed", 8])):
        said(*words, tmp_path / name, *seed)
        found[name] = (tmp_path / name).read_bytes()
    assert found["own"] == found["same"] != found["other"]


def test_compress_a_stock_checkpoint(data, tmp_path: Path, said) -> None:
    stock = {k: v for k, v in MLM.items() if k != "--wrapped-criterion"}
    stock |= {"--task": "masked_lm", "--arch": "roberta", "--criterion": "masked_lm", "--max-update": 1}
    train(tmp_path / "run", data.lm, stock)
    path = write_recipe(tmp_path / "r.yaml", recipe())
    words = [
        "compress",
        tmp_path / "run" / "checkpoint_last.pt",
        "-o",
        tmp_path / "x.qn.safetensors",
        "--recipe",
        path,
    ]
    assert len(json.loads(said(*words, "--json"))["frozen_here"]) == 13
    assert len(fairseq_qn.inspect(tmp_path / "x.qn.safetensors")["layers"]) == 13


@pytest.mark.parametrize("more", [[], ["--all"]])
def test_inspect_fits_80_columns(more: list[str], files: dict[str, Path], said) -> None:
    name = files["classifier"].relative_to(files["classifier"].parent)
    lines = (
        said("inspect", files["classifier"], *more).replace(str(files["classifier"]), str(name)).splitlines()
    )
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any("embed_tokens" in line and "PQ d8 K32" in line for line in lines)
    assert any(line.startswith("tied: ") for line in lines)


def test_inspect_json(files: dict[str, Path], said) -> None:
    data = json.loads(said("inspect", files["masked"], "--json"))
    assert data["size"]["total"] == files["masked"].stat().st_size == sum(data["size"]["parts"].values())
    assert data["assets"]["pieces.model"]["bytes"] > 100 and data["source"]["model"]["_name"] == "qn_roberta"


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_verify(mode: str, files: dict[str, Path], said) -> None:
    assert "good" in said("verify", files["masked"], "--mode", mode)
    report = json.loads(said("verify", files["classifier"], "--json"))
    assert report["bytes"] == files["classifier"].stat().st_size and "QNRobertaModel" in report["model"]


def test_predict_classes(files: dict[str, Path], said) -> None:
    printed = said("predict", files["classifier"], LINES[0], "--top", 2).splitlines()
    assert printed[0] == LINES[0] and {row.split()[1] for row in printed[1:]} == {"early", "late"}
    (answer,) = [
        json.loads(row) for row in said("predict", files["classifier"], LINES[0], "--json").splitlines()
    ]
    assert sum(item["score"] for item in answer["answers"]) == pytest.approx(1, abs=1e-5)
    pair = json.loads(said("predict", files["classifier"], f"{LINES[0]}\t{LINES[1]}", "--json"))
    assert pair["answers"] != answer["answers"], "the second sentence counts"


def test_predict_fills_a_mask(files: dict[str, Path], said) -> None:
    for name in files:
        (row,) = said("predict", files[name], "ka <mask> lo", "--json", "--top", 3).splitlines()
        answers = json.loads(row)["answers"]
        assert len(answers) <= 3 and all(0 < item["score"] < 1 for item in answers)
        assert [item["score"] for item in answers] == sorted(
            (item["score"] for item in answers), reverse=True
        )


def test_predict_reads_lines(files: dict[str, Path], said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode())))
    rows = [json.loads(row) for row in said("predict", files["classifier"], "--json").splitlines()]
    assert [row["input"] for row in rows] == LINES


@pytest.fixture(scope="module")
def bad(files: dict[str, Path], masked: Run, tmp_path_factory) -> dict[str, Path]:
    """Files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    content = bytearray(files["masked"].read_bytes())
    content[-1000] ^= 1
    made = {"damaged": content, "pickle": (masked.folder / "checkpoint_last.pt").read_bytes(), "empty": b""}
    paths = {
        "missing": folder / "missing.qn.safetensors",
        "nothing": folder / "nothing.yaml",
        "text": folder / "x.pt",
    }
    for name, value in made.items():
        paths[name] = folder / f"{name}.qn.safetensors"
        paths[name].write_bytes(value)
    paths["text"].write_text("not a checkpoint\n")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    nothing = recipe()
    nothing["rules"][0]["layers"] = r".*\.no_such_layer"
    write_recipe(paths["nothing"], nothing)
    (folder / "broken.yaml").write_text("rules: [")
    return {
        **paths,
        "other": folder / "other.pt",
        "list": folder / "list.pt",
        "broken": folder / "broken.yaml",
        "folder": folder,
    }


@pytest.mark.parametrize("name", ["missing", "damaged", "pickle", "empty", "folder"])
@pytest.mark.parametrize("verb", ["inspect", "verify", "predict"])
def test_a_bad_file(verb: str, name: str, bad: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    if (verb, name) == ("inspect", "damaged"):
        return  # inspect reads the header alone
    expect_one_line([verb, bad[name], *(["ka"] if verb == "predict" else [])], capsys, bad[name].name)


def test_a_recipe_that_matches_nothing(
    bad: dict[str, Path], data, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path / "run", data.lm, MLM, {"--max-update": 1})
    words = ["compress", tmp_path / "run" / "checkpoint_last.pt", "-o", tmp_path / "x.qn.safetensors"]
    expect_one_line([*words, "--recipe", bad["nothing"]], capsys, "no_such_layer")
    expect_one_line(words, capsys, "--recipe")
    assert not (tmp_path / "x.qn.safetensors").exists()


@pytest.mark.parametrize("name", ["missing", "text", "other", "list", "damaged"])
@pytest.mark.parametrize("verb", ["compress", "export-fairseq"])
def test_a_bad_checkpoint(
    verb: str, name: str, bad: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    expect_one_line([verb, bad[name], "-o", tmp_path / "x.qn.safetensors"], capsys, bad[name].name)
    assert not (tmp_path / "x.qn.safetensors").exists()


BAD_OPTIONS = {
    "another recipe": ["--recipe", "{other_recipe}"],
    "broken.yaml": ["--recipe", "{broken}"],
    "no_such.yaml": ["--recipe", "no_such.yaml"],
    "no module 'encoder.nope'": ["--drop", "encoder.nope"],
    "--bpe": ["--bpe", "nope", "--bpe-files", "{text}"],
    "no_such.model": ["--bpe", "sentencepiece", "--bpe-files", "no_such.model"],
    "no_such_folder": ["--data", "no_such_folder"],
    "cannot write": ["-o", "no_such_folder/x.qn.safetensors"],
}


@pytest.mark.parametrize("word", BAD_OPTIONS)
def test_bad_options(
    word: str, bad: dict[str, Path], masked: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write_recipe(tmp_path / "another recipe.yaml", recipe(block_size=4))
    paths = {**bad, "other_recipe": other}
    options = [option.format(**paths) for option in BAD_OPTIONS[word]]
    words = ["compress", masked.folder / "checkpoint_last.pt", "-o", tmp_path / "x.qn.safetensors", *options]
    expected = "frozen in the checkpoint" if word == "another recipe" else word
    expect_one_line(words, capsys, expected)


def test_bad_questions(
    files: dict[str, Path], masked: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare = tmp_path / "bare.qn.safetensors"
    assert main(["compress", str(masked.folder / "checkpoint_last.pt"), "-o", str(bare)]) == 0
    expect_one_line(["predict", files["classifier"], "ka", "--head", "mood"], capsys, "mood")
    expect_one_line(["predict", files["masked"], "ka"], capsys, "heads")
    expect_one_line(["predict", files["masked"], "<mask> <mask>"], capsys, "one <mask>")
    expect_one_line(["predict", bare, "ka <mask>"], capsys, "BPE")
    dense = masked.folder / "checkpoint_last.pt"
    expect_one_line(["predict", dense, "ka <mask>"], capsys, "--bpe NAME --bpe-files FILE")


def expect_one_line(words: list, capsys: pytest.CaptureFixture, named: str) -> None:
    """Exit status 1, one line on stderr that names the culprit, no traceback."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fairseq-qn: ") and "Traceback" not in error, error
    assert named in error


@pytest.mark.parametrize(
    "words", [[], ["nope"], ["inspect"], ["compress", "x.pt"], ["verify", "x", "--mode", "nope"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_the_console_script(
    files: dict[str, Path], bad: dict[str, Path], masked: Run, tmp_path: Path
) -> None:
    done = command("fairseq-qn", "predict", files["classifier"], cwd=tmp_path, stdin=f"{LINES[0]}\n")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, LINES[0])
    assert done.stderr == "", "no log of fairseq's, no warning"
    words = [masked.folder / "checkpoint_last.pt", "-o", "x.qn.safetensors"]
    done = command("fairseq-qn", "compress", *words, cwd=tmp_path)
    assert done.returncode == 0 and "x.qn.safetensors: 0.0" in done.stdout
    assert done.stderr.count("\n") == 1 and "no BPE inside" in done.stderr
    done = command("fairseq-qn", "verify", bad["pickle"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_restoring_stays_safe(masked: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """torch.load's own default (weights_only) restores fairseq's checkpoints; any other class is refused,
    and runs no code.
    """
    path = masked.folder / "checkpoint_last.pt"
    state = torch.load(path)
    assert {"model", "cfg", "optimizer_history"} <= set(state)
    trap = tmp_path / "trap"
    evil = tmp_path / "evil.pt"
    torch.save({**state, "more": Bomb(trap)}, evil)
    with pytest.raises(Exception, match="(?i)weights.only"):
        torch.load(evil)
    expect_one_line(["compress", evil, "-o", tmp_path / "x.qn.safetensors"], capsys, "evil.pt")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["masked", "classifier"])
def test_fairseq_validate(name: str, request: pytest.FixtureRequest, data, tmp_path: Path) -> None:
    """The stock command in a fresh process, restoring with torch's default: the loss that the training
    logged at its end.
    """
    run, folder, task = request.getfixturevalue(name), data.lm, ["--task", "qn_masked_lm"]
    if name == "classifier":
        folder = data.classes
        task = ["--task", "qn_sentence_prediction", "--num-classes", 2, "--init-token", 0]
        task += ["--separator-token", 2]
    words = [folder, "--path", run.folder / "checkpoint_last.pt", "--user-dir", PLUGIN, *task, "--cpu"]
    words += ["--valid-subset", "valid", "--batch-size", 8, "--num-workers", 0, "--log-format", "json"]
    done = command("fairseq-validate", *words, "--required-batch-size-multiple", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(
        next(row for row in done.stdout.splitlines() if '"valid_loss"' in row).split(" | ")[-1]
    )
    expected = run.logged("valid")[-1]
    assert float(figures["valid_loss"]) == pytest.approx(expected["valid_loss"], abs=2e-3)


def test_no_command_writes_over_its_input(
    masked: Run, data, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By its own path, a link or another name; what is lost is looked at before anything is read."""
    checkpoint, other = tmp_path / "x.pt", tmp_path / "y.pt"
    checkpoint.write_bytes((masked.folder / "checkpoint_last.pt").read_bytes())
    other.symlink_to(checkpoint)
    before = checkpoint.read_bytes()
    for verb in ("compress", "export-fairseq"):
        for source, output in ((checkpoint, checkpoint), (checkpoint, other), (other, checkpoint)):
            assert main([verb, str(source), "-o", str(output)]) == 1
            assert f"{output}: is the input {source} itself, which would be lost" in capsys.readouterr().err
    path = write_recipe(tmp_path / "r.yaml", recipe())
    assert main(["compress", str(checkpoint), "-o", str(path), "--recipe", str(path)]) == 1
    assert checkpoint.read_bytes() == before and path.read_text().startswith("noise")
