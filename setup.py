"""Packaging: every value comes from settings.ini, which nbdev reads too. A wheel carries data/ inside the package."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

extras = {name: settings[f"{name}_requirements"].split()
          for name in ("assets", "lora", "server", "evaluation", "logging", "peers", "notebook", "book", "dev")}


class BuildWithData(build_py):
    """data/ lies beside the package in a checkout and inside it where it is installed; `tasks.data_path` finds both."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            target = Path(self.build_lib, "lire_nb", "data")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(here / "data", target, ignore=shutil.ignore_patterns("__pycache__", ".*", "texts", "trials"))


setup(
    cmdclass={"build_py": BuildWithData},
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["lire_nb", "lire_nb.*"]),
    package_data={"lire_nb": ["py.typed", "*.pyi"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
