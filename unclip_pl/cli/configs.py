"""The YAMLs that come with the package: `stages/` and `lightning_config/`."""

import difflib
from importlib.resources import files
from pathlib import Path

from unclip_pl.utils.errors import UserError

FOLDERS = ("stages", "lightning_config")


def config_folder(name: str) -> Path:
    """The folder `stages` or `lightning_config`.

    It is next to the package in a checkout, and inside it in a wheel.
    """
    checkout = Path(__file__).resolve().parents[2] / name
    return checkout if checkout.is_dir() else Path(str(files("unclip_pl"))) / "_configs" / name


def find_config(path: str) -> str:
    """A YAML's path: as given, or the shipped one of that name where there is no such file.

    So `stages/decoder.yaml` works in any folder.

    Raises:
        UserError: there is neither.
    """
    if Path(path).exists():
        return path
    for folder in FOLDERS:
        head, _, tail = path.partition(f"{folder}/")
        if not head and tail and (config_folder(folder) / tail).exists():
            return str(config_folder(folder) / tail)
    names = shipped_configs()
    similar = difflib.get_close_matches(path, names, 1, 0.5)
    if similar:
        raise UserError(f"There is no configuration {path}: did you mean {similar[0]}?")
    raise UserError(f"There is no configuration {path}. Shipped are: {', '.join(names)}.")


def shipped_configs() -> list[str]:
    """The names of all shipped YAMLs: "stages/decoder.yaml" ..."""
    names = []
    for folder in FOLDERS:
        root = config_folder(folder)
        names += [str(path.relative_to(root.parent)) for path in root.rglob("*.yaml")]
    return sorted(names)


def stage_names() -> tuple[list[str], list[str]]:
    """The shipped files in `stages/` by name: those of a stage, and overlays, which name none."""
    import yaml

    stages: list[str] = []
    overlays: list[str] = []
    for path in sorted(config_folder("stages").glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        (stages if "class_path" in model else overlays).append(path.stem)
    return stages, overlays


def find_configs(arguments: list[str]) -> list[str]:
    """The command line with `find_config` of each `-c FILE`, `--config FILE`, `--config=FILE`."""
    words = list(arguments)
    for i, word in enumerate(arguments):
        option, equals, path = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            words[i] = f"{option}={find_config(path)}"
        elif i + 1 < len(arguments):
            words[i + 1] = find_config(arguments[i + 1])
    return words
