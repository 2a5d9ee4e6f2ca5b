"""Every function of `keras.ops`: how the tests call it, or why it is left out.

A call gets `x` (float, -2 to 2), `p` (float, 0.1 to 0.9), `k` (int32, 0 to 7), all of shape `[batch, height, width, 4]`.
"""

import keras
import tensorflow as tf
from keras import ops

BIT_SHIFTS = "bitwise_left_shift bitwise_right_shift left_shift right_shift".split()
ELEMENTWISE = {
    **{
        name: (lambda x, p, k, name=name: getattr(ops, name)(x))
        for name in (
            "abs absolute arcsinh arctan ceil celu conj conjugate copy cos cosh deg2rad elu erf erfc exp exp2 expm1 fabs floor"
            " gelu glu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh isfinite isinf isnan isneginf isposinf"
            " isreal leaky_relu log_sigmoid negative nan_to_num ones_like rad2deg real relu relu6 round selu sigmoid sign"
            " signbit silu sin sinc sinh soft_shrink softplus softsign sparse_plus sparse_sigmoid square squareplus"
            " stop_gradient swish tan tanh tanh_shrink trunc zeros_like cbrt"
        ).split()
        if hasattr(ops, name)
    },
    **{
        name: (lambda x, p, k, name=name: getattr(ops, name)(p))
        for name in "arccos arcsin arctanh log log10 log1p log2 reciprocal rsqrt sqrt".split()
    },
    **{
        name: (lambda x, p, k, name=name: getattr(ops, name)(x, p))
        for name in (
            "add arctan2 divide divide_no_nan equal floor_divide fmax fmin fmod greater greater_equal heaviside hypot isclose"
            " less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor maximum minimum mod multiply not_equal"
            " subtract true_divide"
        ).split()
    },
    **{name: (lambda x, p, k, name=name: getattr(ops, name)(k, k + 3)) for name in BIT_SHIFTS},
    **{
        f"{name} {dtype}": (
            lambda x, p, k, name=name, dtype=dtype: getattr(ops, name)(ops.cast(k - 3, dtype), ops.cast(k * k, dtype))
        )
        for name in "bitwise_and bitwise_or bitwise_xor".split()
        for dtype in ("int32", "uint8")
    },
    **{
        f"{name} of integers": (lambda x, p, k, name=name: getattr(ops, name)(3 * k - 10, ops.cast(x > 0, "int32") * 6 - 3))
        for name in "floor_divide mod".split()
    },
    "where of infinities": lambda x, p, k: ops.where(x > 0, ops.log(x), 0.0),
    "bitwise_invert": lambda x, p, k: ops.bitwise_invert(k),
    "bitwise_not": lambda x, p, k: ops.bitwise_not(k),
    "angle": lambda x, p, k: ops.angle(x),
    "arccosh": lambda x, p, k: ops.arccosh(p + 1),
    "cast": lambda x, p, k: ops.cast(x, "int32"),
    "saturate_cast": lambda x, p, k: ops.saturate_cast(100 * x, "uint8"),
    "clip": lambda x, p, k: ops.clip(x, -0.5, 0.7),
    "threshold": lambda x, p, k: ops.threshold(x, 0.3, -1.0),
    "power": lambda x, p, k: ops.power(p, x),
    "ldexp": lambda x, p, k: ops.ldexp(x, k),
    "logical_not": lambda x, p, k: ops.logical_not(x > 0),
    "where": lambda x, p, k: ops.where(x > 0, x, p),
    "select": lambda x, p, k: ops.select([x > 1, x > 0], [x, p], default=3.0),
    "digitize": lambda x, p, k: ops.digitize(x, [-1.0, 0.0, 0.5]),
    "searchsorted": lambda x, p, k: ops.searchsorted(ops.convert_to_tensor([-1.0, 0.0, 0.5]), ops.reshape(x, (-1,))),
    "full_like": lambda x, p, k: ops.full_like(x, 3),
    "mish": lambda x, p, k: keras.activations.mish(x),
}
REDUCTIONS = {
    **{
        f"{name} {axis} {keep}": (
            lambda x, p, k, name=name, axis=axis, keep=keep: getattr(ops, name)(x, axis=axis, keepdims=keep)
        )
        for name in "all amax amin any logsumexp max mean median min prod ptp std sum var nanmax nanmean nanmin nansum".split()
        for axis, keep in ((-1, True), ((1, 2), False))
        if not (name == "median" and axis == (1, 2))
    },
    **{
        f"{name} {axis}": (lambda x, p, k, name=name, axis=axis: getattr(ops, name)(x, axis=axis))
        for name in "argmax argmin".split()
        for axis in (-1, 1)
    },
    **{
        name: (lambda x, p, k, name=name: getattr(ops, name)(x, axis=(1, 2)))
        for name in "count_nonzero nanprod nanstd nanvar".split()
    },
    **{name: (lambda x, p, k, name=name: getattr(ops, name)(x, axis=-1)) for name in "nanargmax nanargmin".split()},
    **{
        name: (lambda x, p, k, name=name: getattr(ops, name)(p, axis=2)) for name in "cumprod cumsum nancumsum nancumprod".split()
    },
    "moments": lambda x, p, k: ops.moments(x, axes=(1, 2))[1],
    "norm": lambda x, p, k: ops.norm(x, axis=-1),
    "normalize": lambda x, p, k: ops.normalize(x, axis=-1),
    "quantile": lambda x, p, k: ops.quantile(x, 0.3, axis=-1),
    "percentile": lambda x, p, k: ops.percentile(x, 30, axis=-1),
    "softmax": lambda x, p, k: ops.softmax(x, axis=-1),
    "softmax of channels and height": lambda x, p, k: ops.softmax(x, axis=1),
    "log_softmax": lambda x, p, k: ops.log_softmax(x, axis=-1),
    "sparsemax": lambda x, p, k: ops.sparsemax(x, axis=-1),
    "diff": lambda x, p, k: ops.diff(x, axis=1),
    "trace": lambda x, p, k: ops.trace(x, axis1=1, axis2=3),
    "trapezoid": lambda x, p, k: ops.trapezoid(x, axis=-1),
    "layer_normalization": lambda x, p, k: ops.layer_normalization(x, axis=-1),
    "rms_normalization": lambda x, p, k: ops.rms_normalization(x, axis=-1),
    "batch_normalization": lambda x, p, k: ops.batch_normalization(
        x, ops.convert_to_tensor([0.1, 0.2, 0.3, 0.4]), ops.convert_to_tensor([1.0, 2.0, 3.0, 4.0]), axis=-1
    ),
    "top_k": lambda x, p, k: ops.top_k(x, 2)[0],
    "binary_crossentropy": lambda x, p, k: ops.binary_crossentropy(p, p),
    "categorical_crossentropy": lambda x, p, k: ops.categorical_crossentropy(p, p),
    "sparse_categorical_crossentropy": lambda x, p, k: ops.sparse_categorical_crossentropy(k[..., 0] // 2, p),
    "psnr": lambda x, p, k: ops.psnr(x, p, 2.0),
}
SHAPES = {
    "append": lambda x, p, k: ops.append(x, p, axis=1),
    "broadcast_to": lambda x, p, k: ops.broadcast_to(ops.mean(x, axis=(1, 2), keepdims=True), ops.shape(x)),
    "concatenate": lambda x, p, k: ops.concatenate([x, p], axis=2),
    "argsort": lambda x, p, k: ops.argsort(x, axis=-1),
    "array_split": lambda x, p, k: ops.array_split(x, 3, axis=-1)[0],
    "depth_to_space": lambda x, p, k: ops.depth_to_space(x, 2),
    "space_to_depth": lambda x, p, k: ops.space_to_depth(x, 2),
    "diagonal": lambda x, p, k: ops.diagonal(x, axis1=1, axis2=3),
    "dsplit": lambda x, p, k: ops.dsplit(ops.transpose(x, (0, 1, 3, 2)), 2)[1],
    "vsplit": lambda x, p, k: ops.hsplit(ops.transpose(x, (0, 3, 1, 2)), 2)[0],
    "hsplit": lambda x, p, k: ops.hsplit(ops.transpose(x, (0, 3, 1, 2)), 2)[1],
    "dstack": lambda x, p, k: ops.dstack([x, p]),
    "hstack": lambda x, p, k: ops.hstack([x, p]),
    "vstack": lambda x, p, k: ops.vstack([x, p]),
    "expand_dims": lambda x, p, k: ops.expand_dims(x, 1),
    "flip": lambda x, p, k: ops.flip(x, axis=1),
    "fliplr": lambda x, p, k: ops.fliplr(x),
    "get_item": lambda x, p, k: ops.get_item(x, (slice(None), slice(1, 4), 2)),
    "moveaxis": lambda x, p, k: ops.moveaxis(x, 1, -1),
    "pad": lambda x, p, k: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "pad reflect": lambda x, p, k: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), mode="reflect"),
    "pad symmetric": lambda x, p, k: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), mode="symmetric"),
    "ravel": lambda x, p, k: ops.ravel(x),
    "rearrange": lambda x, p, k: ops.rearrange(x, "b h w c -> b c h w"),
    "repeat": lambda x, p, k: ops.repeat(x, 2, axis=2),
    "reshape": lambda x, p, k: ops.reshape(x, (-1, ops.shape(x)[1], ops.shape(x)[2] * 4)),
    "roll": lambda x, p, k: ops.roll(x, 2, axis=1),
    "rot90": lambda x, p, k: ops.rot90(x, axes=(1, 2)),
    "shape": lambda x, p, k: ops.cast(ops.shape(x)[1], "float32") * x,
    "size": lambda x, p, k: ops.cast(ops.size(x), "float32") * x,
    "slice": lambda x, p, k: ops.slice(x, (0, 1, 1, 0), (1, 3, 2, 2)),
    "slice_update": lambda x, p, k: ops.slice_update(x, (0, 1, 1, 0), p[:1, 1:3, 1:3, :2]),
    "sort": lambda x, p, k: ops.sort(x, axis=-1),
    "split": lambda x, p, k: ops.split(x, 2, axis=-1)[1],
    "squeeze": lambda x, p, k: ops.squeeze(ops.max(x, axis=1, keepdims=True), axis=1),
    "stack": lambda x, p, k: ops.stack([x, p], axis=3),
    "swapaxes": lambda x, p, k: ops.swapaxes(x, 1, 3),
    "take": lambda x, p, k: ops.take(x, [2, 0], axis=1),
    "take_along_axis": lambda x, p, k: ops.take_along_axis(x, ops.argsort(p, axis=-1), axis=-1),
    "tile": lambda x, p, k: ops.tile(x, (1, 2, 1, 3)),
    "transpose": lambda x, p, k: ops.transpose(x, (0, 3, 2, 1)),
    "tril": lambda x, p, k: ops.tril(x),
    "triu": lambda x, p, k: ops.triu(x, 1),
    "unstack": lambda x, p, k: ops.unstack(x, axis=-1)[1],
    "meshgrid": lambda x, p, k: ops.meshgrid(x[0, 0, 0], p[0, 0, 0])[1],
    "one_hot": lambda x, p, k: ops.one_hot(k, 9),
    "multi_hot": lambda x, p, k: ops.multi_hot(k, 9),
}
PRODUCTS = {
    "matmul": lambda x, p, k: ops.matmul(x, ops.swapaxes(p, 2, 3)),
    "einsum": lambda x, p, k: ops.einsum("bhwc,bhvc->bhwv", x, p),
    "dot": lambda x, p, k: ops.dot(x, ops.reshape(ops.arange(12, dtype="float32"), (4, 3))),
    "tensordot": lambda x, p, k: ops.tensordot(x, ops.reshape(ops.arange(12, dtype="float32"), (4, 3)), axes=1),
    "outer": lambda x, p, k: ops.outer(x[0, 0, 0], p[0, 0, 0]),
    "vdot": lambda x, p, k: ops.vdot(x, p),
    "cross": lambda x, p, k: ops.cross(x[..., :3], p[..., :3]),
    "cdist": lambda x, p, k: ops.cdist(x[:, 0], p[:, 1]),
    "dot_product_attention": lambda x, p, k: ops.dot_product_attention(x, p, x),
    "conv": lambda x, p, k: ops.conv(x, ops.ones((3, 3, 4, 2)), padding="same", strides=2),
    "conv_transpose": lambda x, p, k: ops.conv_transpose(x, ops.ones((3, 3, 2, 4)), strides=2),
    "depthwise_conv": lambda x, p, k: ops.depthwise_conv(x, ops.ones((3, 3, 4, 2)), padding="same"),
    "separable_conv": lambda x, p, k: ops.separable_conv(x, ops.ones((3, 3, 4, 2)), ops.ones((1, 1, 8, 3)), padding="same"),
    "average_pool": lambda x, p, k: ops.average_pool(x, 2, padding="same"),
    "max_pool": lambda x, p, k: ops.max_pool(x, 3, 2, padding="same"),
    "adaptive_average_pool": lambda x, p, k: ops.adaptive_average_pool(x, (2, 3)),
    "adaptive_max_pool": lambda x, p, k: ops.adaptive_max_pool(x, (2, 3)),
}
IMAGES = {
    **{
        f"{method} {antialias}": (
            lambda x, p, k, method=method, antialias=antialias: tf.image.resize(x, (9, 5), method, antialias=antialias)
        )
        for method in "bilinear nearest bicubic lanczos3 lanczos5 area".split()
        for antialias in (False, True)
    },
    "twice as large": lambda x, p, k: tf.image.resize(x, (12, 16)),
    "the same size": lambda x, p, k: tf.image.resize(x, (6, 8), "bicubic"),
    "one image": lambda x, p, k: tf.image.resize(x[0], (9, 5), "lanczos3"),
    "integers, nearest": lambda x, p, k: tf.image.resize(k, (9, 5), "nearest"),
    "integers, bicubic": lambda x, p, k: tf.image.resize(k, (9, 5), "bicubic"),
    "crop to aspect ratio": lambda x, p, k: ops.image.resize(x, (9, 5), "bicubic", crop_to_aspect_ratio=True),
    "pad to aspect ratio": lambda x, p, k: ops.image.resize(x, (9, 5), "lanczos5", pad_to_aspect_ratio=True),
    "image patches": lambda x, p, k: tf.image.extract_patches(x, [1, 3, 2, 1], [1, 2, 1, 1], [1, 1, 2, 1], "VALID"),
    "image patches, same": lambda x, p, k: tf.image.extract_patches(x, [1, 3, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1], "SAME"),
}
FIXED_SIZE_IMAGES = {
    method: (lambda x, p, k, method=method: tf.image.resize(x, (9, 5), method)) for method in ("gaussian", "mitchellcubic")
}
LINES = (0, 2, 3, 1)  # the axes in an order in which the last one has several numbers
SPECTRA = {
    "fft": lambda x, p, k: ops.stack(ops.fft((ops.transpose(x, LINES), ops.transpose(p, LINES))), -1),
    "rfft": lambda x, p, k: ops.stack(ops.rfft(x), -1),
    "rfft, shorter": lambda x, p, k: ops.stack(ops.rfft(x, fft_length=3), -1),
    "rfft, longer": lambda x, p, k: ops.stack(ops.rfft(x, fft_length=9), -1),
    "irfft": lambda x, p, k: ops.irfft((x, p)),
    "irfft, shorter": lambda x, p, k: ops.irfft((x, p), fft_length=5),
    "back and forth": lambda x, p, k: ops.irfft(ops.rfft(x), fft_length=4),
    "stft": lambda x, p, k: ops.stack(ops.stft(ops.tile(x[:, 0, 0], (1, 6)), 8, 3, 8), -1),
    "istft": lambda x, p, k: ops.istft(ops.stft(ops.tile(x[:, 0, 0], (1, 6)), 8, 3, 8), 8, 3, 8),
    "absolute value of a complex number": lambda x, p, k: tf.abs(tf.signal.rfft(x)),
    "float64": lambda x, p, k: tf.cast(tf.abs(tf.signal.rfft(tf.cast(x, tf.float64))), tf.float32),
    "MelSpectrogram": lambda x, p, k: MEL(ops.tile(x[:, 0, 0], (1, 6))),
}
MEL = keras.layers.MelSpectrogram(8, 4, sampling_rate=40, num_mel_bins=4, min_freq=1, max_freq=20)
GROUPS = {"elementwise": ELEMENTWISE, "reductions": REDUCTIONS, "shapes": SHAPES, "products": PRODUCTS, "spectra": SPECTRA}

FIXED_SIZE_ONLY = {
    "fft": "the matrix of the transform needs its length",
    "adaptive_average_pool": "Keras infers no shape of it without the size; its layer has one",
    "adaptive_max_pool": "Keras infers no shape of it without the size; its layer has one",
    "trace": "onnxruntime has no Where for the type that tf2onnx gives it",
}
NO_COUNTERPART = {
    **dict.fromkeys("erfinv i0 nextafter".split(), "no such function in ONNX"),
    **dict.fromkeys(
        "cholesky cholesky_inverse det eig eigh inv logdet lstsq lu_factor matrix_rank pinv qr slogdet solve".split(),
        "linear algebra",
    ),
    **dict.fromkeys("solve_triangular svd".split(), "linear algebra"),
    **dict.fromkeys("fft2 ifft2 imag polar view_as_complex view_as_real".split(), "complex numbers"),
    **dict.fromkeys("ctc_decode ctc_loss in_top_k".split(), "losses and metrics"),
    **dict.fromkeys(
        "associative_scan cond custom_gradient fori_loop jvp map scan switch vectorize vectorized_map while_loop".split(),
        "control flow and transformations of functions",
    ),
    **dict.fromkeys(
        "gcd lcm average isin nanmedian nanquantile nanpercentile unfold inner kron".split(),
        "Keras cannot trace it with a batch of unknown size",
    ),
    **dict.fromkeys(
        "allclose argpartition bincount corrcoef correlate diag diagflat extract_sequences fold histogram nonzero scatter"
        " scatter_update segment_max segment_min segment_prod segment_sum unique unravel_index vander view flipud".split(),
        "works on vectors or across the batch, or has an output of unknown size",
    ),
    **dict.fromkeys(
        "arange array bartlett blackman empty empty_like eye full geomspace hamming hanning identity kaiser linspace logspace"
        " ones tri zeros".split(),
        "makes a constant",
    ),
    **dict.fromkeys(
        "convert_to_numpy convert_to_tensor dtype is_tensor ndim".split(),
        "computes nothing in a graph",
    ),
    **dict.fromkeys("image linalg nn numpy".split(), "a module"),
}
