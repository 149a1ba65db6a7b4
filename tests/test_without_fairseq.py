"""The core works where fairseq is not installed: recipe, noise, freezing, the file and back, in a fresh
process.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

BLOCK = """
    import sys
    from importlib.machinery import PathFinder

    find = PathFinder.find_spec

    # as where it is not installed: find_spec gives None
    def find_all_but_fairseq(name, path=None, target=None):
        return None if name.split(".")[0] in ("fairseq", "fairseq_cli") else find(name, path, target)

    PathFinder.find_spec = find_all_but_fairseq
"""


def run(code: str, cwd: Path) -> str:
    """Standard output of a program that runs where `import fairseq` fails."""
    program = textwrap.dedent(BLOCK) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_blocks(tmp_path: Path) -> None:
    code = """
        try:
            import fairseq
        except ImportError as error:
            print(error.name)
    """
    assert run(code, tmp_path).strip() == "fairseq"


def test_quant_imports(tmp_path: Path) -> None:
    assert run("import fairseq_qn.quant; print('fairseq' in sys.modules)", tmp_path).strip() == "False"


def test_the_four_verbs(tmp_path: Path) -> None:
    code = """
        import os
        import torch
        from torch import nn
        import fairseq_qn

        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(300, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

        rule = {"scheme": "product", "block_size": 4, "n_centroids": 16}
        recipe = fairseq_qn.Recipe.load({
            "version": 1,
            "noise": {"kind": "proxy", "p": 0.5},
            "rules": [
                {"layers": "0", **rule, "stage": "emb"},
                {"layers": "1", **rule, "stage": "ffn"},
                {"layers": "3", "scheme": "integer", "bits": 8, "granularity": "channel", "stage": "ffn"},
            ],
            "stages": ["ffn", "emb"],
        })
        x = torch.arange(300).view(30, 10)
        model = build()
        coverage = fairseq_qn.apply(model, recipe)
        stored = [p.detach().clone() for p in model.parameters()]
        a, b = model.train()(x), model(x)
        assert not torch.equal(a, b), "no noise"
        a.sum().backward()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stored)), "a forward wrote a weight"
        dense = model.eval()(x)
        assert torch.equal(dense, model(x)), "noise in evaluation"
        fairseq_qn.freeze(model, stage="ffn")
        fairseq_qn.freeze(model)
        frozen = model(x)
        assert not torch.equal(frozen, dense), "nothing was quantised"
        report = fairseq_qn.save(model, "m.qn.safetensors")
        assert report.total == os.path.getsize("m.qn.safetensors")
        half = fairseq_qn.load("m.qn.safetensors", model=build())
        assert not half.training
        assert (half(x).float() - frozen).abs().max() < 1e-2
        assert fairseq_qn.inspect("m.qn.safetensors")
        print("fairseq" in sys.modules, len(coverage.matched))
    """
    assert run(code, tmp_path).strip() == "False 3"


def test_any_model_trains_freezes_and_ships(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "run_scripts" / "any_model.py"
    code = f"""
        import runpy
        sys.argv = ["any_model.py", "16"]
        runpy.run_path({str(script)!r}, run_name="__main__")
        print("fairseq" in sys.modules)
    """
    plain, size, small, last = run(code, tmp_path).splitlines()
    dense, file = (int(line.split(" bytes")[0].split()[-1].replace(",", "")) for line in (plain, small))
    assert plain.startswith("plain, ") and small.startswith("from the file, ") and last == "False"
    assert 10 * file < dense and "MB on disk" in size
    for line in (plain, small):
        assert 0 < float(line.split(" bytes: ")[1].split("%")[0]) <= 100
