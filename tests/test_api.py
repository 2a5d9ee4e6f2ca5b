"""The public names and signatures of both packages are those that `api.txt` lists, so that no change of the API goes unnoticed.

After an intended change, `python tests/test_api.py` rewrites that file.
"""

import dataclasses
import difflib
import inspect
import re
import sys
from pathlib import Path

FILE = Path(__file__).with_name("api.txt")
PLAIN = (bool, int, float, str, bytes, type(None))


def _value(value):
    if isinstance(value, (tuple, list)):
        items = ", ".join(map(_value, value))
        return f"({items}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else f"[{items}]"
    return repr(value) if isinstance(value, PLAIN) else "..."


def _annotation(annotation):
    """An annotation as written in the source, its classes without the module that defines them."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+([A-Z]\w*)", r"\1", text)


def _parameter(parameter):
    text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    return text if parameter.default is parameter.empty else f"{text} = {_value(parameter.default)}"


def signature(function):
    """A signature as one line; defaults that are objects are shown as `...`."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    parts, kinds = [], [parameter.kind for parameter in found.parameters.values()]
    for index, parameter in enumerate(found.parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY and not {parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY} & {*kinds[:index]}:
            parts.append("*")
        parts.append(_parameter(parameter))
    returns = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    return f"({', '.join(parts)}){returns}"


def _class_lines(name, kind):
    bases = [base.__name__ for base in kind.__bases__ if base is not object]
    yield f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            yield f"    {field.name}: {_annotation(field.type)}"
    elif "__init__" in vars(kind):
        yield f"    __init__{signature(kind.__init__)}"
    for member, value in sorted(vars(kind).items()):
        value = getattr(value, "__func__", value)
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"    {member} (property)"
        elif inspect.isfunction(value):
            yield f"    {member}{signature(value)}"


def describe(module, names):
    """The lines for some names of a module, sorted."""
    for name in sorted(names):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield from _class_lines(name, value)
        elif callable(value):
            yield f"{name}{signature(value)}"
        else:
            yield f"{name} = {_value(value)}"


def _own(module):
    """The public names that a module defines or re-exports from its own package; modules are listed by themselves."""
    stated = getattr(module, "__all__", None)
    if stated is not None:
        return [name for name in stated if not inspect.ismodule(getattr(module, name))]
    package = module.__name__.split(".")[0]
    found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [name for name, value in found.items() if (getattr(value, "__module__", None) or "").split(".")[0] == package]


def api():
    """The whole file."""
    import keras_resnet
    import keras_resnet.data
    import keras_resnet.training
    import resnet_export

    lines = []
    for module in (keras_resnet, keras_resnet.layers, keras_resnet.data, keras_resnet.training, resnet_export):
        models = keras_resnet.list_models() if module is keras_resnet else []
        lines += [f"# {module.__name__}", *describe(module, set(_own(module)) - set(models))]
        if models:
            lines += ["", f"# constructors of keras_resnet, each with the signature {signature(keras_resnet.resnet50)}", *models]
        lines.append("")
    return "\n".join(lines)


def test_public_names_and_signatures_are_those_of_the_file():
    want, got = FILE.read_text("utf-8"), api()
    changes = "\n".join(
        difflib.unified_diff(want.splitlines(), got.splitlines(), "tests/api.txt", "the packages", lineterm="", n=0)
    )
    assert got == want, f"the public API has changed; if it should, run `python tests/test_api.py`\n{changes}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    FILE.write_text(api(), "utf-8")
