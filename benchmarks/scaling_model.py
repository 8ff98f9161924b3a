"""What a step computes, communicates and reads, and when more devices stop helping. See docs/scaling.md.

    python benchmarks/scaling_model.py                        the tables of docs/scaling.md
    python benchmarks/scaling_model.py --architecture PENGUIN --layer-param 64 --slices-per-second 9000
                                                              your network, from its speed on one device
    python benchmarks/scaling_model.py --processes 2          latency and bandwidth between CPU processes here

The time of a step on W devices, with a batch of B slices over all of them:

    T(W) = t0 + t1 * B / W + n * latency * ceil(log2 W) + 2 (W - 1) / W * 4 P / bandwidth

t0 is what every step costs (starting kernels), t1 the time of a slice on one device, P the number of
parameters, n the number of sums over all devices: two per batch normalisation, one of the gradients.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import models

SIZE, AXES, TRAIN_SEEDS = 256, 3, 150
PASSES = 20
"""Times that a step reads or writes each activation in a device's memory: about 7 forward, 13 backward."""


@dataclass(frozen=True)
class Device:
    """A kind of device, by its data sheet; times from it are estimates."""

    name: str
    flops: float
    """Per second, dense, in the precision of float32 convolutions (TF32)."""
    memory: float
    """Bytes per second."""
    efficiency: float = 0.4
    """Share of `flops` that convolutions of this size reach: an assumption."""
    overhead: float = 1e-3
    """t0 in seconds: some 150 kernels started one by one; CUDA graphs take most of it away."""


DEVICES = {
    "A100": Device("A100", 156e12, 1.55e12),
    "H100": Device("H100", 495e12, 3.35e12),
}


@dataclass(frozen=True)
class Links:
    """What joins devices."""

    latency: float = 10e-6
    """Seconds per hop."""
    bandwidth: float = 20e9
    """Bytes per second and device, between hosts."""


@dataclass(frozen=True)
class Network:
    """What one slice costs in a network, counted on the network itself."""

    parameters: int
    forward: float
    """Floating point operations of a slice, a multiplication and an addition being two."""
    training: float
    """The same with the gradients by weights and inputs."""
    activations: int
    """Numbers that the layers of a slice put out, the slice itself among them."""
    normalisations: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes of float32 gradients, summed over all devices each step."""
        return 4 * self.parameters

    def sums(self) -> int:
        """Sums over all devices in a step."""
        return 2 * self.normalisations + 1

    def seconds_per_slice(self, device: Device) -> float:
        """t1 as arithmetic or memory bounds it, whichever is more."""
        arithmetic = self.training / (device.flops * device.efficiency)
        return max(arithmetic, 4 * PASSES * self.activations / device.memory)


def network(architecture: str, layer_param: int) -> Network:
    """Count the operations of each layer by passing a slice without values through the network."""
    with torch.device("meta"):
        model = models.build_model(
            architecture=architecture, layer_param=layer_param, dropout=0.0, size=SIZE
        ).eval()
        forward, training, activations = 0.0, 0.0, SIZE * SIZE

        def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            nonlocal forward, training, activations
            if isinstance(layer, nn.Conv2d | nn.Linear):
                flops = 2.0 * output.numel() * layer.weight[0].numel()
                # Nobody asks for the gradient by the slice itself.
                backward = 1 if isinstance(layer, nn.Conv2d) and layer.in_channels == 1 else 2
                forward, training = forward + flops, training + flops * (1 + backward)
                activations += output.numel()

        for layer in model.modules():
            layer.register_forward_hook(count)
        model(torch.empty(1, 1, SIZE, SIZE))
    return Network(
        sum(parameter.numel() for parameter in model.parameters()),
        forward,
        training,
        activations,
        sum(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in model.modules()),
    )


def step_seconds(
    net: Network, devices: int, batch: int, t0: float, t1: float, links: Links = Links()
) -> float:
    """T(W) of the formula above."""
    if devices == 1:
        return t0 + t1 * batch
    hops = math.ceil(math.log2(devices))
    gradients = 2 * (devices - 1) / devices * net.gradient_bytes / links.bandwidth
    return t0 + t1 * batch / devices + net.sums() * links.latency * hops + gradients


def most_useful(net: Network, batch: int, t0: float, t1: float, links: Links = Links()) -> int:
    """The largest power of two of devices up to which each doubling saves at least a quarter of a step.

    A perfect doubling saves a half.
    """
    devices = 1
    while 2 * devices <= batch // 2:
        now, doubled = (step_seconds(net, n, batch, t0, t1, links) for n in (devices, 2 * devices))
        if doubled > 0.75 * now:
            break
        devices *= 2
    return devices


def efficiency(net: Network, devices: int, batch: int, t0: float, t1: float, links: Links = Links()) -> float:
    """What is gained over one device with the same batch, divided by what is spent."""
    alone = step_seconds(net, 1, batch, t0, t1, links)
    return alone / step_seconds(net, devices, batch, t0, t1, links) / devices


def fitting_batch(net: Network, devices: int, t0: float, t1: float) -> int:
    """The smallest power of two of slices with which `devices` are used at 70 % or better."""
    batch = 2 * devices
    while efficiency(net, devices, batch, t0, t1) < 0.7:
        batch *= 2
    return batch


def bytes_read(slices_per_second: float) -> tuple[float, float]:
    """Bytes per second that a device needs: of the file (cache disk), and over its bus (disk and memory).

    A cube of N^3 numbers holds AXES * N slices of N^2 numbers, so a slice costs 1/AXES of itself to read.
    """
    a_slice = 4.0 * SIZE * SIZE
    return slices_per_second * a_slice / AXES, slices_per_second * a_slice


def print_costs() -> None:
    """What one step computes and communicates."""
    print("| network | parameters | GFLOP / slice: forward | training | gradients, MB / step | sums / step |")
    print("|---|---|---|---|---|---|")
    for architecture in models.REGISTRY:
        for layer_param in (16, 32, 64, 128, 256):
            net = network(architecture, layer_param)
            print(
                f"| {architecture} {layer_param} | {net.parameters / 1e6:.3g} M | {net.forward / 1e9:.3g} | "
                f"{net.training / 1e9:.3g} | {net.gradient_bytes / 1e6:.3g} | {net.sums()} |"
            )


def print_rates(device: Device) -> None:
    """Slices per second of one device, what it must be fed, and how many of them are of use."""
    print(
        f"| network on {device.name} (estimate) | slices / s | bound by | epoch, s | file, MB / s (disk) | "
        "bus, MB / s (disk, memory) | useful devices at batch 256 | at batch 4096 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    slices = TRAIN_SEEDS * 2 * AXES * SIZE
    for architecture in models.REGISTRY:
        for layer_param in (16, 32, 64, 128, 256):
            net = network(architecture, layer_param)
            t1 = net.seconds_per_slice(device)
            t0 = device.overhead
            rate = 256 / (t0 + 256 * t1)
            memory = 4 * PASSES * net.activations / device.memory
            bound = "kernel starts" if t0 > 256 * t1 else "memory" if t1 == memory else "arithmetic"
            file, bus = bytes_read(rate)
            print(
                f"| {architecture} {layer_param} | {rate:,.0f} | {bound} | {slices / rate:,.0f} | "
                f"{file / 1e6:,.0f} | {bus / 1e6:,.0f} | {most_useful(net, 256, t0, t1)} | "
                f"{most_useful(net, 4096, t0, t1)} |"
            )


def print_recommendations(device: Device) -> None:
    """The batch that fills so many devices, the steps that it leaves an epoch, and how long that takes."""
    counts = (1, 4, 64, 1024)
    print(f"| on {device.name}s (estimate) | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in counts) + " |")
    print("|---" * (1 + len(counts)) + "|")
    slices = TRAIN_SEEDS * 2 * AXES * SIZE
    for architecture in models.REGISTRY:
        for layer_param in (16, 64, 256):
            net = network(architecture, layer_param)
            t0, t1 = device.overhead, net.seconds_per_slice(device)
            cells = []
            for devices in counts:
                batch = max(64, fitting_batch(net, devices, t0, t1))
                steps = math.ceil(slices / batch)
                seconds = steps * step_seconds(net, devices, batch, t0, t1)
                cells.append(
                    f"{batch}: {steps} steps, {seconds:.3g} s" if steps >= 50 else f"no ({steps} steps)"
                )
            print(f"| {architecture} {layer_param} | " + " | ".join(cells) + " |")


def print_prediction(net: Network, batch: int, t0: float, t1: float, links: Links) -> None:
    """Steps, epochs and efficiency as devices double."""
    print("| devices | ms / step | slices / s | efficiency |\n|---|---|---|---|")
    for devices in (2**n for n in range(11)):
        if batch // devices < 2:
            break
        seconds = step_seconds(net, devices, batch, t0, t1, links)
        share = efficiency(net, devices, batch, t0, t1, links)
        print(f"| {devices} | {1e3 * seconds:.3g} | {batch / seconds:,.0f} | {share:.0%} |")
    print(f"\nuseful: up to {most_useful(net, batch, t0, t1, links)} devices at batch {batch}")


def measure(processes: int) -> Links:
    """Latency and bandwidth of sums over CPU processes of this host (gloo), each with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    children = [rank for rank in range(1, processes) if os.fork() == 0]
    rank = children[0] if children else 0
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    seconds = {}
    for numbers, repeats in ((2, 500), (16 << 20, 5)):
        tensor = torch.zeros(numbers)
        dist.all_reduce(tensor)
        started = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        seconds[numbers] = (time.perf_counter() - started) / repeats
    dist.destroy_process_group()
    if rank:
        os._exit(0)
    hops = math.ceil(math.log2(processes))
    moved = 2 * (processes - 1) / processes * 4 * (16 << 20)
    return Links(seconds[2] / hops, moved / seconds[16 << 20])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, help="measure sums over so many CPU processes")
    parser.add_argument("--architecture", default="RACOON")
    parser.add_argument("--layer-param", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--slices-per-second", type=float, help="of one device, on large batches: 1 / t1")
    parser.add_argument("--overhead-ms", type=float, default=0.0, help="t0")
    parser.add_argument("--latency-us", type=float, default=1e6 * Links.latency)
    parser.add_argument("--bandwidth-gb", type=float, default=Links.bandwidth / 1e9)
    options = parser.parse_args()
    if options.processes:
        links = measure(options.processes)
        print(f"latency {1e6 * links.latency:.0f} us per hop, bandwidth {links.bandwidth / 1e9:.2f} GB/s")
    elif options.slices_per_second:
        net = network(options.architecture, options.layer_param)
        links = Links(options.latency_us / 1e6, options.bandwidth_gb * 1e9)
        print_prediction(net, options.batch, options.overhead_ms / 1e3, 1 / options.slices_per_second, links)
    else:
        print_costs()
        for device in DEVICES.values():
            print()
            print_rates(device)
            print()
            print_recommendations(device)


if __name__ == "__main__":
    main()
