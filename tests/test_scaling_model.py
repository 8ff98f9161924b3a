"""The model of how training scales, against counts by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling_model
from scaling_model import Links, Network


def test_counts_of_racoon() -> None:
    width, kernel = 16, 4 * 4
    convolutions = [
        (1, width, 64**2),
        (width, 4 * width, 16**2),
        (4 * width, 8 * width, 4**2),
    ]
    connected = 8 * width * 4**2 * width + width
    first = 2 * kernel * width * 64**2
    net = scaling_model.network("RACOON", width)
    assert net.forward == 2 * (sum(kernel * i * o * pixels for i, o, pixels in convolutions) + connected)
    assert net.training == 3 * net.forward - first  # no gradient by the slice
    weights = sum(kernel * i * o for i, o, _ in convolutions) + connected
    assert net.parameters == weights + 2 * 13 * width + width + 1
    assert net.activations == 256**2 + sum(o * pixels for _, o, pixels in convolutions) + width + 1
    assert net.sums() == 7


def test_time_of_a_step() -> None:
    net = Network(parameters=10**6, forward=0, training=0, activations=0, normalisations=3)
    assert scaling_model.step_seconds(net, 1, 64, t0=1.0, t1=0.5) == 33
    links = Links(latency=0.125, bandwidth=1e6)
    assert scaling_model.step_seconds(net, 4, 64, 1.0, 0.5, links) == 1 + 8 + 7 * 0.125 * 2 + 1.5 * 4
    assert scaling_model.efficiency(net, 4, 64, 1.0, 0.5, links) == pytest.approx(33 / 16.75 / 4)


def test_devices_are_of_use_until_the_links_cost_more() -> None:
    net = Network(parameters=0, forward=0, training=0, activations=0, normalisations=0)
    free = Links(latency=0.0)
    assert scaling_model.most_useful(net, 256, t0=0.0, t1=1e-3, links=free) == 128  # two slices each
    assert scaling_model.most_useful(net, 256, t0=1.0, t1=1e-3, links=free) == 1  # starting kernels is all


def test_a_slice_costs_a_third_of_itself_to_read() -> None:
    file, bus = scaling_model.bytes_read(1.0)
    assert bus == 4 * 256**2
    assert file == bus / 3
