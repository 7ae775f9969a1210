"""A training step of `mad` against a plain loop over timm's model, in images per second, and the memory of a step.

    python benchmarks/training.py [--rounds 5] [--batch 32]                          the demo's backbone on a CPU
    python benchmarks/training.py --model vit_giant_patch14_reg4_dinov2 --device cuda --tile-px 224 --batch 8 \\
        --beside sdpa xformers compiled

Both methods of the demo's configuration, each side on the same views in memory (random pixels): reading is left out. The sides
take turns in one process and the medians over the rounds are compared. The plain loop makes one forward pass per size of
view, cross-entropies view by view, and moves the teacher parameter by parameter: `plain-fp32` as one first writes it, `plain`
in the precision that `mad` runs in. Losses and optimiser are the same. `sdpa` and `xformers` are `mad` with that
`runtime.attention`: they differ under `dinov2`, whose views have two sizes, and need a GPU and a plain vision transformer.

`share` is the step's matrix products and convolutions per second, as torch.utils.flop_counter counts them, over the measured
rate of a large bf16 matrix product. `memory` is what a step adds, in a process of its own, beside the estimate.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from operator import truediv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mad.config import load_config
from mad.config.training import RunConfig
from mad.models.heads import Network
from mad.models.precision import choose_dtype
from mad.models.vit import local_crop_px, mean_std
from mad.training import loop
from mad.training.batch import Batch, collate
from mad.training.memory import estimate_memory, size
from mad.training.objective import KOLEO_FLOOR, Numerics, num_views, step_loss
from mad.training.optimiser import build_optimiser, set_schedules
from mad.training.parallel import checkpoint_activations, compile_blocks
from mad.training.views import multicrop_views, pair_views

DEMO = Path(__file__).parents[1] / "config.yaml"
ATTENTIONS = ("sdpa", "xformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="timm name; not given: the demo's backbone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tile-px", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prototypes", type=int, help="not given: the demo's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument(
        "--beside", nargs="*", default=["plain", "plain-fp32"],
        choices=["plain", "plain-fp32", "compiled", *ATTENTIONS],
        help="what is timed beside `mad`; every side holds networks and optimiser of its own",
    )  # fmt: skip
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    if (missing := [name for name in ATTENTIONS if name in arguments.beside]) and not torch.cuda.is_available():
        parser.error(f"--beside {missing[0]}: compares kernels of a GPU (--device cuda), and there is none")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rate = matmul_rate(device)
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, bf16 product {rate / 1e12:.3g} TFLOP/s"
    )
    for method in ("mad", "dinov2"):
        run = method_run(method, arguments)
        compare(run, arguments, device, rate)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            print("  memory:", alone.submit(memory_of_a_step, run, arguments).result())


def method_run(method: str, arguments: argparse.Namespace) -> RunConfig:
    """The demo's run of this method with the backbone, batch and precision asked for."""
    run = load_config(DEMO).run(method)
    entry = run.model_dump(mode="json") | {"batch": arguments.batch, "precision": arguments.precision}
    if arguments.model:
        entry["backbone"] = {"model": arguments.model}
    if arguments.prototypes:
        entry["head"] |= {"prototypes": arguments.prototypes}
    return RunConfig(**entry)


def with_attention(run: RunConfig, attention: str) -> RunConfig:
    """The run with this `runtime.attention`."""
    return run.model_copy(update={"runtime": run.runtime.model_copy(update={"attention": attention})})


def build(run: RunConfig, arguments: argparse.Namespace, device: torch.device) -> tuple[Network, Network]:
    """Student and teacher as training makes them."""
    student, teacher = loop.build_networks(run, arguments.tile_px, 0)
    if arguments.checkpointing:
        checkpoint_activations(student.backbone)
    return student.to(device), teacher.to(device)


def compare(run: RunConfig, arguments: argparse.Namespace, device: torch.device, rate: float) -> None:
    """Print the figures of one method."""
    student, teacher = build(run, arguments, device)
    numerics = Numerics(*mean_std(student.backbone), device, choose_dtype(run.precision, device))
    batch = random_batch(run, student.backbone, arguments.tile_px, run.batch)
    sides = {"mad": ours((student, teacher), run, numerics, batch)}
    kernel, student.kernel = student.kernel, None  # the counter does not know xformers' operators
    with FlopCounterMode(display=False) as counter:
        sides["mad"]()
    flops, student.kernel = counter.get_total_flops(), kernel
    for name in arguments.beside:
        if name.startswith("plain"):
            networks = tuple(network.to(device) for network in loop.build_networks(run, arguments.tile_px, 0))
            dtype = torch.float32 if name == "plain-fp32" else numerics.dtype
            sides[name] = reference(*networks, run, replace(numerics, dtype=dtype), batch)
            continue
        networks = build(with_attention(run, name) if name in ATTENTIONS else run, arguments, device)
        if name == "compiled":
            compile_blocks(*networks)
        sides[name] = ours(networks, run, numerics, batch)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.rounds + 1):
        for name, step in sides.items():
            begin = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - begin) / arguments.steps)
    images = num_views(batch)
    print(f"\n{run.method}: {run.backbone.model}, {run.batch} samples, {images} images, {str(numerics.dtype)[6:]}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = {
            side: statistics.median(map(truediv, other, seconds)) for side, other in times.items() if side != name
        }
        print(
            f"  {name:10} {images / median:8.1f} images/s  share {flops / median / rate:.2f}  "
            + ", ".join(f"{ratio:.2f} x {side}" for side, ratio in ratios.items())
        )


def memory_of_a_step(run: RunConfig, arguments: argparse.Namespace) -> str:
    """Peak of networks, optimiser and three steps, over a process that has all libraries loaded; and the estimate."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    small = run.model_copy(
        update={"backbone": run.backbone.model_copy(update={"model": "test_efficientnet_gn", "pooling": "avg"})}
    )
    take_steps(small, arguments, device, 1)
    gc.collect()
    before = peak_memory(device, reset=True)
    student, teacher, numerics = take_steps(run, arguments, device, run.batch)
    used = peak_memory(device) - before
    trial = [random_batch(run, student.backbone, arguments.tile_px, count) for count in (1, 2)]
    estimate = estimate_memory(
        student, teacher, [trial], lambda part: loss_of(student, teacher, part, run, numerics), run.batch
    )
    return f"peak {size(used)}, {used / estimate.total:.2f} of the estimated {estimate}"


def take_steps(
    run: RunConfig, arguments: argparse.Namespace, device: torch.device, count: int
) -> tuple[nn.Module, nn.Module, Numerics]:
    """Networks after three steps of `count` samples."""
    student, teacher = build(run, arguments, device)
    numerics = Numerics(*mean_std(student.backbone), device, choose_dtype(run.precision, device))
    step = ours((student, teacher), run, numerics, random_batch(run, student.backbone, arguments.tile_px, count))
    for _ in range(3):
        step()
    return student, teacher, numerics


def random_batch(run: RunConfig, backbone: nn.Module, tile_px: int, count: int) -> Batch:
    """`count` samples of random pixels with the run's views."""
    rng = np.random.default_rng(0)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (tile_px, tile_px, 3), dtype=np.uint8)

    local = run.views.local_px or local_crop_px(backbone, tile_px)
    if run.method == "mad":
        made = [
            pair_views(image(), [image() for _ in range(run.children)], run.photometric, rng, ()) for _ in range(count)
        ]
    else:
        made = [multicrop_views(image(), run.views, local, run.photometric, rng, "") for _ in range(count)]
    return collate([[view] for view in made], count)


def loss_of(student: nn.Module, teacher: nn.Module, batch: Batch, run: RunConfig, numerics: Numerics) -> Tensor:
    """The loss as training computes it."""
    return step_loss(student, teacher, batch, run, numerics, run.teacher_temp).total


def ours(networks: tuple[nn.Module, nn.Module], run: RunConfig, numerics: Numerics, batch: Batch) -> Callable[[], None]:
    """One step of mad.training.loop."""
    student, teacher = networks
    state = loop.Run(student, teacher, build_optimiser(student, run), {}, "", run.batch)

    def step() -> None:
        set_schedules(state.optimiser, run, 100)
        loop.accumulate(
            student, state, iter([batch]), 1, lambda _: [],
            lambda network, part, targets: step_loss(network, teacher, part, run, numerics, run.teacher_temp, targets),
        )  # fmt: skip
        loop.optimise(student, state, run, [])

    return step


def reference(
    student: nn.Module, teacher: nn.Module, run: RunConfig, numerics: Numerics, batch: Batch
) -> Callable[[], None]:
    """The same step as one would first write it, over a timm model and a head."""
    (group,) = batch.groups
    for module in student.modules():
        if type(module).__name__.endswith("Fp32"):
            module.__class__ = type(module).__base__  # depthwise convolutions as timm has them
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    mean, std = (
        torch.tensor(values, device=numerics.device).view(1, 3, 1, 1) for values in (numerics.mean, numerics.std)
    )

    def forward(network: nn.Module, views: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings and scores of each view [B, V, H, W, 3] of one size."""
        images = views.to(numerics.device).flatten(0, 1).permute(0, 3, 1, 2).contiguous().float() / 255
        embeddings = network.backbone((images - mean) / std)  # type: ignore[operator]
        scores = network.head(embeddings)  # type: ignore[operator]
        return (
            list(embeddings.unflatten(0, views.shape[:2]).unbind(1)), list(scores.unflatten(0, views.shape[:2]).unbind(1))
        )  # fmt: skip

    def step() -> None:
        with numerics.autocast():
            with torch.no_grad():
                _, teacher_scores = forward(teacher, group.teacher)
            embeddings, scores = forward(student, group.teacher if group.student is None else group.student)
            if group.local.numel():
                scores = scores + forward(student, group.local)[1]
        targets = balanced(torch.cat(teacher_scores), run.teacher_temp).chunk(len(teacher_scores))
        loss, terms = torch.zeros((), device=numerics.device), 0
        for t, target in enumerate(targets):
            for s, score in enumerate(scores):
                if group.student is None and s == t:
                    continue
                log_p = F.log_softmax(score.float() / run.student_temp, dim=-1)
                loss, terms = loss - (target * log_p).sum(dim=-1).mean(), terms + 1
        spread = torch.stack([nearest(view.float()) for view in embeddings]).mean()
        total = loss / terms + run.koleo * spread
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), run.clip)
        optimiser.step()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.mul_(run.ema).add_(theirs, alpha=1 - run.ema)

    return step


@torch.no_grad()
def balanced(scores: Tensor, temperature: float) -> Tensor:
    """Sinkhorn-Knopp, three iterations."""
    q = scores.double().div(temperature).softmax(dim=1)
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q.float()


def nearest(embeddings: Tensor) -> Tensor:
    """KoLeo."""
    x = F.normalize(embeddings, dim=-1)
    distances = torch.cdist(x, x) + 3 * torch.eye(len(x), device=x.device)
    return -torch.log(distances.min(dim=1).values + KOLEO_FLOOR).mean()


def matmul_rate(device: torch.device) -> float:
    """Floating point operations per second of a square bf16 product, the best of five."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def peak_memory(device: torch.device, *, reset: bool = False) -> int:
    """Largest memory of this process so far, or, with `reset`, what it holds now, from where the peak then counts anew."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
