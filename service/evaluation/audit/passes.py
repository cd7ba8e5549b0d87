"""Counted forward passes of one model: logits, and the activation of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from service.cam.hooks import record
from service.inference.perturbation import chunk_size, logits_of
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.condition import Condition


@dataclass(slots=True)
class Passes:
    """Forward passes of a model on one replica, in the compiled lane where there is one.

    forwards: how many images have run so far.
    """

    model: LoadedModel
    replica: Replica
    forwards: int = field(default=0)

    @classmethod
    def of(cls, model: LoadedModel) -> Passes:
        """Passes of a model, on a replica of its own."""
        module = model.replicate()
        return cls(model, Replica(model, module, Condition.of(module)))

    def logits(self, images: Iterable[Tensor]) -> Tensor:
        """Float32 (n, classes) on the CPU, of images, uint8 (C, h, w); images are taken in chunks.

        A value that is not finite becomes the lowest that float32 has: its class never wins.
        """
        rows = [torch.zeros(0, len(self.model.labels))]
        for chunk in self._chunks(images):
            with torch.no_grad():
                rows.append(logits_of(self.model, self.replica, chunk).float())
        lowest = torch.finfo(torch.float32).min
        return torch.cat(rows).nan_to_num(nan=lowest, posinf=lowest, neginf=lowest)

    def activations(self, images: Sequence[Tensor], layer: str) -> tuple[Tensor, Tensor]:
        """A layer's output as maps (n, channels, h, w), and the logits (n, classes), on the CPU."""
        maps, rows = list[Tensor](), list[Tensor]()
        layout = self.model.layer(layer).layout
        assert layout is not None
        for chunk in self._chunks(images):
            with torch.no_grad():
                values, logits = self._recorded(chunk, layer)
            maps.append(layout.as_map(layout.by_image(values)).float().cpu())
            rows.append(logits.float().cpu())
        return torch.cat(maps), torch.cat(rows)

    def gradients(
        self, images: Sequence[Tensor], layer: str, class_id: int
    ) -> tuple[Tensor, Tensor]:
        """A layer's output, and the gradient there of a class's logit above the mean of all.

        Both are maps (n, channels, h, w) on the CPU.
        """
        maps, slopes = list[Tensor](), list[Tensor]()
        layout, model = self.model.layer(layer).layout, self.model
        assert layout is not None
        for chunk in self._chunks(images):
            with record(self.replica.module, targets=[layer]) as seen:
                logits = model.logits(self.replica.module(model.normalised(chunk)))
            values = seen.targets[layer][-1]
            lead = (logits[:, class_id] - logits.mean(dim=1)).sum()
            (slope,) = torch.autograd.grad(lead, values)
            maps.append(layout.as_map(layout.by_image(values.detach())).float().cpu())
            slopes.append(layout.as_map(layout.by_image(slope)).float().cpu())
        return torch.cat(maps), torch.cat(slopes)

    def _recorded(self, chunk: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        model, lane = self.model, self.model.compiled
        if lane is not None and lane.layer == layer:
            activation, *beside = lane.front(chunk)
            # A clone: the tail may overwrite the activation.
            return activation, model.logits(lane.tail(activation.clone(), *beside))
        with record(self.replica.module, outputs=[layer]) as seen:
            logits = model.logits(self.replica.module(model.normalised(chunk)))
        return seen.outputs[layer][-1], logits

    def _chunks(self, images: Iterable[Tensor]) -> Iterator[Tensor]:
        left = iter(images)
        while some := list(islice(left, chunk_size(self.model))):
            self.forwards += len(some)
            yield torch.stack(some)
