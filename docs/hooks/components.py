"""A page for each agent, sampler, correction, advantage and batch source, and one for each other kind: made from the
registries, the docstrings, the tests and the committed results, so that nothing of it is written twice."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import docstrings  # noqa: E402
import evidence  # noqa: E402

import agents as _agents  # noqa: E402, F401  registers the components
import envs as _envs  # noqa: E402, F401
import registry  # noqa: E402
from agents.corrections import traits  # noqa: E402
from benchmarks.comparison.catalogue import catalogue, first_sentence  # noqa: E402
from benchmarks.estimators.families import families  # noqa: E402
from registry.fields import REQUIRED  # noqa: E402


@dataclass(frozen=True)
class Kind:
    """Components that have pages of their own.

    Attributes:
        folder: of their pages, and the registry's name in ``registry``.
        title: of the kind.
        registry: where they are.
        choose: how one is chosen in Python and on the command line; ``{id}`` stands for its id.
        intro: of the kind's page.
    """

    folder: str
    title: str
    registry: registry.Registry
    choose: str
    intro: str


KINDS = (
    Kind(
        "agents",
        "Agents",
        registry.agents,
        "python -m benchmarks.run --agent {form}",
        "An agent is a stable-baselines3 algorithm. Its arguments are keywords in Python and `--set name=value` on the "
        "command line.",
    ),
    Kind(
        "corrections",
        "Corrections",
        registry.corrections,
        'ReFT("tiny", "MathReason-v0", sampler="uniform", correction="{id}")\n'
        "python -m benchmarks.run --agent nested-reft/uniform/{id}\n"
        "python -m benchmarks.estimators --correction {id}",
        "A correction is a detached weight W on every completion token: the gradient is the sum of `W A grad log pi`. "
        "pi is the target, pi_old the target when the rollout was written, mu what the completions were sampled from, "
        "`rho = pi / mu`, `r = pi / pi_old`, w the product of ratios over the tokens named.",
    ),
    Kind(
        "samplers",
        "Skip samplers",
        registry.skip_samplers,
        'ReFT("tiny", "MathReason-v0", sampler="{id}", correction="base")\n'
        "python -m benchmarks.run --agent nested-reft/{id}/base\n"
        "python -m benchmarks.divergence --samplers {id}",
        "A skip sampler says which layers write a rollout. L is the number of layers; inner layers are all but the "
        "first and the last `border`.",
    ),
    Kind(
        "advantages",
        "Advantages",
        registry.advantages,
        'ReFT("tiny", "MathReason-v0", advantage="{id}")\npython -m benchmarks.run --set advantage={id}',
        "An advantage makes one number a completion of the rewards of a rollout.",
    ),
    Kind(
        "batches",
        "Batch sources",
        registry.batches,
        'ReFT("tiny", "MathReason-v0", batch="{id}")\npython -m benchmarks.run --set batch={id}',
        "A batch source says where the groups of a batch come from.",
    ),
)


def pages() -> dict[str, str]:
    """Markdown by path within the site: an overview, and of each kind an overview and its components."""
    made = {"components/index.md": _overview()}
    for kind in KINDS:
        made[f"components/{kind.folder}/index.md"] = _kind_page(kind)
        for ids in by_class(kind):
            made[path_of(kind, ids[0])] = _page(kind, ids)
    return made


def navigation() -> list[Any]:
    """The pages as a nav of mkdocs."""
    nav: list[Any] = ["components/index.md"]
    for kind in KINDS:
        own: list[Any] = [f"components/{kind.folder}/index.md"]
        own += [{", ".join(ids): path_of(kind, ids[0])} for ids in by_class(kind)]
        nav.append({kind.title: own})
    return nav


def by_class(kind: Kind) -> list[list[str]]:
    """The kind's own ids; names of one class with the same fields stand together, the defining one first."""
    grouped: dict[Any, list[str]] = {}
    for id in kind.registry:
        component, fixed = kind.registry.resolve(id)
        if component.__module__.split(".")[0] in ("agents", "policies", "envs"):
            grouped.setdefault((component, str(fixed), kind.registry.form(id).count("/")), []).append(id)
    order = {id: number for number, id in enumerate(kind.registry._known)}
    return sorted((sorted(ids, key=lambda id: order[id]) for ids in grouped.values()), key=lambda ids: ids[0])


def path_of(kind: Kind, id: str) -> str:
    """Where a component's page is."""
    return f"components/{kind.folder}/{id}.md"


def field_table(fields: dict[str, registry.Field], described: dict[str, str]) -> str:
    """Names, types, defaults and meanings of hyper-parameters."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.default is REQUIRED else f"`{_plain(field.default)}`"
        meaning = described.get(name, "").replace("|", r"\|")
        rows.append(f"| `{name}` | `{_type(field.type)}` | {default} | {meaning} |")
    if not any(described.get(name) for name in fields):  # the text says what they are
        rows = [row.rpartition("|")[0].rpartition("|")[0] + "|" for row in rows]
    return "\n".join(rows)


def _page(kind: Kind, ids: list[str]) -> str:
    component, fixed = kind.registry.resolve(ids[0])
    said = docstrings.read(component)
    title = ", ".join(f"`{id}`" for id in ids)
    parts = [f"# {title}", "\n\n".join(said.text)]
    if said.use:
        parts.append(f"## When to use it\n\n{said.use}")
    fields = {name: field for name, field in kind.registry.fields(ids[0]).items() if name not in fixed}
    parts.append("## Fields\n\n" + (field_table(fields, said.fields) if fields else "It has none."))
    if fixed:
        parts.append("The id sets " + ", ".join(f"`{name}={value}`" for name, value in fixed.items()) + ".")
    if kind.registry is registry.corrections:
        parts.append("## What it declares\n\n" + _declared(ids[0]))
    command = kind.choose.format(id=ids[0], form=_example(kind, ids[0]))
    parts.append(f"## How to choose it\n\n{_fenced(command)}")
    parts.append(f"`{component.__module__}.{component.__qualname__}`")
    parts.append("## Which tests hold it\n\n" + _tests(kind, ids, component))
    if rows := _results(ids):
        parts.append("## In the committed results\n\n" + rows)
    return "\n\n".join(parts) + "\n"


def _declared(id: str) -> str:
    declared = traits(registry.corrections.make(id))
    on_policy = "depends on the position" if declared.on_policy is None else f"{declared.on_policy:g}"
    facts = {
        "ratio": declared.edge,
        "what is done to it": declared.operator,
        "what a token's weight is made of": declared.geometry,
        "what must be seen in one call": declared.scope,
        "weight where pi = pi_old = mu": on_policy,
        "unbiased": "yes, by the exact lab to 1e-10" if declared.unbiased else "no",
        "trust region": "yes" if declared.trust_region else "no",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def _tests(kind: Kind, ids: list[str], component: type) -> str:
    name = next(name for name in dir(registry) if getattr(registry, name) is kind.registry)
    others = [one for one in vars(registry).values() if isinstance(one, registry.Registry) and one is not kind.registry]
    named: dict[str, list[str]] = {}
    every: dict[str, list[str]] = {}
    for id in ids:
        ambiguous = any(id in other for other in others)
        own, all_of_kind = evidence.tests_of(id, component.__name__, name, ambiguous)
        for found, into in ((own, named), (all_of_kind, every)):
            for test in found:
                into.setdefault(test.path, [])
                into[test.path] += [test.name] if test.name not in into[test.path] else []
    text = _test_list(f"Of it by name ({sum(map(len, named.values()))})", named)
    return text + "\n\n" + _test_list(f"Of every one of its kind ({sum(map(len, every.values()))})", every)


def _test_list(title: str, tests: dict[str, list[str]]) -> str:
    if not tests:
        return ""
    lines = [f"- `{path}`: " + ", ".join(f"`{name}`" for name in names) for path, names in tests.items()]
    return f'??? note "{title}"\n\n' + "\n".join(f"    {line}" for line in lines)


def _results(ids: list[str]) -> str:
    rows = evidence.rows_of(ids)
    return "\n\n".join(f"[{one.title}](../../{one.path})\n\n{one.table}" for one in rows)


def _example(kind: Kind, id: str) -> str:
    return kind.registry.form(id).replace("<sampler>", "uniform").replace("<correction>", "base")


def _kind_page(kind: Kind) -> str:
    rows = [f"| {kind.title.lower()} | |", "|---|---|"]
    for ids in by_class(kind):
        about = docstrings.markdown(first_sentence(kind.registry.get(ids[0]))).replace("|", r"\|")
        rows.append(f"| [{', '.join(f'`{id}`' for id in ids)}]({ids[0]}.md) | {about} |")
    parts = [f"# {kind.title}", kind.intro, "\n".join(rows)]
    if kind.registry is registry.corrections:
        parts.append(
            "## By ratio\n\nA product such as `truncated-is*ppo-clip` takes one factor that holds the ratio to mu, one "
            f"that holds pi / pi_old, and any masks.\n\n{families().markdown()}"
        )
    return "\n\n".join(parts) + "\n"


def _overview() -> str:
    own = {kind.registry.kind: kind for kind in KINDS}
    parts = [
        "# Components",
        "Everything that can be chosen by a name, as `python -m benchmarks.run --list` prints it. A component is a "
        "frozen dataclass; its fields are set as keywords, as `{'id': ..., field: value}` or by "
        "`--set name.field=value`.",
    ]
    for listed in catalogue():
        singular = {kind.title.lower(): kind for kind in own.values()}
        kind = singular.get(listed.name)
        text = f"[Pages]({kind.folder}/index.md)" if kind else listed.markdown()
        parts.append(f"## {listed.name.capitalize()}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _fenced(code: str) -> str:
    python = [line for line in code.splitlines() if not line.startswith("python -m")]
    shell = [line for line in code.splitlines() if line.startswith("python -m")]
    blocks = [("python", python), ("bash", shell)]
    return "\n\n".join(f"```{language}\n" + "\n".join(lines) + "\n```" for language, lines in blocks if lines)


def _type(kind: Any) -> str:
    if kind is Any:
        return "any"
    if inspect.isclass(kind) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("NoneType", "None").replace("|", "or")


def _plain(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
