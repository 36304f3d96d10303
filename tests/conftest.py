"""What holds for all test files."""
import gc
import secrets

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


@pytest.fixture(scope="session", autouse=True)
def data_sets_are_named_not_hashed():
    """A data set in memory is pickled and hashed for the library's cache of maps, which no test uses: it is named by
    chance."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.arrow_dataset, "generate_fingerprint", lambda data: secrets.token_hex(8))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For files of many tiny models, which threads slow down: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
