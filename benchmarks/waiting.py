"""Waiting OpenMP threads that spin (the default of GNU OpenMP) against ones that sleep (as `mad` sets it), alone and beside others.

    python benchmarks/waiting.py [--threads 2] [--rounds 3] [--steps 1500]

The work is that of a probe: small products, one after the other, each shared by all threads. `others` processes that never wait
run beside it. Each side is a process of its own, as the setting is read when torch is loaded; the sides alternate. Medians of wall
time and of processor time.
"""

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

WORK = """
import sys, time, torch
x, w = torch.randn(8450, 192), torch.randn(192, 5)
wall, own = time.perf_counter(), time.process_time()
for _ in range(int(sys.argv[1])):
    w = w - 1e-6 * (x.T @ torch.softmax(x @ w, 1))
print(time.perf_counter() - wall, time.process_time() - own)
"""
SIDES = {"spinning": "", "sleeping": "PASSIVE"}


def seconds(policy: str, threads: int, steps: int) -> tuple[float, float]:
    """Wall time and processor time of the work."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    run = subprocess.run(
        [sys.executable, "-c", WORK, str(steps)], env=environment, capture_output=True, text=True, check=True
    )
    wall, own = map(float, run.stdout.split())
    return wall, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="products of the work")
    args = parser.parse_args()
    for others in sorted({0, 1, args.threads}):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
        with ExitStack() as stack:
            for _ in range(others):
                busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(busy.kill)
            for _ in range(args.rounds):
                for name, policy in SIDES.items():
                    found[name].append(seconds(policy, args.threads, args.steps))
        medians = {
            name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in found.items()
        }
        print(f"{args.threads} threads, {others} other processes")
        for name, (wall, own) in medians.items():
            print(f"  {name}: {wall:6.2f} s, {own:6.2f} s of processor time")
        wall, own = (spin / sleep for spin, sleep in zip(medians["spinning"], medians["sleeping"], strict=True))
        print(f"  sleeping is {wall:.2f} x as fast, takes 1/{own:.2f} of the processor time", flush=True)


if __name__ == "__main__":
    main()
