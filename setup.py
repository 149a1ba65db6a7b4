"""Packaging. `run_scripts/setup.sh` installs torch, fairseq and then this, in the order that works."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

EXTRAS = {
    "plot": ["matplotlib>=3.7"],
    "tensorboard": ["tensorboardX>=2.5"],
    "hf": ["transformers>=4.40", "tokenizers>=0.19"],
    "hub": ["huggingface_hub>=0.23"],
    "ans": ["constriction>=0.4"],  # entropy coding of what is packed
}
EXTRAS["all"] = sorted(sum(EXTRAS.values(), []))
EXTRAS["oracle"] = ["faiss-cpu>=1.8"]  # k-means to compare ours with, in tests only
# peers, for run_scripts/benchmark.sh only
EXTRAS["benchmark"] = EXTRAS["oracle"] + ["aqlm>=1.1.6", "numba>=0.59"]
EXTRAS["test"] = (
    EXTRAS["all"]
    + EXTRAS["oracle"]
    + ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11"]
)


def _kernels(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("fairseq_qn/kernels").glob(pattern))


setup(
    name="fairseq-qn",
    version=re.search(r'"(\d.*)"', Path("fairseq_qn/version.py").read_text())[1],
    description="Quant-Noise and iterative product quantisation for fairseq, down to one small file that "
    "answers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="fairseq_qn authors",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["fairseq_qn", "fairseq_qn.*"]),
        "fairseq_qn.configs",
        "hydra_plugins",
        "hydra_plugins.fairseq_qn",
    ],
    # configs/ stays at the top of the tree and is installed inside the package; `fairseq_qn.config_dir`
    # finds either. Hydra looks for plugins in the namespace package hydra_plugins, whose own folder must
    # hold no __init__.py.
    package_dir={"fairseq_qn.configs": "configs", "hydra_plugins": "fairseq_qn/hydra_plugins"},
    package_data={"fairseq_qn": ["py.typed"], "fairseq_qn.configs": ["*.md", "*.yaml", "**/*.yaml"]},
    install_requires=[
        "torch>=2.1",
        "fairseq-fixed==0.12.3.1",  # fairseq 0.12.2's code, for Python 3.11 on
        "numpy>=1.21",
        "omegaconf>=2.0.6",
        "hydra-core>=1.0.7",
        "sentencepiece>=0.1.99",
        "safetensors>=0.4",
        "PyYAML>=5.4",
        "tqdm>=4.60",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fairseq-qn = fairseq_qn.cli:main"]},
    # Optional: without a compiler everything works, and codebooks take some ten times longer.
    ext_modules=[
        Extension(
            "fairseq_qn.kernels._native",
            _kernels("*.c"),
            depends=_kernels("*.h"),
            extra_compile_args=["-O3"],
            optional=True,
        )
    ],  # fmt: skip
    zip_safe=False,
)
