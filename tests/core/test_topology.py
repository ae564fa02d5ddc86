import pytest
from tests.core import reference
from tests.core.coders import ROWS, small

from circuitmill.core.topology import Topology, make_topology

EXPECTED = {
    "clt": ([[0], [1], [2]], [[0, 1, 2], [1, 2], [2]]),
    "plt": ([[0], [1], [2]], [[0], [1], [2]]),
    "sae": ([[0], [1], [2]], [[0], [1], [2]]),
    "molt": ([[0], [1], [2]], [[0], [1], [2]]),
    "acausal": ([[0], [1], [2]], [[0, 1, 2], [0, 1, 2], [0, 1, 2]]),
    "crosscoder": ([[0, 1, 2]], [[0, 1, 2]]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_reads_and_writes(name):
    reads, writes = EXPECTED[name]
    made = make_topology(name, 3)
    assert ([list(one) for one in made.reads], [list(one) for one in made.writes]) == (reads, writes)
    assert made.n_sources == len(reads)
    assert made.n_pairs == sum(len(one) for one in writes)
    assert made.reads_one == (name != "crosscoder")


@pytest.mark.parametrize("row", ROWS)
def test_rows_and_pairs_are_numbered_as_in_the_loop(row):
    coder = small(row)
    made = coder.topology
    assert made.n_sources == reference.n_sources(coder)
    for source in range(made.n_sources):
        assert list(made.reads[source]) == reference.reads(coder, source)
        assert list(made.writes[source]) == reference.targets(coder, source)
        assert list(made.encoders(source)) == [
            reference.encoder_row(coder, source, layer) for layer in made.reads[source]
        ]
        assert list(made.pairs(source)) == [reference.pair(coder, source, target) for target in made.writes[source]]
    assert coder.W_enc.shape[0] == sum(len(made.encoders(source)) for source in range(made.n_sources))


def test_every_layer_is_written_to():
    for name in EXPECTED:
        for n_layers in (1, 2, 5):
            made = make_topology(name, n_layers)
            assert {target for targets in made.writes for target in targets} == set(range(n_layers))


def test_reading_another_layer_than_ones_own_is_not_reading_one():
    assert not Topology(2, ((1,), (0,)), ((0,), (1,))).reads_one
    assert make_topology("crosscoder", 1).reads_one
