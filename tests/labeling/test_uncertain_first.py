"""The how-to "Label the uncertain images first", in a real Label Studio.

The order that it gives to tasks is compared with what plain torch says of the same samples.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pictures
import pytest
import torch
from label_studio import LEGACY_TOKEN, LabelStudio
from running import running
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from service.models.builtin.network import FlowerNet

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
CONFIG = f"""<View><Image name="image" value="$image"/>
  <Choices name="flower" toName="image">
    {"".join(f'<Choice value="{name}"/>' for name in FLOWERS)}
  </Choices></View>"""
ASCENDING = ["tasks:predictions_score"]


@dataclass(frozen=True)
class Sample:
    """A held-out image, and how sure plain torch is of it: low is uncertain."""

    name: str
    file: bytes
    sure: dict[str, float]


def samples(shared_data: Path) -> list[Sample]:
    """The two least certain of 48 by each measure, and the most certain, which comes first."""
    sys.path.append(str(ROOT / "tools" / "builtin_model"))
    from photos import read_photos  # noqa: PLC0415 - a script's, whose folder is added just now

    images = read_photos(shared_data / "flowers128.tar", "val").images[:48]
    probabilities = probabilities_of(images)
    best = probabilities.sort(dim=1, descending=True).values
    bits = -(probabilities * probabilities.log()).sum(1) / torch.tensor(len(FLOWERS)).log()
    sure = {"margin": best[:, 0] - best[:, 1], "entropy": 1 - bits}
    by_margin, by_entropy = (sure[name].argsort().tolist() for name in sure)
    chosen = [by_margin[-1], *by_margin[:2], *by_entropy[:2]]
    return [
        Sample(
            f"{number}.png",
            pictures.file(images[number].permute(1, 2, 0).contiguous().numpy()),
            {name: float(values[number]) for name, values in sure.items()},
        )
        for number in dict.fromkeys(chosen)
    ]


def probabilities_of(images: list[Tensor]) -> Tensor:
    """(n, classes) of the built-in model, float64, without the service."""
    with safe_open(ROOT / "service/models/builtin/weights.safetensors", "pt") as file:
        said = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    net = FlowerNet(len(FLOWERS))
    net.load_state_dict(weights)
    mean, std = ([float(number) for number in said[key].split(",")] for key in ("mean", "std"))
    resized = [transforms.resize(each, [int(said["resize"])], antialias=True) for each in images]
    crops = torch.stack([transforms.center_crop(each, [int(said["crop"])] * 2) for each in resized])
    with torch.no_grad():
        return net.eval()(transforms.normalize(crops / 255, mean, std)).double().softmax(dim=1)


@dataclass(frozen=True)
class Project:
    """A project whose tasks are predicted. least_sure: their ids, the least certain one first."""

    studio: LabelStudio
    id: int
    choice: str
    least_sure: list[int]
    sure: list[float]

    @property
    def scores(self) -> list[float]:
        """Of the predictions, in the order of the tasks."""
        return [each["score"] for each in self.studio.predictions(self.id)]

    def listed(self) -> dict[int, float | None]:
        """The scores of the tasks as the Data Manager lists them, ordered by these."""
        data = {"title": "uncertain", "ordering": ASCENDING}
        view = self.studio.ask("POST", "dm/views", json={"project": self.id, "data": data})
        query = {"view": view["id"], "project": self.id, "page_size": 100, "fields": "all"}
        tasks = self.studio.ask("GET", "tasks", params=query)["tasks"]
        return {task["id"]: task.get("predictions_score") for task in tasks}

    def as_displayed(self) -> int:
        """The next task of *Label Tasks As Displayed*."""
        body = {"ordering": ASCENDING, "selectedItems": {"all": True, "excluded": []}}
        query = {"id": "next_task", "project": self.id}
        return int(self.studio.ask("POST", "dm/actions", params=query, json=body)["id"])

    def next(self) -> int:
        """The next task of *Label All Tasks*, by the project's own sampling."""
        return int(self.studio.ask("GET", f"projects/{self.id}/next")["id"])

    def change(self, **settings: str) -> None:
        self.studio.ask("PATCH", f"projects/{self.id}", json=settings)

    def label(self, task: int) -> None:
        result = {"from_name": "flower", "to_name": "image", "type": "choices"}
        result |= {"value": {"choices": ["rose"]}}
        self.studio.ask("POST", f"tasks/{task}/annotations", json={"result": [result]})


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Sample]:
    return samples(shared_data)


@pytest.fixture(params=["margin", "entropy"])
def project(request: pytest.FixtureRequest, studio: LabelStudio, photos: list[Sample]) -> Project:
    """Steps 1 and 2 of the page."""
    choice = request.param
    with running(
        models=("builtin",),
        label_studio_score=choice,
        label_studio_url=studio.url,
        label_studio_token=LEGACY_TOKEN,
    ) as server:
        number = studio.project(CONFIG, f"by {choice}")
        tasks = studio.upload(number, {each.name: each.file for each in photos})
        studio.attach(number, f"{server.url}/integrations/label-studio")
        studio.retrieve(number)
    sure = [each.sure[choice] for each in photos]
    order = sorted(range(len(photos)), key=lambda place: sure[place])
    return Project(studio, number, choice, [tasks[place]["id"] for place in order], sure)


def test_the_two_measures_disagree_on_these_photographs(photos: list[Sample]) -> None:
    first = {name: min(photos, key=lambda each: each.sure[name]) for name in ("margin", "entropy")}
    assert first["margin"].name != first["entropy"].name
    assert photos[0] not in first.values()


def test_tasks_come_in_the_order_of_plain_torchs_doubt(project: Project) -> None:
    """Steps 3 and 4: ordered by prediction score, and by uncertainty sampling; by both alike."""
    assert project.scores == pytest.approx(project.sure, abs=2e-3)
    assert set(project.listed().values()) == {None}, "the model is selected, not its predictions"
    (version,) = {each["model_version"] for each in project.studio.predictions(project.id)}
    project.change(model_version=version)
    first, second, third, *_ = project.least_sure
    assert list(project.listed()) == project.least_sure
    assert list(project.listed().values()) == pytest.approx(sorted(project.sure), abs=2e-3)
    assert project.as_displayed() == first
    project.change(sampling="Uncertainty sampling")
    assert project.next() == first
    project.label(first)
    assert project.next() == second
    project.label(second)
    assert project.as_displayed() == third
