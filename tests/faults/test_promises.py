"""Every row of the table of faults, with a small count. The full counts: `python scripts/faults.py`."""

import pytest

from faultlab.table import ROWS, Bench, Row


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), seed=1, workers=2)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.quick])
def test_the_cache_keeps_its_promise(bench: Bench, row: Row) -> None:
    tally = row.run(bench, row.quick)
    if not tally.trials:
        pytest.skip("this process may not mount a disk for itself")
    assert tally.trials == row.quick
    assert not tally.num_faults, "\n".join(tally.faults)
