"""Makes assets/run.svg, the picture of a terminal on the first page, by running its commands.

python docs/picture.py           write the picture
python docs/picture.py --check   exit 1 if the commands print something else by now
"""

import html
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent / "assets" / "run.svg"
COLUMNS = 92
SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, '
    '"required": ["name", "age"], "additionalProperties": false}'
)
RUNS = {
    "Beam search under a JSON schema": [
        *("generate", "Name: Tom, age: 34. As JSON:", "--sampler", "beam:4"),
        *("--processor", f"json-schema:{SCHEMA}"),
    ],
    "DoLa with a penalty": [
        *("generate", "The sun was setting over the hills, and", "--sampler", "dola"),
        *("--processor", "repetition-penalty:1.1", "--max-new-tokens", "24"),
    ],
    "Sampling with a draft: the same text as without, sooner": [
        *("generate", "Roses are red, violets are blue, roses are", "--sampler", "top-p:0.9"),
        *("--draft", "lookup", "--seed", "1", "--max-new-tokens", "24"),
    ],
}


def main(arguments: list[str]) -> int:
    picture = draw([(title, words, printed(words)) for title, words in RUNS.items()])
    if "--check" in arguments:
        return int(readable(picture) != readable(PICTURE.read_text(encoding="utf-8")))
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


def printed(words: list[str]) -> str:
    """What a command prints on standard output."""
    out = subprocess.run(
        [sys.executable, "-m", "gptk", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": str(COLUMNS)},
    )
    return out.stdout.rstrip()


def draw(runs: list[tuple[str, list[str], str]]) -> str:
    """The picture, an SVG without fonts or scripts from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for title, words, text in runs:
        console.print(Text(f"# {title}", style="bright_black"))
        console.print(Text(f"$ gptk {' '.join(map(quoted, words))}", style="bold"))
        console.print(Text(text))
        console.print()
    return console.export_svg(title="gptk", code_format=FORMAT, unique_id="gptk")


def quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w.:-]+", word) else shlex.quote(word)


def readable(picture: str) -> str:
    """The picture's text."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", picture)).split())


# Rich's own form, which fetches a font.
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
