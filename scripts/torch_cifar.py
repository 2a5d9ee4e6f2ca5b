"""CIFAR networks in torch, for `scripts/parity.py`: no package has them, so they are written down here from their papers.

Parameters are named as in the repositories whose files people have (akamaster's, xternalz', and torchvision's scheme).
"""

from torch import nn
from torch.nn import functional


class Zeros(nn.Module):
    """Option A as akamaster has it: every second pixel, zero channels on both sides."""

    def __init__(self, missing):
        super().__init__()
        self.missing = missing

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))


def convolutions(inputs, width, stride, bottleneck, groups=1):
    """Two 3×3, or 1×1, grouped 3×3 with the stride, 1×1."""
    if not bottleneck:
        shapes = [(inputs, width, 3, stride, 1), (width, width, 3, 1, 1)]
    else:
        inner = width * groups
        shapes = [(inputs, inner, 1, 1, 1), (inner, inner, 3, stride, groups), (inner, 4 * width, 1, 1, 1)]
    return [nn.Conv2d(a, b, kernel, step, kernel // 2, groups=parts, bias=False) for a, b, kernel, step, parts in shapes]


class Block(nn.Module):
    """Post-activation."""

    def __init__(self, inputs, width, stride, shortcut, bottleneck, groups, name):
        super().__init__()
        convs = convolutions(inputs, width, stride, bottleneck, groups)
        for number, conv in enumerate(convs, start=1):
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.count, self.plain, self.name, projection = len(convs), shortcut == "none", name, nn.Sequential()
        outputs = convs[-1].out_channels
        if shortcut == "C" or (shortcut == "B" and (stride > 1 or inputs != outputs)):
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        elif shortcut == "A" and stride > 1:
            projection = Zeros(outputs - inputs)
        setattr(self, name, projection)

    def forward(self, x):
        y = x
        for number in range(1, self.count + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = functional.relu(y) if number < self.count else y
        return functional.relu(y if self.plain else y + getattr(self, self.name)(x))


class PreactBlock(nn.Module):
    """Pre-activation; a projection reads the activated input."""

    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        convs = convolutions(inputs, width, stride, bottleneck)
        for number, conv in enumerate(convs, start=1):
            setattr(self, f"bn{number}", nn.BatchNorm2d(conv.in_channels))
            setattr(self, f"conv{number}", conv)
        self.count, outputs = len(convs), convs[-1].out_channels
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        y = entry = functional.relu(self.bn1(x))
        for number in range(1, self.count + 1):
            y = functional.relu(getattr(self, f"bn{number}")(y)) if number > 1 else y
            y = getattr(self, f"conv{number}")(y)
        return y + (self.downsample(entry) if hasattr(self, "downsample") else x)


class WideBlock(nn.Module):
    """As `PreactBlock` with two 3×3, in xternalz' names."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        entry = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(entry))))
        return y + (self.convShortcut(entry) if hasattr(self, "convShortcut") else x)


class Stack(nn.Module):
    """Stem, three stages of blocks, pooled mean, classifier."""

    def __init__(self, stages, norm, head, classes, stem=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.stages, self.norm, self.head = list(stages), norm, head
        channels = stem
        for name, blocks in stages.items():
            owner, _, inner = name.partition(".")
            sequence = nn.Sequential(*blocks)
            setattr(self, owner, nn.ModuleDict({inner: sequence}) if inner else sequence)
            last = blocks[-1]
            channels = getattr(last, f"conv{getattr(last, 'count', 2)}").out_channels
        self.preact = isinstance(blocks[-1], PreactBlock | WideBlock)
        setattr(self, norm, nn.BatchNorm2d(channels if self.preact else stem))
        setattr(self, head, nn.Linear(channels, classes))

    def forward(self, x):
        x = self.conv1(x)
        if not self.preact:
            x = functional.relu(getattr(self, self.norm)(x))
        for name in self.stages:
            owner, _, inner = name.partition(".")
            x = (getattr(self, owner)[inner] if inner else getattr(self, owner))(x)
        if self.preact:
            x = functional.relu(getattr(self, self.norm)(x))
        return getattr(self, self.head)(x.mean((2, 3)))


def _stages(count, widths, first, expansion, make, name):
    stages, inputs = {}, first
    for stage, width in enumerate(widths, start=1):
        blocks = []
        for number in range(count):
            blocks.append(make(inputs, width, 2 if stage > 1 and number == 0 else 1))
            inputs = width * expansion
        stages[name.format(stage)] = blocks
    return stages


def resnet(depth, classes, shortcut="A", widths=(16, 32, 64), bottleneck=False, groups=1, stem=16, head="linear"):
    """ResNet, plain net or ResNeXt of depth 6n+2 (9n+2 with bottlenecks)."""
    name = "shortcut" if head == "linear" else "downsample"

    def make(inputs, width, stride):
        return Block(inputs, width, stride, shortcut, bottleneck, groups, name)

    count, expansion = ((depth - 2) // 9, 4) if bottleneck else ((depth - 2) // 6, 1)
    return Stack(_stages(count, widths, stem, expansion, make, "layer{}"), "bn1", head, classes, stem)


def preresnet(depth, classes, bottleneck):
    """Pre-activation ResNet of depth 6n+2 or 9n+2."""
    count, expansion = ((depth - 2) // 9, 4) if bottleneck else ((depth - 2) // 6, 1)
    stages = _stages(count, (16, 32, 64), 16, expansion, lambda *sizes: PreactBlock(*sizes, bottleneck), "layer{}")
    return Stack(stages, "bn", "fc", classes)


def wide_resnet(depth, widen, classes):
    """Wide ResNet of depth 6n+4."""
    stages = _stages((depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen), 16, 1, WideBlock, "block{}.layer")
    return Stack(stages, "bn1", "fc", classes)


# Our name -> function of the number of classes.
NETWORKS = {
    **{f"resnet{depth}": lambda classes, depth=depth: resnet(depth, classes) for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"resnet{depth}_b": lambda classes, depth=depth: resnet(depth, classes, "B") for depth in (20, 56, 110)},
    "resnet20_c": lambda classes: resnet(20, classes, "C"),
    "resnet32_b": lambda classes: resnet(32, classes, "B", head="fc"),
    **{f"plain{depth}": lambda classes, depth=depth: resnet(depth, classes, "none", head="fc") for depth in (20, 56, 110)},
    "preresnet110": lambda classes: preresnet(110, classes, False),
    "preresnet164": lambda classes: preresnet(164, classes, True),
    "preresnet1001": lambda classes: preresnet(1001, classes, True),
    **{
        f"wrn{depth}_{widen}": lambda classes, depth=depth, widen=widen: wide_resnet(depth, widen, classes)
        for depth, widen in ((16, 1), (16, 4), (28, 2), (28, 10), (40, 4))
    },
    **{
        f"resnext29_{groups}x64d": lambda classes, groups=groups: resnet(29, classes, "B", (64, 128, 256), True, groups, 64, "fc")
        for groups in (8, 16)
    },
}
# torch's repositories have the stride of a bottleneck in the 3×3, the paper's authors in the first 1×1.
OPTIONS = {"preresnet164": {"stride_in": "3x3"}, "preresnet1001": {"stride_in": "3x3"}}
# With six hundred blocks the usual random weights overflow.
GAINS = {"resnet1202": 0.35}
