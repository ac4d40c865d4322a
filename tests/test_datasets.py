"""The readers of `examples.datasets`, on written files and on the real data."""

import contextlib
import io
import os
import pathlib
import pickle
import re

import numpy as np
import pytest

from examples import datasets
from examples.datasets import (
    data_folder,
    load_bearings,
    load_cifar10,
    load_eigenworms,
    load_mnist,
    load_spoken_digits,
    read_arff,
    read_ts,
)


NAN = np.nan
EPS = float(np.finfo(np.float32).eps)


def written(path, text):
    path.write_text(text)
    return path


def check_dtypes(data):
    assert data.xs.dtype == np.float32
    assert data.lengths.dtype == data.labels.dtype == np.int32
    assert data.is_test.dtype == np.bool_
    assert len(data.xs) == len(data.lengths) == len(data.labels) == len(data.is_test)


def check_series(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.array(y, np.float32))


# --- The UEA archive's formats -----------------------------------------------

TS = """\
# A comment of no meaning, @data
@problemName Small
@timeStamps false

@MISSING true
@univariate false
@Dimensions 2
@equalLength FALSE
@classLabel true Slow fast
@DATA
1,2.5,-3e1:4,5,6:Slow
# Between series.
 ?, 8 : 9,NaN : fast
"""

ARFF = r"""% A comment
@RELATION small
@attribute 'some motion' Relational
  @attribute x0 numeric
  @ATTRIBUTE x1 REAL
  @attribute x2 integer
@end 'some motion'
@attribute class{Slow, 'fast'}

@Data
"1,2.5,-3e1\n4,5,6",Slow
% Between series.
'?, 8,? \n 9,NaN,?' , 'fast'
"""


def test_ts(tmp_path):
    expected = [[[1, 4], [2.5, 5], [-30, 6]], [[NAN, 9], [8, NAN]]]
    path = written(tmp_path / "Small_TRAIN.ts", TS)
    for source in (path, str(path), io.StringIO(TS)):
        series, labels, classes = read_ts(source)
        check_series(series, expected)
        assert labels == ["Slow", "fast"]
        assert classes == ("Slow", "fast")


def test_arff(tmp_path):
    expected = [[[1, 4], [2.5, 5], [-30, 6]], [[NAN, 9], [8, NAN], [NAN, NAN]]]
    path = written(tmp_path / "Small_TRAIN.arff", ARFF)
    for source in (path, str(path), io.StringIO(ARFF)):
        series, labels, classes = read_arff(source)
        check_series(series, expected)
        assert labels == ["Slow", "fast"]
        assert classes == ("Slow", "fast")


def test_univariate():
    ts = "@univariate true\n@classLabel true 0 1\n@data\n1,2,3:0\n4:1\n"
    check_series(read_ts(io.StringIO(ts)).series, [[[1], [2], [3]], [[4]]])
    arff = (
        "@relation r\n@attribute a numeric\n@attribute b real\n"
        "@attribute target {1,2}\n@data\n1.5,?,2\n3,4, 1\n"
    )
    series, labels, classes = read_arff(io.StringIO(arff))
    check_series(series, [[[1.5], [NAN]], [[3], [4]]])
    assert labels == ["2", "1"]
    assert classes == ("1", "2")


def test_byte_order_mark_and_foreign_comments(tmp_path):
    path = tmp_path / "x.ts"
    text = "@classLabel true a\n# Universit\xe9\n@data\n1,2:a\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("latin-1"))
    check_series(read_ts(path).series, [[[1], [2]]])


def as_ts(series, labels, classes, head=""):
    lines = [head + f"@classLabel true {' '.join(classes)}", "@data"]
    for x, label in zip(series, labels, strict=True):
        columns = (",".join(repr(float(v)) for v in column) for column in x.T)
        lines.append(":".join([*columns, label]))
    return "\n".join(lines) + "\n"


def as_arff(series, labels, classes):
    lines = ["@relation r", "@attribute m relational"]
    lines += [f"@attribute x{i} numeric" for i in range(len(series[0]))]
    lines += ["@end m", f"@attribute class {{{','.join(classes)}}}", "@data"]
    for x, label in zip(series, labels, strict=True):
        columns = (",".join(repr(float(v)) for v in column) for column in x.T)
        lines.append('"' + r"\n".join(columns) + f'",{label}')
    return "\n".join(lines) + "\n"


def test_round_trips():
    rng = np.random.default_rng(0)
    classes, labels = ("a", "b", "c"), ["b", "a", "a", "b"]

    def draw(length):
        x = rng.normal(size=(length, 3)) * 10.0 ** rng.integers(-30, 30, (length, 3))
        x[rng.random(x.shape) < 0.2] = NAN
        return x.astype(np.float32)

    unequal, equal = [draw(n) for n in (5, 1, 7, 3)], [draw(6) for _ in range(4)]
    for read, text, series in (
        (read_ts, as_ts(unequal, labels, classes), unequal),
        (read_ts, as_ts(equal, labels, classes), equal),
        (read_arff, as_arff(equal, labels, classes), equal),
    ):
        found = read(io.StringIO(text))
        check_series(found.series, series)
        assert found.labels == labels
        assert found.classes == classes


SIZES = (
    "@equalLength true\n@seriesLength 2\n@dimension 2\n@classLabel true a b\n@data\n"
)


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("problemName x\n", 1, "expected a keyword such as @data, not 'problemName x'"),
        ("#\n@timeStamps true\n", 2, "expected @timestamps false, not 'true'"),
        ("@equalLength maybe\n", 1, "expected @equallength true|false, not 'maybe'"),
        ("@dimension two\n", 1, "expected @dimension [0-9]+, not 'two'"),
        ("@seriesLength\n", 1, "expected @serieslength [0-9]+, not ''"),
        ("@classLabel false\n", 1, "expected @classlabel true, not 'false'"),
        ("\n@data\n1:a\n", 2, "expected @classLabel true and the classes above"),
        (SIZES + "1,2:3,4:c\n", 6, "expected a class of ['a', 'b'], not 'c'"),
        (SIZES + "1,2:3,4:a\n1,2:3,x:a\n", 7, "could not convert string to float: 'x'"),
        (SIZES + "1,2:3,:a\n", 6, "expected float32 numbers or ?"),
        (SIZES + "1,2:1e39,1:a\n", 6, "expected float32 numbers or ?"),
        (SIZES + "1,2,3\n", 6, "expected values:values:label, without time stamps"),
        (SIZES + "(0,1),(1,2):(0,1),(1,2):a\n", 6, "without time stamps"),
        (SIZES + "1,2:a\n", 6, "expected 2 dimensions of 2 values, not of [2]"),
        (SIZES + "1,2,3:4,5,6:a\n", 6, "2 dimensions of 2 values, not of [3, 3]"),
        (SIZES + "1,2:4,5,6:a\n", 6, "2 dimensions of 2 values, not of [2, 3]"),
        ("@classLabel true a\n@data\n1:2:a\n1:a\n", 4, "2 dimensions of 1 values"),
        ("@univariate true\n@classLabel true a\n@data\n1:2:a\n", 4, "1 dimensions of"),
    ],
)
def test_malformed_ts(tmp_path, text, line, message):
    path = written(tmp_path / "x.ts", text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_ts(path)
    assert str(error.value).startswith(f"{path}, line {line}: expected ")


RELATIONAL = (
    "@relation r\n@attribute m relational\n@attribute x numeric\n"
    "@attribute y numeric\n@end m\n@attribute class {a,b}\n@data\n"
)
NUMERIC = RELATIONAL.replace("@attribute m relational\n", "").replace("@end m\n", "")


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("%\nrelation x\n", 2, "@end or @data, not 'relation x'"),
        ("@attribute x string\n", 1, "numeric, relational or {a,b}"),
        ("@attribute numeric\n", 1, "numeric, relational or {a,b}"),
        ("@attribute x numeric\n@data\n", 2, "and then the class {a,b} above"),
        (RELATIONAL.replace("@end m\n", ""), 6, "a relational one of these that ends"),
        ("@attribute c {a}\n@attribute x real\n@data\n", 3, "and then the class"),
        (RELATIONAL + '"1,2\\n3,4",c\n', 8, "expected a class of ['a', 'b'], not 'c'"),
        (RELATIONAL + '"1,2\\n3,4"\n', 8, "expected values,label or 'values\\nvalues'"),
        (RELATIONAL + "1,2\\n3,4,a\n", 8, "expected values,label or 'values\\nvalues'"),
        (RELATIONAL + "\"1,2\\n3,4',a\n", 8, "expected values,label or"),
        (RELATIONAL + '"1,2\\n3,x",a\n', 8, "could not convert string to float: 'x'"),
        (RELATIONAL + '"1,2\\n3",a\n', 8, "2 dimensions of 2 values, not of [2, 1]"),
        (RELATIONAL + '"1,2,3",a\n', 8, "1 dimensions of 2 values, not of [3]"),
        (RELATIONAL + '"1,2",a\n"1,2\\n3,4",a\n', 9, "1 dimensions of 2 values"),
        (NUMERIC + "1,2,3,a\n", 6, "1 dimensions of 2 values, not of [3]"),
        (NUMERIC + "a\n", 6, "expected values,label or"),
        (NUMERIC + "1,2,a\n1,,b\n", 7, "expected float32 numbers or ?"),
    ],
)
def test_malformed_arff(tmp_path, text, line, message):
    path = written(tmp_path / "x.arff", text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_arff(path)
    assert str(error.value).startswith(f"{path}, line {line}: expected ")


@pytest.mark.parametrize("read", [read_ts, read_arff])
def test_files_that_end_too_soon(read, tmp_path):
    path = written(tmp_path / "x", "")
    with pytest.raises(ValueError, match="x: expected @data and series below it"):
        read(path)
    head = NUMERIC if read is read_arff else "@classLabel true a\n@data\n"
    with pytest.raises(ValueError, match="expected at least one series below @data"):
        read(written(path, head + "\n"))


# --- EigenWorms --------------------------------------------------------------


@pytest.mark.parametrize("suffixes", [(".ts", ".ts"), (".arff", ".arff")])
def test_eigenworms(tmp_path, suffixes):
    # The first channel has mean 4 and standard deviation 2, the second is constant.
    train = [np.array([[2.0, 7], [6, 7]]), np.array([[6.0, 7], [2, 7]])]
    test = [np.array([[4.0, 7], [8, 8]])]
    classes = ("3", "1", "2")
    for split, series, labels, suffix in (
        ("TRAIN", train, ["1", "3"], suffixes[0]),
        ("TEST", test, ["2"], suffixes[1]),
    ):
        # The order of the test file's header is of no account.
        order = classes if split == "TRAIN" else classes[::-1]
        text = (as_ts if suffix == ".ts" else as_arff)(series, labels, order)
        written(tmp_path / f"EigenWorms_{split}{suffix}", text)
    data = load_eigenworms(tmp_path)
    check_dtypes(data)
    expected = [[[-1, 0], [1, 0]], [[1, 0], [-1, 0]], [[0, 0], [2, 1]]]
    assert data.xs.tolist() == expected
    assert data.lengths.tolist() == [2, 2, 2]
    assert data.labels.tolist() == [1, 0, 2]
    assert data.is_test.tolist() == [False, False, True]
    assert data.classes == classes


def test_eigenworms_of_unequal_length(tmp_path):
    train = as_ts([np.array([[1.0], [3]]), np.array([[2.0]] * 3)], "ab", "ab")
    written(tmp_path / "EigenWorms_TRAIN.ts", train)
    written(tmp_path / "EigenWorms_TEST.ts", as_ts([np.array([[9.0]])], "b", "ab"))
    data = load_eigenworms(tmp_path)
    assert data.lengths.tolist() == [2, 3, 1]
    # The moments are those of all five training steps: 2, and 2 / 5 squared.
    one = 1 / np.sqrt(0.4)
    expected = [[-one, one, 0], [0, 0, 0], [7 * one, 0, 0]]
    np.testing.assert_allclose(data.xs[..., 0], expected, rtol=2 * EPS)


def test_eigenworms_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="EigenWorms_TRAIN.ts or .*TRAIN.arff"):
        load_eigenworms(tmp_path)
    one = [np.ones((2, 2))]
    written(tmp_path / "EigenWorms_TRAIN.ts", as_ts(one, "a", "ab"))
    with pytest.raises(FileNotFoundError, match="EigenWorms_TEST.ts or .*TEST.arff"):
        load_eigenworms(tmp_path)
    path = tmp_path / "EigenWorms_TEST.ts"
    for text, message in (
        (as_ts(one, "c", "abc"), r"expected the training file's classes, not \['c'\]"),
        (as_ts([np.ones((2, 3))], "a", "ab"), "expected 2 dimensions, without missing"),
        (as_ts([np.full((2, 2), NAN)], "a", "ab"), ".* without missing values"),
    ):
        written(path, text)
        with pytest.raises(ValueError, match=f"EigenWorms_TEST.ts: {message}"):
            load_eigenworms(tmp_path)


# --- CIFAR-10 ----------------------------------------------------------------


def python2_string(value):
    return b"T" + len(value).to_bytes(4, "little") + value


def python2_batch(labels, data, module=b"numpy.core.multiarray"):
    """What Python 2 and NumPy 1 pickled a batch to, which Python 3 cannot write."""
    rows = b"J" + len(data).to_bytes(4, "little")
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    dtype += 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    array = b"c" + module + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01" + rows + b"M\x00\x0c\x86" + dtype + b"\x89"
    array += python2_string(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([x]) for x in labels) + b"e"
    return (
        b"\x80\x02}("
        + python2_string(b"batch_label")
        + python2_string(b"training batch")
        + python2_string(b"labels")
        + listed
        + python2_string(b"data")
        + array
        + b"u."
    )


def python3_batch(labels, data):
    return pickle.dumps({b"labels": labels.tolist(), b"data": data}, protocol=4)


def binary_batch(labels, data):
    return np.concatenate([labels[:, None].astype(np.uint8), data], axis=1).tobytes()


def cifar_names(suffix):
    return [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]


@pytest.fixture
def photographs():
    """Two in each of six batches, which take the values 0 to 255 unevenly."""
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    data[:, :, :1024] //= 2
    return rng.integers(0, 10, (6, 2)), data


CIFAR = {
    "python": (python2_batch, "", "cifar-10-batches-py"),
    "python 3": (python3_batch, "", ""),
    "binary": (binary_batch, ".bin", "cifar-10-batches-bin"),
    "binary itself": (binary_batch, ".bin", ""),
}


@pytest.mark.parametrize("version", CIFAR)
def test_cifar10(tmp_path, photographs, version):
    batch, suffix, inside = CIFAR[version]
    (tmp_path / inside).mkdir(exist_ok=True)
    labels, data = photographs
    for name, *content in zip(cifar_names(suffix), labels, data, strict=True):
        (tmp_path / inside / name).write_bytes(batch(*content))
    found = load_cifar10(tmp_path)
    check_dtypes(found)
    assert found.xs.shape == (12, 1024, 3)
    assert found.labels.tolist() == labels.ravel().tolist()
    assert found.lengths.tolist() == [1024] * 12
    assert found.is_test.tolist() == [False] * 10 + [True] * 2
    assert found.classes[0] == "airplane" and found.classes[9] == "truck"
    # The documented place of a pixel: channel, then row, then column.
    images = data.reshape(12, 3, 32, 32).astype(np.float64)
    mean = images[:10].mean((0, 2, 3))
    std = images[:10].std((0, 2, 3))
    for i, k, c in ((0, 0, 0), (3, 33, 1), (11, 1023, 2), (7, 500, 0)):
        expected = (images[i, c, k // 32, k % 32] - mean[c]) / std[c]
        # Rounded to float32; the moments are summed in another order.
        np.testing.assert_allclose(found.xs[i, k, c], expected, rtol=4 * EPS)
    train = found.xs[:10].astype(np.float64)
    np.testing.assert_allclose(train.mean((0, 1)), 0, atol=EPS)
    np.testing.assert_allclose(train.std((0, 1)), 1, rtol=EPS)


def test_cifar10_of_newer_numpy_pickles(tmp_path, photographs):
    labels, data = photographs
    content = python2_batch(labels[0], data[0], b"numpy._core.multiarray")
    for name in cifar_names(""):
        (tmp_path / name).write_bytes(content)
    assert load_cifar10(tmp_path).labels.tolist() == labels[0].tolist() * 6


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickles_are_refused(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = {b"labels": [0], b"data": Malicious(trace)}
    text = pickle.dumps(content, protocol=protocol)
    for name in cifar_names(""):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(pickle.UnpicklingError, match="Refused .*: not part of an"):
        load_cifar10(tmp_path)
    assert not trace.exists()
    # It would have worked.
    pickle.loads(text)
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins\neval", "numpy\nload", "numpy.core.multiarray\nfromfile"]
)
def test_other_names_are_refused(tmp_path, name):
    (tmp_path / "data_batch_1").write_bytes(b"c" + name.encode() + b"\n.")
    for other in cifar_names("")[1:]:
        (tmp_path / other).touch()
    with pytest.raises(pickle.UnpicklingError, match=name.replace("\n", ".")):
        load_cifar10(tmp_path)


def test_cifar10_refusals(tmp_path, photographs):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.data_batch_1 or"):
        load_cifar10(tmp_path)
    labels, data = photographs[0][0], photographs[1][0]
    first = tmp_path / "data_batch_1"
    first.write_bytes(python3_batch(labels, data))
    with pytest.raises(FileNotFoundError, match="data_batch_2: give the folder of"):
        load_cifar10(tmp_path)
    for name in cifar_names("") + cifar_names(".bin"):
        (tmp_path / name).touch()
    for content, message in (
        (pickle.dumps([1]), "expected a dictionary"),
        (pickle.dumps({b"labels": [1]}), "expected b'data', rows of 3,072 bytes"),
        (python3_batch(labels[:1], data), "and as many b'labels'"),
        (python3_batch(labels, data.astype(np.int16)), "rows of 3,072 bytes"),
        (python3_batch(labels + 10, data), "expected labels from 0 to 9"),
    ):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
            load_cifar10(tmp_path)
    first.unlink()
    for content, message in (
        (binary_batch(labels, data)[:-1], "records of 3,073 bytes"),
        (b"", "records of 3,073 bytes"),
        (binary_batch(labels * 0 + 10, data), "labels from 0 to 9"),
    ):
        first.with_suffix(".bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"data_batch_1.bin: expected {message}"):
            load_cifar10(tmp_path)


# --- What is read from the data folder ---------------------------------------


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEER_ODE_DATA", str(tmp_path))
    return tmp_path


def test_data_folder(own_folder, monkeypatch):
    assert data_folder() == own_folder
    for load, name in (
        (load_spoken_digits, "spoken_digits_8khz.npz"),
        (load_bearings, "bearings_17984.npz"),
        (load_mnist, "mnist_small.npz"),
    ):
        with pytest.raises(FileNotFoundError, match="set DEER_ODE_DATA") as error:
            load()
        assert str(own_folder / name) in str(error.value)
    monkeypatch.delenv("DEER_ODE_DATA")
    repository = pathlib.Path(datasets.__file__).parents[1]
    assert data_folder() == repository.parent / "shared" / "data"


def test_small_spoken_digits(own_folder):
    audio = np.array([3, -3, 3, 0, 0, 1, 7, -1, -7, 5], np.int16)
    np.savez(
        own_folder / "spoken_digits_8khz.npz",
        audio=audio,
        length=np.array([3, 2, 5], np.int32),
        digit=np.array([4, 0, 9], np.int8),
        index=np.array([5, 4, 0], np.int8),
    )
    data = load_spoken_digits(frame=2)
    check_dtypes(data)
    # The root mean squares are 3, 0 and 5.
    expected = [
        [[1, -1], [1, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0]],
        [[0.2, 1.4], [-0.2, -1.4], [1, 0]],
    ]
    np.testing.assert_array_equal(data.xs, np.array(expected, np.float32))
    assert data.lengths.tolist() == [2, 1, 3]
    assert data.labels.tolist() == [4, 0, 9]
    assert data.is_test.tolist() == [False, True, True]
    cut = load_spoken_digits(frame=2, max_steps=2)
    np.testing.assert_array_equal(cut.xs, data.xs[:, :2])
    assert cut.lengths.tolist() == [2, 1, 2]
    one = load_spoken_digits(frame=1)
    np.testing.assert_array_equal(one.xs[0, :, 0], [1, -1, 1, 0, 0])
    assert one.lengths.tolist() == [3, 2, 5]


def save_bearings(folder, records):
    """Of each record two windows of five samples, filled with the record's number."""
    number = np.arange(len(records)).repeat(2)
    x = number[:, None, None] * np.array([1, 10]) * np.array([1, -1, 1, -1, 1])[:, None]
    np.savez(
        folder / "bearings_17984.npz",
        X=x.astype(np.int16),
        scale=np.array([0.5, 2], np.float32),
        y=np.array([name[0] == "B" for name in records], np.int8).repeat(2),
        record=np.array(records).repeat(2),
        rpm=np.zeros(2 * len(records), np.int16),
        classes=np.array(["inner race", "ball"]),
    )
    return number


def test_small_bearings(own_folder):
    records = ["A1", "B1", "A2", "B2", "A3", "B3", "A4"]
    number = save_bearings(own_folder, records)
    drawn = set()
    for seed in range(20):
        data = load_bearings(seed=seed)
        check_dtypes(data)
        assert data.classes == ("inner race", "ball")
        assert data.labels.tolist() == [int(records[i][0] == "B") for i in number]
        assert data.lengths.tolist() == [5] * 14
        # One record (0.3 * 4 and 0.3 * 3, rounded) of each class, with both windows.
        assert np.array_equal(data.is_test[::2], data.is_test[1::2])
        test = number[::2][data.is_test[::2]]
        assert sorted(records[i][0] for i in test) == ["A", "B"]
        drawn.add(tuple(test.tolist()))
        # In units of the training records' own standard deviation, without the test's.
        signs = np.array([1, -1, 1, -1, 1])
        values = number[~data.is_test][:, None] * signs
        expected = number[:, None] * signs / values.std()
        for channel in range(2):
            np.testing.assert_allclose(
                data.xs[..., channel], expected, rtol=8 * EPS, atol=0
            )
        again = load_bearings(seed=seed)
        np.testing.assert_array_equal(again.is_test, data.is_test)
    assert len(drawn) > 5


def test_frames_of_bearings(own_folder):
    save_bearings(own_folder, ["A1", "B1", "A2", "B2"])
    one, two = load_bearings(), load_bearings(frame=2)
    assert two.xs.shape == (8, 3, 4)
    assert two.lengths.tolist() == [3] * 8
    for step in range(3):
        for channel in range(2):
            samples = two.xs[:, step, 2 * channel : 2 * channel + 2]
            expected = one.xs[:, 2 * step : 2 * step + 2, channel]
            np.testing.assert_array_equal(samples[:, : expected.shape[1]], expected)
    assert not two.xs[:, 2, [1, 3]].any()


def test_fractions_of_bearings(own_folder):
    save_bearings(own_folder, [f"{c}{i}" for c in "AB" for i in range(4)])
    for fraction, num_test in ((0.01, 1), (0.5, 2), (0.8, 3), (0.99, 3)):
        data = load_bearings(test_fraction=fraction)
        for label in range(2):
            assert data.is_test[data.labels == label].sum() == 2 * num_test
    for fraction in (0, 1, -0.1, NAN):
        with pytest.raises(ValueError, match=rf"`test_fraction` .* not {fraction}"):
            load_bearings(test_fraction=fraction)
    save_bearings(own_folder, ["A1", "A2", "B1"])
    with pytest.raises(ValueError, match="Class 'ball' needs 2 records, has 1"):
        load_bearings()


def test_small_mnist(own_folder):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    images[0, 1, 2], images[2, 27, 27] = 255, 51
    labels = np.array([3, 1, 4], np.int8)
    np.savez(
        own_folder / "mnist_small.npz",
        x_train=images[:2],
        y_train=labels[:2],
        x_test=images[2:],
        y_test=labels[2:],
    )
    data = load_mnist()
    check_dtypes(data)
    assert data.xs.shape == (3, 784, 1)
    assert data.xs[0, 28 + 2, 0] == 1
    assert data.xs[2, 783, 0] == np.float32(0.2)
    np.testing.assert_array_equal(np.rint(data.xs[..., 0] * 255), images.reshape(3, -1))
    assert data.labels.tolist() == [3, 1, 4]
    assert data.is_test.tolist() == [False, False, True]


@contextlib.contextmanager
def real_data():
    try:
        yield
    except FileNotFoundError as error:
        pytest.skip(f"the real data are not here: {error}")


def test_real_spoken_digits():
    with real_data():
        data = load_spoken_digits(frame=16)
    check_dtypes(data)
    # The longest clip has 18,262 samples.
    assert data.xs.shape == (1500, 1142, 16)
    assert data.lengths.min() == 72 and data.lengths.max() == 1142
    assert data.is_test.sum() == 300
    assert data.classes == tuple("0123456789")
    assert np.bincount(data.labels).tolist() == [150] * 10
    assert np.bincount(data.labels[data.is_test]).tolist() == [30] * 10
    with np.load(data_folder() / "spoken_digits_8khz.npz") as file:
        clips, length = file["audio"].astype(np.float64), file["length"]
    np.testing.assert_array_equal(data.lengths, -(-length // 16))
    # Of unit root mean square over the samples there are, the rest exactly zero.
    flat = data.xs.reshape(1500, -1)
    squares = np.sum(np.square(flat, dtype=np.float64), axis=1)
    np.testing.assert_allclose(squares / length, 1, rtol=EPS)
    for x, n in zip(flat, length, strict=True):
        assert not x[n:].any()
    # The last clip, which ends where the recordings do.
    last = clips[-length[-1] :]
    expected = last / np.sqrt(np.mean(last**2))
    np.testing.assert_allclose(flat[-1, : length[-1]], expected, rtol=2 * EPS)
    cut = load_spoken_digits(frame=100, max_steps=30)
    assert cut.xs.shape == (1500, 30, 100)
    np.testing.assert_array_equal(cut.lengths, np.minimum(-(-length // 100), 30))
    np.testing.assert_array_equal(cut.xs.reshape(1500, -1), flat[:, :3000])
    for wrong in ({"frame": 0}, {"max_steps": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, not 0"):
            load_spoken_digits(**wrong)


def test_real_bearings():
    with real_data():
        data = load_bearings(frame=64)
    check_dtypes(data)
    assert data.xs.shape == (114, 281, 128)
    assert data.classes == ("inner race", "ball", "outer race")
    assert set(data.lengths.tolist()) == {281}
    with np.load(data_folder() / "bearings_17984.npz") as file:
        record, samples, scale = file["record"], file["X"], file["scale"]
    test, train = set(record[data.is_test]), set(record[~data.is_test])
    assert not test & train
    # Of 12, 12 and 28 records: 0.3 of each, rounded.
    for label, num_test, num_records in ((0, 4, 12), (1, 4, 12), (2, 8, 28)):
        of_class = set(record[data.labels == label])
        assert (len(of_class), len(of_class & test)) == (num_records, num_test)
    xs = data.xs.reshape(114, 281, 2, 64).transpose(0, 1, 3, 2).reshape(114, 17984, 2)
    std = xs[~data.is_test].std((0, 1), dtype=np.float64)
    # The divisor and each quotient are rounded.
    np.testing.assert_allclose(std, 1, rtol=2 * EPS)
    of_train = (samples[~data.is_test] * scale.astype(np.float64)).std((0, 1))
    expected = samples[5, 1000] * scale / of_train
    np.testing.assert_allclose(xs[5, 1000], expected, rtol=4 * EPS)
    with pytest.raises(ValueError, match="`frame` must be at least 1, not 0"):
        load_bearings(frame=0)


def test_real_mnist():
    with real_data():
        data = load_mnist()
    check_dtypes(data)
    assert data.xs.shape == (14000, 784, 1)
    assert set(data.lengths.tolist()) == {784}
    assert data.is_test.sum() == 2000 and data.is_test[-2000:].all()
    assert data.xs.min() == 0 and data.xs.max() == 1
    assert data.labels[:5].tolist() == [0, 3, 4, 7, 9]
    assert data.labels[12000:12005].tolist() == [6, 3, 9, 9, 1]
    with np.load(data_folder() / "mnist_small.npz") as file:
        total = file["x_test"].sum(dtype=np.int64)
    np.testing.assert_allclose(
        data.xs[data.is_test].sum(dtype=np.float64), total / 255, rtol=EPS
    )
