"""fairseq-qn train from a checkpoint whose BPE is sentencepiece, with options that are true or false."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fairseq_run import Run, sentences

from fairseq_qn.commands.data import prepare
from fairseq_qn.commands.score import score


def test_scored_with_the_bpe_that_it_was_prepared_with(data, classifier: Run, tmp_path: Path) -> None:
    """As of its own rows: the classes are those of the first word, which it has learned."""
    for name, seed in (("train", 1), ("valid", 2)):
        rows = [f"{'early' if line.split()[0] < 'lo' else 'late'}\t{line}\n" for line in sentences(60, seed)]
        (tmp_path / f"{name}.tsv").write_text("".join(rows))
    args = Namespace(
        model=classifier.folder / "checkpoint_last.pt", train=tmp_path / "train.tsv",
        valid=tmp_path / "valid.tsv", test=None, head="sentence_classification_head", labels=None, seed=1,
        bpe="sentencepiece", bpe_files=[data.pieces], bpe_option=["sentencepiece_enable_sampling=false"],
    )  # fmt: skip
    done = prepare(args, tmp_path / "data")
    assert done.bpe_options == ["sentencepiece_enable_sampling=false"]
    found = score(Path(done.checkpoint), tmp_path / "train.tsv", done, tmp_path)
    assert (found.measure, found.rows) == ("accuracy", 60) and found.value > 60
