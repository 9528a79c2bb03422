"""Imports point one way; models know neither Ray nor the dataset; the README's tree is the real one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gavamoe"

# A module may import only modules that stand before it.
ORDER = """
    errors files context config_problems config config_files storage tracking progress
    sequences metrics sacrebleu_style peter_style bertscore text_metrics significance scoring
    vae_gmm moe decoders conversion
    lexicon texts features catalog dataset dataset_writer mentions copying
    describe records jsonlines pickles tables readers splits
    intake reviews grammar synthetic simple_baselines
    checkpoint base_model base_shape prompts pairs batches explainer lora sentiment
    routes route_controls clusters planted row_adam spectral mixture stage1_checks stage1_artifact stage1_trainer stage1
    serving.text_stream serving.sampling serving.kv_cache serving.engine
    generate joint expert_parallel
    engines plan_model plan_memory plan_work plan encoding plan_data token_cache stage2_setup stage2_artifact
    stage2_best stage2
    personalisation gate_use beyond evaluation_rows evaluate
    retrieval peter peter_training systems ablate_results charts run_data human_eval human_export human_import
    report_figures report_beyond report_systems report ray_worker runtime pipeline status ablate cluster_sweep terminal
    summary systems_summary plan_summary
    tune_metrics tune_space tune_study tune_checks tune_cache tune_data tune_folder tune_trial tune_engine tune_report
    tune tune_summary
    serving.schema serving.settings serving.worker
    serving.browse serving.router serving.writer serving.backend serving.errors serving.security serving.reference
    serving.api serving.deployments serving.launch
    submit cluster_terminal cli_options cli_data cli_human cli_cluster cli_plan cli_train cli_run cli_serve
    cli_scores cli
""".split()

MODELS = {"vae_gmm", "moe", "decoders", "conversion", "explainer", "lora", "serving.engine", "serving.kv_cache"}
KNOW_RAY = {"runtime", "ray_worker", "pipeline", "tune_engine", "serving.deployments", "serving.launch", "submit"}


def modules() -> list[str]:
    """Dotted names below the package."""
    files = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files)


def imports(module: str) -> set[str]:
    """Everything that a module imports, anywhere in its body, with names imported from a package as modules of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_order_lists_every_module() -> None:
    assert sorted(ORDER) == modules()


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    own = {name.removeprefix("gavamoe.") for name in imports(module)} & set(modules())
    before = set(ORDER[: ORDER.index(module)])
    assert own <= before, f"{module} imports {sorted(own - before)}, which stand after it"


@pytest.mark.parametrize("module", modules())
def test_only_the_runtime_knows_ray(module: str) -> None:
    top = {name.split(".")[0] for name in imports(module)}
    if module in MODELS:
        assert not top & {"ray", "pyarrow"}
    if module not in KNOW_RAY:
        assert "ray" not in top


def test_readme_tree_names_real_files() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("## What is where", 1)[1].split("```")[1]
    named = set(re.findall(r"^ +([a-z_0-9]+) ", block, flags=re.MULTILINE))
    assert named == {module for module in modules() if "." not in module} | {"serving"}
