"""A detector and a segmenter of five kinds of flowers, as builders of the service.

    PYTHONPATH=tools/flower_scenes camserve --model flowers=flower_networks:faster_rcnn

Each has a frozen MobileNet v2 that was trained on photographs, read from ../shared/data, below a
small head that `train_heads.py` has trained and that lies beside this file. All are torchvision's
own classes: `FasterRCNN`, `RetinaNet` (not trained far: its head is not committed) and `LRASPP`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torchvision.models
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

HERE = Path(__file__).resolve().parent
BACKBONE = HERE.parents[2] / "shared" / "data" / "weights" / "mobilenet_v2.fp16.safetensors"
LABELS = ("background", "daisy", "dandelion", "rose", "sunflower", "tulip")
"""Names of the class numbers; the background is class 0, as torchvision has it."""
SIDE = 320
WIDTH = 64
"""Channels of the pyramid."""
RATIOS = (0.7, 1.0, 1.4)
"""Height by width of the anchors."""


def faster_rcnn() -> nn.Module:
    """Return the trained two-stage detector: pyramid at strides 8, 16 and 32."""
    return trained(new_faster_rcnn, HERE / "faster_rcnn.safetensors")


def retinanet() -> nn.Module:
    """Return the trained one-stage detector: pyramid at strides 16 and 32."""
    return trained(new_retinanet, HERE / "retinanet.safetensors")


def lraspp() -> nn.Module:
    """Return the trained segmenter; its input is a normalized batch of SIDE x SIDE pixels."""
    return trained(new_lraspp, HERE / "lraspp.safetensors")


def trained(build: Callable[[], nn.Module], head: Path) -> nn.Module:
    """A network with the trained head and the frozen backbone, ready to answer."""
    net = build()
    net.load_state_dict({**_backbone_of(net), **_floats(head)})
    return net.eval()


def with_backbone(net: nn.Module) -> nn.Module:
    """Put the frozen backbone into a network whose head is new."""
    net.load_state_dict(_backbone_of(net), strict=False)
    return net


def head_of(net: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained: all but the frozen backbone's."""
    frozen = _prefix(net)
    return {key: value for key, value in net.state_dict().items() if not key.startswith(frozen)}


def new_faster_rcnn() -> FasterRCNN:
    """A Faster R-CNN without its weights. Objects below 112 pixels are read at stride 8."""
    backbone = BackboneWithFPN(
        torchvision.models.mobilenet_v2().features,
        {"6": "0", "13": "1", "18": "2"},
        [32, 96, 1280],
        WIDTH,
        LastLevelMaxPool(),
    )
    return FasterRCNN(
        backbone,
        min_size=SIDE,
        max_size=2 * SIDE,
        rpn_anchor_generator=AnchorGenerator(
            ((48,), (80,), (120,), (160,)), ((0.7, 1.0, 1.4),) * 4
        ),
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=112),
        box_head=TwoMLPHead(WIDTH * 49, 256),
        box_predictor=FastRCNNPredictor(256, len(LABELS)),
        box_batch_size_per_image=64,
    )


def new_retinanet() -> RetinaNet:
    """A RetinaNet without its weights."""
    backbone = BackboneWithFPN(
        torchvision.models.mobilenet_v2().features,
        {"13": "0", "18": "1"},
        [96, 1280],
        WIDTH,
    )
    anchors = AnchorGenerator(
        ((48, 64, 84), (96, 120, 150), (130, 160, 200)), ((0.7, 1.0, 1.4),) * 3
    )
    head = RetinaNetHead(WIDTH, 9, len(LABELS), lambda width: nn.GroupNorm(8, width))
    return RetinaNet(
        backbone,
        len(LABELS),
        SIDE,
        2 * SIDE,
        anchor_generator=anchors,
        head=head,
        topk_candidates=200,
    )


def new_lraspp() -> LRASPP:
    """An LR-ASPP without its weights: strides 8 and 16.

    The last stage is dilated in place of its stride, as in torchvision's own segmenters.
    """
    features = torchvision.models.mobilenet_v2().features
    features[14].conv[1][0].stride = (1, 1)
    for block in features[15:18]:
        block.conv[1][0].dilation = block.conv[1][0].padding = (2, 2)
    body = IntermediateLayerGetter(features, {"6": "low", "18": "high"})
    return LRASPP(body, 32, 1280, len(LABELS))


def _prefix(net: nn.Module) -> str:
    """What the names of the frozen weights begin with."""
    return "backbone." if isinstance(net, LRASPP) else "backbone.body."


def _backbone_of(net: nn.Module) -> dict[str, Tensor]:
    prefix = _prefix(net)
    return {
        prefix + key.removeprefix("features."): value
        for key, value in _floats(BACKBONE).items()
        if key.startswith("features.")
        and prefix + key.removeprefix("features.") in net.state_dict()
    }


def _floats(file: Path) -> dict[str, Tensor]:
    return {key: v.float() if v.is_floating_point() else v for key, v in load_file(file).items()}
