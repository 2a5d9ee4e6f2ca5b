"""The public names. `__init__.py` imports them lazily from here, so this is the only place that lists them."""

import os
import typing

import keras

from . import blocks as blocks
from . import data as data
from . import graphs as graphs
from . import growth as growth
from . import layers as layers
from . import modelcard as modelcard
from . import models as models
from . import preprocessing as preprocessing
from . import training as training
from . import weights as weights
from . import zoo as zoo
from ._version import __version__ as __version__
from .blocks import ResidualBlock as ResidualBlock
from .blocks import find_blocks as find_blocks
from .blocks import residual_stack as residual_stack
from .growth import block_scales as block_scales
from .growth import depth_curve as depth_curve
from .growth import drift as drift
from .growth import grow as grow
from .growth import growth_scores as growth_scores
from .growth import identity_report as identity_report
from .growth import prune as prune
from .growth import with_drop_path as with_drop_path
from .growth import without_blocks as without_blocks
from .modelcard import ModelCard as ModelCard
from .modelcard import card as card
from .modelcard import set_card as set_card
from .models.loading import load_model_file as load_model_file
from .models.pretrained import load_weights as load_weights
from .models.pretrained import save_weights as save_weights
from .models.registry import ModelInfo as ModelInfo
from .models.registry import Plugin as Plugin
from .models.registry import constructor as constructor
from .models.registry import create_model as create_model
from .models.registry import list_models as list_models
from .models.registry import list_weights as list_weights
from .models.registry import model_info as model_info
from .models.transfer import add_preprocessing as add_preprocessing
from .models.transfer import freeze_batch_norm as freeze_batch_norm
from .models.transfer import replace_head as replace_head
from .models.transfer import with_card as with_card
from .preprocessing import Preprocessing as Preprocessing
from .weights.sources import WeightSource as WeightSource
from .zoo.assembly import feature_info as feature_info
from .zoo.config import Growth as Growth
from .zoo.config import ResNetConfig as ResNetConfig
from .zoo.config import VGGConfig as VGGConfig
from .zoo.config import config_from_dict as config_from_dict
from .zoo.whitening import whiten_stem as whiten_stem

# ---------------------------------------------------------------- written by scripts/models.py

class ResNetOptions(typing.TypedDict, total=False):
    include_top: bool
    pooling: str | None
    input_shape: tuple[int | None, ...] | None
    input_tensor: keras.KerasTensor | None
    preprocessing: str | dict[str, typing.Any] | None
    include_preprocessing: bool
    features_only: bool | str | typing.Sequence[str]
    data_format: str | None
    dtype: str | keras.DTypePolicy | None
    name: str | None
    labels: typing.Sequence[str] | None
    source: dict[str, typing.Any] | None
    image: dict[str, typing.Any] | None
    rank: int
    activation: str
    norm_epsilon: float
    norm_momentum: float
    preact: bool
    shortcut: str
    shortcut_norm: bool
    padding: str
    norm: str
    norm_groups: int
    norm_scale: bool
    weight_standardization: bool
    initializer: str
    conv_bias: tuple[str, ...]
    antialias: bool
    subsampling: str
    gate: str | None
    dropout: float
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    block: str
    groups: int
    base_width: int
    stem_widths: tuple[int, ...]
    stem_kernel: int
    stem_stride: int
    stem_whitening: bool
    stem_pool: str | None
    stride_in: str
    stride_block: str
    first_stride: int
    se_ratio: float
    se_divisor: int
    output_stride: int | None
    drop_path: float
    head_dropout: float
    head_pool: str
    head_scale: float
    input_size: int
    channels: int
    growth: Growth | None

class VGGOptions(typing.TypedDict, total=False):
    include_top: bool
    pooling: str | None
    input_shape: tuple[int | None, ...] | None
    input_tensor: keras.KerasTensor | None
    preprocessing: str | dict[str, typing.Any] | None
    include_preprocessing: bool
    features_only: bool | str | typing.Sequence[str]
    data_format: str | None
    dtype: str | keras.DTypePolicy | None
    name: str | None
    labels: typing.Sequence[str] | None
    source: dict[str, typing.Any] | None
    image: dict[str, typing.Any] | None
    rank: int
    activation: str
    norm_epsilon: float
    norm_momentum: float
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    width: int
    batch_norm: bool
    head: str
    head_widths: tuple[int, ...]
    head_size: int
    head_dropout: float
    input_size: int
    channels: int
    growth: Growth | None

def resnet18(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet26(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet34(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet101(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet152(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet200(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50_v1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet101_v1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet152_v1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet101c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet152c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet18d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet26d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet34d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet101d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet152d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet200d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50s(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet101s(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet152s(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet10t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet14t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet26t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet50t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_18(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_34(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_101(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_152(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_200(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_18d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_34d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_101d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_152d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50d_gn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50_keras(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_101_keras(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_152_keras(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetblur18(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetblur50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetblur50d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext50_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext50d_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext101_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext101_32x8d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext101_32x16d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext101_32x32d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext101_64x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wide_resnet50_2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wide_resnet101_2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet18(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet34(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet101(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet152(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet50t(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnet152d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnext26d_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnext26t_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnext50_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnext101_32x4d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def seresnext101_32x8d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetrs50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetrs101(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetrs152(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetrs200(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50x1_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_50x3_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_101x1_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_101x3_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_152x2_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnetv2_152x4_bit(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain18(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain34(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet20(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet32(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet44(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet56(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet110(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet1202(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet20_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet32_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet44_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet56_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet110_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet1202_a_fixup(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet20_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet32_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet44_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet56_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet110_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet1202_a_avg(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet20_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet32_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet44_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet56_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet110_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet1202_b(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet20_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet32_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet44_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet56_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet110_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnet1202_c(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain20(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain32(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain44(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain56(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def plain110(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def preresnet110(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def preresnet164(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def preresnet1001(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn16_1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn16_2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn16_4(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn16_8(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn16_10(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_4(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_8(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_10(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn28_12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn40_1(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn40_2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn40_4(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn40_8(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def wrn40_10(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext29_8x64d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def resnext29_16x64d(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def cifar_speed(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[ResNetOptions],
) -> keras.Model: ...
def vgg11(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_bn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_bn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_bn(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_bn_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_bn_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_bn_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg11_bn_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_bn_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_bn_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_bn_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg13_bn_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_bn_w12(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_bn_w16(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_bn_w25(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg19_bn_w50(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_w16_grown26(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
def vgg16_bn_w16_grown26(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    **options: typing.Unpack[VGGOptions],
) -> keras.Model: ...
