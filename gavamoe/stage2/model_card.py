"""Writing stage 2's artifact: a self-contained Hugging Face model folder with a model card.

Inputs: the consolidated state of a training run. Output: a folder that `ExplanationGenerator.load` reads, and, for the
language model alone, transformers' Auto classes (after `import gavamoe`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gavamoe.artifacts.files import read_json, write_folder, write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.config.files import dump_config
from gavamoe.config.schema import RunConfig
from gavamoe.generation.artifact import CATALOG_FOLDER, PROMPT_FILE
from gavamoe.generation.authorship import SingleAuthors
from gavamoe.generation.detokenize import clean_text
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.evidence.quotes import Quotes
from gavamoe.model.lora import merged_state
from gavamoe.model.tables.layout import mapped_tables
from gavamoe.stage1.artifact import save_vae_gmm
from gavamoe.stage1.rating_biases import shrink_interaction
from gavamoe.stage1.routes import ROUTES_FILE, training_routes, write_routes
from gavamoe.stage1.strangers.fold_in import Crowd
from gavamoe.stage1.user_words import ClusterWords, UserWords
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.joint_model import EXPLAINER, VAE_GMM, part_of_state
from gavamoe.stage2.setup import Setup
from gavamoe.stage2.tokenized_rows import rows_with_text


def write_artifact(
    out: Path,
    config: RunConfig,
    setup: Setup,
    state: dict[str, Tensor],
    metrics: dict[str, Any],
    device: str = "cpu",
) -> None:
    """Write the folder whole, in float32, from the joint model's `state` (on the CPU) rather than from sharded
    modules; all pairs are routed on `device`, while other workers have theirs and wait."""
    state = _in_float32(state)
    vae_gmm = VaeGmm.from_spec(setup.model.vae_gmm.to_spec())
    vae_gmm.load_state_dict(part_of_state(state, VAE_GMM))
    for table in mapped_tables(setup.model.vae_gmm):
        setattr(vae_gmm, table.name, table)
    explainer_state = part_of_state(state, EXPLAINER)
    if config.stage2.lora.rank:
        explainer_state = merged_state(setup.model.explainer, explainer_state)
    with write_folder(out) as folder:
        setup.model.explainer.save_pretrained(folder, state_dict=explainer_state)
        # transformers notes the type that the module's weights were trained in.
        write_json(folder / "config.json", read_json(folder / "config.json") | {"dtype": "float32"})
        setup.tokenizer.save_pretrained(folder)
        setup.data.catalog.save(folder / CATALOG_FOLDER)
        shrink_interaction(vae_gmm, setup.pairs.held_out("valid"), "cpu")
        save_vae_gmm(folder, vae_gmm)
        write_routes(folder / ROUTES_FILE, setup.data, vae_gmm.to(device), device)
        vae_gmm.to("cpu")
        _write_clusters(folder, config, setup, vae_gmm)
        write_json(folder / PROMPT_FILE, setup.spec.model_dump(mode="json"))
        single_authors(setup).save(folder)
        if config.stage2.prompt.quotes:
            Quotes.read(setup.data).save(folder)
        write_json(folder / "metrics.json", metrics)
        if setup.control is not None:
            setup.control.save(folder)
        (folder / "README.md").write_text(model_card(config, setup, metrics), encoding="utf-8")
        inputs = {"dataset": setup.data.fingerprint, "stage1": setup.stage1.fingerprint}
        write_manifest(folder, "stage2", config, inputs, {"parameters": setup.parameters})


def _in_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state whose weights may be bfloat16; one tensor under two names stays one tensor."""
    wide = {id(tensor): tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in state.values()}
    return {name: wide[id(tensor)] for name, tensor in state.items()}


def _write_clusters(folder: Path, config: RunConfig, setup: Setup, vae_gmm: VaeGmm) -> None:
    """Words, moments and features of the users of the clusters that stage 2 has made of stage 1's."""
    words = UserWords.read(setup.data, config.stage1.vocabulary)
    routes = training_routes(setup.data, folder / ROUTES_FILE)
    home_U = routes.user_means_UK.argmax(axis=1)
    ClusterWords.of(words, home_U, len(routes.pairs_K)).save(folder)
    Crowd.of(vae_gmm, home_U, setup.data.catalog.training_rows()).save(folder)
    PairFeatures.read(setup.data, home_U, len(routes.pairs_K)).save(folder)


def single_authors(setup: Setup) -> SingleAuthors:
    """The training texts of one user each, learned or not (prompts may quote them): as they were written, and those
    that are longer than the model learns as it learned them too."""
    table, rows = setup.data.table("train", ["user", "text"]), rows_with_text(setup.data, "train")
    texts, users = table["text"].take(rows).to_pylist(), table["user"].to_numpy()
    answers = setup.train.answers
    cut = np.flatnonzero(answers.lengths == setup.spec.prompt.max_explanation_tokens)
    learned = [clean_text(setup.tokenizer, answers[int(row)].tolist()) for row in cut]
    authors = np.concatenate([users[rows], users[setup.train_rows[cut]]])
    return SingleAuthors.of_texts(texts + learned, authors.tolist())


def model_card(config: RunConfig, setup: Setup, metrics: dict[str, Any]) -> str:
    """README.md of the folder: what it is, what it was trained on, what it reached, how to use it."""
    stage2, meta = config.stage2, setup.data.meta
    experts = stage2.experts
    blocks = (
        f"{experts.count} experts per block ({experts.conversion}), top {experts.top_k}, {config.gates} gates"
        if experts.enabled
        else "dense feed-forward layers, no experts"
    )
    lora = f" (LoRA of rank {stage2.lora.rank} on attention, merged)" if stage2.lora.rank else ""
    rows = [
        ("base model", stage2.base_model),
        ("blocks", blocks),
        ("routes", stage2.routes),
        ("parameters", f"{setup.parameters:,}"),
        ("parameters trained", f"{setup.trained:,}{lora}"),
        ("dataset", f"{meta.source}, {meta.rows['train']:,} training rows, fingerprint {setup.data.fingerprint[:12]}"),
        ("steps", _steps(metrics)),
        ("validation loss (nats per token)", _number(metrics["validation_loss"])),
        ("the same before training", _number(metrics["validation_loss_at_start"])),
        ("validation perplexity", _number(metrics["validation_perplexity"])),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\nlibrary_name: transformers\ntags: [recommendation, explanation, gavamoe]\n---\n\n"
        "# GaVaMoE explainer\n\n"
        "Writes a sentence that explains why an item is recommended to a user. Trained by `gavamoe train`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "Texts are generated from ratings, feature words and learned preferences; they are not facts about the item.\n"
        "Scores on the test split are in the run's `evaluation/metrics.json`.\n\n"
        "```python\nfrom gavamoe import ExplanationGenerator, ExplanationRequest\n"
        "from gavamoe.config.schema import GenerationConfig\n\n"
        'explainer = ExplanationGenerator.load("stage2")\n'
        "[explanation] = explainer.explain([ExplanationRequest(user=0, item=0)], GenerationConfig())\n```\n\n"
        f"## Config\n\n```yaml\n{dump_config(config)}```\n"
    )


def _steps(metrics: dict[str, Any]) -> str:
    taken = f"{metrics['steps']:,} of {metrics['planned_steps']:,} on {metrics['workers']} workers"
    return f"{taken}; these weights are those after {metrics['kept_step']:,}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
