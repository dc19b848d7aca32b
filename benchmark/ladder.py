# /// script
# requires-python = ">=3.12"
# ///
"""What each rung of the ladder changes, counted from the scripts: the table in the README, and what its test checks.

    uv run benchmark/ladder.py                    # print the table

A line counts if it holds code or a comment; docstrings and blank lines do not. A replaced line counts twice, once as
gone and once as new, as `diff` shows it. Definitions that two scripts share are byte-identical unless listed here.
"""

import ast
import difflib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Rung(NamedTuple):
    before: str
    after: str
    adds: str
    changes: str  # definitions that both scripts have and that differ
    lines: int  # at most so many changed lines


RUNGS = [
    Rung("reinforce", "reinforce_baseline", "a critic V(s), subtracted from the return", "Args Agent update main", 50),
    Rung(
        "reinforce_baseline", "actor_critic", "an update after every step, from the TD error; rewards brought to scale",
        "Args check Agent policy_loss update set_up main", 145,
    ),
    Rung(
        "actor_critic", "a2c", "many environments, n-step returns, entropy bonus, gradient clipping, RMSprop",
        "Args update main", 80,
    ),
    Rung("a2c", "trpo", "a bound on the KL divergence: natural gradient, line search", "Args Agent update main", 123),
    Rung("trpo", "ppo", "the clipped surrogate in place of the bound", "Args check Agent update main", 142),
    Rung(
        "a2c", "ppo", "the ratio, clipped; several epochs of minibatches",
        "Args check policy_loss update main", 90,
    ),
    Rung(
        "ppo", "dreamerv3", "a world model, and dreams to learn from",
        "Args check make_env Envs Agent update evaluate set_up main", 864,
    ),
]  # fmt: skip


def code_lines(source: str) -> list[str]:
    """The lines with code or comments."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for number, line in enumerate(source.split("\n"), 1) if line.strip() and number not in docstrings]


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """Lines gone and lines new between two sources."""
    matcher = difflib.SequenceMatcher(None, code_lines(before), code_lines(after), autojunk=False)
    different = [codes for codes in matcher.get_opcodes() if codes[0] != "equal"]
    return sum(c[2] - c[1] for c in different), sum(c[4] - c[3] for c in different)


def definitions(source: str) -> dict[str, str]:
    """Each top-level function or class and its text, in order."""
    nodes = ast.parse(source).body
    found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in found}


def read(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def table() -> str:
    lines = ["| diff | adds | new definitions | changed definitions | lines gone + new |", "|---|---|---|---|---|"]
    for before, after, adds, changes, _ in RUNGS:
        gone, new = changed_lines(read(before), read(after))
        fresh = [name for name in definitions(read(after)) if name not in definitions(read(before))]
        fresh, changes = (", ".join(f"`{name}`" for name in names) for names in (fresh, changes.split()))
        lines.append(f"| `{before}.py` → `{after}.py` | {adds} | {fresh} | {changes} | {gone} + {new} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
