"""Score-CAM, Ablation-CAM, occlusion and RISE: against peers and against loops word by word."""

from __future__ import annotations

import threading
from collections.abc import Callable

import oracles
import pytest
import torch
from captum.attr import Occlusion
from pytorch_grad_cam import AblationCAM, ScoreCAM
from tiny import SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional
from torchcam.methods import ScoreCAM as TorchScoreCAM

from service.inference import perturbation
from service.inference.batch import forward
from service.inference.forward_pass import ImagePass
from service.inference.method_table import cost
from service.inference.questions import Question
from service.models.compiled.cut import split
from service.models.loaded import LoadedModel

pytestmark = [pytest.mark.reference, pytest.mark.timeout(30)]

PIXELS = oracles.picture(4, 64, 64)


def small(net: nn.Module | None = None, side: int = 64) -> LoadedModel:
    """A small net whose classes differ: fresh heads hardly do."""
    net = net or SmallNet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(net.head.weight, std=2)
    return loaded(net, side=side)


def logits_of(model: LoadedModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.replicate()(images)


def rounded(model: LoadedModel, images: Tensor) -> Tensor:
    """Normalised images as they are after a way through 8 bits."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (model.preprocessing.mean, model.preprocessing.std)
    )
    levels = ((images * std + mean) * 255).round()
    return (levels / 255 - mean) / std


def ask(model: LoadedModel, method: str, target: int, pixels: Tensor = PIXELS, **options) -> Tensor:
    question = Question(pixels, targets=(target,), method=method, **options)
    return oracles.raw(oracles.explained(model, question)[0])


def activation_of(model: LoadedModel, layer: str, pixels: Tensor = PIXELS) -> Tensor:
    """A layer's output (C, h, w) of a twin that overwrites nothing."""
    return oracles.full_backward(model, layer, pixels, lambda logits: logits[0])[0]


def score_masks(activation: Tensor, side: int, *, first: str) -> Tensor:
    """Masks (C, side, side): scaled up and taken to 0..1, in one order or the other."""

    def unit(maps: Tensor) -> Tensor:
        low, high = (maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True))
        return torch.nan_to_num((maps - low) / (high - low))

    def up(maps: Tensor) -> Tensor:
        return functional.interpolate(maps[None], size=side, mode="bilinear")[0]

    return unit(up(activation)) if first == "scale up" else up(unit(activation))


def score_cam(model: LoadedModel, target: int, *, first: str, in_8_bits: bool = True) -> Tensor:
    """Wang et al. 2020, algorithm 1, one masked image at a time; ours rounds these to 8 bits."""
    activation = activation_of(model, "features")
    image = oracles.input_of(model, PIXELS)
    baseline = logits_of(model, torch.zeros_like(image))[0, target]
    masks = score_masks(activation, 64, first=first)
    seen = [rounded(model, image * mask) if in_8_bits else image * mask for mask in masks]
    scores = [logits_of(model, one)[0, target] - baseline for one in seen]
    weights = torch.stack(scores).softmax(dim=0)
    return torch.einsum("c,chw->hw", weights, activation).relu()


def test_scorecam_is_algorithm_1_and_pytorch_grad_cams_with_the_corners_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peer scales masks up with `align_corners`, which moves every cell but the middle one."""
    model = small()
    target = oracles.best(model, PIXELS)
    ours = ask(model, "scorecam", target, layers=("features",))
    assert oracles.distance(ours, score_cam(model, target, first="scale up")) < 1e-4
    exact = score_cam(model, target, first="scale up", in_8_bits=False)
    assert oracles.distance(ours, exact) < 5e-3, "what rounding the masked images changes"
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear"))
    with oracles.without_in_place(model.module) as net:
        (peer,) = oracles.by_grad_cam(
            ScoreCAM, net, ["features"], oracles.input_of(model, PIXELS), target
        )
    assert oracles.distance(exact, peer.relu()) < 1e-5


def test_torchcams_scorecam_takes_masks_to_0_1_before_it_scales_them_up() -> None:
    """Algorithm 1 does it after: TorchCAM's map is that of the other order, and another map."""
    model = small()
    target = oracles.best(model, PIXELS)
    with oracles.without_in_place(model.module) as net, torch.no_grad():
        extractor = TorchScoreCAM(net, "features", input_shape=(3, 64, 64))
        net(oracles.input_of(model, PIXELS))
        peer = extractor(target, normalized=False)[0][0]
        extractor.remove_hooks()
    ours = ask(model, "scorecam", target, layers=("features",))
    theirs = score_cam(model, target, first="to 0..1", in_8_bits=False)
    assert oracles.distance(peer, theirs) < 1e-5
    paper = score_cam(model, target, first="scale up", in_8_bits=False)
    assert oracles.distance(peer, paper) > 10 * oracles.distance(ours, paper)


class Residual(nn.Module):
    """The skip around `inner` goes beside a cut there."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 8, 3, stride=4)
            self.inner = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x.relu()).relu()).mean(dim=(2, 3)))


class Dense(Residual):
    """Concatenates what comes by `inner` and what comes around it: the batches must be equal.

    It looks at its numbers, which a traced graph cannot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        assert x.abs().max() < 1e9
        return self.head(torch.cat([x.relu(), self.inner(x).relu()], dim=1).mean(dim=(2, 3)))


class Twice(Residual):
    """Runs `inner` two times; the last call is explained."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(self.stem(x)).relu()).relu().mean(dim=(2, 3)))


class Untraceable(Residual):
    """Looks at its numbers, which a traced graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.abs().max() > 1e9:
            return self.head(x.mean(dim=(2, 3)))
        return self.head(self.inner(x.relu()).relu().mean(dim=(2, 3)))


def ablation_cam(model: LoadedModel, layer: str, target: int, call: int = 0) -> Tensor:
    """Desai and Ramaswamy 2020, equations 3 and 4, one whole forward pass a channel."""
    image, activation = oracles.input_of(model, PIXELS), activation_of(model, layer)
    whole = logits_of(model, image)[0, target]
    weights = []
    for channel in range(len(activation)):
        calls = iter(range(9))

        def without(_module, _args, output, channel=channel, calls=calls):
            if next(calls) != call:
                return output
            output = output.clone()
            output[:, channel] = 0
            return output

        net = model.replicate()
        net.get_submodule(layer).register_forward_hook(without)
        with torch.no_grad():
            weights.append((whole - net(image)[0, target]) / whole)
    return torch.einsum("c,chw->hw", torch.stack(weights), activation).relu()


@pytest.mark.parametrize(
    ("build", "layer", "way", "call"),
    [
        (SmallNet, "features.3", "by_tail", 0),
        (SmallNet, "features", "by_tail", 0),
        (Twice, "inner", "by_tail", 1),
        (Residual, "inner", "by_tail", 0),
        (Untraceable, "inner", "by_broadcast", 0),
        (Dense, "inner", "in_full", 0),
    ],
)
def test_ablationcam_is_a_loop_of_whole_forward_passes_whichever_way_it_is_computed(
    build: Callable[[], nn.Module], layer: str, way: str, call: int
) -> None:
    """A model cut at the layer, its front broadcast, or all of it once more: one result."""
    model = small(build())
    target = oracles.best(model, PIXELS)
    assert way_of(model, layer, target) == way
    ours = ask(model, "ablationcam", target, layers=(layer,))
    assert oracles.distance(ours, ablation_cam(model, layer, target, call)) < 1e-4


def way_of(model: LoadedModel, layer: str, target: int) -> str:
    with oracles.leased(model) as replica:
        question = Question(PIXELS, targets=(target,), method="ablationcam", layers=(layer,))
        (part,) = forward(replica, [question])
        assert isinstance(part, ImagePass)
        way, _ = perturbation._logits_from_layer(
            replica, part, layer, part.target_activations[layer]
        )
    return way.__name__


def test_ablationcam_equals_pytorch_grad_cams() -> None:
    model = small()
    target = oracles.best(model, PIXELS)
    with oracles.without_in_place(model.module) as net:
        (peer,) = oracles.by_grad_cam(
            AblationCAM, net, ["features"], oracles.input_of(model, PIXELS), target
        )
    ours = ask(model, "ablationcam", target, layers=("features",))
    assert oracles.distance(ours, peer.relu()) < 1e-5


def test_ablationcam_of_a_negative_logit_shows_what_speaks_for_the_class() -> None:
    """The paper's division by y turns the sign of such a map; ours divides by |y|."""
    model = small()
    image = oracles.input_of(model, PIXELS)
    target = int(logits_of(model, image)[0].argmin())
    whole = logits_of(model, image)[0, target]
    assert whole < 0
    ours = ask(model, "ablationcam", target, layers=("features",))
    with torch.no_grad():
        model.module.head.bias[target] += 2 * whole.abs()  # the same evidence, the logit above zero
    assert oracles.distance(ours, ablation_cam(model, "features", target)) < 1e-4


def test_a_model_is_cut_without_disturbing_another_thread_that_runs_it() -> None:
    """torch.fx patches `nn.Module` for all threads while it traces; replicas share parameters."""
    model = small()
    image = oracles.input_of(model, PIXELS)
    expected = logits_of(model, image)
    cut, other = model.replicate(), model.replicate()
    faults: list[object] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(other(image), expected):
                        faults.append("another result")
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is the fault
                faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    call = nn.Module.__call__
    cuts = [threading.Thread(target=split, args=(cut, "features.3")) for _ in range(20)]
    for each in cuts:
        each.start()
    for each in cuts:
        each.join()
    done.set()
    thread.join()
    assert not faults
    assert nn.Module.__call__ is call


@pytest.mark.parametrize("side", [96, 100])
def test_occlusion_equals_captums(side: int) -> None:
    """Windows of 32, steps of 16, the last cut short at the border, the mean colour as filling."""
    model = small(side=side)
    pixels = oracles.picture(5, side, side)
    target = oracles.best(model, pixels)
    peer = Occlusion(model.replicate()).attribute(
        oracles.input_of(model, pixels),
        target=target,
        sliding_window_shapes=(3, 32, 32),
        strides=(3, 16, 16),
        baselines=0,
    )
    ours = ask(model, "occlusion", target, pixels)
    assert (ours < 0).any()
    assert oracles.distance(ours, peer[0, 0]) < 1e-4  # float32 logits, differences of 1e-3 of them
    windows = len(perturbation.windows(side)) ** 2
    assert cost(model, Question(pixels, method="occlusion")) == 1 + windows


def test_rise_is_the_mean_score_of_the_masks_that_keep_a_pixel_less_that_of_all() -> None:
    """Petsiuk et al. 2018, equation 6, in float64, mask by mask, less the mean score."""
    model = small()
    target, image = oracles.best(model, PIXELS), oracles.input_of(model, PIXELS)
    grids, shifts = perturbation._random_grids(60, 7)
    masks = [
        perturbation._shifted(grid, shift, (64, 64))
        for grid, shift in zip(grids, shifts, strict=True)
    ]

    def expected(images: list[Tensor]) -> Tensor:
        scores = [float(logits_of(model, one)[0].softmax(0)[target]) for one in images]
        drawn = torch.stack(masks).double()
        total = torch.einsum("n,nhw->hw", torch.tensor(scores, dtype=torch.float64), drawn)
        return total / drawn.sum(dim=0) - sum(scores) / len(scores)

    ours = ask(model, "rise", target, samples=60, seed=7)
    exact = [image * mask for mask in masks]
    assert oracles.distance(ours, expected([rounded(model, one) for one in exact])) < 5e-4
    assert oracles.distance(ours, expected(exact)) < 1e-2, "what rounding to 8 bits changes"
    again = ask(model, "rise", target, samples=60, seed=7)
    assert torch.equal(ours, again)
    assert not torch.equal(ours, ask(model, "rise", target, samples=60, seed=8))


def test_rises_masks_are_the_papers() -> None:
    """In 0..1, half kept, each a 7 × 7 grid scaled up to one cell more and cut at a random spot."""
    grids, shifts = perturbation._random_grids(400, 0)
    assert set(grids.unique().tolist()) == {0, 1}
    masks = torch.stack(
        [
            perturbation._shifted(grid, shift, (70, 140))
            for grid, shift in zip(grids, shifts, strict=True)
        ]
    )
    assert masks.shape == (400, 70, 140)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert abs(float(masks.mean()) - 0.5) < 0.02
    large = functional.interpolate(grids[:1, None], (80, 160), mode="bilinear")[0, 0]
    top, left = int(shifts[0, 0] * 10), int(shifts[0, 1] * 20)
    assert torch.equal(masks[0], large[top : top + 70, left : left + 140])


def test_rise_says_nothing_of_a_pixel_that_no_mask_keeps() -> None:
    """With one mask some pixels are never kept: zero there, not 0 / 0."""
    found = ask(small(), "rise", 0, samples=1)
    assert found.isfinite().all()
