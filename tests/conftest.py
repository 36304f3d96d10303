"""What holds for all test files."""
import gc

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With --dist loadgroup a file stays on one worker, for the sake of its fixtures; a notebook that is run goes where
    there is time, at the end."""
    for item in items:
        if item.originalname != "test_notebook_runs":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_not_collected():
    """Every training ends with collections of garbage, half a second each where all libraries are loaded: they look at
    what came since the file began."""
    gc.collect()
    gc.freeze()
