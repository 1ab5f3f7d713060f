"""YAML as fewstep reads and writes it: an unquoted word means what the setting's declared type makes of it.

YAML 1.1 reads `5e-7` as text, `no` as false and `010` as 8. Here the reader leaves unquoted scalars as `Text`, exactly
like words of the command line, and the writer quotes every text that could be taken for something else.
"""

# pyright: reportUnknownMemberType=false
# The stubs of PyYAML leave the types of its nodes and values out.

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml

from fewstep.config.problems import ConfigError
from fewstep.errors import UserError, show
from fewstep.untrusted import text

_STR, _MAP, _SEQ = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # no file name, no UTF-8
_PLAIN = re.compile(
    r"(?!(?:none|null|true|false|yes|no|on|off|y|n|inf|nan|infinity)$)[A-Za-z_/][\w./@-]*", re.ASCII | re.IGNORECASE
)


# PyYAML reads some 100 kB a second; a configuration has a few.
_MAX_BYTES = 2**18
_MAX_DEPTH = 50


class Text(str):
    """A word without quotes: its meaning is decided by the declared type. A plain str is text and nothing else."""

    __slots__ = ()


def read_yaml(text: str) -> Any:
    """Mappings, lists, None, str (quoted) and Text (unquoted); ValueError with the line for what is not YAML."""
    try:
        loader: Any = _Loader(text)  # Any: PyYAML has no types
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" at line {error.problem_mark.line + 1}"
        raise UserError(f"not YAML{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}") from error


def read_yaml_mapping(text: str, where: str) -> Mapping[str, Any]:
    """The mapping that a document holds, {} if it is empty; ConfigError that starts with `where`."""
    try:
        data = read_yaml(text)
    except ValueError as error:
        raise ConfigError([(where, str(error))]) from error
    if data is not None and not isinstance(data, Mapping):
        raise ConfigError([(where, f"must hold a mapping of settings, as optim: {{lr: 1e-4}}, not {show(data)}")])
    return cast("Mapping[str, Any]", data or {})


def read_text(path: Path) -> str:
    """The text of a file; ConfigError that names it and what lies nearest."""
    try:
        return text.read_text(path, _MAX_BYTES)
    except UserError as error:
        raise ConfigError([("", str(error))]) from error
    except OSError as error:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, set(beside) - {path.name}, n=1)
        advice = f"; did you mean {path.parent / near[0]}?" if near else f" (looked in {path.parent.resolve()})"
        raise ConfigError([(str(path), f"cannot be read: {error.strerror}{advice}")]) from error


def write_yaml(data: Any) -> str:
    """Plain data as YAML that `read_yaml` and any YAML 1.1 or 1.2 reader understand alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=1 << 20)


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = cast("Any", self.peek_event())
        if self.check_event(yaml.AliasEvent):  # a few of them can stand for more than the memory holds
            problem = f"*{event.anchor} is not read: write out its value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # YAML forbids a key given twice; PyYAML silently takes the last.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | None:
    value = loader.construct_scalar(node)
    if _NO_TEXT.search(value):
        raise yaml.MarkedYAMLError(problem="holds a character that is no text", problem_mark=node.start_mark)
    if node.style is not None:
        return value
    return Text(value) if value not in ("", "~") else None


def _write_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    if _NO_TEXT.search(value):
        raise ConfigError([("", f"{value!r} holds a character that is no text: no file of settings can hold it")])
    return dumper.represent_scalar(_STR, value, style=None if _PLAIN.fullmatch(value) else '"')


def _write_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    on_one_line = not any(isinstance(item, (dict, list)) for item in value)
    return dumper.represent_sequence(_SEQ, value, flow_style=on_one_line)


# No other tag is understood: `!!timestamp x` and its kin are refused by the loader instead of crashing in it.
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    _STR: _read_scalar,
    _MAP: yaml.SafeLoader.construct_yaml_map,
    _SEQ: yaml.SafeLoader.construct_yaml_seq,
    None: yaml.SafeLoader.construct_undefined,
}
_Dumper.add_representer(str, _write_str)
_Dumper.add_representer(list, _write_list)
