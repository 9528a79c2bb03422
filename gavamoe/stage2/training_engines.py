"""Training engines, which take optimizer steps: DeepSpeed on any number of workers, or plain torch on one, with one
interface (`engines.interface`).

Inputs: a `JointModel`, `Stage2Config`, batches as dicts of tensors. Outputs: losses, checkpoints, the consolidated
state. `make_engine` picks one. Losses, clipping, accumulation and rates mean the same in both: gradients are means over
the accumulated batches and the workers, clipped by their joint norm, then AdamW.
"""

from gavamoe.config.schema import Stage2Config
from gavamoe.errors import InputError
from gavamoe.stage2.engines.interface import Engine
from gavamoe.stage2.engines.plain import TorchEngine
from gavamoe.stage2.engines.zero import DeepSpeedEngine
from gavamoe.stage2.joint_model import JointModel

__all__ = ["DeepSpeedEngine", "Engine", "TorchEngine", "make_engine"]


def make_engine(kind: str, module: JointModel, config: Stage2Config, *, world_size: int, device: str) -> Engine:
    """Build the engine `kind` ("deepspeed" or "torch") around `module`, which moves to `device`."""
    if kind == "deepspeed":
        return DeepSpeedEngine(module, config, world_size=world_size, device=device)
    if world_size > 1:
        raise InputError(f"runtime.engine: torch runs one worker, not {world_size}; use deepspeed")
    return TorchEngine(module, config, device=device)
