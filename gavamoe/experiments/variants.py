"""The systems that `gavamoe ablate` compares: the paper's Figure 3, controls of its claims, rivals, systems that copy.

A system is the same config with a few fields changed (`system` among them, for the baselines), or a `retrieval` source;
everything else, the budget and the seed among it, is equal.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from gavamoe.baselines.registry import BASELINES, find_baseline
from gavamoe.baselines.retrieval import Source
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.model.base_config import base_shape
from gavamoe.model.conversion import expert_width
from gavamoe.model.decoders import dense_width

GPT2 = "openai-community/gpt2"
Changes = Callable[[RunConfig, Dataset], list[str]]


@dataclass(frozen=True)
class System:
    """One line of the comparison."""

    name: str
    """Name of the system and of its folder."""
    label: str
    """Name in tables and figures."""
    what: str
    """Description in a few words."""
    changes: Changes | None = None
    """Overrides of the config; raises InputError, with the reason, where the system makes no sense."""
    source: Source | None = None
    """A system that copies, in place of a trained one."""
    baseline: bool = False
    """Whether it is one of the `baselines`, in place of the config's own model."""
    told: bool = True
    """Whether it reads the rating or the features of a request."""
    extra: bool = False
    """Whether it is compared only where it is named."""

    @property
    def model(self) -> Literal["stage2", "baseline"] | None:
        """The artifact in its run folder that writes; None: it copies, and is the same for every seed."""
        if self.source is not None:
            return None
        return "baseline" if self.baseline else "stage2"


def _fixed(*overrides: str) -> Changes:
    def changes(config: RunConfig, dataset: Dataset) -> list[str]:
        del dataset
        for override in overrides:
            _must_differ(config, override)
        return list(overrides)

    return changes


def _must_differ(config: RunConfig, override: str) -> None:
    field, _, value = override.partition("=")
    node: Any = config
    for name in field.split("."):
        node = getattr(node, name)
    if node == yaml.safe_load(value):
        raise InputError(f"the config itself has {override}")


def _coarse(config: RunConfig, dataset: Dataset) -> list[str]:
    """Experts r times as wide, r times fewer, r times fewer active, with r = gcd(count, top_k)."""
    del dataset
    experts = config.stage2.experts
    ratio = math.gcd(experts.count, experts.top_k)
    if not experts.enabled or ratio == 1:
        raise InputError(f"{experts.count} experts with top_k {experts.top_k} have no coarser form of equal size")
    changes = {"count": experts.count // ratio, "top_k": experts.top_k // ratio}
    if experts.intermediate_size:
        changes["intermediate_size"] = experts.intermediate_size * ratio
    return [f"stage2.experts.{name}={value}" for name, value in changes.items()]


def _dense(config: RunConfig, dataset: Dataset) -> list[str]:
    """The base model's own feed-forward layers."""
    del dataset
    if not config.stage2.experts.enabled:
        raise InputError("the config itself has stage2.experts.enabled=false")
    if config.stage2.experts.conversion == "lora":
        raise InputError("conversion lora freezes the base model, and a dense one would be trained as a whole")
    return [*_WITHOUT_GATES, "stage2.shared_first=0", "stage2.experts.enabled=false"]


_WITHOUT_GATES = ("stage2.soft_routes=false", "stage2.gate_dropout=0", "stage2.experts.gate_bias=0")
"""What a system of one gate, or of none, can't have."""


def _one_gate(config: RunConfig, dataset: Dataset) -> list[str]:
    del dataset
    _must_differ(config, "stage2.experts.multi_gate=false")
    return [*_WITHOUT_GATES, "stage2.experts.multi_gate=false"]


def _wide(*, active: bool) -> Changes:
    """Dense layers with as many parameters as shared and routed experts have together, or as those of them that a
    token uses; for conversion lora one low-rank addition with as many."""

    def changes(config: RunConfig, dataset: Dataset) -> list[str]:
        experts = config.stage2.experts
        used = experts.top_k if active else experts.count
        if experts.enabled and experts.conversion == "lora":
            rank = round((used + 1) * experts.lora_rank / 2)  # the matrix that reads counts like one more that writes
            one = {"count": 1, "top_k": 1, "lora_rank": rank, "multi_gate": "false"}
            return [*_WITHOUT_GATES, *(f"stage2.experts.{name}={value}" for name, value in one.items())]
        dense = _dense(config, dataset)
        extra = _extra_width(config, used)
        if config.stage2.base_model == "scratch":
            width = config.stage2.scratch.intermediate_size + extra
            return [*dense, f"stage2.scratch.intermediate_size={width}"]
        if extra <= 0:
            raise InputError("the experts that are meant have no more parameters than the base model's own layers")
        return [*dense, f"stage2.extra_width={extra}"]

    return changes


def _extra_width(config: RunConfig, used: int) -> int:
    """Neurons that `used` routed experts have beside the shared one, beyond those of the dense layer."""
    experts, base = config.stage2.experts, base_shape(config.stage2)
    if experts.conversion == "split":
        raise InputError("only experts that add parameters call for a wider dense layer")
    width, size = dense_width(base), expert_width(experts, base)
    shared = {"shared": width, "upcycle": width - size}.get(experts.conversion, 0)
    return shared + used * size - width


def _cluster_token(config: RunConfig, dataset: Dataset) -> list[str]:
    _must_differ(config, "stage2.prompt.cluster=true")
    if config.stage1.clusters == 1:
        raise InputError("one cluster tells nothing")
    return [*_wide(active=False)(config, dataset), "stage2.prompt.cluster=true"]


def _baseline(name: str, *overrides: str) -> Changes:
    def changes(config: RunConfig, dataset: Dataset) -> list[str]:
        entry = find_baseline(name)
        fields = [f"system={name}", *(f"baselines.{entry.module}.{override}" for override in overrides)]
        entry.load().check(override_config(config, fields), dataset)
        return fields

    return changes


def _form(name: str, label: str, what: str, system: str, *overrides: str) -> System:
    """A form of a baseline that its paper has beside the main one, or a control of it."""
    return System(name, label, what, _baseline(system, *overrides), baseline=True, told=False, extra=True)


def _gpt2(config: RunConfig, dataset: Dataset) -> list[str]:
    del dataset
    if config.stage2.base_model == "scratch":
        _must_differ(config, "stage2.scratch.family=gpt2")
        return ["stage2.scratch.family=gpt2"]
    return [f"stage2.base_model={GPT2}"]


def _oracle(config: RunConfig, dataset: Dataset) -> list[str]:
    truth = dataset.truth()
    if truth is None:
        raise InputError("only synthetic data have planted groups")
    if truth.groups > config.stage1.clusters:
        raise InputError(f"{truth.groups} planted groups, {config.stage1.clusters} clusters")
    return ["stage2.routes=oracle"]


def _full(config: RunConfig, dataset: Dataset) -> list[str]:
    del config, dataset
    return []


FULL = System("full", "GaVaMoE", "the config as it is", _full)
SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        FULL,
        System(
            "no-multi-gating",
            "w/o multi-gating",
            "one gate for all clusters",
            _one_gate,
        ),
        System(
            "no-fine-grained",
            "w/o fine-grained experts",
            "fewer, wider experts with the same parameters, all and active",
            _coarse,
        ),
        System("base", "Base (dense)", "the base model's own feed-forward layers", _dense),
        System("base-active", "Base, as active", "dense, with the parameters that a token uses", _wide(active=True)),
        System("base-wide", "Base, as large", "dense, with as many parameters as GaVaMoE", _wide(active=False)),
        System("cluster-token", "cluster token", "dense, as large, with the cluster in the prompt", _cluster_token),
        System("gpt2", "GaVaMoE [GPT-2]", "GPT-2 as the base model", _gpt2),
        System("alpha-0", "alpha 0", "stage 1 is not trained along (Eq. 13)", _fixed("stage2.alpha=0")),
        System("random-routes", "random routes", "each user's gate is drawn by a hash", _fixed("stage2.routes=random")),
        System("oracle-routes", "oracle routes", "each user's gate is the planted group's", _oracle),
        *(
            System(name, each.label, each.what, _baseline(name), baseline=True, told=each.features)
            for name, each in BASELINES.items()
        ),
        _form("pepler-mlp", "PEPLER (MLP)", "with a rating by a network", "pepler", "variant=mlp"),
        _form("pepler-mf", "PEPLER (MF)", "with a rating by a product", "pepler", "variant=mf"),
        _form("pepler-d", "PEPLER-D", "features as words in place of ids", "pepler", "variant=discrete"),
        _form("maple", "MAPLE", "PEPLER with an aspect that it chooses", "pepler", "aspects=30"),
        _form("xrec-lora", "XRec, LoRA", "XRec with adapters on its language model", "xrec", "tune=lora"),
        _form("xrec-linear", "XRec, linear", "one linear map in place of its experts", "xrec", "experts=1"),
        _form("xrec-no-profiles", "XRec w/o profiles", "no profiles in prompts", "xrec", "profile_features=0"),
        _form("pevae-elbo", "PEVAE, ELBO", "a plain variational autoencoder", "pevae", "kl=elbo", "fusion=false"),
        System("constant", "constant text", "the most frequent training explanation", source="constant"),
        System("copy-user", "nearest of the user", "the user's nearest training explanation", source="user"),
        System("copy-item", "nearest of the item", "the item's nearest training explanation", source="item"),
        System("copy-features", "nearest by features", "the nearest of all training explanations", source="features"),
    )
}


def find_systems(names: Sequence[str]) -> list[System]:
    """Systems by name, in the order given; `gates-K` is the full system with K clusters and gates (Table 3).

    Raises:
        InputError: an unknown name, or one given twice.
    """
    if len(set(names)) < len(names):
        raise InputError(f"systems {', '.join(names)}: one is named twice")
    return [_find(name) for name in names]


def _find(name: str) -> System:
    if name in SYSTEMS:
        return SYSTEMS[name]
    gates = re.fullmatch(r"gates-(\d{1,2})", name)
    if gates:
        return System(name, f"{gates[1]} gates", f"{gates[1]} clusters and gates", _gates(int(gates[1])))
    raise InputError(f"system {name}: unknown; known are {', '.join(SYSTEMS)}, and gates-K such as gates-4")


def _gates(clusters: int) -> Changes:
    def changes(config: RunConfig, dataset: Dataset) -> list[str]:
        del config, dataset
        return [f"stage1.clusters={clusters}"]

    return changes
