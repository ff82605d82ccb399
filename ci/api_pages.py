"""The API pages, from the docstrings, with pdoc: then open FOLDER/index.html.

    .venv/bin/python -m ci.api_pages FOLDER

An adapter that cannot be imported without its trainer is left out, with a word. A docstring or
annotation that pdoc cannot make sense of is an error.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import dl_norm.integrations as adapters

# dl_norm.reference comes with dl_norm, of which it is a public name.
MODULES = ["dl_norm", "dl_norm.theory", "dl_norm.monitor", "dl_norm.surrogates", "dl_norm.weights"]


def importable_adapters() -> list[str]:
    """Those whose trainer is here or is not needed to look at them."""
    names = []
    for adapter in pkgutil.iter_modules(adapters.__path__, "dl_norm.integrations."):
        try:
            importlib.import_module(adapter.name)
        except ImportError as error:
            print(f"left out {adapter.name}: {error}", file=sys.stderr)
        else:
            names.append(adapter.name)
    names.remove("dl_norm.integrations._shared")  # of the adapters alone
    return names


def main(folder: Path) -> None:
    import pdoc

    pdoc.render.configure(docformat="google", math=True, show_source=False)
    names = [*MODULES, *importable_adapters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*names, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
