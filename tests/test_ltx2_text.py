"""LTX-2's text: connectors and Gemma 3 against the release's own output, and their loading."""

import pytest
import torch
from golden import Golden, error

from dailies.model import checkpoint
from dailies.model.ltx2.config import connectors_config
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.keys import connectors_table


def connectors_of(path, fields, hidden, *, audio=True, precision="fp32"):
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored_tensors(path).items()}
    config = connectors_config(fields, shapes, hidden, "golden")
    return checkpoint.build(lambda: TextConnectors(config, audio=audio), path, connectors_table(audio=audio),
                            name="golden", device="cpu", precision=precision)


@pytest.mark.parametrize("name", ["ltx2_connectors_a_v1", "ltx2_connectors_b_v2"])
def test_contexts_equal_the_release_without_what_is_padding(name):
    golden = Golden(name)
    connectors = connectors_of(golden.folder / "weights.safetensors", golden.config["transformer"],
                               golden.config["gemma_hidden"])
    stack = torch.stack([golden.inputs[f"hidden_states.{i}"] for i in range(golden.config["gemma_layers"])], dim=-1)
    for sample, mask in enumerate(golden.inputs["attention_mask"].bool()):
        features = connectors.features(stack[sample, mask])
        contexts = connectors(stack[sample, mask], len(mask))
        for stream, feature, context in zip(("video", "audio"), features, contexts, strict=True):
            assert error(feature, golden.outputs[f"{stream}_features"][sample, mask]) < golden.tolerance["value"]
            assert error(context, golden.outputs[f"{stream}_encoding"][sample]) < golden.tolerance["value"]
