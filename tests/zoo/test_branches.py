"""One table of residual branches: whatever is a row, the zoo and growth build it, and they build the same."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.blocks import BRANCHES, BlockStyle, LayerKit, LayerStyle
from keras_resnet.growth import KINDS
from keras_resnet.models.build import outline
from keras_resnet.zoo.counting import arithmetic, count
from tests.helpers import randomise


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("block", BRANCHES)
def test_every_row_is_a_block_of_the_zoo(block, preact):
    config = kr.ResNetConfig(depths=(2, 1), widths=(8, 16), stem_widths=(8,), block=block, preact=preact, input_size=32)
    assert count(outline(config)) == arithmetic(config)
    assert kr.config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize("kind", KINDS)
def test_the_zoo_and_growth_build_the_same_block(kind):
    row = KINDS[kind]
    block = next(name for name, branch in BRANCHES.items() if branch is row.branch)
    # Where no norm follows the last convolution, growth gives it a bias.
    bias = ("last",) if row.preact else ()
    style = BlockStyle(preact=row.preact, shortcut="projection" if row.residual else "none", conv_bias=bias)
    inputs = keras.Input((9, 8, 16))
    zoo = keras.Model(inputs, kr.blocks.residual(inputs, 16, block=block, style=style, name="block"))
    rectified = keras.Input((9, 8, 16))
    x = keras.layers.ReLU()(rectified)
    grown = randomise(keras.Model(rectified, kr.residual_stack(x, 1, kind, gate="none")))
    zoo.set_weights(grown.get_weights())
    pixels = np.abs(np.random.default_rng(0).standard_normal((2, 9, 8, 16))).astype("float32")
    np.testing.assert_array_equal(np.asarray(zoo(pixels)), np.asarray(grown(pixels)))


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="unknown `block` 'basik'; did you mean 'basic'"):
        kr.blocks.residual(keras.Input((8, 8, 4)), 4, block="basik", name="b")
    with pytest.raises(ValueError, match="`block` must be one of 'basic', 'bottleneck', 'depthwise', got 'wide'"):
        kr.ResNetConfig((1,), (8,), block="wide")


def test_a_style_without_blocks_is_refused():
    kit = LayerKit(LayerStyle())
    with pytest.raises(TypeError, match="must be a BlockStyle or a ResNetConfig, got LayerStyle"):
        kr.blocks.basic(keras.Input((8, 8, 4)), 4, name="block", kit=kit)
    with pytest.raises(TypeError, match="must be a ResNetConfig or a VGGConfig, got BlockStyle"):
        kr.feature_info(BlockStyle())
