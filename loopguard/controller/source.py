"""The source of a function or a class, with all that it refers to, as one text that runs elsewhere.

Lives here: what such a text may consist of. Modules and what stands in them become imports, constants become literals,
functions and classes of the same file come along. Whatever else a name may stand for lives in this process alone, and a
copy of it would not be it; so it is refused, with what to do instead.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import sys
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loopguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = frozenset({"tool", "wrap_environment"})
"""Names of the methods of a guard that stand as decorators over what they take."""

_PREAMBLE = "from __future__ import annotations\n"
_FROM_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def portable(what: types.FunctionType | type, *, first: str = "") -> str:
    """The text that defines `what` in an empty module. Annotations in it are never evaluated.

    Constants are as they are now. `first` is code that runs before everything else. Raises UsageError for what cannot
    travel.
    """
    return _PREAMBLE + first + "\n".join(_Text(what).parts)


class _Text:
    """The parts of one text, in the order in which they have to run."""

    def __init__(self, what: types.FunctionType | type) -> None:
        self.parts: list[str] = []
        self._who = what.__name__
        self._globals = _globals(what)
        self._home = what.__module__
        self._known = {what.__name__}
        self._add(what)

    def _add(self, what: types.FunctionType | type) -> None:
        if isinstance(what, types.FunctionType):
            check_plain(what)
        definition = _definition(what)
        text = ast.unparse(definition)
        code = compile(_PREAMBLE + text, self._who, "exec", dont_inherit=True)
        names = _names(code, who=self._who)
        _check_inner(what, code, names)
        for name in sorted(names):
            # A name of the file's own goes before a builtin of that name.
            builtin = name not in self._globals and hasattr(builtins, name)
            if name not in self._known and not builtin:
                self._known.add(name)
                self._take(name)
        for name in sorted(_annotating(definition) & self._globals.keys() - self._known):
            # Most classes never read them, so what cannot travel is refused by those alone that miss it.
            with suppress(UsageError):
                self._take(name)
                self._known.add(name)
        self.parts.append(text)

    def _take(self, name: str) -> None:
        if name not in self._globals:
            raise UsageError(
                f"{self._who} refers to {name}, which is not there: define it at the top of the file and above, "
                f"or inside of {self._who}"
            )
        value = self._globals[name]
        if isinstance(value, types.ModuleType):
            self.parts.append(_import(value, name, who=self._who))
        elif isinstance(value, (types.FunctionType, type)) and value.__module__ == self._home:
            if value.__name__ == "<lambda>":
                raise UsageError(f"{self._who} refers to {name}, a lambda: write it as a def")
            if value.__name__ != name:
                raise UsageError(
                    f"{self._who} calls {value.__name__} by the name {name}: use the name it is defined by"
                )
            self._add(value)
        elif (line := _imported(value, name, home=self._home)) or (line := _constant(value, name)):
            self.parts.append(line)
        else:
            raise UsageError(
                f"{self._who} refers to {name}, a {type(value).__name__} of this process, which no cell has: "
                f"make it inside of {self._who}, or pass it as an argument"
            )


def check_plain(function: types.FunctionType) -> None:
    """Raises UsageError for a function whose source is not all there is to it."""
    name = function.__name__
    if hasattr(function, "__wrapped__"):
        raise UsageError(f"{name} is decorated, so its source is not what runs: hand in the plain function")
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        free = ", ".join(function.__code__.co_freevars)
        raise UsageError(f"{name} is a closure over {free}, which no cell has: pass {free} as arguments instead")


def _globals(what: types.FunctionType | type) -> dict[str, Any]:
    if isinstance(what, types.FunctionType):
        return what.__globals__
    module = sys.modules.get(what.__module__)
    return vars(module) if module is not None else {}


def _definition(what: types.FunctionType | type) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef:
    """The syntax tree of a definition, without the decorators that have no place in a cell."""
    name = what.__name__
    try:
        source = inspect.getsource(what)
    except (OSError, TypeError) as error:
        raise UsageError(
            f"the source of {name} cannot be found ({error}): define it in a file, so that it can be sent to a cell"
        ) from error
    # Not dedented: that would reach into texts of several lines.
    tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    found = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or found.name != name:
        raise UsageError(f"the source of {name} is not a definition by that name: define it with def or class")
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(found)):
        raise UsageError(f"{name} imports relative to its package, which no cell has: import by the full name")
    decorators = found.decorator_list
    ours = max((i for i, each in enumerate(decorators) if _is_ours(each)), default=-1)
    # What stands over ours takes what we give back. A function that came here plain has nothing under ours that counts.
    found.decorator_list = decorators[ours + 1 :] if isinstance(found, ast.ClassDef) else []
    return found


def _is_ours(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Attribute) and decorator.attr in OURS


def _check_inner(what: types.FunctionType | type, code: types.CodeType, names: set[str]) -> None:
    """Raises UsageError for what stands in a function and refers to a name of it: a global of that name is another."""
    if "<locals>" not in what.__qualname__:
        return
    inner = {name for name in _at_once(code) if not hasattr(builtins, name)} | (_free(what) & names)
    if inner:
        raise UsageError(
            f"{what.__name__} stands in a function and refers to {', '.join(sorted(inner))}, which may be a name of "
            f"that function: define {what.__name__} at the top of its file"
        )


def _at_once(code: types.CodeType) -> Iterator[str]:
    """The names that are looked up while a definition runs: bases, defaults, what the body of a class refers to."""
    steps = list(dis.get_instructions(code))
    own = {step.argval for step in steps if step.opname == "STORE_NAME"} | {"__name__"}
    yield from (step.argval for step in steps if step.opname == "LOAD_NAME" and step.argval not in own)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and not inner.co_flags & inspect.CO_OPTIMIZED:
            yield from _at_once(inner)


def _free(what: types.FunctionType | type) -> set[str]:
    """The names that the methods of a class take from the function around it."""
    members = [getattr(each, "__func__", getattr(each, "fget", each)) for each in vars(what).values()]
    plain = [inspect.unwrap(each) for each in members if callable(each)]
    return {name for each in plain if isinstance(each, types.FunctionType) for name in each.__code__.co_freevars}


def _annotating(definition: ast.stmt) -> set[str]:
    """The names in the annotations of a class's attributes, which some classes read when they are made."""
    if not isinstance(definition, ast.ClassDef):
        return set()
    annotations = (each.annotation for each in definition.body if isinstance(each, ast.AnnAssign))
    return {node.id for each in annotations for node in ast.walk(each) if isinstance(node, ast.Name)}


def _names(code: types.CodeType, *, who: str) -> set[str]:
    """The names that code takes from the module around it or from the builtins."""
    # Every module has its own `__name__` and the like.
    return {name for name in _loaded(code, who=who) if not (name.startswith("__") and name.endswith("__"))}


def _loaded(code: types.CodeType, *, who: str) -> Iterator[str]:
    own: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise UsageError(
                f"{who} keeps {step.argval} in a global, and each call runs in a process of its own: give it back as "
                f"a result, or use guard.wrap_environment, whose instances keep their state"
            )
        if step.opname == "STORE_NAME":
            own.add(step.argval)
    yield from (
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in _FROM_GLOBALS and not (step.opname != "LOAD_GLOBAL" and step.argval in own)
    )
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _loaded(inner, who=who)


def _import(module: types.ModuleType, name: str, *, who: str) -> str:
    if module.__name__ == "__main__":
        raise UsageError(f"{who} refers to {name}, the script that runs here, which no cell has: pass what it needs")
    return f"import {module.__name__} as {name}"


def _imported(value: Any, name: str, *, home: str) -> str:
    """The line that imports what stands in another module than `home` by a name of its own; empty where none does."""
    there, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(there, str) or not isinstance(own, str) or there in ("__main__", home) or not own.isidentifier():
        return ""
    return f"from {there} import {own} as {name}" if getattr(sys.modules.get(there), own, None) is value else ""


def _constant(value: Any, name: str) -> str:
    """The line that makes an equal constant; empty for what is not made of plain values."""
    try:
        text = repr(value)
        same = ast.literal_eval(text)
        return f"{name} = {text}" if type(same) is type(value) and same == value else ""
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
