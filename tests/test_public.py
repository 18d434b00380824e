"""The names of `import moe_tools`: all there, each imported on first use."""

import pytest

import moe_tools


@pytest.mark.parametrize("name", moe_tools.__all__)
def test_a_public_name_can_be_used(name: str) -> None:
    assert callable(getattr(moe_tools, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moe_tools' has no attribute 'lod'"):
        moe_tools.lod  # noqa: B018
