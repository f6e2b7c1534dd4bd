import inspect

import pytest


@pytest.fixture
def unchecked():
    """Takes the tests' shape checker off a function, to see the error messages that users see."""
    return inspect.unwrap
