"""GPU requests: what can be written, what it means, and what is refused."""

from __future__ import annotations

import pytest

from lib.gpu import MOST, NONE, Gpu, GpuError, parse_gpu


@pytest.mark.parametrize("name", sorted(MOST))
def test_every_gpu_can_be_asked_for_by_ones_and_up_to_its_most(name: str) -> None:
    assert parse_gpu(name) == Gpu(name, 1)
    assert parse_gpu(f"{name}:{MOST[name]}") == Gpu(name, MOST[name])
    with pytest.raises(GpuError, match=f"1 to {MOST[name]} {name}"):
        parse_gpu(f"{name}:{MOST[name] + 1}")


def test_a_request_is_written_as_modal_takes_it() -> None:
    assert [str(parse_gpu(text)) for text in ("H100", "H100:1", "H100:2")] == ["H100", "H100", "H100:2"]


def test_a10g_is_a10() -> None:
    assert (str(parse_gpu("A10G")), str(parse_gpu("a10g:2"))) == ("A10", "A10:2")
    with pytest.raises(GpuError, match="1 to 4 A10"):
        parse_gpu("A10G:5")


@pytest.mark.parametrize("text", ["h100", "a100-80gb", "rtx-pro-6000", "l40s"])
def test_case_does_not_matter(text: str) -> None:
    assert parse_gpu(text) == Gpu(text.upper())


def test_none_is_no_gpu() -> None:
    assert parse_gpu(NONE) is None


@pytest.mark.parametrize(
    "text", ["V100", "", "A100-40", " H100", "H100 ", "H100,L4", "A100 80GB", "any", "H100!", "NONE "]
)
def test_a_wrong_name_lists_the_allowed_ones(text: str) -> None:
    with pytest.raises(GpuError) as caught:
        parse_gpu(text)
    assert all(name in str(caught.value) for name in MOST) and "A10G is A10" in str(caught.value)


@pytest.mark.parametrize("count", ["", "0", "-1", "1.5", "01", "two", " 2", "2 ", "2:2", "²", "\u0662", "9", "1\n"])
def test_a_wrong_number_says_how_many_fit(count: str) -> None:
    with pytest.raises(GpuError, match="1 to 8 H100: write H100:n"):
        parse_gpu(f"H100:{count}")
