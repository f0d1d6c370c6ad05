"""What fails, by kind:  python -m tests.hostile [--thorough] [words in the names of kinds]"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from tests.hostile.apart import faults_apart


def main(words: list[str]) -> int:
    failing, thorough = 0, "--thorough" in words
    words = [word for word in words if word != "--thorough"]
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if words and not any(word in path.stem for word in words):
            continue
        start = time.monotonic()
        judged = faults_apart(f"tests.hostile.{path.stem}", thorough=thorough)
        wrong = {name: found for name, found in judged.items() if found}
        failing += len(wrong)
        seconds = time.monotonic() - start
        print(f"\n## {path.stem}: {len(wrong)} of {len(judged)} fail ({seconds:.0f} s)", flush=True)
        for name, found in wrong.items():
            print(f"- {name}: {_in_short(found)}")
    return int(failing > 0)


def _in_short(found: list[str]) -> str:
    """Each problem once, with the verbs that have it."""
    verbs: dict[str, list[str]] = {}
    problems = {}
    for line in found:
        verb, _, problem = line.partition(": ")
        key = re.sub(r"[0-9.e+-]+", "#", problem)
        verbs.setdefault(key, []).append(verb)
        problems.setdefault(key, problem)
    return "; ".join(f"[{', '.join(verbs[key])}] {problems[key]}" for key in problems)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
