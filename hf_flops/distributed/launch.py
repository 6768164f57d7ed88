"""Launchers that start other processes than were meant: found before anything is written, and said
what to do instead.
"""

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
    """Refuse a launcher that started one process where several were meant, or that is to shard the
    model.

    Raises:
        ConfigurationError: the environment tells of it.
    """
    # What accelerate's launcher sets where it was asked for several processes and starts one, as
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
                f"{name}=true: {what} shards the model for a backward pass, which there is none "
                f"of. {_INSTEAD}"
            )


def check_world(world: int) -> None:
    """Refuse processes that do not know of each other.

    Args:
        world: how many processes the run has, as far as this one knows.

    Raises:
        ConfigurationError: the environment tells of more.
    """
    if _started() > 1 and world == 1:
        raise ConfigurationError(
            f"{_started()} processes were started, but each takes itself for the only one and "
            f"would train alone, all of them into the same output_dir. {_INSTEAD}"
        )


def _started() -> int:
    return max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", *_MPI))
