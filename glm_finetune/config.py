"""The flags of train.py: the rooms' flags, added up."""

from dataclasses import dataclass

from glm_finetune.data.flags import BatchFlags, DataFlags
from glm_finetune.flags import Flags, flag
from glm_finetune.modes.flags import ModelFlags
from glm_finetune.run.flags import MemoryFlags, OptimizationFlags, OutputFlags
from glm_finetune.tuning.flags import TuningFlags


@dataclass(kw_only=True)
class SettingsFlags(Flags):
    """Where flags come from."""

    config: str | None = flag(
        "YAML or JSON file of flags, or train_config.json of a run; the command line wins", None, group="settings"
    )


@dataclass(kw_only=True)
class TrainConfig(  # --help begins with the last
    MemoryFlags, OptimizationFlags, TuningFlags, OutputFlags, BatchFlags, ModelFlags, SettingsFlags, DataFlags
):
    """Flags of train.py. Names and defaults are ChatGLM-Finetuning's, except where its default could not run."""
