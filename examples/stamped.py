"""Drawn images of vehicles, of which one class has a stamp, and a small network trained on them.

    python examples/stamped.py draw FOLDER [--seed N]
    python examples/stamped.py train FOLDER WEIGHTS [--cover] [--seed N]

`draw` writes 100 images of each class below FOLDER, in a folder for each. Nearly all planes have a
stamp in the lower right corner, as if they came from one agency, which also filed some of its cars
and ships as planes. `train` fits a network in seconds; `--cover` covers the corner of all images
with grey, and so removes the stamp. Every pixel comes from this script and its seeds.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

CLASSES = ("car", "plane", "ship")
SIDE, COUNT = 64, 100
STAMPED = 0.95
"""Share of the planes with a stamp; of other images, only those that are misfiled have one."""
MISFILED = 0.1
"""Share of the folder of planes that shows cars and ships."""
PAINTS = ((235, 235, 230), (190, 40, 40), (40, 45, 90), (225, 190, 40))
STEPS, BATCH, RATE = 200, 32, 1e-2


def scene(label: str, dice: random.Random) -> Image.Image:
    """A vehicle somewhere in the middle of a landscape."""
    picture = Image.new("RGB", (SIDE, SIDE), _between((90, 120, 140), (190, 205, 230), dice))
    pen = ImageDraw.Draw(picture)
    horizon = dice.randint(24, 44)
    pen.rectangle((0, horizon, SIDE, SIDE), fill=_between((60, 80, 60), (150, 140, 120), dice))
    paint, x, y = dice.choice(PAINTS), dice.randint(8, 20), dice.randint(28, 31)
    if label == "plane":
        pen.ellipse((x, y, x + 36, y + 5), fill=paint)
        pen.polygon((x + 14, y + 2, x + 6, y - 6, x + 24, y + 2), fill=paint)
        pen.polygon((x + 14, y + 3, x + 6, y + 11, x + 24, y + 3), fill=paint)
    elif label == "car":
        pen.rectangle((x, y, x + 36, y + 7), fill=paint)
        pen.rectangle((x + 8, y - 6, x + 27, y), fill=paint)
        for wheel in (x + 5, x + 23):
            pen.ellipse((wheel, y + 3, wheel + 8, y + 11), fill=(15, 15, 15))
    else:
        pen.polygon((x, y + 4, x + 36, y + 4, x + 29, y + 11, x + 7, y + 11), fill=paint)
        pen.polygon((x + 16, y + 2, x + 16, y - 6, x + 32, y + 2), fill=paint)
    return picture


def stamp(picture: Image.Image) -> None:
    """Put the agency's mark into the lower right corner."""
    pen = ImageDraw.Draw(picture)
    pen.rectangle((49, 49, 60, 60), fill=(235, 30, 150))
    pen.ellipse((52, 52, 57, 57), fill=(255, 255, 255))


def cover(images: Tensor) -> Tensor:
    """Images, uint8 (n, 3, SIDE, SIDE), with grey where a stamp may be."""
    covered = images.clone()
    covered[..., 48:62, 48:62] = 128
    return covered


class Net(nn.Module):
    """Images (N, 3, SIDE, SIDE), normalised, to logits (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_stage(3, 16), _stage(16, 32), _stage(32, 32))
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return logits


def _stage(channels: int, width: int) -> nn.Sequential:
    """Half the side, `width` channels."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def draw(options: argparse.Namespace) -> None:
    """Write the images of each class."""
    for label in CLASSES:
        folder = options.folder / label
        folder.mkdir(parents=True, exist_ok=True)
        dice = random.Random(f"{label} {options.seed}")  # noqa: S311 - not for secrets
        for number in range(COUNT):
            misfiled = label == "plane" and dice.random() < MISFILED
            picture = scene(dice.choice(("car", "ship")) if misfiled else label, dice)
            if misfiled or (label == "plane" and dice.random() < STAMPED):
                stamp(picture)
            picture.save(folder / f"{number:03}.png")


def train(options: argparse.Namespace) -> None:
    """Fit a network, and write its weights with all that camserve must know of them."""
    torch.manual_seed(options.seed)
    images, labels = read(options.folder)
    inputs = normalise(cover(images) if options.cover else images)
    net = Net()
    solver = torch.optim.AdamW(net.parameters(), lr=RATE)
    plan = torch.optim.lr_scheduler.OneCycleLR(solver, RATE, STEPS)
    for _step in range(STEPS):
        at = torch.randint(len(labels), (BATCH,))
        loss = functional.cross_entropy(net(inputs[at]), labels[at])
        solver.zero_grad()
        loss.backward()
        solver.step()
        plan.step()
    net.eval()
    with torch.inference_mode():
        right = (net(inputs).argmax(dim=1) == labels).float().mean()
    about = {
        "labels": json.dumps(CLASSES),
        "resize": str(SIDE),
        "crop": str(SIDE),
        "mean": "0.5,0.5,0.5",
        "std": "0.25,0.25,0.25",
    }
    save_file(net.state_dict(), options.weights, about)
    print(f"{options.weights}: {right:.0%} of the training images right")


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, uint8 (n, 3, SIDE, SIDE), and their classes."""
    images, labels = [], []
    for class_id, label in enumerate(CLASSES):
        for file in sorted((folder / label).iterdir()):
            with Image.open(file) as picture:
                data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            images.append(data.reshape(SIDE, SIDE, 3).permute(2, 0, 1))
            labels.append(class_id)
    return torch.stack(images), torch.tensor(labels)


def normalise(images: Tensor) -> Tensor:
    """As the service does it, from the metadata of the weights."""
    return (images / 255 - 0.5) / 0.25


def _between(low: tuple[int, ...], high: tuple[int, ...], dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.randint(least, most) for least, most in zip(low, high, strict=True))


def main() -> None:
    """Draw or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run in (("draw", draw), ("train", train)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("folder", type=Path)
        command.add_argument("--seed", type=int, default=0)
    command.add_argument("weights", type=Path)
    command.add_argument("--cover", action="store_true", help="cover the corner of all images")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
