"""For the tests of examples and pages: the scripts of examples/, and the run that the first of them leaves."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

from helpers.scratch import scratch_folder
from helpers.tiny import tiny_yaml

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str) -> Callable[[list[str]], None]:
    """The `main` of a script, which takes its command line."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main


def write_config(path: Path) -> Path:
    """Tests' tiny config as a file, in which stage 2 takes 20 steps."""
    path.write_text(tiny_yaml("stage2.max_steps=20"))
    return path


@functools.cache
def example_run() -> Path:
    """The run folder that own_reviews.py leaves with that config, trained once a session, on its Ray."""
    folder = scratch_folder("gavamoe-examples-")
    config = write_config(folder / "tiny.yaml")
    example("own_reviews")(["--config", str(config), "--run-dir", str(folder / "run")])
    return folder / "run"
