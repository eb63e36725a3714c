"""Every entry of the list of guards is current, and one of them is tried here."""

from __future__ import annotations

import pytest

from tests.drills.unguarded import GUARDS, ROOT, without


def test_each_guard_is_in_the_code_once_and_has_a_test() -> None:
    for guard in GUARDS:
        assert (ROOT / "othink_ray" / guard.file).read_text().count(guard.code) == 1, guard.name
        file, _, name = guard.test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / "tests" / file).read_text(), guard.name


@pytest.mark.slow
def test_a_test_without_its_guard_fails() -> None:
    [lock] = [guard for guard in GUARDS if guard.name == "a folder belongs to one run"]
    assert without(lock)
