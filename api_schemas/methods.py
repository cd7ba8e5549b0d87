"""The methods: one record per method, for checks, costs, the documentation and the page.

A new method is a record here, its name in `options.Method`, and a function in
`service.cam.formulas.LAYER_METHODS` or `service.inference.method_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from api_schemas.options import Method, Task

DEFAULTS: Mapping[Task, Method] = MappingProxyType(
    {"classification": "gradcam", "detection": "hirescam", "segmentation": "hirescam"}
)
"""The method of a request that names none."""

ALL_TASKS: tuple[Task, ...] = ("classification", "detection", "segmentation")

Need = Literal["layer", "gradients", "head", "relu", "attention", "class token"]

BACKWARD = 1.5
"""The cost of a backward pass through the whole model per target, in forward passes.

Measured on resnet50 (`benchmarks/methods.py`): forward and backward 2.3, with guided ReLUs 2.9, 1.8
per image in chunks. A backward pass through a part of the model costs that part's share."""

WINDOW, STRIDE = 32, 16
"""The square of occlusion and its stride, in pixels of the model input."""


class MethodRecord(NamedTuple):
    """One method; the page and the docs use the order of METHODS.

    title:    as in its paper. group: its heading on the page.
    shows:    what the map shows, in one line. misleads: when it misleads, or "".
    paper:    authors, venue, year.
    needs:    what the model must have: a target layer, gradients, a single linear layer after the
              target layer, ReLUs, attention between tokens, a class token.
    runs:     what runs after the predicting pass: nothing, forward passes, forward passes with the
              gradient at the input, or the part of the model after the layer.
    times:    how often that runs; `squares` are those of occlusion.
    samples:  the default of the option.
    grid:     the shape of the map: that of the layer, the model input, or the patches.
    signed:   whether the map is −1..1, negative for evidence against the class, or 0..1.
    class_blind: whether the map is the same for every class; its explanations carry this flag.
    tasks:    the tasks that it is for. per_box: whether its map tells one box from another; if not,
              explanations of detections carry the flag `not_per_box`.
    """

    name: Method
    title: str
    group: Literal["At a layer", "At the pixels", "By hiding parts", "Of transformers"]
    shows: str
    misleads: str
    paper: str
    needs: tuple[Need, ...] = ()
    runs: Literal["", "forward", "gradient", "tail"] = ""
    times: Literal["once", "channels", "squares", "samples", "steps"] = "once"
    samples: int = 1000
    grid: Literal["layer", "input", "patches"] = "layer"
    signed: bool = False
    class_blind: bool = False
    tasks: tuple[Task, ...] = ("classification",)
    per_box: bool = True

    @property
    def has_layer(self) -> bool:
        """Whether the map is drawn from target layers."""
        return "layer" in self.needs

    @property
    def is_forward_only(self) -> bool:
        """Whether all that it runs behind the pass that predicts are whole forward passes."""
        return self.runs in {"", "forward"} and "attention" not in self.needs

    @property
    def is_correctable(self) -> bool:
        """Whether `correction` changes its map: one from one gradient at a layer or the input."""
        return self.name == "input_gradient" or (self.walks and not self.runs)

    @property
    def walks(self) -> bool:
        """Whether it needs a backward pass to the target layers per target."""
        return {"layer", "gradients"} <= {*self.needs}


METHODS: Mapping[str, MethodRecord] = {
    record.name: record
    for record in (
        MethodRecord(
            "gradcam",
            "Grad-CAM",
            "At a layer",
            "Channels weighted by their mean gradient: where evidence for the class is active.",
            "averages the gradient over the map: a channel that supports the class here and "
            "opposes it there cancels out; weak for small or several objects",
            "Selvaraju et al., ICCV 2017",
            needs=("layer", "gradients"),
            tasks=ALL_TASKS,
            per_box=False,
        ),
        MethodRecord(
            "gradcampp",
            "Grad-CAM++",
            "At a layer",
            "Like Grad-CAM, with weights from higher orders of the gradient, for several objects.",
            "can highlight places with a gradient and no evidence; follows the paper where other "
            "implementations add a constant",
            "Chattopadhay et al., WACV 2018",
            needs=("layer", "gradients"),
            tasks=ALL_TASKS,
            per_box=False,
        ),
        MethodRecord(
            "hirescam",
            "HiResCAM",
            "At a layer",
            "Gradient times activation, cell by cell.",
            "exact only where a linear head follows the layer, noisy elsewhere; vanishes right "
            "before a LayerNorm (ConvNeXt's stages), where gradient times activation sums to zero",
            "Draelos and Carin, arXiv 2011.08891, 2020",
            needs=("layer", "gradients"),
            tasks=ALL_TASKS,
        ),
        MethodRecord(
            "layercam",
            "LayerCAM",
            "At a layer",
            "Positive gradient times activation, cell by cell; also for early layers.",
            "drops evidence against the class",
            "Jiang et al., IEEE TIP 2021",
            needs=("layer", "gradients"),
            tasks=ALL_TASKS,
        ),
        MethodRecord(
            "xgradcam",
            "XGrad-CAM",
            "At a layer",
            "Like Grad-CAM, gradients weighted by the activation.",
            "as Grad-CAM; equals it for ReLU features with a linear head",
            "Fu et al., BMVC 2020",
            needs=("layer", "gradients"),
            tasks=ALL_TASKS,
            per_box=False,
        ),
        MethodRecord(
            "eigencam",
            "Eigen-CAM",
            "At a layer",
            "What stands out in the layer: its first principal component, whatever the class.",
            "has the same map for every target",
            "Muhammad and Yeasin, IJCNN 2020",
            needs=("layer",),
            class_blind=True,
        ),
        MethodRecord(
            "cam",
            "CAM",
            "At a layer",
            "The original: channels weighted by the linear head.",
            "",
            "Zhou et al., CVPR 2016",
            needs=("layer", "head"),
        ),
        MethodRecord(
            "ablationcam",
            "Ablation-CAM",
            "At a layer",
            "Channels weighted by how much the class falls without them.",
            "the model never sees zeroed channels in practice; where it can neither be cut nor "
            "broadcast behind the layer, it runs in full and costs more than announced",
            "Desai and Ramaswamy, WACV 2020",
            needs=("layer",),
            runs="tail",
            times="channels",
        ),
        MethodRecord(
            "scorecam",
            "Score-CAM",
            "At a layer",
            "Channels weighted by how the class scores when the image is seen through them. Slow.",
            "a softmax over many channels hardly differs between them",
            "Wang et al., CVPR workshops 2020",
            needs=("layer",),
            runs="forward",
            times="channels",
        ),
        MethodRecord(
            "input_gradient",
            "Input gradient",
            "At the pixels",
            "How much each pixel would move the class: the slope of its logit. Noisy.",
            "noise; a saturated score has no slope",
            "Simonyan et al., arXiv 1312.6034, 2013",
            needs=("gradients",),
            runs="gradient",
            grid="input",
            signed=True,
        ),
        MethodRecord(
            "integrated_gradients",
            "Integrated gradients",
            "At the pixels",
            "Gradients summed on the way from the mean color to the image; their sum is the "
            "difference of the logits.",
            "depends on the baseline: pixels of the mean color get nothing",
            "Sundararajan et al., ICML 2017",
            needs=("gradients",),
            runs="gradient",
            times="steps",
            grid="input",
            signed=True,
        ),
        MethodRecord(
            "expected_gradients",
            "Expected gradients",
            "At the pixels",
            "Gradients times the difference from baselines, the mean over random baselines and "
            "places on the way to the image.",
            "depends on the baselines, which are noise with the spectrum of photographs and not "
            "images of the training; noise falls with the square root of the samples",
            "Erion et al., Nature Machine Intelligence 2021",
            needs=("gradients",),
            runs="gradient",
            times="samples",
            samples=100,
            grid="input",
            signed=True,
        ),
        MethodRecord(
            "guided_backprop",
            "Guided backprop",
            "At the pixels",
            "The input gradient, negative gradients cut at each ReLU: sharp edges that hardly "
            "depend on the class, not evidence.",
            "shows the edges of the image, whatever the class (Adebayo et al., 2018)",
            "Springenberg et al., ICLR workshop 2015",
            needs=("gradients", "relu"),
            runs="gradient",
            grid="input",
            signed=True,
        ),
        MethodRecord(
            "guided_gradcam",
            "Guided Grad-CAM",
            "At the pixels",
            "Guided backprop where Grad-CAM looks.",
            "the detail is that of guided backprop",
            "Selvaraju et al., ICCV 2017",
            needs=("layer", "gradients", "relu"),
            runs="gradient",
            grid="input",
            signed=True,
        ),
        MethodRecord(
            "occlusion",
            "Occlusion",
            "By hiding parts",
            "How much the class falls when a square hides each part. Slow.",
            "squares are themselves a shape; blind to parts much larger or smaller than them",
            "Zeiler and Fergus, ECCV 2014",
            runs="forward",
            times="squares",
            grid="input",
            signed=True,
            tasks=ALL_TASKS,
        ),
        MethodRecord(
            "rise",
            "RISE",
            "By hiding parts",
            "How the class scores under random masks that keep a pixel. Slow; needs no gradients.",
            "noisy: noise falls with the square root of the samples",
            "Petsiuk et al., BMVC 2018",
            runs="forward",
            times="samples",
            grid="input",
            signed=True,
            tasks=ALL_TASKS,
        ),
        MethodRecord(
            "attention_rollout",
            "Attention rollout",
            "Of transformers",
            "What the class token, or what the head reads in its place, draws from each patch "
            "through all layers, whatever the class.",
            "attention is not importance; the map is the same for every class",
            "Abnar and Zuidema, ACL 2020",
            needs=("attention",),
            runs="forward",
            grid="patches",
            class_blind=True,
        ),
        MethodRecord(
            "gae",
            "Generic attention explainability",
            "Of transformers",
            "Attention times its positive gradient, through all layers to the class token.",
            "only positive gradients count: evidence against the class is not shown; coarser than "
            "Grad-CAM on the one backbone where both were measured",
            "Chefer et al., ICCV 2021",
            needs=("gradients", "attention", "class token"),
            runs="gradient",
            grid="patches",
        ),
    )
}
