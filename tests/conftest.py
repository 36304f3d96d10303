"""What holds for all test files."""
import gc
import secrets
import sys

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Among workers a file stays on one, for the sake of its fixtures; a notebook that is run goes where there is time, at
    the end. The mark xdist_group does nothing with pytest 9.2 and pytest-xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            return nodeid if name.startswith("test_notebook_runs") else file

    return ByFile(config, log)


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


@pytest.fixture(autouse=True)
def losses_of_one_test_stay_in_it():
    """A loss that a test registers is not there for the next one."""
    yield
    if (module := sys.modules.get("lire_nb.rivals")) is not None:
        for name, spec in list(module.LOSSES.items()):
            if not getattr(spec.fn, "__module__", "").startswith("lire_nb"):
                del module.LOSSES[name]
