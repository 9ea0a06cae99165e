"""A frozen base streamed from the host: the same numbers to the last bit, and few blocks of it on the device at once."""

import gc
import weakref

import accelerate
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.toy import LEAVE, Blocks, Script, Toy, config, lines, run, same, weights
from trainerd.contract.errors import ConfigError
from trainerd.engine import checkpointing
from trainerd.engine.streaming import Copies, Stream

_WIDTH, _BLOCKS = 12, 5
_SELECTIVE = {"activation_checkpointing": "selective"}


class Adapted(nn.Module):
    """A frozen matrix under a small one that is learned, between a norm that is not and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH).requires_grad_(False)
        self.base = nn.Linear(_WIDTH, _WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.dropout(torch.tanh(self.base(y) + self.adapter(y)))


class Model(Blocks):
    def __init__(self) -> None:
        super().__init__(Adapted, _BLOCKS, _WIDTH)


class Task(Toy):
    model_kind = Model

    def blocks(self, model):
        return list(model.blocks)


BASE = {"offload": "base"}


@pytest.mark.parametrize("more", [{}, {"micro_batch": 3, "eval_every_steps": 4}, {"precision": "bf16"}, _SELECTIVE])
def test_a_run_is_the_same_to_the_last_bit(more, tmp_path):
    """Every loss and every weight, evaluations included; and the plan says that blocks are computed again."""
    again = {"activation_checkpointing": "full", **more}
    run(tmp_path / "resident", config(again), task=Task())
    link = Script()
    run(tmp_path / "streamed", config(more, memory=BASE), link, Task())
    assert link.of("plan")[-1]["offload"] == "base"
    assert link.of("plan")[-1]["activation_checkpointing"] == again["activation_checkpointing"]
    assert same(tmp_path / "resident", tmp_path / "streamed")


@pytest.mark.parametrize("streamed_first", [False, True])
def test_it_may_come_and_go_when_a_run_is_resumed(streamed_first, tmp_path):
    """The frozen weights are in no checkpoint, and those on the host have the same sha256: left with one, gone on with the other."""
    asked = {on: config({"activation_checkpointing": "full"}, memory={"offload": "base" if on else "none"}) for on in (False, True)}
    run(tmp_path / "whole", asked[False], task=Task())
    assert run(tmp_path / "parts", asked[streamed_first], Script({9: LEAVE}), Task()).outcome == "left"
    assert run(tmp_path / "parts", asked[not streamed_first], task=Task()).outcome == "finished"
    assert same(tmp_path / "whole", tmp_path / "parts")


class _Counting(Copies):
    """Copies whose lives are counted, in blocks; `ahead` as on a GPU."""

    def __init__(self, ahead: bool) -> None:
        self.ahead = ahead
        self.alive: set[tuple[int, int]] = set()
        self.most = self.made = 0

    def begin(self, homes):
        copies = super().begin(homes)
        self.made += 1
        for number, copy in enumerate(copies):
            self.alive.add((self.made, number))
            weakref.finalize(copy.untyped_storage(), self.alive.discard, (self.made, number))
        self.most = max(self.most, len({made for made, _ in self.alive}))
        return copies


def _step(model):
    torch.manual_seed(5)
    model.train()(torch.arange(18).view(2, 9) % 20).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _built():
    torch.manual_seed(3)
    return Model()


def test_sampling_in_an_evaluation_is_the_same(tmp_path):
    """A task that generates in evaluate(), token by token through every block: the same numbers with the base streamed, and afterwards."""

    class Writes(Task):
        best_metric = "loss"

        def evaluate(self, model, ctx, losses):
            tokens = torch.arange(4).view(2, 2)
            for _ in range(6):
                tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
            scale = model(tokens).double().square().sum()
            return {**losses, "written": float((tokens * torch.arange(tokens.numel()).view_as(tokens)).sum()), "scale": float(scale)}

    again = {"activation_checkpointing": "full", "eval_every_steps": 4}
    run(tmp_path / "resident", config(again), task=Writes())
    run(tmp_path / "streamed", config({"eval_every_steps": 4}, memory=BASE), task=Writes())
    assert same(tmp_path / "resident", tmp_path / "streamed")
    assert any("scale" in str(line) for line in lines(tmp_path / "streamed"))


@pytest.mark.parametrize("ahead", [False, True])
def test_few_blocks_of_the_base_are_there_at_once(ahead):
    """One, or two where the next is fetched ahead; every block twice a step; the gradients are those of the resident model."""
    resident = _built()
    checkpointing.wrap(resident, list(resident.blocks), checkpointing.FULL)
    expected = _step(resident)
    model, copies = _built(), _Counting(ahead)
    stream = Stream(model, list(model.blocks), torch.device("cpu"), copies)
    checkpointing.wrap(model, list(model.blocks), checkpointing.FULL)
    gc.disable()
    try:
        found = _step(model)
        assert copies.most == (2 if ahead else 1), copies.most
        assert copies.made == 2 * _BLOCKS
    finally:
        gc.enable()
    assert len(found) == len(expected) == _BLOCKS + 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    stream.close()
    assert not copies.alive


def test_the_next_block_is_brought_ahead_in_every_pass():
    """Up on the way there, down on the way back; also in a training pass after an evaluation, and in one evaluation after another."""
    model = _built()
    stream = Stream(model, list(model.blocks), torch.device("cpu"), _Counting(True))
    checkpointing.wrap(model, list(model.blocks), checkpointing.FULL)
    ahead = []
    for block in model.blocks:  # while each computes
        block.norm.register_forward_hook(lambda *_: ahead.append(None if stream._next is None else stream._next[0]))
    up, down = [*range(1, _BLOCKS), None], [*range(_BLOCKS - 1)[::-1], None]

    def evaluated():
        ahead.clear()
        with torch.no_grad():
            model(torch.arange(8).view(2, 4))
        assert ahead == up

    evaluated()
    evaluated()
    for _ in range(2):
        ahead.clear()
        _step(model)
        assert ahead == up + down
    evaluated()


def test_without_computing_again_all_of_it_would_stay():
    """Why the plan insists on it: autograd keeps every copy until the way back, and the numbers are right all the same."""
    expected = _step(_built())
    model, copies = _built(), _Counting(False)
    Stream(model, list(model.blocks), torch.device("cpu"), copies)
    assert all(torch.equal(a, b) for a, b in zip(_step(model), expected, strict=True))
    assert copies.most >= _BLOCKS - 1  # through the first block no gradient flows on


def test_checkpointing_that_is_switched_off_is_refused(tmp_path):
    """Both are asked for, and they contradict each other: said, with what to change."""
    asked = config({"activation_checkpointing": "none"}, memory=BASE)
    with pytest.raises(ConfigError, match=r"memory\.offload = base.*train\.activation_checkpointing"):
        run(tmp_path, asked, task=Task())


@pytest.mark.parametrize("kind", ["no blocks", "nothing frozen"])
def test_a_model_with_nothing_to_stream_is_refused(kind, tmp_path):
    """A task that names no blocks, and one whose blocks are all learned."""

    class Learned(Task):
        def model(self):
            return Model().requires_grad_(True)

    with pytest.raises(ConfigError, match="block"):
        run(tmp_path, config(memory=BASE), task=Toy() if kind == "no blocks" else Learned())


def test_a_weight_that_is_used_elsewhere_too_stays():
    """Tied to the embedding: it is never taken from under whoever else uses it."""
    model = _built()
    model.blocks[0].base.weight = nn.Parameter(torch.randn(_WIDTH, _WIDTH), requires_grad=False)
    model.also = nn.Linear(_WIDTH, _WIDTH, bias=False)
    model.also.weight = model.blocks[0].base.weight
    stream = Stream(model, list(model.blocks), torch.device("cpu"))
    assert stream.bytes[0] == stream.bytes[1] - _WIDTH * _WIDTH * 4


def test_weights_mapped_from_a_file_are_not_read_into_memory(tmp_path):
    """A base that lies on the disk stays there: its pages are those of the file, before and after."""
    model = _built()
    weights = {f"{n}.{name}": p.data for n, b in enumerate(model.blocks) for name, p in b.named_parameters() if not p.requires_grad}
    save_file(weights, tmp_path / "base.safetensors")
    with safe_open(tmp_path / "base.safetensors", "pt") as file:
        for number, block in enumerate(model.blocks):
            for name, p in block.named_parameters():
                if not p.requires_grad:
                    p.data = file.get_tensor(f"{number}.{name}")
    before = [p.data_ptr() for p in model.blocks.parameters() if not p.requires_grad]
    Stream(model, list(model.blocks), torch.device("cpu"))
    checkpointing.wrap(model, list(model.blocks), checkpointing.FULL)
    _step(model)
    assert [p.data_ptr() for p in model.blocks.parameters() if not p.requires_grad] == before


@pytest.mark.parametrize("where", ["RAM", "disk", "both"])
def test_a_finished_model_that_does_not_fit_runs_by_accelerates_dispatch(where, tmp_path):
    """As docs/write-a-task.md says: the task's model with what was learned, its weights in RAM, on the disk, or half each; the numbers of
    the resident one, to the bit."""
    run(tmp_path / "home", config({"max_steps": 6}, memory=BASE), task=Task())
    resident, model = _built(), _built()
    for one in (resident, model):
        kept = one.load_state_dict(weights(tmp_path / "home"), strict=False)
        assert not kept.unexpected_keys
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = resident.eval()(tokens)
        if where == "RAM":
            accelerate.cpu_offload(model, "cpu")
        elif where == "disk":
            accelerate.disk_offload(model, str(tmp_path / "offloaded"), "cpu")
        else:
            places = {"embed": "cpu", "out": "cpu", **{f"blocks.{n}": "cpu" if n % 2 else "disk" for n in range(_BLOCKS)}}
            accelerate.dispatch_model(model, places, offload_dir=str(tmp_path / "offloaded"))
        assert all(p.is_meta for p in model.blocks[0].parameters()) and torch.equal(model.eval()(tokens), expected)


def test_accelerates_hooks_leave_a_model_that_does_not_train():
    """Why a training's own evaluation does not use them: with the hooks removed again, the model's weights are others than the optimizer's;
    with our stream closed they are the same, and learn."""
    for ours in (False, True):
        model = _built()
        learned = [p for p in model.parameters() if p.requires_grad]
        if ours:
            Stream(model, list(model.blocks), torch.device("cpu")).close()
        else:
            accelerate.cpu_offload(model, "cpu")
            accelerate.hooks.remove_hook_from_submodules(model)
        now = {id(p) for p in model.parameters()}
        assert [id(p) in now for p in learned] == [ours] * len(learned)
        _step(model)
        assert all((p.grad is not None) is ours for p in learned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_on_a_gpu_it_is_the_same_run_and_two_blocks_of_the_base_at_most(tmp_path):
    """The same bits as resident, and of a base of 64 MiB no more than two of its sixteen blocks are on the device."""
    run(tmp_path / "resident", config({"activation_checkpointing": "full"}), task=Task())
    run(tmp_path / "streamed", config(memory=BASE), task=Task())
    assert same(tmp_path / "resident", tmp_path / "streamed")
    device = torch.device("cuda")
    model = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024, bias=False).requires_grad_(False), nn.LayerNorm(1024)) for _ in range(16)])
    stream = Stream(model, list(model), device)
    checkpointing.wrap(model, list(model), checkpointing.FULL)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.train()(torch.ones(4, 1024, device=device)).sum().backward()
    torch.cuda.synchronize()
    assert stream.is_pinned and torch.cuda.max_memory_allocated() - held < 20 << 20
    stream.close()
