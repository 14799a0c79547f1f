"""From words to things: ``--cfg.task=quadratic --cfg.task.dim=3``, in any order, nested.

A *kind* (task, optimizer, estimator, meta-optimizer) is a frozen base dataclass in its package. A
*thing* of that kind is a frozen subclass, or a plain function whose defaulted arguments are the
fields. A field whose type is a kind is a choice: a name of the package's dict, or
``MODULE:NAME`` of anybody's module. The class chosen brings its own fields and defaults.

Nothing here imports a package before a choice is made in it, so that most wrong commands
are refused at once.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launch.own_modules import faults_of, imported


class Kind(NamedTuple):
    """Where the things of a kind are.

    Attributes:
      word: what to call one.
      package: the module that holds the base class and the names.
      base: name of the base class there.
      names: name of the dict there, ``name -> thing``.
      given: what ``method`` gets, by position; a plain function takes those it has arguments for.
      method: of the base class, for which a plain function stands.
    """

    word: str
    package: str
    base: str
    names: str
    given: tuple[str, ...] = ()
    method: str = "make"

    def made(self) -> type:
        """What ``method`` returns."""
        base = getattr(self.module(), self.base)
        return typing.get_type_hints(getattr(base, self.method))["return"]

    def module(self) -> Any:
        return importlib.import_module(self.package)

    def things(self) -> dict[str, Any]:
        """The things that have a name."""
        return getattr(self.module(), self.names)


# By the base class, which is the type of a field that is a choice.
KINDS = {
    kind.base: kind
    for kind in (
        Kind("task", "tasks", "TaskConfig", "TASKS", ("data_dir",)),
        Kind("optimizer", "learned_opt", "OptimizerConfig", "OPTIMIZERS"),
        Kind(
            "estimator",
            "meta_train.estimators",
            "EstimatorConfig",
            "ESTIMATORS",
            ("system", "horizons", "job"),
        ),
        Kind(
            "meta-optimizer",
            "meta_train.meta_optimizers",
            "MetaOptimizerConfig",
            "META_OPTIMIZERS",
            ("learning_rate",),
            "optimizer",
        ),
    )
}


def thing(base: str, name: str, /, **values: Any) -> Any:
    """The thing of that name, with these values for its fields and its own defaults for others.

    Args:
      base: the kind, a key of ``KINDS``.
      name: a name of its dict, or ``MODULE:NAME``.

    Raises:
      ValueError: on an unknown name, field or value.
    """
    cls = find(KINDS[base], name)
    unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(_no_field(f"{KINDS[base].word} {name!r}", min(unknown), cls))
    return cls(**values)


def find(kind: Kind, name: str, *, importing: bool = True) -> type:
    """The class of the thing called ``name``.

    Args:
      importing: whether ``MODULE:NAME`` may import the module. Of what a file names, only
        modules that are already imported count: reading must not run code.

    Raises:
      ValueError: if there is none, with the names there are.
    """
    things = kind.things()
    if name in things:
        return _class_of(kind, things[name])
    module, colon, _ = name.partition(":")
    if not colon:
        raise ValueError(
            f"must be one of {', '.join(sorted(things))}, or MODULE:NAME for one of your own, "
            f"got {name!r}.{suggest(name, things)}"
        )
    if module not in sys.modules and not importing:
        raise ValueError(
            f"is {name!r}, which is not part of this library. Import {module} first "
            f"(on the command line: --import={module})."
        )
    thing = attribute_of(name)
    if not callable(thing):
        raise ValueError(
            f"names {name!r}, a {type(thing).__name__}, which must be a function or a {kind.base} "
            "dataclass."
        )
    if not importing:
        from learned_opt.named import check_named

        check_named(name, thing, (kind.made(), getattr(kind.module(), kind.base)))
    return _class_of(kind, thing)


def attribute_of(name: str) -> Any:
    """What ``MODULE:NAME`` names; imports the module.

    Raises:
      ValueError: as ``imported``, or if the module has none of that name.
    """
    module, _, attribute = name.partition(":")
    found = imported(module)
    if not hasattr(found, attribute):
        public = [word for word in vars(found) if not word.startswith("_")]
        raise ValueError(
            f"names {name!r}, but {module} has no {attribute!r}.{suggest(attribute, public)}"
            if attribute
            else f"names {name!r}, which must go on with a name after the colon."
        )
    return getattr(found, attribute)


@functools.cache
def _class_of(kind: Kind, thing: Any) -> type:
    """The thing itself if it is a dataclass of the kind, else the dataclass of a plain function."""
    base = getattr(kind.module(), kind.base)
    if isinstance(thing, type):
        if issubclass(thing, base) and "__dataclass_params__" in vars(thing):
            return thing
        raise ValueError(
            f"names the class {thing.__qualname__}, which must be a frozen dataclass derived from "
            f"{kind.package}.{kind.base}."
        )
    entries = []
    parameters = inspect.signature(thing).parameters
    base_fields = {f.name for f in dataclasses.fields(base)}
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"names the function {thing.__qualname__}, which takes `{parameter}`; the "
                "arguments are the fields of the configuration, name each one."
            )
        if parameter.name in kind.given and parameter.name not in base_fields:
            continue
        if parameter.default is parameter.empty:
            if parameter.name in kind.given:
                continue
            raise ValueError(
                f"names the function {thing.__qualname__}, whose argument `{parameter.name}` has "
                "no default; the arguments are the fields of the configuration, give each one."
            )
        if isinstance(parameter.default, list | dict | set):
            raise ValueError(
                f"names the function {thing.__qualname__}, whose argument `{parameter.name}` has "
                f"the default {parameter.default!r}, which could change; use a tuple."
            )
        if not _is_plain(parameter.default):
            raise ValueError(
                f"names the function {thing.__qualname__}, whose argument `{parameter.name}` has "
                f"a {type(parameter.default).__name__} as its default, which cannot be written to "
                "a file; use a number, a word, a tuple of these, or a configuration."
            )
        entry = dataclasses.field(default=parameter.default)
        entries.append((parameter.name, parameter.annotation, entry))
    passed = [name for name in kind.given if name in parameters]
    made = kind.made()
    where = f"{thing.__module__}:{thing.__qualname__}"

    def make(self: Any, *given: Any) -> Any:
        arguments = dict(zip(kind.given, given, strict=False))
        arguments = {name: arguments.get(name) for name in passed}
        fields = (f.name for f in dataclasses.fields(self) if f.name in parameters)
        arguments |= {name: getattr(self, name) for name in fields if name not in passed}
        ours = thing.__module__.partition(".")[0] in OURS
        named = faults_of(f"The {kind.word} {where} cannot be made")
        with contextlib.nullcontext() if ours else named:
            result = thing(**arguments)
        if not isinstance(result, made):
            raise ValueError(
                f"The function {where}, given as the {kind.word}, must return {made.__name__}, got "
                f"{type(result).__name__}."
            )
        return result

    namespace = {
        kind.method: make,
        "thing": staticmethod(thing),
        "__doc__": thing.__doc__,
        "__module__": thing.__module__,
    }
    return dataclasses.make_dataclass(
        thing.__qualname__,
        entries,
        bases=(base,),
        namespace=namespace,
        frozen=True,
    )


def _is_plain(value: Any) -> bool:
    """Whether it can be a field: what JSON has, a tuple of that, or a configuration."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (dataclasses.is_dataclass(value) and not isinstance(value, type))
    )


def name_of(config: Any) -> str:
    """The name under which ``find`` finds the class of ``config`` again."""
    kind = _kind_of_class(type(config))
    found = getattr(type(config), "thing", type(config))
    for name, known in kind.things().items():
        if known is found:
            return name
    return f"{found.__module__}:{found.__qualname__}"


def _kind_of_class(cls: type) -> Kind:
    return next(KINDS[base.__name__] for base in cls.__mro__ if base.__name__ in KINDS)


def kind_of(field: dataclasses.Field) -> Kind | None:
    """The kind of thing a field holds; None if it is no choice."""
    written = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    return KINDS.get(written.split("|")[0].strip().rpartition(".")[2])


def _kind_of_entries(field: dataclasses.Field) -> Kind | None:
    """The kind of thing a field holds a tuple of; None if it does not."""
    found = re.search(r"tuple\[(?:\w+\.)*(\w+)", str(field.type))
    return KINDS.get(found[1]) if found else None


# To and from JSON.


def to_dict(config: Any) -> Any:
    """A configuration, or a part of one, as nested dicts of JSON values; things say their name."""
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if not dataclasses.is_dataclass(config):
        return config
    named = any(base.__name__ in KINDS for base in inspect.getmro(type(config)))
    values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return ({"name": name_of(config)} if named else {}) | values


OURS = ("launch", "learned_opt", "meta_train", "tasks")


def modules_outside(tree: Any) -> list[str]:
    """The modules of things that are not of this library, in what ``to_dict`` wrote."""
    if isinstance(tree, dict):
        named, _, thing = str(tree.get("name", "")).partition(":")
        inner = (modules_outside(value) for value in tree.values())
        named_outside = thing and named.partition(".")[0] not in OURS
        found = [*([named] if named_outside else []), *(name for names in inner for name in names)]
    elif isinstance(tree, list):
        found = [name for value in tree for name in modules_outside(value)]
    else:
        found = []
    return list(dict.fromkeys(found))


def from_dict(cls: type, tree: Mapping[str, Any], where: str = "the file") -> Any:
    """Inverse of ``to_dict``. A field that the tree does not have is younger: at its default.

    Raises:
      ValueError: on a field or name that is not known here, or a value out of range.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} must have the fields of {cls.__name__}, got {tree!r}.")
    entries = {f.name: f for f in dataclasses.fields(cls)}
    unknown = tree.keys() - entries.keys() - {"name"}
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(map(repr, sorted(unknown)))}, which is no field of "
            f"{cls.__name__}: it was written by a newer version, or changed by hand."
        )
    values = {}
    for name, field in entries.items():
        if name in tree:
            values[name] = _read(field, tree[name], f"{where}, {name}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from None


def _read(field: dataclasses.Field, value: Any, where: str) -> Any:
    kind = kind_of(field)
    if kind and value is not None:
        return thing_from_dict(kind.base, value, where)
    several = _kind_of_entries(field)
    if several:
        return tuple(thing_from_dict(several.base, entry, where) for entry in value)
    plain = _plain_dataclass(field)
    if plain:
        return from_dict(plain, value, where)
    wanted = _JSON.get(type(_default(field)))
    if wanted and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
        raise ValueError(
            f"{where} must be {_TYPES.get(type(_default(field)), 'text')}, got {value!r}."
        )
    return tuple(value) if isinstance(value, list) else value


# What a value is in a file, by the type of its field's default.
_JSON: dict[type, Any] = {bool: bool, int: int, float: (int, float), str: str, tuple: (list, tuple)}


def thing_from_dict(base: str, tree: Mapping[str, Any], where: str = "the file") -> Any:
    """The thing that ``to_dict`` wrote; its module must have been imported by someone."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get("name"), str):
        raise ValueError(f"{where}: the {KINDS[base].word} must have a `name`, got {tree!r}.")
    try:
        cls = find(KINDS[base], tree["name"], importing=False)
    except ValueError as error:
        raise ValueError(f"{where}: the {KINDS[base].word} {error}") from None
    return from_dict(cls, {k: v for k, v in tree.items() if k != "name"}, where)


def _plain_dataclass(field: dataclasses.Field) -> type | None:
    """The class of a part of the configuration that is no choice."""
    factory = field.default_factory
    if kind_of(field):
        return None
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


# From the command line.


@dataclasses.dataclass
class Node:
    """What the words say of one field: its own value, if any, and those of the fields in it."""

    value: str | None = None
    children: dict[str, "Node"] = dataclasses.field(default_factory=dict)


def take_words(argv: Sequence[str], root: str) -> tuple[Node, list[str]]:
    """Splits ``argv`` into the words ``--ROOT.a.b=value``, as a tree, and all others."""
    top, rest, words = Node(), [], iter(argv)
    for word in words:
        match = re.match(rf"--?(no)?{root}\.([^=]*)(=?)(.*)$", word, re.S)
        if not match:
            rest.append(word)
            continue
        negated, path, equals, value = match.groups()
        if negated:
            raise ValueError(f"--no{root}.{path}: write --{root}.{path}=false.")
        node = top
        for part in path.split("."):
            node = node.children.setdefault(part, Node())
        node.value = value if equals else next(words, "")
    return top, rest


def words_of(node: Node, where: str) -> list[str]:
    """The words that ``take_words`` took, in the form ``--a.b=value``."""
    own = [] if node.value is None else [f"--{where}={node.value}"]
    inner = (words_of(child, f"{where}.{name}") for name, child in node.children.items())
    return [*own, *(word for words in inner for word in words)]


def check_plain(cls: type, node: Node, where: str) -> None:
    """Refuses what can be seen to be wrong before any package is imported.

    Raises:
      ValueError: on an unknown field, or a value of the wrong type, outside the choices.
    """
    entries = {f.name: f for f in dataclasses.fields(cls)}
    for name, child in node.children.items():
        if name not in entries:
            raise ValueError(_no_field(f"--{where}", name, cls))
        plain = _plain_dataclass(entries[name])
        if plain:
            check_plain(plain, child, f"{where}.{name}")
        elif not kind_of(entries[name]):
            _convert(child, entries[name], f"{where}.{name}")


def apply_words(config: Any, node: Node, where: str) -> Any:
    """The configuration with what the words say.

    A choice starts from the class's own defaults. Of the thing that was there before, values
    that differ from its class's defaults carry over to fields of the same name.

    Raises:
      ValueError: naming the word, what was given, and what would be right.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return _build(type(config), values, node, where)


def _build(cls: type, values: dict[str, Any], node: Node, where: str) -> Any:
    entries = {f.name: f for f in dataclasses.fields(cls)}
    values = dict(values)
    for name, child in node.children.items():
        if name not in entries:
            raise ValueError(_no_field(f"--{where}", name, cls))
        current, path = values.get(name), f"{where}.{name}"
        kind = kind_of(entries[name])
        if kind:
            values[name] = _choose(kind, current, child, path)
        elif dataclasses.is_dataclass(current):
            if child.value is not None:
                names = ", ".join(f.name for f in dataclasses.fields(current))
                raise ValueError(f"--{path} has fields, set one of them: {names}.")
            values[name] = apply_words(current, child, path)
        else:
            values[name] = _convert(child, entries[name], path)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        # "`sigma` must be ..." of --cfg.estimator is --cfg.estimator.sigma.
        named = re.match(r"`([\w.]+)`(.*)$", str(error), re.S)
        if named and named[1].partition(".")[0] in entries:
            raise ValueError(f"--{where}.{named[1]}{named[2]}") from None
        raise ValueError(f"--{where}: {error}") from None


def _choose(kind: Kind, current: Any, node: Node, where: str) -> Any:
    if node.value is None:
        if current is None:
            raise ValueError(
                f"--{where}.{next(iter(node.children))} needs --{where}=NAME: there is no "
                f"{kind.word} yet to set it for."
            )
        return apply_words(current, node, where)
    try:
        cls = find(kind, node.value)
    except ValueError as error:
        raise ValueError(f"--{where} {error}") from error.__cause__
    if type(current) is cls:
        return apply_words(current, node, where)
    carried = _changed(current) if current is not None else {}
    return _build(cls, _start(cls, carried), node, where)


def _changed(config: Any) -> dict[str, Any]:
    """Values that differ from the class's defaults, those of the things inside included."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if kind_of(field):
            changed |= _changed(value)
        elif value != _default(field):
            changed[field.name] = value
    return changed


def _start(cls: type, carried: dict[str, Any]) -> dict[str, Any]:
    """The class's defaults, with carried values where they fit; also in the things inside."""
    values = {}
    for field in dataclasses.fields(cls):
        default = _default(field)
        if kind_of(field) and default is not None:
            values[field.name] = type(default)(**_start(type(default), carried))
        elif field.name in carried:
            values[field.name] = carried[field.name]
        elif default is not dataclasses.MISSING:
            values[field.name] = default
    return values


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "numbers in parentheses, as (32,32)",
}


def _convert(node: Node, field: dataclasses.Field, where: str) -> Any:
    """The value of a word, of the type of the field's default (or, for None, its annotation)."""
    if node.children:
        name = next(iter(node.children))
        raise ValueError(f"--{where}.{name}: --{where} is a value and has no field {name!r}.")
    if _kind_of_entries(field):
        raise ValueError(f"--{where} is written in a preset or a module of yours, not in words.")
    text, default = node.value or "", _default(field)
    kind = type(default)
    if default is None or default is dataclasses.MISSING:
        written = str(field.type)
        if default is None and text.lower() == "none":
            return None
        kind = next((t for t in (bool, int, float, tuple) if t.__name__ in written), str)
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            return _whole(text)
        if kind is float:
            return float(text)
        if kind is tuple:
            return _numbers(text, _whole if "float" not in str(field.type) else float)
        return kind(ast.literal_eval(text))
    except (ValueError, KeyError, SyntaxError, TypeError):
        wanted = _TYPES.get(kind, f"a {kind.__name__}")
        raise ValueError(f"--{where} must be {wanted}, got {text!r}.") from None


def _whole(value: Any) -> int:
    """A whole number, also as ``1e6`` or ``1_000``."""
    try:
        return int(value) if not isinstance(value, float) else _integral(value)
    except ValueError:
        return _integral(float(value))


def _integral(value: float) -> int:
    if not value.is_integer():
        raise ValueError
    return int(value)


def _numbers(text: str, element: Callable[[Any], Any]) -> tuple:
    value = ast.literal_eval(text) if text.strip() else ()
    return tuple(
        element(entry) for entry in (value if isinstance(value, tuple | list) else (value,))
    )


# What users read.


def suggest(word: str, valid: Any) -> str:
    """`` Did you mean ...?`` if something similar is valid, else nothing."""
    by_lower = {name.lower(): name for name in valid}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[found[0]]!r}?" if found else ""


def _no_field(where: str, name: str, cls: type) -> str:
    names = [field.name for field in dataclasses.fields(cls)]
    # A field of a part is often asked of the whole: `--cfg.horizon` is `--cfg.inner.horizon`.
    inner = [path for path in plain_paths(cls, where) if path.endswith(f".{name}")]
    hint = f" Did you mean {inner[0]}?" if inner else suggest(name, names)
    chosen = [f"{where}.{f.name}.FIELD" for f in dataclasses.fields(cls) if kind_of(f)]
    if chosen and not hint:
        hint = f" The fields of what is chosen are written {', '.join(chosen)}."
    return f"{where} has no field {name!r}; its fields are: {', '.join(names) or 'none'}.{hint}"


def plain_paths(cls: type, where: str) -> Iterator[str]:
    """The paths of all fields outside the choices, and of the choices themselves."""
    for field in dataclasses.fields(cls):
        plain = _plain_dataclass(field)
        if plain:
            yield from plain_paths(plain, f"{where}.{field.name}")
        else:
            yield f"{where}.{field.name}"


class Described(NamedTuple):
    """A line of the help: the flag, its value, what it is."""

    flag: str
    value: str
    words: str


def describe(config: Any, where: str) -> Iterator[Described]:
    """Every field of a configuration, depth first, with the words of its class's docstring."""
    words = field_words(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{where}.{field.name}"
        text, kind = words.get(field.name, ""), kind_of(field)
        if kind:
            names = ", ".join(sorted(kind.things()))
            text = f"{text} One of {names}; or MODULE:NAME."
            yield Described(f"--{path}", name_of(value) if value is not None else "none", text)
            if value is not None:
                yield from describe(value, path)
        elif dataclasses.is_dataclass(value):
            yield from describe(value, path)
        else:
            shown = str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
            yield Described(f"--{path}", shown, text)


def field_words(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field."""
    words: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", doc, re.M):
            for name, text in re.findall(r"^  (\w+): (.*(?:\n {3,}.*)*)", section, re.M):
                words[name] = " ".join(text.split())
    return words
