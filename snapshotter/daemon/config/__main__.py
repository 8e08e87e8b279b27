"""Write `config.toml.example` and the tables of `docs/configuration.md` anew from the schema.

`python -m snapshotter.daemon.config`, from the root of the repository. Tests hold both files against the code.
"""

from __future__ import annotations

from pathlib import Path

from snapshotter.daemon.config.writing import default_text, markdown

BEGIN = "<!-- made from the code: begin -->\n"
END = "<!-- made from the code: end -->\n"


def main() -> None:
    """Rewrite both files."""
    Path("config.toml.example").write_text(default_text(), encoding="utf-8")
    document = Path("docs/configuration.md")
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}{markdown()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
