"""`python -m benchmarks.memory.dispatch`: evaluating a model whose base stays in RAM or on the disk: our lanes against accelerate's hooks.

One run, interleaved, on a CPU that stands for the GPU: what is computed with is a copy there, so a block that lies in RAM is copied in
both. Every tensor is counted, the numbers are compared to the bit, and one training step follows right after the hooks are removed. Must
not judge.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.chunked_loss import interval
from tests.memory_oracle import TensorCount
from trainerd.engine import streaming

_CPU = torch.device("cpu")
_RATE = 0.01


class Block(nn.Module):
    """Two frozen matrices under a small one that is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width).requires_grad_(False)
        self.down = nn.Linear(4 * width, width).requires_grad_(False)
        self.first, self.second = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.second(self.first(x))


class Copying(Mapping[str, Tensor]):
    """Weights in RAM, each access a copy, as to a GPU: on a CPU accelerate would hand out what lies there."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self._kept = kept

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class Place:
    """Where the weights lie, and who brings them; `leave()` makes the model one that trains."""

    def __init__(self, width: int, number: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width) for _ in range(number)))
        for block in self.model:
            nn.init.normal_(block.second.weight, std=0.01)
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self._folder = folder

    def enter(self, how: str) -> None:
        """By its name in WAYS."""
        getattr(self, f"_{how.replace(' ', '_').replace(',', '')}")()

    def leave(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()
            del self._stream
        else:
            remove_hook_from_submodules(self.model)

    def is_whole(self) -> bool:
        """Whether what the optimizer has is what the model computes with."""
        now = {id(p) for p in self.model.parameters()}
        return all(id(p) in now for p in self.learned)

    def _mapped(self) -> None:
        """Frozen weights are those of a file."""
        path = self._folder / "base.safetensors"
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        if not path.exists():
            save_file({name: p.data for name, p in frozen.items()}, path)
        for name, tensor in load_file(path).items():
            frozen[name].data = tensor

    def _ours_RAM(self) -> None:
        self._stream = streaming.Stream(self.model, list(self.model), _CPU)

    def _ours_disk(self) -> None:
        self._mapped()
        self._ours_RAM()

    def _accelerate_RAM(self) -> None:
        cpu_offload(self.model, _CPU, state_dict=Copying(self.model.state_dict()))  # type: ignore[arg-type]

    def _accelerate_disk(self) -> None:
        disk_offload(self.model, str(self._folder / "offloaded"), _CPU)

    def _accelerate_dispatch(self) -> None:
        """Half of the blocks in RAM, half on the disk."""
        half = len(self.model) // 2
        places = {str(n): "cpu" if n < half else "disk" for n in range(len(self.model))}
        dispatch_model(self.model, places, main_device=_CPU, offload_dir=str(self._folder / "dispatched"))

    def _resident(self) -> None:
        self._stream = type("Nothing", (), {"close": lambda self: None})()


PAIRS = (("accelerate RAM", "ours RAM"), ("accelerate disk", "ours disk"), ("accelerate dispatch", "ours disk"))
ALONE = "resident"


def evaluated(place: Place, batches: list[Tensor]) -> Tensor:
    """The outputs' sums over all batches, without gradients."""
    with torch.no_grad():
        return torch.stack([place.model(batch).sum() for batch in batches])


def trained(place: Place, batch: Tensor) -> tuple[Tensor, ...]:
    """The adapters after one step of SGD, as an optimizer that was made before has them."""
    optimizer = torch.optim.SGD(place.learned, lr=_RATE)
    place.model(batch).square().mean().backward()
    optimizer.step()
    return tuple(p.detach().clone() for p in place.model.parameters() if p.requires_grad)


def look(how: str, make: Callable[[], Place], batches: list[Tensor], expected: Tensor, step: tuple[Tensor, ...]) -> str:
    """What it holds, whether its numbers are right, and whether it trains on."""
    place = make()
    homes = [p.detach() for p in place.model.parameters()]
    place.enter(how)
    with TensorCount([*homes, *(p for p in place.model.parameters() if not p.is_meta)]) as count:
        same = torch.equal(evaluated(place, batches), expected)
    place.leave()
    whole = place.is_whole()
    try:
        after = trained(place, batches[0])
        trains = all(torch.equal(one, other) for one, other in zip(after, step, strict=True))
        said = "trains on, to the bit" if trains else "does not train: the optimizer's weights are no longer the model's"
    except RuntimeError as error:
        said = f"does not train: {str(error).splitlines()[0][:90]}"
    assert whole or said.startswith("does not")
    return f"{how:20} holds {(count.peak - count.known) / 1e6:7.2f} MB more, {'equal' if same else 'NOT EQUAL'}; then it {said}"


def main() -> None:
    """A line for each way, and a ratio for each pair."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.dispatch", description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    batches = [torch.randn(asked.rows, asked.width, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    with tempfile.TemporaryDirectory() as folder:

        def make() -> Place:
            return Place(asked.width, asked.blocks, Path(folder))

        plain = make()
        expected, step = evaluated(plain, batches), trained(plain, batches[0])
        ways = dict.fromkeys([ALONE, *(way for pair in PAIRS for way in pair)])
        for how in ways:
            print(look(how, make, batches, expected, step), flush=True)
        places = {how: make() for how in ways}
        for how, place in places.items():
            place.enter(how)
        times: dict[str, list[float]] = {how: [] for how in ways}
        for _ in range(asked.rounds):
            for how, place in places.items():
                began = time.perf_counter()
                evaluated(place, batches)
                times[how].append(time.perf_counter() - began)
        for one, other in (*PAIRS, ("ours RAM", ALONE), ("ours disk", ALONE)):
            ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
            low, high = interval(ratios)
            milliseconds = statistics.median(times[other]) * 1e3
            print(f"{one} against {other}: {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] of {milliseconds:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
