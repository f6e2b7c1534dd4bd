"""Files of records: read piece by piece as json would read them whole, and every fault named."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_mamba_jax.data import llava
from ml_mamba_jax.data.llava import Description, Entry, describe, json_file, read_entries
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn
from tests.data.own_data import conversation

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


@here
@given(entries=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 2]), ascii=st.booleans())
def test_a_list_is_read_as_json_reads_it(tmp_path, monkeypatch, entries, indent, ascii):
    monkeypatch.setattr(llava, "PIECE", 3)  # every object is cut somewhere
    path = tmp_path / "a.json"
    path.write_text(json.dumps(entries, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    read = list(read_entries(path))
    assert [entry.value for entry in read] == entries
    assert [entry.name for entry in read] == [f"a.json[{i}]" for i in range(len(entries))]


@here
@given(text=st.text(alphabet='[]{}",:1a \n', max_size=20))
def test_any_other_text_is_refused_where_json_refuses_it(tmp_path, monkeypatch, text):
    monkeypatch.setattr(llava, "PIECE", 2)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert [entry.value for entry in read_entries(path)] == expected
    else:
        with pytest.raises(InputError, match=r"a\.json: (got no list|cannot read the records: broken at record \d)"):
            list(read_entries(path))


@pytest.mark.parametrize(
    "text, read, problem",
    [
        ('[{"a": 1}, {"b": ]', 1, "broken at record 1, character 17"),
        ('[{"a": 1} {"b": 2}]', 1, "broken at record 1, character 10: expected a comma"),
        ('[{"a": 1}] more', 1, "got more text after the list"),
        ('[{"a": 1}', 1, "expected a comma or the end"),
        ("[" * 100_000, 0, "broken at record 0"),
        ("[1" + "0" * 5000 + "]", 0, "broken at record 0"),
        ("", 0, "got no list of records"),
        ('{"a": 1}', 0, "got no list of records"),
    ],
)
def test_what_stands_before_a_break_is_read(tmp_path, text, read, problem):
    path = tmp_path / "a.json"
    path.write_text(text)
    entries = read_entries(path)
    for _ in range(read):
        next(entries)
    with pytest.raises(InputError, match=problem):
        list(entries)


def test_bytes_that_are_no_text_and_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(InputError, match=r"a\.json: got bytes that are not UTF-8"):
        list(read_entries(path))
    with pytest.raises(InputError, match="found no such file"):
        json_file(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"metadata\.jsonl: found no such file"):
        json_file(tmp_path)


def test_lines_are_records_and_a_broken_one_is_named_alone(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '\ufeff{"caption": "a"}\n\n{"caption"\n{"caption": "b"}\n', encoding="utf-8"
    )
    first, broken, last = read_entries(json_file(tmp_path))
    assert (first.value, last.value) == ({"caption": "a"}, {"caption": "b"})
    with pytest.raises(InputError, match=r"metadata\.jsonl:3: cannot be read as JSON"):
        describe(broken)


TALK = conversation("<image>\nQ", "A")


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"id": "x", "image": "a/b.jpg", "conversations": TALK}, ("x", "a/b.jpg", "<image>\nQ", "A")),
        ({"id": 7, "conversations": conversation("Q", "A")}, ("7", None, "Q", "A")),
        ({"image": None, "question": "Q", "answer": "A"}, ("", None, "Q", "A")),
        ({"image": ["a.jpg"], "question": "Q", "answer": "A"}, ("", "a.jpg", "<image>\nQ", "A")),
        ({"file_name": "a.jpg", "caption": "C"}, ("", "a.jpg", "<image>\n", "C")),
    ],
)
def test_every_form_of_a_record_is_understood(value, expected):
    id, image, *texts = expected
    turns = (Turn("human", texts[0]), Turn("gpt", texts[1]))
    assert describe(Entry("r", value)) == Description(id, image, turns)


@pytest.mark.parametrize(
    "value, message",
    [
        ([], r"r: got list, expected an object"),
        ({"image": 3, "conversations": TALK}, "r: image: got int, expected a path"),
        ({"image": ["a", "b"], "conversations": TALK}, "r: image: got a list of 2, expected one path"),
        ({"image": "../a.jpg", "conversations": TALK}, r"r: image: got '\.\./a\.jpg', expected a path inside"),
        ({"image": "/a.jpg", "conversations": TALK}, "r: image: got '/a.jpg', expected a path inside"),
        ({"image": "", "conversations": TALK}, "r: image: got '', expected a path inside"),
        ({"file_name": "a\0", "caption": "C"}, "r: file_name: got .* expected a path inside"),
        ({"id": [], "conversations": TALK}, "r: id: got list"),
        ({"question": "Q"}, "r: answer: got nothing, expected text"),
        ({"caption": 3}, "r: caption: got int, expected text"),
        ({"caption": "C", "conversations": TALK}, "r: got conversations and caption, expected only one"),
        ({}, "r: conversations: got NoneType, expected a list"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(value, message):
    with pytest.raises(InputError, match=message):
        describe(Entry("r", value))


@here
@given(value=VALUES)
def test_whatever_an_object_holds_the_error_is_ours(value):
    try:
        describe(Entry("r", {"conversations": value, "image": value, "id": value} if value is not None else value))
    except InputError as error:
        assert str(error).startswith("r: ")
