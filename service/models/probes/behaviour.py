"""Measure the behaviour of a model when it is loaded, before it is served.

Each probe runs the model a few times and returns a `Finding` with the result and its consequence.
`behaviour` runs all of them, in at most 25 forward passes of one image (a backward pass counts 1.5)
and about `MAX_SECONDS`; a probe without time left counts as failed, so that the model is served
with the restriction.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._python_dispatch import TorchDispatchMode

from service.cam.hooks import gradients
from service.errors import first_line
from service.models.catalog import Select
from service.models.probes.attention import Followed
from service.models.probes.condition import Condition
from service.models.probes.logits import OutputActivation, as_logits, logits_in, output_activation
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate

MAX_SECONDS = 120.0
"""Time after which no further probe starts."""

STALL_SECONDS = 10.0
"""Time that one of two alternating threads waits for the other before both run freely."""

TURNS_SECONDS = 30.0
"""Time that two threads alternate; afterwards they run freely."""

Name = Literal["isolation", "batch", "determinism", "output", "gradients", "places", "input"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one probe. `follows`: the consequence; None if there is none."""

    name: Name
    passed: bool
    result: str
    follows: str | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The measured behaviour of a model.

    isolated:      whether replicas are independent of the master and of each other; otherwise the
                   master is the only replica, used by one batch at a time.
    batchable:     whether an image gets the same logits in a batch as alone; otherwise batches have
                   one image.
    deterministic: whether the same image gets the same logits twice, without random numbers.
    output_activation:     the activation inside the model, if any.
    vectorised:    whether several gradients can be computed in one pass (`is_grads_batched`).
    """

    isolated: bool = True
    batchable: bool = True
    deterministic: bool = True
    output_activation: OutputActivation | None = None
    vectorised: bool = True
    findings: tuple[Finding, ...] = ()


class Trial:
    """The state that the probes share: the model, its inputs, and the logits of each input alone.

    images: normalised (3, C, h, w), three images that differ everywhere.
    served: the module that requests run: a replica, or the master if replicas are not independent.
    uncopied: why the master cannot be copied, or its copy fails; None if it works.
    alone:  the logits (1, classes) of the first two images.
    attention: what the logits depend on of it, if another pass has followed that.
    """

    def __init__(self, master: nn.Module, images: Tensor, select: Select) -> None:
        self.master = master
        self.images = images
        self.select = select
        self._until = time.monotonic() + MAX_SECONDS
        self.uncopied: str | None = None
        self.attention: Followed | None = None
        self._graph: tuple[Tensor, Tensor] | None = None
        try:
            self.served = replicate(master)
            self.alone, self.called = self.each(self.served)
        except Exception as error:  # noqa: BLE001 - for instance a lock, or a hook that writes to the master
            self.uncopied = f"{type(error).__name__}: {first_line(error)}"
            self.served = master
            self.alone, self.called = self.each(master)

    def logits(self, output: Any) -> Tensor:
        return logits_in(output, self.select)

    def run(self, module: nn.Module, images: Tensor, seed: int = 0) -> Tensor:
        """The logits (N, classes) of images, with seeded random numbers."""
        with torch.no_grad(), seeded(seed), kept_torch_state(random=False), preserved(module):
            return self.logits(module(images.clone())).detach()

    def each(self, module: nn.Module) -> tuple[list[Tensor], set[str]]:
        """The logits of the first two images alone, and the paths of the modules that ran."""
        called: set[str] = set()
        with ExitStack() as hooks:
            for path, part in _hookable(module):
                handle = part.register_forward_hook(lambda *_, path=path: called.add(path))
                hooks.callback(handle.remove)
            return [self.run(module, image[None]) for image in self.images[:2]], called

    def graph(self) -> tuple[Tensor, Tensor]:
        """The first image, with `requires_grad`, and its logits: computed once for all probes.

        Raises the exceptions of the model.
        """
        if self._graph is None:
            image = self.images[:1].clone().requires_grad_()
            with seeded(0), kept_torch_state(random=False), preserved(self.served):
                self._graph = image, self.logits(self.served(image.clone()))
        return self._graph

    @property
    def spread(self) -> float:
        """The largest difference between the logits of the two images."""
        first, second = self.alone
        return (
            float((first - second).nan_to_num().abs().max()) if first.shape == second.shape else 0.0
        )

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._until


def _hookable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        if path and not isinstance(part, ScriptModule):
            yield path, part


def behaviour(trial: Trial) -> Behaviour:
    """Measure a built and frozen model; its buffers do not change.

    If replicas are not independent, `trial.served` is set to the master.
    """
    determinism, steady = _determinism(trial)
    isolated = _isolation(trial, steady=steady)
    if not isolated.passed:
        trial.served = trial.master
    batch = _batch(trial, steady=steady)
    output, kind = _output(trial)
    vectorised = _gradients(trial)
    return Behaviour(
        isolated=isolated.passed,
        batchable=batch.passed,
        deterministic=determinism.passed,
        output_activation=kind,
        vectorised=vectorised.passed,
        findings=(isolated, batch, determinism, output, vectorised),
    )


def trial_images(shape: tuple[int, int, int]) -> Tensor:
    """Three images, uint8 (3, C, h, w), of coarse blocks and noise, which differ everywhere.

    Their values avoid the ends of the range, where activations saturate. The third has a quarter
    of the contrast: statistics over a batch of images that are alike would show nothing.
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, channels, 5, 5, generator=generator)
    coarse = torch.nn.functional.interpolate(blocks, (height, width), mode="nearest")
    noise = torch.rand(2, channels, height, width, generator=generator)
    first, second = 0.7 * coarse + 0.3 * noise
    images = torch.stack([first, 1 - first, 0.25 * second])
    return (20 + 155 * images).round().to(torch.uint8)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random` inside the `with`; their state is restored at the end."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models use it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Restore a module at the end, as a lease of the pool does.

    Restores what `Condition.restore` restores, and the tables and values of parameters and buffers.
    """
    condition: Condition | None = None
    with suppress(Exception):  # an unreadable module is not restored
        condition = Condition.of(module)
    parts = [part for part in module.modules() if not isinstance(part, ScriptModule)]
    tables = [(vars(part)[name], dict(vars(part)[name])) for part in parts for name in _TABLES]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with suppress(Exception):
            if condition is not None:
                condition.restore()
        for table, items in tables:
            table.clear()
            table.update(items)
        for buffer, value in values:
            with suppress(RuntimeError), torch.no_grad():  # of inference mode: never written
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


_TABLES = ("_parameters", "_buffers", "_modules")


def differ(expected: Tensor, actual: Tensor, spread: float) -> bool:
    """Whether two logits of the same image differ by more than rounding.

    spread: the difference between logits of different images; a tenth of it is never a rounding
            error, even if the logits are large.
    """
    if expected.shape != actual.shape:
        return True
    if not bool((expected.isfinite() == actual.isfinite()).all()):
        return True
    usable = expected.isfinite()
    if not bool(usable.any()):
        return False
    rounding = 1e-3 if expected.dtype == torch.float32 else 2e-2
    largest = float(expected[usable].abs().max())
    gap = float((expected - actual)[usable].abs().max())
    is_off = gap > rounding * largest or (gap > 0.1 * spread and gap > 3e-5 * largest)
    return is_off or _differ_before_activation(expected, actual, rounding)


def _differ_before_activation(expected: Tensor, actual: Tensor, rounding: float) -> bool:
    """Whether the logits of two probabilities differ: near 0 and 1 they differ by far more.

    rounding: the largest change of a logit, relative to the largest logit, that is no difference.
              Near 1 the logit is known only to the resolution of the probability, of which four
              steps are none either.
    """
    kind = output_activation(expected)
    if kind is None or output_activation(actual) != kind:
        return False
    before, after = as_logits(expected, kind), as_logits(actual, kind)
    chances = before.sigmoid()
    steps = 4 * torch.finfo(chances.dtype).eps * chances
    allowed = rounding * max(1.0, float(before.abs().max())) * chances * (1 - chances)
    return bool(((after.sigmoid() - chances).abs() > allowed + steps).any())


def _determinism(trial: Trial) -> tuple[Finding, bool]:
    """Run the same image again, with other random numbers; also whether its logits are the same."""
    with seeded(1):
        before = _random_states()
        with torch.no_grad(), kept_torch_state(random=False), preserved(trial.served):
            again = trial.logits(trial.served(trial.images[:1].clone())).detach()
        draws = _random_states() != before
    first = trial.alone[0]
    same = (
        not differ(first, again, trial.spread)
        and torch.allclose(first, again, rtol=1e-5, atol=1e-6, equal_nan=True)
        and not _differ_before_activation(first, again, 1e-5)
    )
    if same and not draws:
        return Finding("determinism", True, "The same image gets the same logits twice."), True
    follows = "{} vary from request to request; explanations carry the flag not_deterministic."
    if same:
        result = "It draws random numbers, though the same image gets the same logits twice."
        return Finding("determinism", False, result, follows.format("Maps may")), True
    result = "The same image gets other logits each time: it "
    result += (
        "draws random numbers."
        if draws
        else "keeps something of its calls where it cannot be restored."
    )
    return Finding("determinism", False, result, follows.format("Predictions and maps")), False


def _random_states() -> tuple[bytes, object, bytes]:
    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    numbers = of_numpy["state"]["key"].tobytes() + bytes([of_numpy["state"]["pos"] % 256])
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), numbers


# ---- replicas


def _isolation(trial: Trial, *, steady: bool) -> Finding:
    """Compare a replica with the master, and two alternating replicas with each alone."""
    reason = trial.uncopied and f"A copy of the module cannot be used ({trial.uncopied})."
    reason = reason or _unlike_master(trial, steady=steady) or _shared_state(trial, steady=steady)
    if reason is None:
        return Finding(
            "isolation",
            True,
            "Replicas return the same logits as the master, and do not affect each other.",
        )
    return Finding(
        "isolation",
        False,
        reason,
        "It is served by one replica, the module that the builder returned, one batch at a time.",
    )


def _unlike_master(trial: Trial, *, steady: bool) -> str | None:
    expected, called = trial.each(trial.master)
    alone, of_replica = trial.alone, trial.called
    differs = [differ(a, b, trial.spread) for a, b in zip(expected, alone, strict=True)]
    if (steady and any(differs)) or called != of_replica:
        trial.alone, trial.called = expected, called  # as it is served then
    if steady and any(differs):
        return (
            "A replica (a deep copy) returns other logits than the module of the builder: a hook's "
            "closure, a bound method or a table outside the module still refers to the original."
        )
    if called != of_replica:
        path = min(called ^ of_replica)
        return (
            f"A replica (a deep copy) does not run its own layers ({path}): its forward still "
            "refers to the module of the builder."
        )
    return None


def _shared_state(trial: Trial, *, steady: bool) -> str | None:
    """Run two replicas on two threads that alternate after each operation: the worst interleaving.

    State outside the module tree is overwritten by the other replica before it is read again.
    """
    if not steady:
        return "Concurrent replicas cannot be compared, because the model's logits vary."
    if trial.is_late:
        return "There was no time left to run two replicas concurrently."
    answers = _side_by_side(trial, [trial.served, replicate(trial.master)])
    for alone, answer in zip(trial.alone, answers, strict=True):
        if isinstance(answer, BaseException):
            return f"A replica fails while another one runs ({first_line(answer)})."
        if differ(alone, answer, trial.spread):
            return (
                "Two replicas that run concurrently change each other's logits: the model has "
                "state outside the module tree."
            )
    return None


def _side_by_side(trial: Trial, replicas: Sequence[nn.Module]) -> list[Tensor | BaseException]:
    """The logits of two replicas for the first and the second image, on alternating threads."""
    turns = _Turns()
    answers: list[Tensor | BaseException] = [RuntimeError("it did not run")] * len(replicas)

    def work(number: int, module: nn.Module) -> None:
        image = trial.images[number : number + 1].clone()
        try:
            with (
                torch.no_grad(),
                kept_torch_state(random=False),
                preserved(module),
                turns.of(number, module),
            ):
                answers[number] = trial.logits(module(image)).detach()
        except BaseException as error:  # noqa: BLE001 - a model may raise anything; it is compared
            answers[number] = error

    with seeded(0):
        threads = [
            threading.Thread(target=work, args=numbered, daemon=True)
            for numbered in enumerate(replicas)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return answers


class _Turns:
    """Alternates two threads after each operation of torch, until one is done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._alone = False
        self._until = time.monotonic() + TURNS_SECONDS

    @contextmanager
    def of(self, number: int, module: nn.Module) -> Iterator[None]:
        """Run a replica as thread 0 or 1: each operation and each module is a turn."""

        def pause(*_: Any) -> None:
            self._next(number)

        self._wait(number)
        try:
            with ExitStack() as stack:
                for _, part in _hookable(module):
                    stack.callback(part.register_forward_pre_hook(pause).remove)
                    stack.callback(part.register_forward_hook(pause).remove)
                stack.enter_context(_InTurn(pause))
                yield
        finally:
            with self._changed:
                self._alone = True
                self._changed.notify_all()

    def _next(self, number: int) -> None:
        if self._alone:
            return
        with self._changed:
            self._turn = 1 - number
            self._alone = self._alone or time.monotonic() > self._until
            self._changed.notify_all()
        self._wait(number)

    def _wait(self, number: int) -> None:
        with self._changed:
            # A model with a lock of its own blocks one thread: then both run freely.
            if not self._changed.wait_for(
                lambda: self._alone or self._turn == number, STALL_SECONDS
            ):
                self._alone = True
                self._changed.notify_all()


class _InTurn(TorchDispatchMode):
    """Calls `after` after every operation of the thread inside the `with`."""

    def __init__(self, after: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._after = after

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._after()
        return output


# ---- batches, output, gradients


def _batch(trial: Trial, *, steady: bool) -> Finding:
    """Compare three images in one batch with each alone."""
    follows = "Its batches have one image."
    if not steady:
        result = "Batches cannot be compared, because the model's logits vary."
        return Finding("batch", False, result, follows)
    if trial.is_late:
        return Finding("batch", False, "There was no time left to run a batch.", follows)
    count = len(trial.images)
    try:
        logits = trial.run(trial.served, trial.images)
    except Exception as error:  # noqa: BLE001 - a model may raise anything
        return Finding("batch", False, f"A batch of {count} fails ({first_line(error)}).", follows)
    if len(logits) != count:
        result = f"A batch of {count} gets {len(logits)} rows of logits."
        return Finding("batch", False, result, follows)
    if any(differ(one, logits[i : i + 1], trial.spread) for i, one in enumerate(trial.alone)):
        return Finding(
            "batch",
            False,
            "An image's logits depend on the others in its batch (batch statistics, or a reshape "
            "across the batch).",
            follows,
        )
    return Finding("batch", True, "An image gets the same logits in a batch as alone.")


def _output(trial: Trial) -> tuple[Finding, OutputActivation | None]:
    """Whether the output has an activation already."""
    kind = output_activation(torch.cat(trial.alone))
    if kind == "sigmoid" and not _ends_in_activation(trial):  # logits that lie in 0..1 by chance
        kind = None
    if kind is None:
        return Finding("output", True, "Its output is logits."), None
    kind_of_output = {
        "softmax": "probabilities that sum to one",
        "sigmoid": "probabilities, each in 0..1",
        "log_softmax": "logarithms of probabilities",
    }[kind]
    finding = Finding(
        "output",
        False,
        f"Its output is {kind_of_output}: the activation is part of the model.",
        "Scores are taken as they are and explained at log p − log(1 − p); explanations carry the "
        "flag activation_in_model.",
    )
    return finding, kind


def _ends_in_activation(trial: Trial) -> bool:
    """Whether the autograd graph of the logits ends in a bounded function.

    True without a graph, as for a scripted or quantised model.
    """
    try:
        _, logits = trial.graph()
    except Exception:  # noqa: BLE001 - a model may refuse to be differentiated
        return True
    node = logits.grad_fn
    while node is not None and node.name().startswith(_CARRYING) and node.next_functions:
        node = next((before for before, _ in node.next_functions if before is not None), None)
    return logits.grad_fn is None or (node is not None and node.name().startswith(_BOUNDED))


_BOUNDED = ("Sigmoid", "Softmax", "Hardsigmoid", "Tanh", "Hardtanh", "Clamp", "Erf", "Atan")
"""Beginnings of the names of graph nodes with bounded results."""

_CARRYING = (
    *("View", "Unsafe", "Reshape", "Alias", "Squeeze", "Unsqueeze", "Select", "Slice", "Cat"),
    *(
        "Stack",
        "TBackward",
        "Permute",
        "Transpose",
        "ToCopy",
        "Clone",
        "Expand",
        "Index",
        "Unbind",
        "Split",
    ),
    *("AddBackward", "MulBackward", "DivBackward", "SubBackward", "RsubBackward"),
)
"""Beginnings of the names of graph nodes that only move or scale values."""


def _gradients(trial: Trial) -> Finding:
    """Compute the gradients of two targets at the image in one pass."""
    follows = "Several targets cost one backward pass each."
    if trial.is_late:
        return Finding("gradients", False, "There was no time left to run two targets.", follows)
    try:
        image, logits = trial.graph()
        if not logits.requires_grad:
            return Finding("gradients", True, "The model returns no gradient.")
        weights = logits.new_zeros(2, *logits.shape)
        weights[0, 0, 0] = weights[1, 0, -1] = 1
        gradients(logits, [image], weights)
    except Exception as error:  # noqa: BLE001 - a custom Function without a vmap rule, above all
        return Finding(
            "gradients", False, f"Two gradients at once fail ({first_line(error)}).", follows
        )
    return Finding("gradients", True, "Gradients of several targets can be computed together.")
