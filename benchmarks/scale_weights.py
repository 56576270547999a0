"""What publishing new weights costs, for `benchmarks/scale.py`: files, passes over the bytes, and time beside one memcpy."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from scale_figure import Figure
from torch import Tensor

from e3rl.cluster.wire import decode, encode
from e3rl.weights.image import read_image
from e3rl.weights.model import copy_weights
from e3rl.weights.publish import Offer, Publisher, Receiver

LAYERS, WIDTH, FORWARD, VOCABULARY = 24, 896, 4864, 151_936
"""Of Qwen2.5-0.5B, whose 494 million parameters are 1.98 GB in float32."""
ROUNDS = 5


class Weights(torch.nn.Module):
    """Parameters of the sizes of a 0.5B model, divided by ``scale``."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        shapes = [(VOCABULARY, WIDTH), (WIDTH,)]
        for _ in range(LAYERS):
            shapes += [(WIDTH, WIDTH), (128, WIDTH), (128, WIDTH), (WIDTH, WIDTH), (WIDTH,), (WIDTH,)]
            shapes += [(FORWARD, WIDTH), (FORWARD, WIDTH), (WIDTH, FORWARD)]
        generator = torch.Generator().manual_seed(0)
        for n, (rows, *rest) in enumerate(shapes):
            made = torch.empty(max(1, rows // scale), *rest).normal_(generator=generator)
            self.register_parameter(f"w{n}", torch.nn.Parameter(made, requires_grad=False))

    def named(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return dict(self.named_parameters())


def receive(scale: int) -> None:
    """A second process: takes what is offered on its standard input into a model of its own, and says when it has it."""
    model, receiver = Weights(scale), Receiver()
    print("ready", flush=True)
    for line in sys.stdin:
        offer = decode(Offer, line.strip().encode())
        with receiver.taken(offer, 60) as image:
            copy_weights(model, read_image(image, offer.checksum, model.named()))
        print(float(model.named()["w0"][0, 0]), flush=True)


class Receivers:
    """Processes that run `receive`."""

    def __init__(self, number: int, scale: int = 1) -> None:
        command = [sys.executable, "-c", f"from scale_weights import receive; receive({scale})"]
        directory = __file__.rpartition("/")[0]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory)
            for _ in range(number)
        ]
        for process in self._processes:
            self._answer(process)

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "a receiver has died"
        return line.strip()

    def take(self, offer: Offer) -> list[str]:
        """What they say once all of them have the weights."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(encode(offer).decode() + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._processes]

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def weights_vs_memcpy() -> Figure:
    """Publishing a 0.5B float32 model until a second process's model holds it, over one memcpy of its bytes, in turns."""
    model, publisher, receivers = Weights(), Publisher(), Receivers(1)
    weights = model.named()
    copy = {name: tensor.clone() for name, tensor in weights.items()}
    seconds: dict[str, list[float]] = {"publish": [], "receive": [], "memcpy": []}
    for version in range(ROUNDS + 1):
        weights["w0"][0, 0] = version
        began = time.perf_counter()
        offer = publisher.publish(version, weights, weights).offer
        published = time.perf_counter()
        assert receivers.take(offer) == [str(float(version))]
        received = time.perf_counter()
        memcpy = _seconds(lambda: [copy[name].copy_(tensor) for name, tensor in weights.items()])
        for name, spent in zip(seconds, (published - began, received - published, memcpy), strict=True):
            seconds[name].append(spent)
    receivers.close()
    publisher.close()
    first = seconds["publish"][0] + seconds["receive"][0]
    later = {name: found[1:] for name, found in seconds.items()}  # the first also makes the memory
    ratios = [(p + r) / m for p, r, m in zip(*later.values(), strict=True)]
    parts = {f"{name}, s": statistics.median(found) for name, found in later.items()}
    return Figure(statistics.median(ratios), 4, {**parts, "the first time, s": first})


def weights_passes() -> Figure:
    """Times that the publisher copies, hashes or serialises each byte, once for three receivers together."""
    return _moved()[0]


def weights_files() -> Figure:
    """Files that publisher and receivers write while new weights travel."""
    return _moved()[1]


def _moved() -> tuple[Figure, Figure]:
    model, publisher, receivers = Weights(64), Publisher(), Receivers(3, 64)
    weights, opened = model.named(), list[str]()
    size = publisher.publish(0, weights, weights).offer.size
    before, watching = dict(publisher.moved), True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)
    receivers.take(publisher.publish(1, weights, weights).offer)
    watching = False
    receivers.close()
    parts = {name: (publisher.moved[name] - before[name]) / size for name in before}
    publisher.close()
    return Figure(sum(parts.values()), 2, {"receivers": 3, **parts}), Figure(len(opened), 0, {"receivers": 3})
