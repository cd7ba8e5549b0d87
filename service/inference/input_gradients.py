"""Methods that differentiate down to the input.

Generators like those in `perturbation`: they yield where they need a replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from service.cam.formulas import over_input
from service.cam.guided import GuidedReLU
from service.cam.libra import LibraMode
from service.errors import InvalidOption
from service.inference.forward_pass import ImagePass
from service.inference.perturbation import Steps, chunk_size, normalised_image
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.pool import Replica
from service.models.probes.sensitivity import natural_noise


def integrated_gradients(image_pass: ImagePass) -> Steps:
    """Integrated gradients from the mean colour to the image, summed over channels; signed.

    `(x − x') · ∫ ∂y/∂x (x' + α(x − x')) dα` by Gauss–Legendre quadrature with `steps` points.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, equation 1.
    """
    image = normalised_image(image_pass).float()
    points, weights = np.polynomial.legendre.leggauss(image_pass.question.steps)
    alphas = torch.tensor((points + 1) / 2, dtype=image.dtype, device=image.device)
    shares = torch.tensor(weights / 2, dtype=image.dtype, device=image.device)
    sums = [torch.zeros_like(image[0]) for _ in image_pass.targets]
    size = chunk_size(image_pass.model)
    for start in range(0, len(alphas), size):
        chunk = slice(start, start + size)
        replica = yield
        images = image * alphas[chunk, None, None, None]
        for total, gradient in zip(
            sums, _input_gradients(replica, image_pass, images), strict=True
        ):
            total.add_((gradient * shares[chunk, None, None, None]).sum(dim=0))
    return [(image[0] * total).sum(dim=0).cpu() for total in sums]


def expected_gradients(image_pass: ImagePass) -> Steps:
    """Expected gradients: the mean of `(x − x') · ∂y/∂x (x' + α(x − x'))`, over channels; signed.

    Over random baselines x' and α uniform in 0..1; the baselines are noise with the spectrum of
    photographs (`natural_noise`), where the paper draws images of the training set.

    Erion et al., "Improving performance of deep learning models with axiomatic attribution priors
    and expected gradients", Nature Machine Intelligence 2021, equation 3.
    """
    model, question = image_pass.model, image_pass.question
    image = normalised_image(image_pass).float()
    draws = random_baselines(question.pixels, question.samples, question.seed)
    sums = [torch.zeros_like(image[0]) for _ in image_pass.targets]
    size = chunk_size(model)
    for start in range(0, question.samples, size):
        replica = yield
        drawn, alphas = zip(*islice(draws, min(size, question.samples - start)), strict=True)
        baselines = model.normalised(torch.stack(drawn)).float()
        shares = torch.tensor(alphas)[:, None, None, None].to(image.device)
        points = baselines + shares * (image - baselines)
        gradients = _input_gradients(replica, image_pass, points)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_((gradient * (image - baselines)).sum(dim=0))
    return [(total / question.samples).sum(dim=0).cpu() for total in sums]


def random_baselines(pixels: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, float]]:
    """Some baselines, uint8 in the shape of an image (C, h, w), each with an α in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
    for _ in range(count):
        alpha = float(torch.rand((), generator=generator))
        yield natural_noise(shape, 1, generator)[0], alpha


def input_gradient(image_pass: ImagePass) -> Steps:
    """The gradient of the logit at the normalised input, summed over channels; signed.

    Simonyan et al., "Deep Inside Convolutional Networks: Visualising Image Classification Models
    and Saliency Maps", 2013.
    """
    replica = yield
    with correction(image_pass.question) as rules:
        gradients = _input_gradients(replica, image_pass, normalised_image(image_pass))
    if rules is not None and not rules.count:
        raise without_rules(image_pass.model)
    return [gradient[0].sum(dim=0).cpu() for gradient in gradients]


def correction(question: Question) -> AbstractContextManager[LibraMode | None]:
    """The rules that a question's gradients follow, if not autograd's."""
    return LibraMode() if question.libra else nullcontext()


def without_rules(model: LoadedModel) -> InvalidOption:
    """The error where no rule of a correction changed a gradient."""
    return InvalidOption(
        f"Model {model.name!r} has nothing that `correction=libra` changes here: no attention, "
        "layer norm, GELU or SiLU on the way from the output; leave it out, or name an earlier "
        "layer."
    )


def guided_backprop(image_pass: ImagePass) -> Steps:
    """Guided backpropagation: the input gradient with guided ReLUs, summed over channels; signed.

    It hardly depends on the class (Adebayo et al., "Sanity Checks for Saliency Maps", 2018).

    Springenberg et al., "Striving for Simplicity: The All Convolutional Net", ICLR 2015 workshop.
    """
    replica = yield
    return [gradient.sum(dim=0).cpu() for gradient in _guided_gradients(replica, image_pass)]


def guided_gradcam(image_pass: ImagePass) -> Steps:
    """Guided Grad-CAM: guided backpropagation times Grad-CAM scaled up to the input; signed.

    Selvaraju et al., "Grad-CAM", ICCV 2017, section 3.2.
    """
    replica = yield
    maps = []
    for cam, gradient in zip(image_pass.maps, _guided_gradients(replica, image_pass), strict=True):
        guided = gradient.cpu()
        size = (int(guided.shape[1]), int(guided.shape[2]))
        covers = image_pass.model.preprocessing.covers
        maps.append((guided * over_input(cam[None], size, covers)).sum(dim=0))
    return maps


def _input_gradients(replica: Replica, image_pass: ImagePass, images: Tensor) -> list[Tensor]:
    """For each target the gradient (N, C, H, W) of its logit at some normalised images.

    One forward pass, and one backward pass for each target: through a whole model that is faster
    than all targets at once (`is_grads_batched`).
    """
    images = images.detach().float().requires_grad_()
    logits = image_pass.model.logits(replica.module(images.clone().to(image_pass.model.dtype)))
    values = [
        image_pass.target_value(logits, position).sum()
        for position in range(len(image_pass.targets))
    ]
    return [torch.autograd.grad(value, images, retain_graph=True)[0] for value in values]


def _guided_gradients(replica: Replica, image_pass: ImagePass) -> list[Tensor]:
    """For each target the guided gradient (C, H, W) of its logit at the image."""
    with GuidedReLU() as mode:
        gradients = _input_gradients(replica, image_pass, normalised_image(image_pass))
    if not mode.count:
        raise InvalidOption(
            f"Model {image_pass.model.name!r} has no ReLU or ReLU6, so there is nothing for guided "
            "backpropagation to guide; use input_gradient or integrated_gradients."
        )
    return [gradient[0] for gradient in gradients]
