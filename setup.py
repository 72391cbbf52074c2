"""What pyproject.toml cannot say: the folder `configs/` is installed as `vixml_jax/configs/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vixml_jax*"]), "vixml_jax.configs"],
    package_dir={"vixml_jax.configs": "configs"},
)
