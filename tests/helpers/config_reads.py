"""Which fields of the config's sections does a package read? Found in its syntax trees, section by section.

A field counts as read where an attribute of its name is taken from something that can be its section: a variable,
parameter or attribute annotated with the section's class, another section's field, or what was assigned from those.
What a function returns and what an attribute of a class holds is taken from annotations and assignments. Properties
and methods of a section count as readers of it; its validators don't, for they only judge a value.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from pydantic import BaseModel

Function = ast.FunctionDef | ast.AsyncFunctionDef
Classes = frozenset[str]
"""Names of the classes that a value can be of. A container counts as what it holds."""
NONE: Classes = frozenset()
PASSES = 3
"""What an attribute holds may follow from another attribute, in a file read later."""


def sections(root: type[BaseModel]) -> dict[str, set[str]]:
    """The fields of the root and of every section below it, by the section's class."""
    found: dict[str, set[str]] = {root.__name__: set(root.model_fields)}
    for field in root.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= sections(field.annotation)
    return found


def unread_fields(root: type[BaseModel], sources: Iterable[str]) -> list[str]:
    """`Section.field` of every field that no source reads."""
    reads = Reads(sources)
    fields = sections(root)
    return sorted(f"{section}.{name}" for section in fields for name in fields[section] - reads.of[section])


class Reads:
    """`of[class]`: names of the attributes that are read from instances of a class, in any of the sources."""

    def __init__(self, sources: Iterable[str]) -> None:
        trees = [ast.parse(source) for source in sources]
        self._classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self._attributes: dict[tuple[str, str], Classes] = defaultdict(frozenset)
        self._returns: dict[str, Classes] = defaultdict(frozenset)
        self.of: dict[str, set[str]] = defaultdict(set)
        for tree in trees:
            self._declare(tree)
        for _ in range(PASSES):
            for tree in trees:
                self._visit(tree.body, {}, "")

    def _declare(self, tree: ast.Module) -> None:
        """Note what annotations say of attributes and of returned values."""
        for node in ast.walk(tree):
            if isinstance(node, Function):
                self._returns[node.name] |= self._named(node.returns)
            if not isinstance(node, ast.ClassDef):
                continue
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    self._attributes[node.name, part.target.id] |= self._named(part.annotation)
                elif isinstance(part, Function) and any("property" in ast.unparse(d) for d in part.decorator_list):
                    self._attributes[node.name, part.name] |= self._named(part.returns)

    def _named(self, annotation: ast.expr | None) -> Classes:
        """The classes of the package that an annotation names."""
        if annotation is None:
            return NONE
        found: set[str] = set()
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name | ast.Attribute):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\w+", node.value))  # an annotation in quotes
        return frozenset(found & self._classes.keys())

    def _visit(self, body: Sequence[ast.stmt], outer: dict[str, Classes], owner: str) -> None:
        """Read one scope: first what its names can be, then what is read from them, then the scopes in it."""
        names = dict(outer)
        nodes = list(_within(body))
        for _ in range(2):  # a name may be bound below the place where another takes it
            for node in nodes:
                self._bind(node, names)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                for found in self._classes_of(node.value, names):
                    self.of[found].add(node.attr)
            elif isinstance(node, ast.ClassDef):
                self._visit(node.body, names, node.name)
            elif isinstance(node, Function) and not any("validator" in ast.unparse(d) for d in node.decorator_list):
                self._visit(node.body, names | self._parameters(node, owner), "")

    def _parameters(self, function: Function, owner: str) -> dict[str, Classes]:
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        found = {one.arg: self._named(one.annotation) for one in given}
        if owner and given:
            found[given[0].arg] = frozenset({owner})
        return found

    def _bind(self, node: ast.AST, names: dict[str, Classes]) -> None:
        """Note what a statement makes of names and attributes."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value, names)
        elif isinstance(node, ast.AnnAssign):
            self._put(node.target, self._named(node.annotation), names)
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value, names)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            self._assign(node.target, node.iter, names)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._assign(node.optional_vars, node.context_expr, names)

    def _assign(self, target: ast.expr, value: ast.expr, names: dict[str, Classes]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._assign(one, other, names)
        else:
            self._put(target, self._classes_of(value, names), names)

    def _put(self, target: ast.expr, classes: Classes, names: dict[str, Classes]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = names.get(target.id, NONE) | classes
        elif isinstance(target, ast.Attribute):
            for owner in self._classes_of(target.value, names):
                self._attributes[owner, target.attr] |= classes
        elif isinstance(target, ast.Tuple | ast.List):
            for one in target.elts:
                self._put(one, classes, names)

    def _classes_of(self, value: ast.expr, names: dict[str, Classes]) -> Classes:
        """What an expression can be."""
        if isinstance(value, ast.Name):
            return names.get(value.id, NONE)
        if isinstance(value, ast.Attribute):
            owners = self._classes_of(value.value, names)
            return frozenset().union(*(self._attribute(owner, value.attr) for owner in owners))
        if isinstance(value, ast.Call):
            return self._called(value, names)
        if isinstance(value, ast.IfExp):
            return self._classes_of(value.body, names) | self._classes_of(value.orelse, names)
        if isinstance(value, ast.BoolOp | ast.Tuple | ast.List):
            parts = value.values if isinstance(value, ast.BoolOp) else value.elts
            return frozenset().union(*(self._classes_of(part, names) for part in parts))
        if isinstance(value, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            return self._classes_of(value.elt, names)
        if isinstance(value, ast.Await | ast.Subscript | ast.NamedExpr | ast.Starred):
            return self._classes_of(value.value, names)
        return NONE

    def _attribute(self, owner: str, name: str) -> Classes:
        """What an attribute of a class, or of a class it is made from, can be."""
        bases = self._classes[owner].bases if owner in self._classes else []
        inherited = (self._attribute(base, name) for one in bases for base in self._named(one) if base != owner)
        return self._attributes[owner, name].union(*inherited)

    def _called(self, call: ast.Call, names: dict[str, Classes]) -> Classes:
        """What a call returns: an instance, a copy, or what the function's annotation says."""
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        if name in self._classes:
            return frozenset({name})
        if isinstance(call.func, ast.Attribute):
            if name == "model_copy":
                return self._classes_of(call.func.value, names)
            if name == "model_validate":
                return self._named(call.func.value)
        return self._returns[name]


def _within(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node of a scope, with the functions and classes defined in it but not what is in them."""
    for node in body:
        yield node
        if isinstance(node, Function | ast.ClassDef):
            yield from _within([*node.decorator_list, *getattr(node, "bases", [])])
            if isinstance(node, Function):
                yield from _within([one for one in [*node.args.defaults, *node.args.kw_defaults] if one is not None])
        else:
            yield from _within(ast.iter_child_nodes(node))
