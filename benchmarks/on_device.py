"""The reference criterion beside published ones on an accelerator: time, memory, and how often the host waits.

    python benchmarks/on_device.py [--device cuda]

Per shape, for theirs and ours: the median time of seven calls run in turn (forward and backward, each ended by a
synchronisation), the peak of the device's memory above the inputs, and how often a call makes the host wait for the
device, which torch counts in its sync debug mode. Then ours under torch.compile and inference_mode beside eager.
Without an accelerator there is nothing to time: ``--device simulated`` counts transfers and waits on the simulated one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from against_published import Comparison, comparisons, forward, forward_and_backward

from detr_conformance import devices
from detr_conformance.errors import ConformanceError

REPEATS = 7


def synchronize(device: str) -> None:
    module = getattr(torch, device, None)
    if module is not None:
        module.synchronize()


@contextmanager
def waits(device: str, there: Any) -> Iterator[list[str]]:
    """What makes the host wait for the device, and what is moved, a word each."""
    found: list[str] = []
    if device == "cuda":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += ["wait(s)" for one in said if "synchroniz" in str(one.message)]
    elif device == devices.SIMULATED:
        there.traffic.clear()
        yield found
        found += there.traffic.elements()
    else:
        yield found


def milliseconds(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def megabytes(run: Callable[[], Any], device: str) -> float:
    module = getattr(torch, device, None)
    if module is None or not hasattr(module, "reset_peak_memory_stats"):
        return float("nan")
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    run()
    return float(module.max_memory_allocated() - before) / 2**20


def sides(of: Comparison) -> list[Callable[..., Any]]:
    return [of.theirs, of.ours]


def title(of: Comparison) -> str:
    shape = of.shape
    size = f"{shape.images} × {shape.queries} × {shape.channels}, {shape.targets} targets, {len(of.layers)} layers"
    return f"{shape.name}: {size}, against {of.peer}"


def traffic(of: Comparison, device: str, there: Any) -> Iterator[str]:
    """What one call moves and waits for, theirs and ours."""
    for whose, call in zip(("theirs", "ours"), sides(of), strict=True):
        with waits(device, there) as found:
            forward(call, of)
        counts = [f"{found.count(word)} {word}" for word in sorted({*found})]
        yield f"    {whose}: {', '.join(counts) or 'no wait'}"


def spent(of: Comparison, device: str) -> str:
    """Time and memory of forward and backward, theirs → ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):
        for own, call in zip(times, sides(of), strict=True):
            one = milliseconds(partial(forward_and_backward, call, of), device)
            own += [one] if repeat else []
    peaks = [megabytes(partial(forward_and_backward, call, of), device) for call in sides(of)]
    theirs, ours = map(statistics.median, times)
    return f"    ms {theirs:.1f} → {ours:.1f} ({theirs / ours:.1f}×) · MB {peaks[0]:.0f} → {peaks[1]:.0f}"


def other_ways(of: Comparison, device: str) -> str:
    """Ours under torch.compile and inference_mode: the time of the forward pass beside eager."""
    compiled = torch.compile(of.ours)

    def inferred() -> None:
        with torch.inference_mode():
            forward(of.ours, of)

    ways = {"eager": lambda: forward(of.ours, of), "compiled": lambda: forward(compiled, of), "inference": inferred}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, run in ways.items():
            one = milliseconds(run, device)
            times[name] += [one] if repeat else []
    eager = statistics.median(times["eager"])
    told = ", ".join(f"{name} {statistics.median(own) / eager:.2f}" for name, own in times.items())
    return f"    ours, forward, in units of eager: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The reference beside published criterions on an accelerator.")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, xpu, or simulated")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        device = devices.chosen(parser.parse_args().device)
    except ConformanceError as error:
        sys.exit(str(error))
    if device in (devices.NONE, devices.CPU):
        sys.exit("there is no accelerator on this machine; --device simulated counts transfers and waits")
    accelerator = devices.of(device)
    real = device != devices.SIMULATED
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else device}; theirs → ours")
    with accelerator.entered() as there:
        for shape, build in comparisons(accelerator.device):
            if real or not shape.slow:
                of = build(shape)
                print(title(of), *traffic(of, device, there), sep="\n", flush=True)
                if real:
                    print(spent(of, device), other_ways(of, device), sep="\n", flush=True)


if __name__ == "__main__":
    main()
