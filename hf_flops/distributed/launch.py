"""Checks that the launcher started the intended processes, before anything is written."""

from __future__ import annotations

import os

from ..errors import ConfigurationError

_INSTEAD = (
    "Start with `torchrun --nproc_per_node N script.py` or `accelerate launch --multi_gpu "
    "--num_processes N --num_machines 1 script.py`; on CPUs the training arguments need "
    "use_cpu=True with either."
)
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_environment() -> None:
    """Raise an error if one process was started instead of several, or the model is sharded.

    Raises:
        ConfigurationError: environment variables say so.
    """
    # accelerate's launcher sets these if several processes were requested but it starts one, as
    # with --cpu or MULTI_CPU.
    if _started() == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(
        os.environ
    ):
        raise ConfigurationError(
            "`accelerate launch` was asked for several processes but started one, as it does with "
            f"--cpu or distributed_type MULTI_CPU. {_INSTEAD} If one process is meant, unset "
            "MASTER_ADDR and MASTER_PORT."
        )
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "").lower() == "true":
            raise ConfigurationError(
                f"{name}=true: {what} shards the model for a backward pass, but there is "
                f"none. {_INSTEAD}"
            )


def check_world(world: int) -> None:
    """Raise an error if processes are not connected.

    Args:
        world: number of processes in this process's group.

    Raises:
        ConfigurationError: environment variables name a larger number.
    """
    if _started() > 1 and world == 1:
        raise ConfigurationError(
            f"{_started()} processes were started, but they are not connected: each would "
            f"train alone and write to the same output_dir. {_INSTEAD}"
        )


def _started() -> int:
    return max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", *_MPI))
