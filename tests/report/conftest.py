import pytest


@pytest.fixture
def study_folder(tmp_path):
    """A study made by hand."""
    from hand_made import make_study  # here: what it imports may not be installed

    return make_study(tmp_path / "by-hand")
