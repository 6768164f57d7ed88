"""What pyproject.toml cannot say: the recipes, which lie beside the package, are installed inside
it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_flops", "hf_flops.*"]), "hf_flops.bundled.recipes"],
    package_dir={"hf_flops.bundled.recipes": "recipes"},
    package_data={"hf_flops": ["py.typed"], "hf_flops.bundled.recipes": ["*.yaml", "help/*.txt"]},
)
