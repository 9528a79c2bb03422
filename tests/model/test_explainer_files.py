"""Saving and loading an explainer: complete, strict, by the Auto classes."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, GATES, ITEMS, SLOT, USERS, dense_model, explainer, saved_and_loaded, slot_batch
from helpers.stage2_runs import Trained
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from gavamoe.config.files import parse_config
from gavamoe.errors import InputError
from gavamoe.model.build import build_explainer, load_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "experts", [{}, {"conversion": "shared"}, {"enabled": False}], ids=["random", "shared", "dense"]
)
def test_saved_folder_is_complete_and_loads_equal(
    family: str, tied: bool, experts: dict[str, Any], tmp_path: Path
) -> None:
    model = explainer(dense_model(family, tied=tied), **experts)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = saved_and_loaded(model, tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    word_table = loaded.get_input_embeddings().weight
    assert (loaded.lm_head.weight.data_ptr() == word_table.data_ptr()) == tied
    ids, mask, clusters = slot_batch(model)
    settings = {"attention_mask": mask, "cluster_ids": clusters, "max_new_tokens": 6}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))
    assert loaded.generation_config.pad_token_id == 2
    assert loaded.generation_config.eos_token_id == 1


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    explainer().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GavamoeConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GavamoeForCausalLM)


def test_kernel_choice_survives_saving_and_can_be_changed(tmp_path: Path) -> None:
    dense = dense_model()  # a dense LLaMA made first makes transformers cache that LLaMA has no experts
    assert dense._can_set_experts_implementation() is False
    model = explainer(dense.float(), implementation="batched_mm")
    assert model.config._experts_implementation == "batched_mm"
    loaded = saved_and_loaded(model, tmp_path)
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"
    loaded.set_experts_implementation("grouped_mm")
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"


def test_auto_kernel_is_the_default() -> None:
    config = parse_config({}, "test")
    model = build_explainer(config, dense_model().float(), ExplainerSizes(USERS, ITEMS, SLOT, GATES))
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "auto"


def test_loading_is_strict(tmp_path: Path) -> None:
    saved_and_loaded(explainer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "user_embedding.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing keys in the weights, such as user_embedding\.weight"):
        load_explainer(tmp_path)
    save_file(weights | {"stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="unexpected keys in the weights, such as stray"):
        load_explainer(tmp_path)
    save_file(weights | {"user_embedding.weight": torch.zeros(2, SLOT)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"mismatched keys in the weights, such as .*user_embedding"):
        load_explainer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no explainer can be loaded"):
        load_explainer(tmp_path)


def test_folders_that_hold_no_explainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no explainer can be loaded"):
        load_explainer(tmp_path / "nowhere")
    dense_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a llama model, not gavamoe"):
        load_explainer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_explainer(tmp_path)


def test_config_file_names_every_size(tmp_path: Path) -> None:
    explainer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "gavamoe", "n_users": USERS, "n_items": ITEMS, "slot_size": SLOT, "n_gates": GATES,
        "n_experts": 4, "experts_per_token": 2, "expert_size": 16, "conversion": "random", "expert_kernel": "eager",
        "renormalise": False, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {name: saved[name] for name in expected} == expected
    assert saved["text_config"]["model_type"] == "llama"


def test_weights_go_straight_to_their_device(torch_run: Trained) -> None:
    """On a device that is not the host's, no weight is ever the host's; "meta" is one that every machine has."""
    there, _ = load_explainer(torch_run.out, device="meta")
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"meta"}
    here, _ = load_explainer(torch_run.out)
    mapped, _ = load_explainer(torch_run.out, device="cpu:0")
    assert all(torch.equal(tensor, mapped.state_dict()[name]) for name, tensor in here.state_dict().items())


def test_code_of_a_tokenizer_is_not_run(torch_run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's run may bring a tokenizer with code of its own; transformers once asked whether to run it."""
    folder = shutil.copytree(torch_run.out, tmp_path / "stage2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    marker = tmp_path / "it ran"
    (folder / "evil.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"import os\nos.mkdir({str(marker)!r})\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(InputError):
        load_explainer(folder)
    assert not marker.exists()
