"""Communicators that layers share."""

from __future__ import annotations

import pytest

from expertlink import ClosedError
from expertlink.integrations.growing import Communicators, shared
from support.frameworks import Layer


class Mesh:
    """A device mesh, equal to all others, without a group."""

    def get_group(self) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_layers_of_a_mesh_share_and_equal_meshes_do_not() -> None:
    first, second = Mesh(), Mesh()
    found = shared(first, num_experts=8, max_tokens_per_rank=None)
    assert shared(first, num_experts=8, max_tokens_per_rank=None) is found
    assert shared(first, num_experts=8, max_tokens_per_rank=16) is not found
    assert shared(second, num_experts=8, max_tokens_per_rank=None) is not found


def test_one_rank_grows_and_closes() -> None:
    communicators = Communicators(None, num_experts=8)
    rooms = []
    for tokens in (4, 3, 5, 30):
        layer = Layer.drawn(0, tokens)
        *_, comm = communicators.dispatch(layer.x_TH, layer.ids_TK, layer.weights_TK)
        rooms.append(comm.config.max_tokens_per_rank)
    assert rooms == [4, 4, 8, 30]
    for _ in range(2):
        communicators.close()
    layer = Layer.drawn(0, 1)
    with pytest.raises(ClosedError, match="these communicators are closed"):
        communicators.dispatch(layer.x_TH, layer.ids_TK, layer.weights_TK)
