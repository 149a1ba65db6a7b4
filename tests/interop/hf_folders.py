"""Hugging Face folders for the tests, made by hand."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

SENTENCES = [
    "The committee's report, published in 1998, was never read by anyone.",
    "Where is the nearest railway station?",
    "Je n'ai pas vu l'été passer à Zürich.",
    "Prices rose by 3.7% in March (seasonally adjusted).",
    'He said: "I won\'t go!" and slammed the door behind him.',
    "A compiler translates source code into machine instructions.",
    "Yes.",
    "They planted oak, ash and hawthorn along the old canal, so that the hedge would keep the sheep in; it "
    "did not.",
]
WORDS = """the of a in and was to he is by it they said yes where not code source report read march rose go
    door""".split()
PIECES = ["##s", "##ed", "##ing", "##t", "##e", ".", ",", "?", "!", "'", '"', "(", ")", ";", ":", "%"]


def wordpiece_lines() -> list[str]:
    """A shuffled vocabulary with letters for every word, so that nothing but odd signs is [UNK]; specials
    anywhere.
    """
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *PIECES, *letters])]
    lines += [f"##{c}" for c in letters if f"##{c}" not in PIECES]
    random.Random(0).shuffle(lines)
    return lines


def byte_bpe_files(folder: Path, pad: int) -> None:
    """vocab.json and merges.txt: 256 bytes, a few merges, and the specials, with <pad> at `pad`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [b for b in range(256) if b not in printable]
    names = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(extra))]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("in", "g")]
    tokens = ["<s>", "</s>", "<unk>", *names, *dict.fromkeys(a + b for a, b in merges), "<mask>"]
    tokens.insert(pad, "<pad>")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")


def bert_config(n_rows: int, **changes: object) -> dict:
    config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": n_rows, "max_position_embeddings": 20, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip
    return {**config, **changes}


def bert_tensors(config: dict) -> dict[str, torch.Tensor]:
    """Random tensors under the names that Hugging Face's BertModel gives them, spelled out apart from the
    key map.
    """
    d, f = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        "embeddings.LayerNorm.weight": (d,), "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d), "pooler.dense.bias": (d,),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        linears = {
            "attention.self.query": (d, d),
            "attention.self.key": (d, d),
            "attention.self.value": (d, d),
            "attention.output.dense": (d, d),
            "intermediate.dense": (f, d),
            "output.dense": (d, f),
        }
        for name, shape in linears.items():
            shapes[f"encoder.layer.{i}.{name}.weight"], shapes[f"encoder.layer.{i}.{name}.bias"] = (
                shape,
                shape[:1],
            )
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = shapes[f"encoder.layer.{i}.{name}.bias"] = (d,)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_bert(folder: Path, lines: list[str], tensors: dict | None = None, **changes: object) -> dict:
    """A BERT folder without transformers; returns its tensors."""
    config = bert_config(len(lines), pad_token_id=lines.index("[PAD]"), **changes)
    tensors = bert_tensors(config) if tensors is None else tensors
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return tensors
