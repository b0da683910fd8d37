"""Writes into the pages of `docs` what their code prints now: `python -m docs.make_shown`, from the top of the repository.

Look at the differences before they are committed: the tests compare with what stands in the pages.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests import pages
from tests.world import World

PAGES = sorted(Path(__file__).parent.glob("*.md"))


def main() -> None:
    worlds: dict[int, World] = {}

    def on_ranks(ranks: int, *args: object) -> list[str]:
        return worlds.setdefault(ranks, World(ranks)).run(pages.run_script, *args)

    try:
        for path in PAGES:
            text = path.read_text(encoding="utf-8")
            with tempfile.TemporaryDirectory() as folder:
                outcomes = list(pages.Page.of(text, path).outcomes(Path(folder).resolve(), on_ranks))
            for block, what, shown, printed in outcomes:
                if pages.matches(shown, printed):
                    continue
                now = pages.renewed(shown, printed)
                if now is None or text.count(shown) != 1:
                    print(f"{path.name}, block of line {block.line}: to be written by hand; {what} prints\n{printed}")
                else:
                    text = text.replace(shown, now)
                    print(f"{path.name}, block of line {block.line}: written")
            path.write_text(text, encoding="utf-8")
    finally:
        for world in worlds.values():
            world.stop()


if __name__ == "__main__":
    main()
