"""Exact sizes: published counts, arithmetic on the config, and a walk over the layers must agree."""

import keras
import pytest

import keras_resnet as kr
from keras_resnet.models.build import outline
from keras_resnet.models.registry import config_of
from keras_resnet.zoo.counting import arithmetic, count, count_macs
from tests.helpers import grown26

# (variant, changed fields, trainable, with moving statistics, 10^9 or 10^6 multiply-adds as published, at the published size)
GIGA = [
    ("resnet18", {}, 11_689_512, 11_699_112, 1.814),
    ("resnet34", {}, 21_797_672, 21_814_696, 3.664),
    ("resnet26", {}, 15_995_176, 16_026_024, 2.342),
    ("resnet50", {}, 25_557_032, 25_610_152, 4.089),
    ("resnet50_v1", {}, 25_557_032, 25_610_152, 3.858),
    ("resnet101", {}, 44_549_160, 44_654_504, 7.801),
    ("resnet101_v1", {}, 44_549_160, 44_654_504, 7.570),
    ("resnet152", {}, 60_192_808, 60_344_232, 11.514),
    ("resnet152_v1", {}, 60_192_808, 60_344_232, 11.282),
    ("resnet200", {}, 64_673_832, 64_849_832, 15.007),
    ("resnet18d", {}, 11_708_744, 11_718_472, 2.054),
    ("resnet34d", {}, 21_816_904, 21_834_056, 3.903),
    ("resnet50c", {}, 25_576_264, 25_629_512, 4.329),
    ("resnet50d", {}, 25_576_264, 25_629_512, 4.329),
    ("resnet101d", {}, 44_568_392, 44_673_864, 8.041),
    ("resnet152d", {}, 60_212_040, 60_363_592, 11.753),
    ("resnet200d", {}, 64_693_064, 64_869_192, 15.247),
    ("resnet50s", {}, 25_680_808, 25_734_312, 5.444),
    ("resnet50t", {}, 25_573_728, 25_626_960, 4.297),
    ("resnetv2_18", {}, 11_687_720, 11_695_528, 1.814),
    ("resnetv2_34", {}, 21_795_880, 21_811_112, 3.664),
    ("resnetv2_50", {}, 25_549_352, 25_594_792, 4.089),
    ("resnetv2_101", {}, 44_541_480, 44_639_144, 7.801),
    ("resnetv2_152", {}, 60_185_128, 60_328_872, 11.514),
    ("resnetv2_200", {}, 64_666_152, 64_834_472, 15.007),
    ("resnet50_v1", {"conv_bias": ("stem", "inner", "last", "projection")}, 25_583_592, 25_636_712, 3.858),
    ("resnet101_v1", {"conv_bias": ("stem", "inner", "last", "projection")}, 44_601_832, 44_707_176, 7.570),
    ("resnet152_v1", {"conv_bias": ("stem", "inner", "last", "projection")}, 60_268_520, 60_419_944, 11.282),
    ("resnetv2_50_keras", {}, 25_568_360, 25_613_800, 3.482),
    ("resnetv2_101_keras", {}, 44_577_896, 44_675_560, 7.194),
    ("resnetv2_152_keras", {}, 60_236_904, 60_380_648, 10.907),
    ("resnet50_v1", {"conv_bias": ("stem",)}, 25_557_096, 25_610_216, 3.858),
    ("resnext50_32x4d", {}, 25_028_904, 25_097_128, 4.230),
    ("resnext101_32x4d", {}, 44_177_704, 44_315_560, 7.970),
    ("resnext101_32x8d", {}, 88_791_336, 88_994_216, 16.414),
    ("resnext101_64x4d", {}, 83_455_272, 83_658_152, 15.460),
    ("wide_resnet50_2", {}, 68_883_240, 68_951_464, 11.398),
    ("wide_resnet101_2", {}, 126_886_696, 127_024_552, 22.753),
    ("seresnet18", {"se_divisor": 1}, 11_778_592, 11_778_592 + 9_600, 1.814),
    ("seresnet18", {}, 11_779_624, 11_779_624 + 9_600, 1.814),
    ("seresnet34", {"se_divisor": 1}, 21_958_868, 21_958_868 + 17_024, 3.664),
    ("seresnet34", {}, 21_960_416, 21_960_416 + 17_024, 3.664),
    ("seresnet50", {}, 28_088_024, 28_141_144, 4.092),
    ("seresnet101", {}, 49_326_872, 49_432_216, 7.806),
    ("seresnet152", {}, 66_821_848, 66_973_272, 11.520),
    ("seresnext50_32x4d", {}, 27_559_896, 27_628_120, 4.233),
    ("seresnext101_32x4d", {}, 48_955_416, 49_093_272, 7.975),
    ("resnetrs50", {"input_size": 224}, 35_691_912, 35_745_288, 4.454),
    ("resnet18", {"shortcut": "projection_first"}, 11_693_736, 11_703_464, 1.827),
    ("resnet34", {"shortcut": "projection_first"}, 21_801_896, 21_819_048, 3.677),
    ("plain18", {}, 11_515_688, 11_523_496, 1.795),
    ("plain34", {}, 21_623_848, 21_639_080, 3.644),
]
MEGA = [
    ("resnet20", {}, 269_722, 271_098, 41),
    ("resnet32", {}, 464_154, 466_426, 69),
    ("resnet44", {}, 658_586, 661_754, 97),
    ("resnet56", {}, 853_018, 857_082, 125),
    ("resnet110", {}, 1_727_962, 1_736_058, 253),
    ("resnet1202", {}, 19_421_274, 19_510_906, 2_829),
    ("resnet20_b", {}, 272_474, 274_042, 41),
    ("resnet32_b", {}, 466_906, 469_370, 69),
    ("resnet44_b", {}, 661_338, 664_698, 97),
    ("resnet56_b", {}, 855_770, 860_026, 126),
    ("resnet110_b", {}, 1_730_714, 1_739_002, 253),
    ("resnet20_b", {"shortcut_norm": False}, 272_282, 273_658, 41),
    ("resnet56_b", {"shortcut_norm": False}, 855_578, 859_642, 126),
    ("resnet20", {"num_classes": 100}, 269_722 + 5_850, 271_098 + 5_850, 41),
    ("cifar_speed", {}, 1_971_338, 1_973_930, 118),
    ("preresnet164", {}, 1_703_258, 1_727_482, 245),
    ("preresnet1001", {}, 10_327_706, 10_476_922, 1_488),
    ("wrn16_4", {}, 2_748_890, 2_752_506, 393),
    ("wrn16_8", {}, 10_961_370, 10_968_570, 1_548),
    ("wrn28_2", {}, 1_467_610, 1_471_226, 214),
    ("wrn28_10", {}, 36_479_194, 36_497_146, 5_243),
    ("wrn28_10", {"num_classes": 100}, 36_536_884, 36_554_836, 5_243),
    ("wrn40_2", {}, 2_243_546, 2_248_954, 328),
    ("wrn40_4", {}, 8_949_210, 8_959_994, 1_299),
    ("wrn40_8", {}, 35_748_314, 35_769_850, 5_172),
    ("resnext29_8x64d", {}, 34_426_698, 34_484_170, 5_387),
    ("resnext29_16x64d", {}, 68_155_210, 68_255_690, 10_689),
]


def _id(row):
    return "-".join([row[0], *map(str, row[1].values())])


@pytest.mark.parametrize(("name", "fields", "trainable", "total", "giga"), GIGA, ids=map(_id, GIGA))
def test_imagenet_families_have_the_published_sizes(name, fields, trainable, total, giga):
    counts = arithmetic(config_of(name).replace(**fields))
    assert (counts.trainable, counts.total, round(counts.macs / 1e9, 3)) == (trainable, total, giga)


@pytest.mark.parametrize(("name", "fields", "trainable", "total", "mega"), MEGA, ids=map(_id, MEGA))
def test_cifar_families_have_the_published_sizes(name, fields, trainable, total, mega):
    counts = arithmetic(config_of(name).replace(**fields))
    assert (counts.trainable, counts.total, round(counts.macs / 1e6)) == (trainable, total, mega)


VGG = [
    ("vgg16", {}, 138_357_544, 138_357_544, 15.470),
    ("vgg16", {"include_top": False, "input_shape": (224, 224, 3)}, 14_714_688, 14_714_688, 15.347),
    ("vgg19", {}, 143_667_240, 143_667_240, 19.632),
    ("vgg19", {"include_top": False, "input_shape": (224, 224, 3)}, 20_024_384, 20_024_384, 19.508),
    ("vgg16_bn", {}, 138_365_992, 138_374_440, 15.470),
    ("resnet50", {"include_top": False, "input_shape": (224, 224, 3)}, 23_508_032, 23_561_152, None),
    ("resnet18", {"include_top": False, "input_shape": (224, 224, 3)}, 11_176_512, 11_186_112, None),
]


@pytest.mark.parametrize(("name", "changes", "trainable", "total", "giga"), VGG)
def test_model_info_walks_the_layers(name, changes, trainable, total, giga):
    info = kr.model_info(name, **changes)
    assert (info.trainable, info.total) == (trainable, total)
    assert giga is None or round(info.macs / 1e9, 3) == giga


# One of every kind of block, stem and shortcut; the arithmetic is not the builder, so the two check each other.
WALKED = [
    *("resnet18", "resnet50_v1", "resnet26t", "resnetv2_18d", "resnetv2_50_keras", "resnext50_32x4d", "seresnet18", "resnetrs50"),
    *("resnetblur50d", "resnetv2_50x1_bit", "plain20", "resnet20_a_fixup", "resnet20_a_avg", "resnet20_c", "wrn16_4"),
]


@pytest.mark.parametrize("name", WALKED)
def test_layer_walk_equals_arithmetic(name):
    config = config_of(name)
    assert count(outline(config)) == arithmetic(config)


@pytest.mark.parametrize("trunk", ["vgg16_w16", "vgg16_bn_w16"])
def test_a_grown_variant_is_what_grow_makes(trunk):
    row, grown = kr.create_model(f"{trunk}_grown26"), grown26(kr.create_model(trunk))
    assert [variable.path for variable in row.variables] == [variable.path for variable in grown.variables]
    assert count(outline(config_of(f"{trunk}_grown26"))) == count(grown)


def test_grown_variants_are_counted_by_a_layer_walk():
    with pytest.raises(ValueError, match="counted by a layer walk"):
        arithmetic(config_of("resnet20").replace(growth=kr.Growth([("stage1_block1_out", 2)])))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in kr.list_models() if config_of(name).family == "resnet"])
def test_layer_walk_equals_arithmetic_everywhere(name):
    config = config_of(name)
    assert count(outline(config)) == arithmetic(config)


@pytest.mark.parametrize("depth", [20, 32])
def test_a_plain_net_has_the_parameters_of_option_a(depth):
    plain, residual = kr.create_model(f"plain{depth}"), kr.create_model(f"resnet{depth}")
    assert plain.count_params() == residual.count_params()
    assert not [layer for layer in plain.layers if isinstance(layer, kr.layers.ResidualAdd)]


def test_multiply_adds_of_layers_outside_the_zoo():
    inputs = keras.Input((9, 7, 4))
    x = keras.layers.DepthwiseConv2D(3, strides=2, padding="valid")(inputs)
    x = keras.layers.Conv2D(6, (3, 1), groups=2, padding="same")(x)
    nested = keras.Sequential([keras.Input((4, 3, 6)), keras.layers.Conv2D(5, 2)])
    x = nested(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    by_hand = 4 * 3 * 9 * 4 + 4 * 3 * (3 * 2 * 6) + 3 * 2 * (2 * 2 * 6 * 5) + 3 * 2 * 5 * 3
    assert count_macs(model) == by_hand


def test_counting_only_reads():
    """A model from elsewhere has no calls more afterwards, nested ones neither."""
    inner = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, [inner(inputs), inner(keras.layers.Conv2D(3, 1)(inputs))])
    layers = [*model.layers, *inner.layers]
    before = [len(layer._inbound_nodes) for layer in layers]
    info = kr.model_info(model)
    assert [len(layer._inbound_nodes) for layer in layers] == before
    assert info.macs == 2 * 36 * 9 * 3 * 4 + 64 * 9


def test_blocks_as_layers_transposed_and_separable_convolutions_count():
    inputs = keras.Input((8, 6, 4))
    x = kr.layers.ResidualBlock(kind="bottleneck")(inputs)
    x = keras.layers.SeparableConv2D(5, 3, padding="same")(x)
    model = keras.Model(inputs, keras.layers.Conv2DTranspose(2, 3, strides=2)(x))
    assert count_macs(model) == 48 * (4 + 9 + 4) + 48 * (9 * 4 + 4 * 5) + 48 * 9 * 5 * 2


def test_multiply_adds_of_an_open_input_need_a_size():
    model = kr.create_model("resnet20", include_top=False)
    assert count_macs(model) is None
    assert count_macs(model, (32, 32, 3)) == count_macs(kr.create_model("resnet20", include_top=False, input_shape=(32, 32, 3)))


def test_an_outline_takes_no_memory_and_leaves_nothing_behind():
    model = outline(config_of("vgg19"))
    assert all(variable._value is None for variable in model.variables)
    other = kr.create_model("resnet20")
    with keras.StatelessScope():
        pass
    assert all(variable._value is None for variable in model.variables)
    assert all(variable._value is not None for variable in other.variables)
