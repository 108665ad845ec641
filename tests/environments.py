"""Fresh virtual environments, to install packages as a user would, without fetching anything."""

import os
import subprocess
import sys
import venv
from pathlib import Path


class Environment:
    """A virtual environment that also sees the packages of the running environment.

    So gptk, torch, pip and pytest need not be installed in it. What is installed in it is visible
    there only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def run(
        self, *args: object, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a module as a program: `run("gptk", "plugins")` is `python -m gptk plugins`.

        check: an exit code other than 0 is an AssertionError with what the program said.
        """
        # Packages are found in the environment's site-packages only.
        settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        out = subprocess.run(
            [self.python, "-m", *map(str, args)],
            cwd=cwd or self.folder,
            env=settings | {"VIRTUAL_ENV": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and out.returncode:
            said = f"{out.stdout}\n{out.stderr}".strip()
            raise AssertionError(f"{' '.join(map(str, args))} exits {out.returncode}:\n{said}")
        return out

    def install(self, path: str | Path, *, editable: bool = False) -> None:
        """`pip install` a package folder, perhaps with extras, `"folder[test]"`, or a wheel.

        Nothing is fetched: what the package needs must be there, or pip says what is missing.
        """
        self.run(
            "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index",
            "--no-build-isolation", *(["--editable"] if editable else []), path,
        )  # fmt: skip


def fresh_environment(folder: Path, *, with_gptk: bool = True) -> Environment:
    """A new environment in a folder that is not there yet.

    with_gptk: it sees the gptk of the running environment; otherwise only the other packages.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder)
    folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    # A line that begins with `import` is run. addsitedir reads the .pth files of a folder in
    # turn, those of editable installs among them.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in folders]
    if not with_gptk:
        # A plain line adds a folder without reading the .pth files in it.
        lines = [
            f"{_without_gptk(Path(path), folder / f'seen-{n}')}\n" for n, path in enumerate(folders)
        ]
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "of_the_running_environment.pth").write_text("".join(lines))
    return environment


def _without_gptk(packages: Path, seen: Path) -> Path:
    """A folder of links to all packages of a folder but gptk."""
    seen.mkdir()
    for path in packages.iterdir():
        if not path.name.startswith(("gptk", "__editable__")):
            (seen / path.name).symlink_to(path)
    return seen
