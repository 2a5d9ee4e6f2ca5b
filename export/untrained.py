"""Fresh weights hide errors: a batch norm with mean 0 and variance 1, a bias or a gate of 0 can be wrong unnoticed."""

import contextlib

import numpy as np

STRENGTHS = (1.0, 0.3, 0.1, 0.03)
POSITIVE = ("gamma", "variance", "scale")


def hiding_variables(model):
    """The float variables whose entries are all equal: those of an untrained model's batch norms, biases and gates."""
    found = []
    for variable in model.weights:
        if "float" not in str(variable.dtype):
            continue
        values = np.asarray(variable, "float32")
        if values.size and (values.flat[0] == values).all():
            found.append(variable)
    return found


@contextlib.contextmanager
def randomised(interface, feeds, seed=0):
    """Give those variables random values while the block runs; they get their own back afterwards.

    Scales around 1 blow up the output of a very deep untrained network; they are made smaller until it is finite.

    Args:
        interface: `interface.Interface` of the model.
        feeds: a batch on which the output has to be finite.
        seed: seed of the values.
    """
    variables = hiding_variables(interface.model)
    before = [np.array(variable) for variable in variables]
    try:
        for strength in STRENGTHS:
            _assign(variables, strength, seed)
            reference, largest = interface.reference(feeds)
            if all(np.isfinite(value).all() for value in reference.values()) and max(largest.values()) < 1e12:
                break
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _assign(variables, strength, seed):
    rng = np.random.default_rng(seed)
    for variable in variables:
        shape = tuple(variable.shape)
        if any(word in variable.name for word in POSITIVE):
            low = strength if "variance" not in variable.name else 1.0
            variable.assign(low * rng.uniform(0.5, 1.5, shape))
        else:
            variable.assign(rng.normal(0, 0.3 / max(1.0, np.prod(shape[:-1])) ** 0.5, shape))
