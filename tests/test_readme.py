"""The knobs table of the README is the manual of `train_gpt.py --help`. Run this file to write it anew."""

import re
from pathlib import Path

from train_gpt import manual

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- knobs:begin -->\n).*?(?=<!-- knobs:end -->)", re.S)


def knob_table() -> str:
    """Every knob as a row, its section as a row of its own."""
    rows, last = ["| knob | default | |", "|---|---|---|"], None
    for section, name, default, text in manual():
        if section != last:
            rows.append(f"| **{section}** | | |")
            last = section
        rows.append(f"| `{name}` | {default or '(empty)'} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def test_the_readme_shows_the_manual() -> None:
    shown = BLOCK.search(README.read_text(encoding="utf-8"))
    assert shown is not None and shown[0] == knob_table(), "run `make readme`"


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: knob_table(), README.read_text(encoding="utf-8")), encoding="utf-8")
