"""Downloads are complete or rejected, whatever happens to their chunks and to the process."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import BlobError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import BlobStore, Download, chunk, ref_of, split
from fedspine_edge.protocol.messages import CHUNK_BYTES, BlobRef

DATA = bytes(range(256)) * 20  # 5 chunks of 1024


@pytest.fixture(params=["memory", "disk"])
def directory(request, tmp_path):
    return tmp_path if request.param == "disk" else None


@given(st.binary(max_size=5000), st.integers(1024, 2000), st.randoms(use_true_random=False))
def test_download_accepts_any_order_and_repetitions(data, size, random):
    ref, chunks = split(data, chunk_bytes=size)
    assert ref.num_chunks == len(chunks)
    assert [chunk(ref, data, i) for i in range(len(chunks))] == chunks
    download = Download(ref)
    order = list(range(len(chunks))) * 2
    random.shuffle(order)
    new = [download.feed(i, chunks[i]) for i in order]
    assert sum(new) == len(chunks)
    assert download.complete
    assert download.data() == data


def test_default_chunk_fits_every_broker():
    ref, chunks = split(bytes(CHUNK_BYTES * 2 + 1))
    assert [len(c) for c in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 1]
    assert ref.sha256 == codec.digest(bytes(CHUNK_BYTES * 2 + 1))


def test_download_of_an_empty_blob_is_complete(directory):
    ref, chunks = split(b"")
    download = Download(ref, directory)
    assert chunks == []
    assert download.complete
    assert download.missing() == []
    assert download.data() == b""


def test_download_missing_returns_the_lowest_indices(directory):
    ref, chunks = split(DATA, chunk_bytes=1024)
    download = Download(ref, directory)
    assert download.missing(3) == [0, 1, 2]
    download.feed(1, chunks[1])
    assert download.missing(3) == [0, 2, 3]
    download.feed(0, chunks[0])
    assert download.missing(16) == [2, 3, 4]
    assert download.received == 2


def test_download_of_a_huge_blob_allocates_nothing():
    ref = BlobRef(sha256="0" * 64, size_bytes=2 * 1024**3, chunk_bytes=1024)
    download = Download(ref)
    assert download.missing(4) == [0, 1, 2, 3]
    with pytest.raises(BlobError, match="at most 1,000"):
        Download(ref, max_bytes=1000)


@pytest.mark.parametrize("index", [-1, 5, 10**9])
def test_chunk_index_outside_the_blob_raises_blob_error(directory, index):
    ref, _ = split(DATA, chunk_bytes=1024)
    with pytest.raises(BlobError, match="5 chunks"):
        Download(ref, directory).feed(index, bytes(1024))
    with pytest.raises(BlobError, match="5 chunks"):
        chunk(ref, DATA, index)


@pytest.mark.parametrize("data", [b"", bytes(1023), bytes(1025)])
def test_chunk_of_wrong_length_changes_nothing(directory, data):
    ref, chunks = split(DATA, chunk_bytes=1024)
    download = Download(ref, directory)
    download.feed(0, chunks[0])
    with pytest.raises(BlobError, match="instead of 1024"):
        download.feed(1, data)
    assert download.missing() == [1, 2, 3, 4]


def test_incomplete_download_has_no_data(directory):
    ref, chunks = split(DATA, chunk_bytes=1024)
    download = Download(ref, directory)
    download.feed(3, chunks[3])
    with pytest.raises(BlobError, match="1 of 5"):
        download.data()
    assert download.received == 1


def test_corrupt_download_is_discarded_and_can_restart(directory):
    ref, chunks = split(DATA, chunk_bytes=1024)
    download = Download(ref, directory)
    for index, data in enumerate(chunks):
        download.feed(index, bytes(1024) if index == 2 else data)
    with pytest.raises(BlobError, match="corrupt"):
        download.data()
    assert download.missing() == [0, 1, 2, 3, 4]
    for index, data in enumerate(chunks):
        assert download.feed(index, data)
    assert download.data() == DATA


def test_download_continues_after_a_restart(tmp_path):
    ref, chunks = split(DATA, chunk_bytes=1024)
    first = Download(ref, tmp_path)
    first.feed(0, chunks[0])
    first.feed(4, chunks[4])
    second = Download(ref, tmp_path)
    assert second.missing() == [1, 2, 3]
    assert second.feed(0, chunks[0]) is False
    for index in (1, 2, 3):
        second.feed(index, chunks[index])
    assert second.data() == DATA
    second.discard()
    assert list(tmp_path.iterdir()) == []


def test_download_ignores_incomplete_and_foreign_files(tmp_path):
    ref, chunks = split(DATA, chunk_bytes=1024)
    first = Download(ref, tmp_path)
    for index in (0, 1):
        first.feed(index, chunks[index])
    (folder,) = tmp_path.iterdir()
    (folder / "1").write_bytes(chunks[1][:100])
    for name in ("99", "-1", "03", ".writing-abc", "²"):
        (folder / name).write_bytes(chunks[3])
    assert Download(ref, tmp_path).missing() == [1, 2, 3, 4]
    assert [path.name for path in folder.iterdir()] == ["0"]


def test_download_with_another_chunk_size_reuses_nothing(tmp_path):
    ref, chunks = split(DATA, chunk_bytes=1024)
    Download(ref, tmp_path).feed(0, chunks[0])
    assert Download(ref_of(DATA, chunk_bytes=2048), tmp_path).received == 0


def test_chunk_deleted_from_disk_raises_blob_error(tmp_path):
    ref, chunks = split(DATA, chunk_bytes=1024)
    download = Download(ref, tmp_path)
    for index, data in enumerate(chunks):
        download.feed(index, data)
    (folder,) = tmp_path.iterdir()
    (folder / "2").unlink()
    with pytest.raises(BlobError, match="cannot be read"):
        download.data()
    assert download.missing() == [0, 1, 2, 3, 4]


def test_reference_with_a_path_as_hash_is_rejected(tmp_path):
    with pytest.raises(BlobError, match="not a SHA-256"):
        Download(BlobRef(sha256="../../x", size_bytes=1), tmp_path)


# BlobStore


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_blob_store_round_trips(tmp_path_factory, data):
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    sha256 = store.put(data)
    assert store.put(data) == sha256 == codec.digest(data)
    assert store.path(sha256).is_file()
    assert store.get(sha256) == data
    assert list(store) == [sha256]


def test_blob_store_removes_a_damaged_blob(tmp_path):
    store = BlobStore(tmp_path)
    sha256 = store.put(b"good")
    store.path(sha256).write_bytes(b"evil")
    with pytest.raises(BlobError, match="damaged"):
        store.get(sha256)
    assert not store.path(sha256).is_file()
    store.put(b"good")
    store.path(sha256).write_bytes(b"evil")
    store.put(b"good")
    assert store.get(sha256) == b"good"


def test_blob_store_rejects_unknown_and_invalid_hashes(tmp_path):
    store = BlobStore(tmp_path / "deep" / "blobs")
    with pytest.raises(BlobError, match="is not in"):
        store.get("0" * 64)
    for bad in ("", "../x", "A" * 64, "0" * 63):
        with pytest.raises(BlobError, match="not a SHA-256"):
            store.path(bad).is_file()


def test_blob_store_prune_keeps_only_the_given_blobs(tmp_path):
    store = BlobStore(tmp_path)
    kept, gone = store.put(b"kept"), store.put(b"gone")
    (tmp_path / ".writing-leftover").write_bytes(b"half")
    assert store.prune([kept, "f" * 64]) == 2
    assert list(store) == [kept]
    assert not store.path(gone).is_file()
    assert list(tmp_path.iterdir()) == [store.path(kept)]


def test_interrupted_write_leaves_the_old_state(tmp_path, monkeypatch):
    store = BlobStore(tmp_path)

    def fail(*_args):
        raise OSError("no power")

    monkeypatch.setattr("fedspine_edge.files.os.replace", fail)
    with pytest.raises(OSError, match="no power"):
        store.put(b"data")
    assert list(tmp_path.iterdir()) == []
