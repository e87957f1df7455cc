"""Both graphs compute what the model computes, at any size, on the model's own parameters, which stay as they were."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graphs import captured
from tests.models_zoo import VOCAB, prompt, tiny
from zsmerge_compile.capture import INPUTS, capture
from zsmerge_compile.errors import UnsupportedGraphError
from zsmerge_compile.models.registry import spec_for
from zsmerge_compile.models.spec import ModelSpec

SIZES = [(1, 1, ()), (1, 2, ()), (2, 11, (0, 3)), (3, 40, (5, 0, 39)), (1, 700, ())]  # batch, length, pads by row


def _want(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("name", ["llama-gqa", "llama-llama3", "mistral-w8", "falcon-new", "falcon-rw"])
def test_graphs_give_the_models_logits(name: str) -> None:
    model, _, graphs = captured(name)
    for batch, length, pads in SIZES:
        inputs = prompt(batch, length, pads=pads)
        torch.testing.assert_close(graphs.prefill(*inputs.values()), _want(model, inputs), atol=1e-5, rtol=1e-4)
    inputs = prompt(3, 1)
    inputs["position_ids"] += 37
    torch.testing.assert_close(graphs.decode(**inputs), _want(model, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, attn, dtype, tied",
    [
        ("llama-gqa", "eager", torch.bfloat16, True),
        ("falcon-7b", "sdpa", torch.float16, False),
    ],
)
def test_dtypes_spellings_and_tied_embeddings(name: str, attn: str, dtype: torch.dtype, tied: bool) -> None:
    model = tiny(name, dtype, attn, num_hidden_layers=1, tie_word_embeddings=tied)
    graphs = capture(model, spec_for(model), batch_size=1)
    inputs = prompt(2, 11, pads=(0, 3))
    got, want = graphs.prefill(**inputs), _want(model, inputs)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    _shares_storage(model, graphs.prefill)
    _shares_storage(model, graphs.decode)


def _shares_storage(model: nn.Module, graph: nn.Module) -> None:
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    constants = {name for name, _ in graph.named_buffers() if "lifted_tensor" in name}
    mine = dict([*graph.named_parameters(), *graph.named_buffers()])
    strangers = {name for name, tensor in mine.items() if tensor.data_ptr() not in own} - constants
    assert not strangers
    assert {tensor.data_ptr() for tensor in model.parameters()} <= {tensor.data_ptr() for tensor in mine.values()}


def test_graphs_are_plain() -> None:
    _, _, graphs = captured("falcon-new", layers=1)
    for gm in (graphs.prefill, graphs.decode):
        assert [node.target for node in gm.graph.find_nodes(op="placeholder")] == list(INPUTS)
        assert isinstance(gm.graph.output_node().args[0], torch.fx.Node)
        assert not gm._forward_pre_hooks and not list(gm.graph.find_nodes(op="call_module"))
        assert "assert" not in gm.code and "_guards" not in gm.code
        assert not any(node.target._schema.is_mutable for node in gm.graph.nodes if hasattr(node.target, "_schema"))
    logits = graphs.prefill(**prompt(2, 5))
    assert logits.shape == (2, VOCAB)
    assert graphs.prefill(**prompt(2, 5)).data_ptr() != logits.data_ptr()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("falcon-rw", attn="eager", num_hidden_layers=1)
    inputs = prompt(2, 9)
    before, config, hooks = _want(model, inputs), copy.deepcopy(model.config.to_dict()), _state(model)
    capture(model, spec_for(model), batch_size=1)
    assert torch.equal(_want(model, inputs), before)
    assert model.config.to_dict() == config
    assert _state(model) == hooks


def _state(model: nn.Module) -> dict[str, Any]:
    """Names of every module's attributes and hooks, and the parameters' addresses."""
    modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()}
    pointers = {name: (tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    return {"modules": modules, "hooks": hooks, "pointers": pointers, "attn": model.config._attn_implementation}


class _Own(nn.Module):
    """A model of one embedding, with a forward to choose."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, VOCAB)
        self.last = nn.Buffer(torch.zeros(()))
        self.choose = forward

    def forward(self, ids: Tensor) -> Tensor:
        return self.choose(self, self.embedding(ids))


def _capture(forward: Any) -> Any:
    spec = ModelSpec("own", 0, VOCAB, None, (), lambda model, ids, seen, at: model(ids)[:, -1])
    return capture(_Own(forward).eval(), spec, 2)


def test_a_forward_for_some_lengths_only_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="_Own.forward must be traceable .* every batch size and length"):
        _capture(lambda own, x: x * 2 if x.shape[1] > 20 else x)


def test_a_forward_that_remembers_is_refused() -> None:
    def remember(own: _Own, x: Tensor) -> Tensor:
        own.last.copy_(x.mean())
        return x

    with pytest.raises(UnsupportedGraphError, match="free of writes to the model's buffers"):
        _capture(remember)


def test_writes_within_a_forward_become_values() -> None:
    """Into a view of another tensor: nothing in the graph leads from the write to what is read afterwards."""

    def overwrite(own: _Own, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, :5].zero_()
        y.mul_(2)
        return y.tanh().add_(1)

    graphs = _capture(overwrite)
    ids = prompt(2, 7)
    want = graphs.prefill.get_parameter("model.embedding.weight")[ids["input_ids"][:, -1]].clone()
    want[:, :5] = 0
    assert not any(str(node.target).endswith("_.default") for node in graphs.prefill.graph.nodes)
    torch.testing.assert_close(graphs.prefill(**ids), (2 * want).tanh() + 1)
