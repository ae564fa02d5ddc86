from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from circuitmill.errors import StoreError
from circuitmill.stores import sharded
from circuitmill.stores.sharded import Extent, Part, Piece, extent_of, shares

WHERE = Path("here")


def part(start: int, length: int, total: int = 8) -> Extent:
    return Extent((total, 2), torch.float32, 0, start, length)


def test_an_extent_is_where_the_values_lie():
    whole = torch.zeros(4, 6, dtype=torch.int16)
    extent = extent_of("W", Part(whole[:, 2:5], 1, 2, 6))
    assert (extent.shape, extent.dtype, extent.offsets, extent.sizes, extent.bytes) == (
        (4, 6),
        torch.int16,
        (0, 2),
        (4, 3),
        24,
    )
    plain = extent_of("W", whole)
    assert (plain.shape, plain.offsets, plain.sizes, plain.bytes) == ((4, 6), (0, 0), (4, 6), 48)
    assert extent_of("step", torch.tensor(1)).bytes == 8


@pytest.mark.parametrize("entry", [(1, 0, 3), (-1, 0, 3), (0, -1, 3), (0, 2, 3)])
def test_a_part_outside_its_whole_is_refused(entry):
    with pytest.raises(StoreError, match="where: W"):
        extent_of("W", Part(torch.zeros(2), *entry))


def test_every_stretch_has_one_writer_and_replicated_ones_go_where_least_is_written():
    rank = [{"W": part(0, 6), "a": Extent((9,), torch.float32)}, {"W": part(6, 2), "a": Extent((9,), torch.float32)}]
    assert shares(rank, WHERE) == [["W"], ["W", "a"]]
    # two data ranks of two feature ranks each; a scalar on one of them
    mesh = [{"W": part(4 * (rank % 2), 4), "b": part(4 * (rank % 2), 4)} for rank in range(4)]
    mesh[2]["step"] = Extent((), torch.int64)
    assert shares(mesh, WHERE) == [["W"], ["W"], ["b", "step"], ["b"]]


@pytest.mark.parametrize("start", [0, 5, 8])
def test_a_rank_without_rows_writes_nothing_wherever_it_says_to_be(start):
    assert shares([{"W": part(start, 0)}, {"W": part(0, 8)}], WHERE) == [[], ["W"]]
    assert shares([{"W": part(0, 0, 0)}, {"W": part(0, 0, 0)}], WHERE) == [["W"], []]


@pytest.mark.parametrize(
    "stretches", [[(0, 4)], [(0, 4), (5, 3)], [(0, 4), (3, 5)], [(0, 4), (0, 8)], [(4, 4)], [(0, 0)], [(8, 0)]]
)
def test_stretches_that_do_not_make_the_whole_are_refused(stretches):
    with pytest.raises(StoreError, match="stretches of W that follow each other up to 8 on axis 0"):
        shares([{"W": part(*stretch)} for stretch in stretches], WHERE)


def test_ranks_that_disagree_about_the_whole_are_refused():
    for other in (part(4, 4, 9), Extent((8, 2), torch.float32), Extent((8, 2), torch.float64, 0, 4, 4)):
        with pytest.raises(StoreError, match="on rank 1"):
            shares([{"W": part(0, 4)}, {"W": other}], WHERE)


def test_pieces_are_small_copies_that_together_are_the_tensor(monkeypatch):
    monkeypatch.setattr(sharded, "FILE_BYTES", 40)
    whole = torch.arange(90.0).reshape(1, 3, 30)
    pieces = sharded.stage({"W": Part(whole, 2, 30, 60)}, ["W"])
    rebuilt = torch.full((1, 3, 60), -1.0)
    for index, piece in pieces.items():
        assert piece.values.nbytes <= 40 and piece.shape == (1, 3, 60)
        places = tuple(slice(a, a + n) for a, n in zip(index.offset, piece.values.shape, strict=True))
        assert (rebuilt[places] == -1).all()
        rebuilt[places] = piece.values
    whole_before = whole.clone()
    whole.zero_()
    assert torch.equal(rebuilt[..., 30:], whole_before) and (rebuilt[..., :30] == -1).all()
    assert len(pieces) == 9


def test_two_pieces_of_one_tensor_never_share_a_file(tmp_path):
    halves = {MetadataIndex("W", (start,)): Piece(torch.arange(2.0) + start, (4,)) for start in (0, 2)}
    sharded.write(tmp_path, halves, None)
    assert len(list(tmp_path.iterdir())) == 2
    found = torch.zeros(4)
    sharded.read(tmp_path, sharded.read_metadata(tmp_path), {"W": found})
    assert found.tolist() == [0, 1, 2, 3]


def test_equal_states_are_equal_files(tmp_path: Path):
    pieces = {MetadataIndex("W", (0, 0)): Piece(torch.ones(3, 2), (3, 2))}
    made = set()
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        sharded.write(folder, pieces, None)
        (file,) = folder.glob("*.safetensors")
        made.add(file.read_bytes())
    assert len(made) == 1
    found = torch.zeros(3, 2)
    sharded.read(folder, sharded.read_metadata(folder), {"W": found})
    assert found.equal(torch.ones(3, 2))
