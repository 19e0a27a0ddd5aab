"""What strict readers let through, and what they refuse."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from reltune.reading import ALIASES, DEPTH, SLACK, Damaged, inside, parse_json, parse_yaml, read_header, read_json
from reltune.tensor_files import load_tensors

PLAIN = [
    "a: 1\nb: [1, -2, x, 1.5, 1e3, null, ~, true, no, 2020-01-01]\nc: {d: e, f: }\n",
    "a: &x {p: 1}\nb: {<<: *x, q: 2}\nc: *x\nd: {<<: [*x, {p: 3, r: 4}]}\n",
    "x: 1_000\ny: 0x1f\nz: 1:30\nw: .inf\no: 0o7\nold: 017\n",
    "'a': \"1\"\n1: 2\n~: 3\n2020-01-01: 5\n",
    "text: |\n  two\n  lines\nfolded: >\n  a\n  b\n",
    "!!str 1",
    "!!binary aGk=",
    "'1'",
    "",
    "# nothing\n",
    "a: ä中🙂\n",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_yaml_is_what_pyyaml_makes_of_it(text: str) -> None:
    assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3 gives 'a' a second time"),
        ("{a: 1, 'a': 2}", "gives 'a' a second time"),
        ("[" * (DEPTH + 1), f"deeper than {DEPTH} levels"),
        ("[" * 100_000, f"deeper than {DEPTH} levels"),
        ("&a [*a]", "alias 'a' without an anchor"),
        ("- &a x\n" + "- *a\n" * (ALIASES + 1), f"more than {ALIASES} aliases"),
        ("!!python/object/apply:os.getcwd []", "is for no plain value"),
        ("!!python/name:os.system x", "is for no plain value"),
        ("!!set {a}", "is for no plain value"),
        ("!own x", "is for no plain value"),
        ("? [a]\n: 1", "a key that is a list or a mapping"),
        ("a: 2001-99-99", "is no value of the tag"),
        ("!!int many", "is no value of the tag"),
        ("9" * 5000, "digits"),
        ("0x" + "f" * 5000, "too long"),
        ("<<: 1", "merges"),
        ("a: 1\n---\nb: 2", "second document"),
        ("a: [", "line 1 is not valid YAML"),
        ("\x01", "is not valid YAML"),
        ("- 1\n" * 300_001, "values"),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(Damaged, match="(?s)" + words.replace("(", r"\(")):
        parse_yaml(text)


@pytest.mark.parametrize("text", [".nan", "a: .inf", "[-.INF]"])
def test_numbers_of_yaml_that_must_be_finite(text: str) -> None:
    parse_yaml(text)
    with pytest.raises(Damaged, match="no finite number"):
        parse_yaml(text, finite=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "gives 'c' a second time"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "deeper"),
        ("[" * 100_000, "deeper"),
        ('{"a":' * 100_000, "deeper"),
        ("9" * 5000, "digits"),
        ("[1, 2", "line 1 is not valid JSON"),
        ("\n\nx", "line 3 is not valid JSON"),
        (b"\xff", "line 1 is no UTF-8 text"),
        (b'{"a":\n"\0"}', "line 2 holds a NUL"),
        ('"\\ud800"', "half a character"),
        ("[NaN]", "NaN, which is no finite"),
        ("[-Infinity]", "no finite"),
        ("[1e999]", "no finite"),
        ("[" + "{}," * 2**19 + "{}]", "more values"),
    ],
)
def test_json_that_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        parse_json(text, finite=True)


def test_json_that_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "ä🙂"], "b": {"c": -(2**70)}}
    assert parse_json(json.dumps(value), finite=True) == value and parse_json(b"\xef\xbb\xbf1") == 1
    assert math.isnan(parse_json("NaN")) and parse_json("[" * DEPTH + "]" * DEPTH)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 400_000 + "[]]",
        "{" + ",".join(f'"{i}":{i}' for i in range(200_000)) + "}",
        "[" + "1.5," * 10**6 + "1]",
    ],
)
def test_memory_of_json_that_is_all_brackets_and_commas(text: str) -> None:
    tracemalloc.start()
    try:
        parse_json(text)
    except Damaged:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 2 * len(text) + SLACK


def tensors_file(path: Path, header: object, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    held = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(held) if length is None else length) + held + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(shape=[2**63])}, "too large"),
        ({"a": entry(shape=[2**32, 2**32])}, "too large"),
        ({"a": entry(shape=[0, 2**63 - 1, 4])}, "too large"),
        ({"a": entry(shape=[-2])}, "sizes"),
        ({"a": entry(shape=[2.0])}, "sizes"),
        ({"a": entry(shape=[True, 2])}, "sizes"),
        ({"a": entry(shape="2")}, "sizes"),
        ({"a": entry(shape=[3])}, "another number of bytes"),
        ({"a": entry(offsets=[0, 12], shape=[3])}, "tensors of 12 bytes, and holds 8"),
        ({"a": entry(offsets=[4, 8], shape=[1])}, "at 4 and not at 0"),
        ({"a": entry(), "b": entry()}, "at 0 and not at 8"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "tensors of 4 bytes"),
        ({"a": entry(offsets=[8, 0])}, "another number"),
        ({"a": entry("F4")}, "type 'F4'"),
        ({"a": entry() | {"more": 1}}, "does not describe"),
        ({"a": [1]}, "does not describe"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        ([], "no mapping"),
        (b'{"a":{},"a":{}}', "second time"),
        (b"\xff", "UTF-8"),
        (b'{"a":', "not valid JSON"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: object, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        load_tensors(tensors_file(tmp_path / "x", header))


def test_files_that_are_too_short_for_their_header(tmp_path: Path) -> None:
    for length in (100, 2**63, 2**64 - 1):
        with pytest.raises(Damaged, match="header is said to have"):
            read_header(tensors_file(tmp_path / "x", {}, length=length))
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(Damaged, match="3 bytes"):
        read_header(tmp_path / "x")
    with pytest.raises(Damaged, match="no regular file"):
        read_header("/dev/zero")


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
    held = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds} | {
        "scalar": torch.tensor(1.0),
        "none": torch.empty(0, 5),
    }
    save_file(held, tmp_path / "x", metadata={"a": "b"})
    read = load_tensors(tmp_path / "x")
    assert all(read[name].dtype == held[name].dtype and read[name].equal(held[name]) for name in held)
    header = read_header(tmp_path / "x")
    assert header.metadata == {"a": "b"} and header.tensors["none"] == ("F32", (0, 5))
    with pytest.raises(Damaged, match="which has no place here"):
        load_tensors(tmp_path / "x", ["F32"])


def test_paths_in_files(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("x")
    (folder / "here").write_text("x")
    (folder / "near").symlink_to("here")
    (folder / "away").symlink_to(secret)
    assert inside(folder, "here") == folder / "here" and inside(folder, "near").is_file()
    for name in ("../secret", str(secret), "away", "", "a\0b", "..\\secret", 3):
        with pytest.raises(Damaged, match="names"):
            inside(folder, name)
    # the Hub's cache: snapshots/REVISION/file is a link to blobs/HASH
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("x")
    (snapshot / "file").symlink_to("../../blobs/hash")
    (snapshot / "away").symlink_to(secret)
    assert inside(snapshot, "file").read_text() == "x"
    with pytest.raises(Damaged, match="leads out"):
        inside(snapshot, "away")


def test_a_small_file_takes_little_memory(tmp_path):
    (tmp_path / "small.json").write_text('{"a": 1}')
    tracemalloc.start()
    try:
        assert read_json(tmp_path / "small.json") == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < 2**20  # whatever the largest file may be
    finally:
        tracemalloc.stop()
