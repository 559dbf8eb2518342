"""Who owns backward and step: plain PyTorch or DeepSpeed, behind one small protocol.

The only package that imports deepspeed, and only when it is asked for. Optimizer states are float32 in both engines.
State leaves and enters under logical names with whole tensors (`model/<name>`, `optim/<name>/exp_avg`), never as an
engine's own partitions: any engine, ZeRO stage, layout and number of ranks reads it.
"""

from __future__ import annotations

from dla_train.config import Config
from dla_train.engine.local import LocalEngine
from dla_train.engine.protocol import Engine, StepResult
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.mesh import Mesh

__all__ = ["Engine", "LocalEngine", "StepResult", "build_engine"]


def build_engine(config: Config, model: LanguageModel, mesh: Mesh) -> Engine:
    """The engine of `engine.name` around `model`, to which it gives storage on the mesh's device and initial values.

    The model is best on the meta device (`meta_model`): ZeRO stage 3 then never holds more than one block of it whole.
    """
    if config.engine.name == "deepspeed":
        from dla_train.engine.zero import DeepSpeedEngine

        return DeepSpeedEngine(config, model, mesh)
    return LocalEngine(config, model, mesh)
