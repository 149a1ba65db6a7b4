"""A plain torch model, on banking77: trained with noise, frozen in stages, shipped as one small file."""

import re
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

import fairseq_qn as qn

RULE = {"scheme": "product", "block_size": 4, "n_centroids": 256}
RULES = [{"layers": "embed", "stage": "table", **RULE}, {"layers": "fc[12]", "stage": "linear", **RULE}]
RECIPE = {"version": 1, "noise": {"kind": "proxy", "p": 0.1}, "rules": RULES}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(4000, 64, 0), nn.Linear(64, 256), nn.Linear(256, 77)

    def forward(self, ids: Tensor) -> Tensor:  # words [rows, length], 0 for none -> scores [rows, 77]
        return self.fc2(self.fc1(self.embed(ids).sum(1) / (ids > 0).sum(1, keepdim=True)).relu())


def read(part: str) -> tuple[Tensor, Tensor]:
    lines = (Path(__file__).parent / f"data/banking77/{part}.tsv").read_text("utf-8").lower().splitlines()
    intents, texts = zip(*(line.split("\t") for line in lines))
    rows = [[int.from_bytes(w.encode(), "big") % 3999 + 1 for w in re.findall(r"\w+", t)] for t in texts]
    ids, names = [torch.tensor(row[:32]) for row in rows], sorted({*intents})
    return nn.utils.rnn.pad_sequence(ids, True), torch.tensor([names.index(intent) for intent in intents])


def train(updates: int, recipe: dict | None = None) -> nn.Module:
    torch.manual_seed(1)
    model, (ids, labels) = Model(), read("train")
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    if recipe:
        qn.apply(model, recipe)
        qn.Stages(model, adam, updates=[updates // 2, updates * 3 // 4])  # all that the loop needs
    for _ in range(updates):
        rows = torch.randint(len(ids), (64,))
        nn.functional.cross_entropy(model(ids[rows]), labels[rows]).backward()
        adam.step()
        adam.zero_grad()
    return model


def report(what: str, model: nn.Module) -> None:
    ids, labels = read("test")
    print(what, f"{(model.eval()(ids).argmax(1) == labels).float().mean():.1%} of test questions right")


if __name__ == "__main__":
    n, file = int((sys.argv[1:] or ["2400"])[0]), f"{mkdtemp()}/model.qn.safetensors"
    plain = train(n)
    report(f"plain, {sum(p.nbytes for p in plain.parameters()):,} bytes:", plain)
    print(qn.save(train(n, RECIPE), file))
    report(f"from the file, {Path(file).stat().st_size:,} bytes:", qn.load(file, "packed", model=Model()))
