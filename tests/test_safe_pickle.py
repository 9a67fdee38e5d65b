"""The reader of pickles: plain data comes out, everything else is refused with its place, and nothing runs."""

import collections
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from lightning_modules import safe_pickle
from lightning_modules.pickled_networks import NetworkRecord, read_network_pickle
from lightning_modules.pickled_tensors import (
    STORAGES,
    TENSORS,
    ArrayRecord,
    NumberType,
    Storage,
    TensorRecord,
    read_legacy_stream,
    read_numbers,
    read_zip_archive,
)
from lightning_modules.safe_pickle import read_pickle

DATA = {
    "none": None,
    "truth": [True, False],
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**31, 2**80, -(2**80), 0.1, float("inf")],
    "texts": ["", "T1", "é" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [{}]}},
}


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def place(data, *names):
    """Offset of the first instruction with one of these names."""
    return next(position for operation, _, position in pickletools.genops(data) if operation.name in names)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_out_as_it_went_in(protocol):
    assert read_pickle(io.BytesIO(pickle.dumps(DATA, protocol)), {}) == DATA


def test_bytes_and_sets_come_out_and_shared_objects_stay_shared():
    shared = ["x"]
    content = {"bytes": b"\x00" * 300, "array": bytearray(b"ab"), "set": {"a", "b"}, "twice": [shared, shared]}
    read = read_pickle(io.BytesIO(pickle.dumps(content, 5)), {})
    assert read == content
    assert read["twice"][0] is read["twice"][1]


def test_the_stream_is_left_behind_the_end():
    stream = io.BytesIO(pickle.dumps(1, 4) + b"rest")
    read_pickle(stream, {})
    assert stream.read() == b"rest"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, f"{os.name}.system"), (eval, "builtins.eval"), (io.open, "io.open")]
)
def test_a_global_that_is_not_expected_is_refused_with_its_name_and_place(protocol, function, name, tmp_path):
    data = pickle.dumps({"weights": [Calls(function, f"touch {tmp_path / 'canary'}")]}, protocol, fix_imports=False)
    offset = place(data, "GLOBAL", "STACK_GLOBAL")
    with pytest.raises(ValueError, match=rf"^byte {offset}: the global '{name}' .* not imported"):
        read_network_pickle(data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        b"\x80\x02ccollections\nOrderedDict.__init__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x1a_utils._rebuild_tensor_v2 \x93.",
    ],
    ids=["stack", "text", "space"],
)
def test_a_dotted_path_through_an_allowed_module_is_refused(data):
    offset = place(data, "GLOBAL", "STACK_GLOBAL")
    with pytest.raises(
        ValueError, match=rf"^byte {offset}: the global '(collections\.OrderedDict\.__init__|torch\._ut)"
    ):
        read_network_pickle(data)


@pytest.mark.parametrize(
    ("data", "instruction"),
    [
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02\x83\x01\x00.", "EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02(NNo.", "OBJ"),
        (b"\x80\x04N)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x02Pstorage\n.", "PERSID"),
        (b"\x80\x02NQ.", "BINPERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02N2.", "DUP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_instructions_that_are_not_plain_data_are_refused(data, instruction):
    with pytest.raises(ValueError, match=rf"^byte {place(data, instruction)}: the instruction {instruction} "):
        read_network_pickle(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02]}b.", "a state is given to a list"),
        (b"\x80\x02}}b.", "a state is given to a dict"),
        (b"\x80\x02N)R.", "not a global"),
        (b"\x80\x02ccollections\nOrderedDict\nNR.", "not a tuple"),
        (b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02e\x85R.", "in collections.OrderedDict"),
        (b"\x80\x02]NNs.", "keys and values are given to a list"),
        (b"\x80\x02}K\x01a.", "appended to a dict"),
        (b"\x80\x02}K\x01Ns.", "a key is a int"),
        (b"\x80\x04\x8f(K\x01\x90.", "a key is a int"),
        (b"\x80\x02NN.", "does not leave one object"),
        (b"\x80\x02(N.", "does not leave one object"),
        (b"\x80\x02.", "does not leave one object"),
        (b"\x80\x02\x86.", "2 objects are needed"),
        (b"\x80\x02t.", "byte 2:"),
        (b"\x80\x02h\x07.", "byte 2:"),
        (b"\x80\x02q\x07.", "byte 2:"),
        (b"\x80\x02", "exhausted"),
        (b"", "exhausted"),
        (b"\x80\x02\xff.", "unknown"),
        (b"\x80\x04K\x01\x8c\x01a\x93.", "name of a global is not text"),
    ],
)
def test_inconsistent_streams_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        read_network_pickle(data)
    assert str(refused.value).startswith("byte ")


def test_a_deeply_nested_key_is_refused_rather_than_hashed():
    depth = 200_000
    with pytest.raises(ValueError, match="a key is a tuple"):
        read_network_pickle(b"\x80\x02})" + b"\x85" * depth + b"Ns.")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"short.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"short.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"short.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"short.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    ],
    ids=["bytes", "text", "bytearray", "integer", "frame"],
)
def test_a_huge_announced_size_is_refused_without_allocating_it(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^byte 2: (.* only \d+ remain|not enough data)"):
            read_network_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_number_of_instructions_is_bounded(monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_INSTRUCTIONS", 100)
    with pytest.raises(ValueError, match=r"^byte 101: more than 100 instructions"):
        read_network_pickle(b"\x80\x02" + b"}" * 1000 + b".")


def test_bytes_behind_the_end_are_refused():
    with pytest.raises(ValueError, match="byte 4: 3 bytes follow"):
        read_network_pickle(b"\x80\x02N.abc")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", ">f8", "<i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_out_as_they_went_in(protocol, dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype=dtype, order=order)
    record = read_network_pickle(pickle.dumps(array, protocol))
    assert type(record) is ArrayRecord
    assert record.value.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(record.value, array)


def test_arrays_of_the_time_of_numpy_1_come_out_too():
    data = pickle.dumps(np.arange(3.0), 3).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in data
    np.testing.assert_array_equal(read_network_pickle(data).value, [0, 1, 2])


def test_texts_of_python_2_are_texts_and_the_bytes_of_its_arrays_too():
    assert read_pickle(io.BytesIO(b"\x80\x02U\x02T1."), {}) == "T1"
    content = struct.pack("<2f", 1.5, -2).decode("latin-1")
    np.testing.assert_array_equal(read_numbers(NumberType("f4"), content, (2,), "C"), [1.5, -2])


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(-3), np.bool_(True), np.int64(7)])
def test_numpy_scalars_become_plain_numbers(protocol, value):
    read = read_network_pickle(pickle.dumps(value, protocol))
    assert read == value
    assert type(read) in (int, float, bool)


@pytest.mark.parametrize(
    "array",
    [np.array([Calls(os.system, "true")], dtype=object), np.zeros(2, "f4,i4"), np.zeros(2, "S3"), np.zeros(2, "M8[s]")],
    ids=["object", "fields", "text", "time"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_anything_but_numbers_are_refused(array, protocol):
    with pytest.raises(ValueError, match=r"in numpy\.dtype: an array type is not one of plain numbers"):
        read_network_pickle(pickle.dumps(array, protocol))


def test_an_array_whose_bytes_do_not_fit_its_shape_is_refused():
    data = pickle.dumps(np.zeros(4, np.float32), 3).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(ValueError, match=r"an array of float32 \(2147483647,\) is announced, but 16 bytes came"):
        read_network_pickle(data)


def legacy(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zipped(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def read_legacy(data):
    return read_legacy_stream(data, STORAGES | TENSORS)


STREAMS = {"legacy": (legacy, read_legacy), "zip": (zipped, read_zip_archive)}
streams = pytest.mark.parametrize(("write", "read"), STREAMS.values(), ids=STREAMS)


@streams
def test_tensors_come_out_as_they_went_in(write, read):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    tensors = collections.OrderedDict(
        double=base.double(),
        half=base.half(),
        bfloat=base.bfloat16(),
        long=base.long(),
        bool=base > 3,
        scalar=torch.tensor(0.5),
        empty=torch.zeros(0, 3),
        transposed=base.clone().permute(2, 0, 1),
        part=base.clone()[1:, ::2],
        channels_last=torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.rand(3)),
    )
    content = read(write(tensors))
    assert list(content) == list(tensors)
    for name, record in content.items():
        assert type(record) is TensorRecord
        tensor = record.read()
        assert tensor.is_contiguous()
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name].detach()), name


@streams
def test_attributes_of_a_state_dict_are_dropped(write, read):
    state = torch.nn.BatchNorm2d(3).state_dict()
    assert hasattr(state, "_metadata")
    assert {name: record.read().shape for name, record in read(write(state)).items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


@streams
def test_a_file_of_torch_save_that_calls_anything_is_refused(write, read, tmp_path):
    data = write({"weight": Calls(os.system, f"touch {tmp_path / 'canary'}")})
    with pytest.raises(ValueError, match=rf"byte \d+: the global '{os.name}\.system'"):
        read(data)
    assert not list(tmp_path.iterdir())


@streams
def test_a_cut_or_lengthened_file_of_torch_save_is_refused(write, read):
    data = write({"weight": torch.rand(8, 8)})
    for length in range(0, len(data) - 1, 37):
        with pytest.raises(ValueError, match=r"byte|zip archive"):
            read(data[:length])
    if write is legacy:
        with pytest.raises(ValueError, match=f"byte {len(data)}: 1 bytes follow"):
            read(data + b"x")


def test_a_storage_is_as_large_as_its_bytes():
    data = legacy(torch.zeros(2**10))
    larger = data.replace(b"M\x00\x04", b"M\x00\x80").replace(struct.pack("<q", 2**10), struct.pack("<q", 2**15))
    assert larger != data
    with pytest.raises(ValueError, match="a storage of 131072 bytes is announced, but the stream ends before"):
        read_legacy(larger)


def test_tensors_that_overlap_beyond_their_storage_are_refused():
    storage = Storage(torch.float32, 4)
    storage.fill(bytes(16))
    assert TensorRecord(storage, 0, (2, 2), (2, 1)).read().shape == (2, 2)
    with pytest.raises(ValueError, match="does not fit into its storage"):
        TensorRecord(storage, 0, (2, 2), (2, 1)).read()


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(1, (4,), (1,)), (0, (3,), (2,)), (0, (10**9,), (0,)), (0, (1, 5), (5, 1))]
)
def test_tensors_that_reach_beyond_their_storage_are_refused(offset, size, stride):
    storage = Storage(torch.float32, 4)
    storage.fill(bytes(16))
    with pytest.raises(ValueError, match="does not fit into its storage"):
        TensorRecord(storage, offset, size, stride).read()


def test_a_compressed_archive_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2) + bytes(2**20))
    with pytest.raises(ValueError, match="compressed"):
        read_zip_archive(file.getvalue())


def test_a_nested_stream_may_hold_a_storage_only():
    data = pickle.dumps({"x": Calls(torch.storage._load_from_bytes, legacy(torch.zeros(3).untyped_storage()))}, 4)
    with pytest.raises(ValueError, match=r"in torch\.storage\._load_from_bytes: nested stream, byte \d+: "):
        read_network_pickle(data)
    data = pickle.dumps({"x": Calls(torch.storage._load_from_bytes, legacy({"x": 1}))}, 4)
    with pytest.raises(ValueError, match="a nested stream does not hold a storage"):
        read_network_pickle(data)


def test_a_network_of_tensorflow_takes_only_arrays_as_variables():
    network = NetworkRecord()
    with pytest.raises(ValueError, match="a variable is not an array"):
        network.set_state(
            {"version": 2, "build_func_name": "G_paper", "static_kwargs": {}, "variables": [("lod", "0.0")]}
        )
