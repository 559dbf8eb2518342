"""The cluster and the corpus of the tests marked `slurm`."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, start, stop
from tests.slurm.packages import missing
from tests.train.runs import write_corpus


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    running = start(tmp_path_factory.mktemp("slurm"))
    yield running
    stop(running)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
