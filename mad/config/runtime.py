"""What concerns the machine that trains a run, and never the weights' recipe: may change between a run and its resumption."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mad.config.base import Section


class RuntimeConfig(Section):
    """What concerns the machine and never the trained weights' recipe."""

    processes: int = Field(1, ge=1)
    """Training processes that `mad train` starts on one machine by way of torchrun, each with a GPU of its own where there are
    GPUs; the workflow asks a cluster for as many. Under a `torchrun` of your own its number counts."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a process; not given: those that the job was granted. Bit-equal resumption needs the same number."""
    workers: int = Field(0, ge=0)
    """Data-loading processes beside each training process; 0 loads in the training process."""
    checkpoint_steps: int = Field(1000, ge=1)
    """Steps between two checkpoints."""
    checkpoint_minutes: float = Field(15.0, gt=0)
    """A checkpoint is also written when the last one is this old."""
    health_every: int = Field(500, ge=1)
    """Steps between two health checks on the held-out set."""
    health_samples: int = Field(256, ge=8)
    """Parent–child pairs in the held-out set of the health checks."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """What many processes share. `ddp`: each holds all of both networks. `fsdp`: each holds a part of the weights, gradients,
    moments and of the teacher, for networks that fill a GPU. `auto`: ddp. One process always holds everything."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples per forward pass of a process: its share of `batch` is accumulated over passes, for less memory. Teacher
    targets are balanced over the whole step all the same; KoLeo sees only the samples of one pass over all processes. Not
    given: the whole share at once."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory for about a third more time."""
    compile: bool = False
    """Compile each block with torch.compile; equal up to rounding."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """How the student's views of several sizes pass through a plain vision transformer. `sdpa`: size by size, with PyTorch's
    attention. `xformers`: all tokens at once (DINOv2), which needs a CUDA GPU; views of one size pass as under `sdpa`. `auto`:
    xformers where it works. Equal up to rounding."""
    shard_url: str | None = None
    """`loader: stream`: where the tars are instead of `results/shard/`. `{shard}` in it, or its end, becomes a tar's path there:
    `https://host/bucket`, or a command, `pipe:aws s3 cp s3://bucket/{shard} -`, which the shell runs. The tables stay local, and
    so do the tars that the health checks (and `head.standardise`) read."""
    log_seconds: float = Field(10.0, ge=0)
    """Seconds between two lines of progress."""
    tensorboard: bool = False
    """Write the figures of metrics.jsonl to `train/{run}/tensorboard/` too; needs the package tensorboard."""
