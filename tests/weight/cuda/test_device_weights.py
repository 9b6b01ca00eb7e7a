import pytest
import torch
from flume_weight.cuda.device_weights import on_device
from flume_weight.model.linear import can_pack
from flume_weight.model.weights import slots
from step_fakes import random_weights, small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "qk_norm": True}], ids=str
)
def test_every_parameter_arrives(changes):
    weights = random_weights(small_config(**changes))
    moved = on_device(weights, CPU)
    theirs = slots(moved)
    assert theirs.keys() == slots(weights).keys()
    assert all(torch.equal(theirs[name], place) for name, place in slots(weights).items())


def test_a_tied_head_stays_tied():
    moved = on_device(random_weights(small_config(tie_word_embeddings=True)), torch.device("meta"))
    assert moved.head.weight is moved.embedding
    assert moved.layers[0].kv.weight.device.type == "meta"


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="nothing is packed here")
def test_weights_packed_for_a_cpu_are_refused():
    weights = random_weights(small_config())
    weights.pack()
    with pytest.raises(ValueError, match="without packing"):
        on_device(weights, CPU)
