"""The set-up of stage 2's training: the joint model, the tokenized rows, and each row's cluster.

Inputs: the config, a dataset folder, a stage-1 folder. Output: a `Setup`, the same on every worker.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import Manifest
from gavamoe.config.schema import RunConfig, Stage2Config
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.ratings import SENTIMENTS
from gavamoe.errors import InputError
from gavamoe.generation.prompts import PromptBuilder, PromptSpec
from gavamoe.model.base_model import encode_texts, load_base
from gavamoe.model.build import adapt, build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.stage1.artifact import load_stage1
from gavamoe.stage1.pair_stream import PairSource
from gavamoe.stage1.route_overrides import RouteControl
from gavamoe.stage1.routes import ROUTES_FILE, Routes, read_routes
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.batches import TextRows
from gavamoe.stage2.clear_texts import training_rows
from gavamoe.stage2.joint_model import JointModel
from gavamoe.stage2.preflight import check_positions
from gavamoe.stage2.token_cache import read_cache
from gavamoe.stage2.tokenized_rows import (
    encode_rows,
    rating_scale,
    tokenizer_texts,
    usual_features,
    validation_rows,
)

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Setup:
    """Everything that the training loop and the artifact need."""

    data: Dataset
    """The dataset, opened."""
    stage1: Manifest
    """Manifest of the stage-1 artifact that training starts from."""
    model: JointModel
    """Explainer and VAE-GMM, untrained by stage 2."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the explainer."""
    spec: PromptSpec
    """How prompts are built; saved with the artifact."""
    train: TextRows
    """Tokenized training rows with a text, or the clearest of them (`stage2.clear_share`)."""
    train_rows: np.ndarray
    """Their row numbers in the training split, ascending: int64."""
    valid: TextRows
    """Tokenized validation rows with a text, at most `validation_rows`, chosen by the seed."""
    routed: dict[str, Split]
    """Users and items of the rows of `train` and `valid`, by split name."""
    clusters: dict[str, np.ndarray]
    """Cluster of each row of `train` and `valid`, by stage 1 or by the control, by split name: int64 (N,); with soft
    routes their responsibilities, float32 (N, K)."""
    control: RouteControl | None
    """Rule that routes pairs instead of stage 1; None: stage 1 routes them."""
    pairs: PairSource
    """Stage-1 pairs for the ELBO."""
    pad: int
    """Token id that batches are padded with."""
    parameters: int
    """Parameters of explainer and stage 1 together, shared tables once, without adapters, which are merged at the
    end."""
    trained: int
    """Parameters that get into the optimizer, adapters included."""


def prepare(config: RunConfig, dataset: Path, stage1: Path, *, empty_weights: bool = False) -> Setup:
    """Load, build and tokenize; `empty_weights` leaves the explainer's own weights unset: another worker sends them.

    Raises:
        InputError: stage 1 was trained on another dataset or with other clusters; no row has a text.
    """
    data = open_dataset(dataset)
    vae_gmm, manifest = load_stage1(stage1)
    _check_stage1(config, data, Path(dataset), vae_gmm, manifest, Path(stage1))
    explainer, tokenizer = _build_explainer(config, data, vae_gmm, _rating_spread(Path(stage1), data), empty_weights)
    model = JointModel(explainer, vae_gmm, config.stage2.alpha, bf16=config.stage2.precision == "bf16")
    if not empty_weights:
        explainer.calibrate_slots()
    if config.stage2.precision == "bf16_weights":
        model.store_in_bf16()
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)
    spec = PromptSpec(
        prompt=config.stage2.prompt,
        scale=rating_scale(data),
        usual_features=usual_features(data, config.stage2.prompt.max_features),
    )
    builder = PromptBuilder(tokenizer, explainer.slots, spec.prompt, spec.scale)
    chosen = {"train": training_rows(config, data), "valid": validation_rows(config, data)}
    arrays = {split: data.arrays(split) for split in chosen}
    routed = {split: (arrays[split].user[rows], arrays[split].item[rows]) for split, rows in chosen.items()}
    control = RouteControl.of(config, data)
    return Setup(
        data=data,
        stage1=manifest,
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        train=read_cache(data, builder, chosen["train"]) or encode_rows(builder, data, "train", chosen["train"]),
        train_rows=chosen["train"],
        valid=encode_rows(builder, data, "valid", chosen["valid"]),
        routed=routed,
        clusters={
            split: clusters_of(_routes(data, Path(stage1), split, control, routed[split], rows), config.stage2)
            for split, rows in chosen.items()
        },
        control=control,
        pairs=PairSource(
            data, negatives=config.stage1.negatives, unknown_rate=config.stage1.unknown_id_rate, seed=config.seed
        ),
        pad=tokenizer.pad_token_id,
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )


def _check_stage1(
    config: RunConfig, data: Dataset, dataset: Path, vae_gmm: VaeGmm, manifest: Manifest, stage1: Path
) -> None:
    if manifest.inputs.get("dataset") != data.fingerprint:
        raise InputError(f"{stage1}: was trained on a dataset other than {dataset}; train stage 1 on this one")
    if vae_gmm.config.clusters != config.stage1.clusters:
        raise InputError(
            f"{stage1}: has {vae_gmm.config.clusters} clusters, the config has"
            f" stage1.clusters {config.stage1.clusters}; set it to the same value or train stage 1 again"
        )

    if vae_gmm.layout.kind != config.stage1.tables:
        raise InputError(
            f"{stage1}: has {vae_gmm.layout.kind} tables, the config has stage1.tables {config.stage1.tables}; set it"
            " to the same value or train stage 1 again"
        )


def _build_explainer(
    config: RunConfig, data: Dataset, vae_gmm: VaeGmm, rating_spread: float, empty_weights: bool
) -> tuple[GavamoeForCausalLM, PreTrainedTokenizerBase]:
    stage2 = config.stage2
    base, tokenizer = load_base(
        stage2.base_model,
        stage2.scratch,
        tokenizer_texts(data, stage2.prompt),
        config.seed,
        empty_weights=empty_weights,
    )
    check_positions(config, base.config)
    sizes = ExplainerSizes(
        vae_gmm.n_users, vae_gmm.n_items, vae_gmm.config.embedding_size, config.gates, vae_gmm.layout, rating_spread
    )
    words = encode_texts(tokenizer, [f" {word}" for word in SENTIMENTS])
    explainer = build_explainer(config, base, sizes, sentiments=words, empty_weights=empty_weights)
    adapt(explainer, config)
    if stage2.gradient_checkpointing:
        explainer.activation_checkpointing_enable()
    return explainer, tokenizer


def _rating_spread(stage1: Path, data: Dataset) -> float:
    """Stage 1's error on validation rows, as a share of the scale's range; 0 for data without ratings."""
    scale = rating_scale(data)
    if scale is None or scale.high <= scale.low:
        return 0.0
    measured = read_json(stage1 / "metrics.json").get("valid", {})
    return float(measured.get("rmse", 0.0)) / (scale.high - scale.low)


def _routes(
    data: Dataset, stage1: Path, split: str, control: RouteControl | None, pairs: Split, rows: np.ndarray
) -> Routes:
    """Routes of the given rows of a split, which are those `pairs`."""
    every = read_routes(stage1 / ROUTES_FILE, split, data.size(split))
    routes = Routes(*(column[rows] for column in every))
    return routes if control is None else control.apply(routes, *pairs)


def clusters_of(routes: Routes, stage2: Stage2Config) -> np.ndarray:
    """What the model is told of the pairs' gates: clusters, int64 (N,); with soft routes responsibilities, (N, K)."""
    return routes.responsibilities if stage2.soft_routes else routes.cluster.astype(np.int64)
