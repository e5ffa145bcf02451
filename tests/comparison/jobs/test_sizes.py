from __future__ import annotations

import pytest

from lfm_torch.comparison.jobs.sizes import parse_size, shown_size


def test_sizes_are_read_and_shown() -> None:
    assert [parse_size(text) for text in ("2GiB", "1.5 MB", "7", "3k")] == [2 * 2**30, 1572864, 7, 3072]
    for text in ("", "GiB", "-1M", "0", "2 XB"):
        with pytest.raises(ValueError, match="2GiB or 500M"):
            parse_size(text)
    assert [shown_size(size) for size in (12, 2048, 3 * 2**30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
