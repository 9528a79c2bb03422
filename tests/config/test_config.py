"""Config: round trip, presets, and errors that name field, value, bound and the nearest name."""

import inspect
from pathlib import Path

import pytest
from helpers.config_reads import unread_fields
from pydantic import BaseModel, field_validator, model_validator

from gavamoe.config.files import PACKAGE, dump_config, field_paths, load_config, parse_config, shipped
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError

PRESETS = sorted(path.stem for path in shipped("configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_round_trip(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_shipped_presets() -> None:
    assert set(PRESETS) == {"quickstart", "reviews", "smollm2", "paper", "paper-fast", "gpt2"}


def test_paper_preset_is_section_4_2() -> None:
    config = load_config("paper")
    stage1, stage2 = config.stage1, config.stage2
    assert (stage1.encoder_layers, stage1.latent_size, stage1.embedding_size) == (2, 128, 768)
    assert (stage1.batch_size, stage1.learning_rate, stage1.beta, stage1.epochs) == (4096, 1e-5, 0.1, 30)
    assert (stage2.batch_size, stage2.learning_rate, stage2.gradient_accumulation, stage2.clip_norm) == (
        1,
        3e-5,
        8,
        0.3,
    )
    assert (stage2.experts.count, stage2.experts.intermediate_size, stage2.experts.top_k) == (12, 1280, 2)
    assert (stage2.experts.conversion, stage2.epochs, stage2.base_model) == ("random", 3, "meta-llama/Llama-3.1-8B")
    assert config.gates == stage1.clusters
    assert not stage2.experts.renormalised
    assert stage2.experts.load_balance_weight == stage2.experts.router_z_weight == 0


def test_gates_follow_clusters() -> None:
    assert parse_config({"stage1": {"clusters": 5}}, "x").gates == 5
    assert parse_config({"stage1": {"clusters": 5}, "stage2": {"experts": {"multi_gate": False}}}, "x").gates == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.cluster=3", r"stage1\.cluster: unknown field; did you mean clusters\?"),
        ("clusters=3", r"clusters: unknown field; did you mean stage1\.clusters\?"),
        ("stage2.experts.topk=3", r"stage2\.experts\.topk: unknown field; did you mean top_k\?"),
        ("stage2.base_model.x=3", r"stage2\.base_model: .*valid string"),
        ("stage1.clusters=0", r"stage1\.clusters: 0: .*greater than or equal to 1"),
        ("stage1.clusters=five", r"stage1\.clusters: 'five': .*valid integer"),
        ("stage1.beta=.nan", r"stage1\.beta: nan: .*finite"),
        ("stage2.experts.top_k=20", r"stage2\.experts\.top_k: 20 is above count 12"),
        ("stage1.encoder_heads=7", r"stage1\.encoder_heads: 7 does not divide embedding_size 768"),
        ("stage2.offload_parameters=true", r"stage2\.offload_parameters: needs zero_stage 3, not 1"),
        ("runtime.engine=tensorflow", r"runtime\.engine: 'tensorflow': .*'deepspeed' or 'torch'"),
        ("stage2=3", r"stage2: 3: .*valid dictionary"),
        ("peter.layers=3", r"--set peter\.layers=3: peter\.layers has moved to baselines\.peter\.layers"),
        ("seed", r"--set seed: expected FIELD=VALUE"),
        ("seed=[", r"--set seed=\[: not valid YAML"),
    ],
)
def test_bad_override_names_field_and_bound(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({}, "config.yaml", [override])


def test_torch_engine_refuses_two_workers() -> None:
    with pytest.raises(InputError, match=r"runtime\.engine: torch runs one worker, not 2"):
        parse_config({"runtime": {"engine": "torch", "workers": 2}}, "x")


def test_overrides_apply_in_order_and_read_exponents() -> None:
    config = parse_config({"stage1": {"beta": 0.5}}, "x", ["stage1.beta=1e-2", "stage1.beta=2e-2", "stage1.epochs=3"])
    assert config.stage1.beta == 0.02
    assert config.stage1.epochs == 3


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "a: !!python/object/apply:os.system ['true']", "\x00"])
def test_hostile_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml: (not valid YAML|expected fields)") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="nosuch: no such config file, nor one of the presets gpt2, paper, paper-fast"):
        load_config("nosuch")


def test_configs_of_earlier_versions_have_peter_at_the_top() -> None:
    former = parse_config({"seed": 1, "peter": {"layers": 3}}, "x", ["baselines.peter.heads=4"])
    assert (former.baselines.peter.layers, former.baselines.peter.heads) == (3, 4)
    assert former == parse_config({"seed": 1, "baselines": {"peter": {"layers": 3, "heads": 4}}}, "x")
    both = {"peter": {"layers": 3}, "baselines": {"peter": {"layers": 3}}}
    with pytest.raises(InputError, match=r"x: peter has moved to baselines\.peter, which is given too"):
        parse_config(both, "x")
    with pytest.raises(InputError, match=r"x: baselines\.peter\.layers: 0: "):
        parse_config({"peter": {"layers": 0}}, "x")


def test_field_paths_cover_nested_fields() -> None:
    paths = field_paths(RunConfig)
    assert "stage2.experts.top_k" in paths
    assert "seed" in paths
    assert len(paths) == len(set(paths))


def test_every_field_is_read_somewhere() -> None:
    """A config field that no code reads would be silently ignored."""
    assert unread_fields(RunConfig, [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]) == []


class LoraPart(BaseModel):
    rank: int = 0
    alpha: float = 1.0

    @field_validator("alpha")
    @classmethod
    def _positive(cls, alpha: float) -> float:
        assert alpha > 0
        return alpha

    @model_validator(mode="after")
    def _small(self) -> "LoraPart":
        assert self.alpha < self.rank + 100
        return self


class ModelPart(BaseModel):
    lora: LoraPart = LoraPart()
    alpha: float = 0.5
    layers: int = 2

    @property
    def deep(self) -> bool:
        return self.layers > 8


class Whole(BaseModel):
    model: ModelPart = ModelPart()


READS_ALL_BUT_ALPHA_OF_LORA = """
class Trainer:
    size: float

    def __init__(self, config: Whole, other) -> None:
        self.config, (self.lora, _) = config, (config.model.lora, other)
        model = self.config.model
        self.size = model.alpha * other.alpha

    def scaled(self):
        return self.lora.rank
"""


@pytest.mark.parametrize(
    ("code", "unread"),
    [
        ("", ["LoraPart.alpha", "LoraPart.rank", "ModelPart.alpha", "ModelPart.lora", "Whole.model"]),
        (READS_ALL_BUT_ALPHA_OF_LORA, ["LoraPart.alpha"]),
        (READS_ALL_BUT_ALPHA_OF_LORA + "def f(trainer: Trainer): return trainer.lora.alpha", []),
        (READS_ALL_BUT_ALPHA_OF_LORA + "def f(parts: list['LoraPart']): return [part.alpha for part in parts]", []),
        (READS_ALL_BUT_ALPHA_OF_LORA + "def f(x: Whole): x.model.lora.alpha = 3", ["LoraPart.alpha"]),
        (READS_ALL_BUT_ALPHA_OF_LORA + "def g() -> LoraPart: ...\ndef f(): return g().alpha", []),
        (READS_ALL_BUT_ALPHA_OF_LORA + "def f(size): return size.alpha", ["LoraPart.alpha"]),
    ],
)
def test_a_field_that_nothing_reads_from_its_section_is_found(code: str, unread: list[str]) -> None:
    """`alpha` is read from another section, from something unknown and in validators; none of that counts."""
    declared = [inspect.getsource(part) for part in (LoraPart, ModelPart, Whole)]
    assert unread_fields(Whole, [*declared, code]) == unread


def test_the_former_place_of_peter_is_read_but_not_written() -> None:
    config = parse_config({"peter": {"layers": 3}}, "old.yaml")
    assert config.baselines.peter.layers == 3
    assert "peter:" not in dump_config(config).splitlines()
    assert parse_config({"peter": {"layers": 3}, "baselines": {}}, "old.yaml") == config
    with pytest.raises(InputError, match=r"old\.yaml: peter has moved to baselines\.peter, which is given too"):
        parse_config({"peter": {}, "baselines": {"peter": {}}}, "old.yaml")
    with pytest.raises(InputError, match=r"peter\.layers has moved to baselines\.peter\.layers"):
        parse_config({}, "new.yaml", ["peter.layers=3"])


@pytest.mark.parametrize("value", ["yes", "true", "off"])
@pytest.mark.parametrize("field", ["stage1.clusters", "stage1.beta", "stage2.lora.alpha", "seed"])
def test_truth_values_are_no_numbers(field: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"{field}: (True|False): input should be a number, not true or false"):
        parse_config({}, "x", [f"{field}={value}"])
    assert parse_config({}, "x", ["stage2.experts.renormalise=yes"]).stage2.experts.renormalise is True


def test_a_name_longer_than_a_files_is_unknown() -> None:
    with pytest.raises(InputError, match="no such config file"):
        load_config("x" * 5000)
