"""Every ready recipe, on the architectures that it is for: how many layers it takes, and what share of the
parameters.
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

from fairseq_qn.config_dir import config_dir
from fairseq_qn.models.undrawn import Undrawn
from fairseq_qn.modules.match import match
from fairseq_qn.recipe import Recipe

RECIPES = sorted((config_dir() / "recipes").glob("*.yaml"))

# (recipe, architecture, options) -> layers, share of all parameters with the vocabulary that the
# architecture is known for
TABLE = {
    ("roberta", "qn_roberta", ()): (73, 0.991),
    ("roberta", "qn_roberta_base", ()): (73, 0.991),
    ("roberta", "qn_roberta_prenorm", ()): (73, 0.991),
    ("roberta", "qn_roberta_large", ()): (145, 0.995),
    ("roberta", "qn_xlm", ()): (97, 0.993),
    ("roberta-int8", "qn_roberta_base", ()): (73, 0.991),
    ("roberta-int8", "qn_roberta_large", ()): (145, 0.995),
    ("transformer_lm", "qn_transformer_lm_gpt", ("share_decoder_input_output_embed",)): (73, 0.999),
    ("transformer_lm", "qn_transformer_lm_big", ("share_decoder_input_output_embed",)): (73, 0.999),
    ("transformer", "qn_transformer", ("share_all_embeddings",)): (97, 0.999),
    ("transformer", "qn_transformer_iwslt_de_en", ("share_all_embeddings",)): (97, 0.998),
    ("transformer", "qn_transformer_iwslt_de_en", ("share_decoder_input_output_embed",)): (98, 0.999),
    ("transformer", "qn_transformer_vaswani_wmt_en_de_big", ("share_all_embeddings",)): (97, 0.999),
    ("int8", "qn_roberta_base", ()): (75, 0.999),
    ("int4", "qn_roberta_base", ()): (75, 0.999),
    ("int8-activations", "qn_roberta_base", ()): (75, 0.999),
    ("diffq", "qn_roberta_base", ()): (75, 0.999),
}


def build(arch: str, options: tuple[str, ...], vocabulary: int = 50_265) -> torch.nn.Module:
    dictionary = Dictionary()
    dictionary.symbols += [str(i) for i in range(vocabulary - len(dictionary))]
    task = SimpleNamespace(
        source_dictionary=dictionary, target_dictionary=dictionary, cfg=None, args=Namespace(seed=1)
    )
    args = Namespace(
        arch=arch, _name=arch, max_positions=512, tokens_per_sample=512, **dict.fromkeys(options, True)
    )
    cls = ARCH_MODEL_REGISTRY[arch]
    if getattr(cls, "__dataclass", None) is None:
        ARCH_CONFIG_REGISTRY[arch](args)
    else:
        defaults = getattr(cls, "__dataclass")()
        ARCH_CONFIG_REGISTRY[arch](args)
        for name in type(defaults).__dataclass_fields__:
            if not hasattr(args, name):
                setattr(args, name, getattr(defaults, name))
        args.tokens_per_sample = args.max_target_positions = 512
    with torch.device("meta"), Undrawn():  # shapes are all that matching needs
        return cls.build_model(args, task)


@pytest.mark.parametrize(("recipe", "arch", "options"), TABLE)
def test_a_ready_recipe_covers_its_architecture(recipe: str, arch: str, options: tuple[str, ...]) -> None:
    model = build(arch, options)
    _, coverage = match(model, Recipe.load(config_dir() / "recipes" / f"{recipe}.yaml"))
    layers, share = TABLE[recipe, arch, options]
    assert (len(coverage.matched), round(coverage.share, 3)) == (layers, share), str(coverage)


def test_every_ready_recipe_is_in_the_table() -> None:
    own_models = {"minilm", "quickstart"}  # for models that a script makes, and which that script checks
    own_models |= {"efficientnet"}  # tests/models/test_efficientnet.py
    own_models |= {"bert-hf", "roberta-hf", "gpt2-hf"}  # tests/interop/test_hf_models.py
    assert {path.stem for path in RECIPES} - own_models == {recipe for recipe, _, _ in TABLE}


@pytest.mark.parametrize("name", ["minilm", "quickstart"])
def test_the_recipes_of_the_scripts_cover_a_roberta(name: str) -> None:
    model = build("qn_roberta_base", ())
    model.register_classification_head("head", 77, 768)
    _, coverage = match(model, Recipe.load(config_dir() / "recipes" / f"{name}.yaml"))
    assert len(coverage.matched) >= 73 and not any("embed_positions" in left for left in coverage.left)
