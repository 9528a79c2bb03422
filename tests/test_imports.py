"""Imports point one way; models know neither Ray nor the dataset; the README's tree is the real one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gavamoe"

# A module may import only modules that stand before it.
ORDER = """
    errors files context config metrics text_metrics scoring
    vae_gmm moe decoders conversion
    lexicon texts features catalog dataset dataset_writer describe records jsonlines pickles tables readers splits
    intake reviews grammar synthetic simple_baselines
    checkpoint base_model prompts pairs batches explainer
    routes clusters planted row_adam spectral mixture stage1_checks stage1_trainer stage1 generate joint engines stage2_setup
    stage2_artifact stage2
    evaluate charts run_data report runtime pipeline terminal summary cli
""".split()

FORBIDDEN = {
    "vae_gmm": {"ray", "pyarrow"},
    "moe": {"ray", "pyarrow"},
    "decoders": {"ray", "pyarrow"},
    "conversion": {"ray", "pyarrow"},
    "explainer": {"ray", "pyarrow"},
}
RAY_ALLOWED = {"runtime", "pipeline"}


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module: str) -> set[str]:
    """Top-level packages and own modules ("gavamoe.x" as "x") that a module imports, anywhere in its body."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"gavamoe.{alias.name}" for alias in node.names}
                if node.module == "gavamoe" and node.names[0].name != "__version__"
                else {node.module}
            )
    return found


def test_order_lists_every_module() -> None:
    assert set(modules()) == set(ORDER)


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    own = {name.split(".")[1] for name in imports(module) if name.startswith("gavamoe.")}
    before = set(ORDER[: ORDER.index(module)])
    assert own <= before, f"{module} imports {sorted(own - before)}, which stand after it"


@pytest.mark.parametrize("module", modules())
def test_only_the_runtime_knows_ray(module: str) -> None:
    top = {name.split(".")[0] for name in imports(module)}
    assert not top & FORBIDDEN.get(module, set())
    if module not in RAY_ALLOWED:
        assert "ray" not in top


def test_readme_tree_names_real_files() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("## What is where", 1)[1].split("```")[1]
    named = set(re.findall(r"^ +([a-z_0-9]+) ", block, flags=re.MULTILINE))
    assert named == set(modules())
