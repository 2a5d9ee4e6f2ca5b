"""Graph passes, one small file per subject; each changes an onnx-ir graph in place and keeps what it computes."""

import onnx_ir as ir

from .affine import fold_affine, permute_flattened, write_batch_norm
from .constants import drop_identities, fold_constants
from .pools import guard_pads, merge_pads, settle_same_padding, split_means, write_global_pools
from .reshapes import merge_reshapes
from .resizes import settle_resizes
from .sequence import sequence
from .simplify import drop_neutral, fix_reshapes, settle_groups, spell_out_erfc, write_split_sizes
from .transposes import sink_transposes

ORDER = (
    spell_out_erfc,
    settle_groups,
    fold_constants,
    drop_identities,
    drop_neutral,
    fix_reshapes,
    fold_constants,
    settle_resizes,
    write_split_sizes,
    sink_transposes,
    drop_identities,
    fold_constants,
    fold_affine,
    write_batch_norm,
    write_global_pools,
    split_means,
    settle_same_padding,
    merge_pads,
    permute_flattened,
    fold_affine,
    merge_reshapes,
    guard_pads,
)


def finished(model: ir.Model, *, inputs: list[str], outputs: list[str], target: int, channels_first: bool = False) -> ir.Model:
    """Turn a translated model into the model of the file; see `sequence.sequence` for the arguments."""
    steps = sequence(ORDER, inputs=inputs, outputs=outputs, target=target, channels_first=channels_first)
    return steps(model).model
