"""A small residual CNN whose last stage, average pool and single linear head suit Grad-CAM.

Every step down in resolution is a kernel that tiles its input exactly (2x2 stride 2, or 4x4
stride 2 with a border of one). A cell of the last grid is therefore centred on the pixels that it
stands for; the usual 3x3 stride 2 moves a map half a cell up and left at every step.
"""

from torch import Tensor, nn

STEM_WIDTH = 24
STAGES = ((32, 1), (64, 2), (144, 3))
"""Width and number of residual blocks of `layer1`, `layer2` and `layer3`."""


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    """A convolution without bias and the batch normalisation that takes its place."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and an identity shortcut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(width, width, 3, 1, 1)
        self.conv2 = conv_bn(width, width, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        y: Tensor = self.conv2(self.relu(self.conv1(x)))
        return self.relu(y + x)  # type: ignore[no-any-return]


class FlowerNet(nn.Module):
    """Images (N, 3, H, W), H and W multiples of 16, to logits (N, classes).

    `layer3` answers with the (N, 144, H/16, W/16) features under the pool: the Grad-CAM target.
    """

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, STEM_WIDTH, 4, 2, 1), nn.ReLU(inplace=True))
        width = STEM_WIDTH
        for number, (outputs, blocks) in enumerate(STAGES, 1):
            self.add_module(f"layer{number}", _stage(width, outputs, blocks))
            width = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for layer in self.children():
            x = layer(x)
        return x


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    """Halve the resolution, then refine it by `blocks` residual blocks."""
    halve = nn.Sequential(*conv_bn(inputs, outputs, 2, 2, 0), nn.ReLU(inplace=True))
    return nn.Sequential(halve, *(ResidualBlock(outputs) for _ in range(blocks)))
