"""What pyproject.toml cannot say: the recipes, which lie beside the package, are installed inside
it; and the README leads nowhere by relative links, which a package index does not have.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def readme() -> str:
    """Return README.md with links into the repository: absolute ones if pyproject.toml names it
    (`[project.urls] repository`), else their text alone.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project.get("urls", {}).get("repository", "").rstrip("/")

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match("[a-z]+:|#", target):
            return link[0]
        if not url:
            return "" if picture else text
        return f"{picture}[{text}]({url}/{'raw' if picture else 'blob'}/main/{target})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", absolute, text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["hf_flops", "hf_flops.*"]), "hf_flops.bundled.recipes"],
    package_dir={"hf_flops.bundled.recipes": "recipes"},
    package_data={"hf_flops": ["py.typed"], "hf_flops.bundled.recipes": ["*.yaml", "help/*.txt"]},
)
