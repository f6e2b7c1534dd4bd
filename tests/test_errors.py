"""What a command line makes of errors: one line on stderr and an exit code for those of users, a traceback for ours."""

import pytest

from ml_mamba_jax.errors import (
    CheckpointError,
    ConvertError,
    InputError,
    NonFiniteError,
    WorkerError,
    one_line_errors,
)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("a.json: got nothing"), 2, "error: a.json: got nothing\n"),
        (ConvertError("b.pt: got a pickle"), 2, "error: b.pt: got a pickle\n"),
        (NonFiniteError("step 7: got NaN"), 3, "error: step 7: got NaN\n"),
        (CheckpointError("run: found none"), 4, "error: run: found none\n"),
        (WorkerError("worker 7 was killed"), 5, "error: worker 7 was killed\n"),
        (PermissionError(13, "Permission denied", "/run"), 2, "error: /run: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_users_are_one_line(error, code, line, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("b"), OSError("no file in it"), AssertionError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_a_file_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit), one_line_errors():
        (tmp_path / "file" / "inside").mkdir()
    assert capsys.readouterr().err == f"error: {tmp_path}/file/inside: Not a directory\n"
