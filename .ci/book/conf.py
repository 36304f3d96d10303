"""Sphinx's settings for the book; `make book` calls it."""
import sys
from configparser import ConfigParser
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sphinx.search.en import SearchEnglish

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

_settings = ConfigParser(delimiters=["="])
_settings.read(ROOT / "settings.ini", encoding="utf-8")
_own = _settings["DEFAULT"]

project, author, version = _own["title"], _own["author"], _own["version"]
release, copyright, language = version, _own["copyright"], "en"

extensions = ["myst_nb", "sphinx_copybutton", "mathml", "names", "figures", "sidebar"]
root_doc = "index"
templates_path = ["templates"]
exclude_patterns = ["files"]

# What the notebooks carry is shown; nothing is run.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_number_source_lines = False
nb_code_prompt_show = "Show the setup"
nb_code_prompt_hide = "Hide the setup"
# Math stays in its dollars, as Jupyter and the README have it.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline", "strikethrough"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may go from a second to a fourth level

python_display_short_literal_types = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

SearchEnglish.stem = cache(SearchEnglish.stem)  # Sphinx remembers the words of one page; most stand on many

html_theme = "sphinx_book_theme"
html_title = project
# The font travels with the site: where a system has none for math, sums and fractions would be drawn small.
_font = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
html_static_path = [str(HERE / "static"), str(_font)]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": True,
    "show_toc_level": 2,
    "collapse_navigation": False,
    "home_page_in_toc": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-sh pre, div.highlight-python pre"
